"""Faults: one small function a kind."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from typing import TYPE_CHECKING

import numpy as np

from fake_api.behaviour import Fault
from fake_api.protocol import Item, Refusal, Reply

if TYPE_CHECKING:
    from fake_api.exchange import Exchange


def _status(exchange: Exchange, fault: Fault) -> Reply:
    assert fault.status
    body = exchange.protocol.error(exchange.protocol.usual_refusal(fault.status))
    if fault.body is not None:
        body = (fault.body if isinstance(fault.body, str) else json.dumps(fault.body)).encode()
    headers = dict(fault.headers or {})
    if fault.retry_after is not None:
        headers["Retry-After"] = f"{fault.retry_after:g}"
    if fault.retry_after_date is not None:
        headers["Retry-After"] = formatdate(math.ceil(time.time() + fault.retry_after_date), usegmt=True)
    return Reply(fault.status, body, headers)


def _hang(exchange: Exchange, fault: Fault) -> Reply | None:
    if fault.hang is True:
        exchange.wait(math.inf)
        return None
    exchange.wait(fault.hang or 0)
    return exchange.reply(exchange.items())


def _close(exchange: Exchange, fault: Fault) -> None:
    return None


def _fall(exchange: Exchange, fault: Fault) -> None:
    exchange.tenant.down_until = time.monotonic() + (fault.fall or 0)


def _cut_off(exchange: Exchange, fault: Fault) -> Reply:
    reply = exchange.reply(exchange.items())
    reply.cut_off_at = len(reply.body) // 2 if fault.cut_off is True else fault.cut_off
    return reply


def _slow_body(exchange: Exchange, fault: Fault) -> Reply:
    reply = exchange.reply(exchange.items())
    reply.spread_seconds = fault.slow_body or 0
    return reply


def _blocks(size: int) -> Iterator[bytes]:
    """The start of an answer, and then digits without end."""
    start, block = b'{"embeddings":[[0.', 1 << 16
    yield start[:size]
    for left in range(size - len(start), 0, -block):
        yield b"1" * min(left, block)


def _gzipped(pieces: Iterator[bytes]) -> Iterator[bytes]:
    packer = zlib.compressobj(level=1, wbits=31)
    for piece in pieces:
        if packed := packer.compress(piece):
            yield packed
    yield packer.flush()


def _big_body(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(200, pieces=_blocks(fault.big_body or 0))


def _gzip_body(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(200, headers={"Content-Encoding": "gzip"}, pieces=_gzipped(_blocks(fault.gzip_body or 0)))


def _not_json(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(200, b"<html><body>Bad gateway</body></html>", {"Content-Type": "text/html"})


def _redirect(exchange: Exchange, fault: Fault) -> Reply:
    return Reply(307, headers={"Location": fault.redirect or ""})


def _echo_authorization(exchange: Exchange, fault: Fault) -> Reply:
    name = exchange.protocol.key_header
    given = exchange.handler.headers.get(name)
    return Reply(401, exchange.protocol.error(Refusal(401, f"Not allowed: {name}: {given}")))


def _twisted(twist: Callable[[list[Item], Fault], list[Item]]) -> Callable[[Exchange, Fault], Reply]:
    return lambda exchange, fault: exchange.reply(twist(exchange.items(), fault))


def _wrong_count(items: list[Item], fault: Fault) -> list[Item]:
    difference = -1 if fault.wrong_count is True else fault.wrong_count or 0
    more = [replace(items[-1], index=len(items) + number) for number in range(difference)]
    return items[:difference] if difference < 0 else items + more


def _wrong_dimensions(items: list[Item], fault: Fault) -> list[Item]:
    size = len(items[0].vector) - 1 if fault.wrong_dimensions is True else fault.wrong_dimensions or 0
    return [replace(item, vector=np.resize(item.vector, size)) for item in items]


def _with_number(number: float) -> Callable[[list[Item], Fault], list[Item]]:
    def twist(items: list[Item], fault: Fault) -> list[Item]:
        vector = np.array(items[-1].vector)
        vector[len(vector) // 2] = number
        return [*items[:-1], replace(items[-1], vector=vector)]

    return twist


FAULTS: dict[str, Callable[[Exchange, Fault], Reply | None]] = {
    "status": _status,
    "hang": _hang,
    "close": _close,
    "fall": _fall,
    "cut_off": _cut_off,
    "slow_body": _slow_body,
    "big_body": _big_body,
    "gzip_body": _gzip_body,
    "not_json": _not_json,
    "redirect": _redirect,
    "echo_authorization": _echo_authorization,
    "wrong_count": _twisted(_wrong_count),
    "wrong_dimensions": _twisted(_wrong_dimensions),
    "nan": _twisted(_with_number(math.nan)),
    "infinity": _twisted(_with_number(math.inf)),
    "duplicate_index": _twisted(lambda items, fault: [*items[:-1], replace(items[-1], index=0)]),
    "missing_index": _twisted(lambda items, fault: [*items[:-1], replace(items[-1], index=None)]),
    "shuffled": _twisted(lambda items, fault: items[::-1]),
    "invalid_base64": _twisted(lambda items, fault: [*items[:-1], replace(items[-1], vector="?!")]),
}
