"""A provider that answers what no HTTP server would: each case is a path, and gives the bytes of its answer.

It runs beside the database, in the same container: http://127.0.0.1:8100/<case> is a model's base_url.
"""

from __future__ import annotations

import base64
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

PORT = 8100
DIMENSIONS = 8
# Where the database stops reading what a provider says of an error, in bytes.
CUT = 10_000


class Request(NamedTuple):
    """A request: its secret, as its header has it, how many texts it has, and its headers by lower case names."""

    secret: str
    texts: int
    headers: Mapping[str, str]


Case = Callable[[Request], Iterator[bytes]]


def head(*lines: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", "Connection: close", *lines, "", ""]).encode()


def whole(body: bytes, *lines: str, status: str = "200 OK") -> bytes:
    return head(f"Content-Length: {len(body)}", *lines, status=status) + body


def embedded(count: int, **more: Any) -> bytes:
    vector = [1.0] + [0.0] * (DIMENSIONS - 1)
    return json.dumps({"data": [{"index": n, "embedding": vector} for n in range(count)], **more}).encode()


def bytes_of(make: Callable[[Request], bytes]) -> Case:
    return lambda request: iter([make(request)])


def json_of(make: Callable[[str], Any], status: str = "200 OK") -> Case:
    """An answer of JSON that has the request's secret somewhere."""
    return bytes_of(lambda request: whole(json.dumps(make(request.secret)).encode(), status=status))


def refused(words: Callable[[str], str], status: str = "500 Internal Server Error") -> Case:
    return bytes_of(lambda request: whole(words(request.secret).encode(), status=status))


def item(**fields: Any) -> Any:
    return {"data": [{"index": 0, "embedding": [1.0] * DIMENSIONS, **fields}]}


# Answers that repeat the key where no reader expects words.
ECHOES: dict[str, Case] = {
    "no-http": bytes_of(lambda r: f"{r.secret}\r\n\r\n".encode()),
    "status-line": bytes_of(lambda r: f"HTTP/1.1 {r.secret}\r\n\r\n".encode()),
    "version": bytes_of(lambda r: f"{r.secret} 200 OK\r\n\r\n".encode()),
    "reason-phrase": bytes_of(lambda r: whole(b"", status=f"500 {r.secret}")),
    "header-line": bytes_of(lambda r: head(r.secret, "Content-Length: 0")),
    "content-length": bytes_of(lambda r: head(f"Content-Length: {r.secret}")),
    "content-encoding": bytes_of(lambda r: whole(embedded(r.texts), f"Content-Encoding: {r.secret}")),
    "transfer-encoding": bytes_of(lambda r: head(f"Transfer-Encoding: {r.secret}")),
    "chunk-length": bytes_of(lambda r: head("Transfer-Encoding: chunked") + f"{r.secret}\r\n\r\n".encode()),
    "chunk-end": bytes_of(lambda r: head("Transfer-Encoding: chunked") + f"1\r\n{{{r.secret}".encode()),
    "location": bytes_of(lambda r: whole(b"", f"Location: http://{r.secret.split()[-1]}/", status="307 Moved")),
    "retry-after": bytes_of(lambda r: whole(b"", f"Retry-After: {r.secret}", status="503 Unavailable")),
    "escaped": bytes_of(
        lambda r: whole(
            b'{"error": {"message": "%s"}}' % "".join(f"\\u{ord(c):04x}" for c in r.secret).encode(),
            status="500 Internal Server Error",
        )
    ),
    "cut-in-the-key": refused(lambda secret: "x" + " " * (CUT - 30) + secret + " " * 100),
    "cut-in-many-keys": refused(lambda secret: f"{secret} " * 600),
    "shortened": refused(lambda secret: f"no {secret[:30]}... here, nor ...{secret[-30:]}, nor {secret[15:45]}"),
    "base64": refused(lambda secret: f"no {base64.b64encode(secret.encode()).decode()} here"),
    "object": json_of(lambda secret: {"error": {secret: secret}}, "403 Forbidden"),
    "number-of-an-item": json_of(lambda secret: item(index=secret)),
    "embedding": json_of(lambda secret: item(embedding=secret)),
    "number-of-an-embedding": json_of(lambda secret: item(embedding=[secret] * DIMENSIONS)),
    "data": json_of(lambda secret: {"data": secret}),
    "names": json_of(lambda secret: {secret: [], "data": [{secret: 1}]}),
    "error-with-200": json_of(lambda secret: {"error": {"message": secret}}),
    "usage": bytes_of(lambda r: whole(embedded(r.texts, usage={"total_tokens": r.secret}))),
    "not-json": bytes_of(lambda r: whole(f"<html>{r.secret}</html>".encode())),
}


def packed(times: int, megabytes: int, pack: Callable[[bytes], bytes] = gzip.compress) -> bytes:
    """So many megabytes of one digit, packed so many times."""
    packer = zlib.compressobj(9, wbits=31 if pack is gzip.compress else 15)
    digits = b"1" * (1 << 20)
    body = b"".join([packer.compress(b'{"data": [['), *(packer.compress(digits) for _ in range(megabytes))])
    body += packer.flush()
    for _ in range(times - 1):
        body = pack(body)
    return body


# Answers that are small on the wire and large when they are unpacked. Each is 512 MB.
BOMBS: dict[str, Case] = {
    "gzip-1": bytes_of(lambda r: whole(packed(1, 512), "Content-Encoding: gzip")),
    "gzip-2": bytes_of(lambda r: whole(packed(2, 512), "Content-Encoding: gzip, gzip")),
    "gzip-3": bytes_of(lambda r: whole(packed(3, 512), "Content-Encoding: gzip, gzip, gzip")),
    "gzip-lines": bytes_of(lambda r: whole(packed(2, 512), "Content-Encoding: gzip", "Content-Encoding: gzip")),
    "deflate-2": bytes_of(lambda r: whole(packed(2, 512, zlib.compress), "Content-Encoding: deflate, deflate")),
    "transfer-gzip": bytes_of(lambda r: whole(packed(2, 512), "Transfer-Encoding: gzip")),
}


def with_header(name: str, value: str, status: str = "200 OK") -> Case:
    return bytes_of(lambda r: whole(embedded(r.texts), f"{name}: {value}", status=status))


# Headers that take time to read where a reader is careless; all are below what HTTP clients refuse.
LONG_HEADERS: dict[str, Case] = {
    "reset-requests": with_header("x-ratelimit-reset-requests", "1" * 30_000 + "x"),
    "reset-tokens": with_header("x-ratelimit-reset-tokens", "1." * 15_000 + "x"),
    "reset-durations": with_header("x-ratelimit-reset-requests", "1m1" * 10_000 + "x"),
    "limit": bytes_of(
        lambda r: whole(
            embedded(r.texts),
            f"x-ratelimit-limit-requests: {'9' * 30_000}",
            f"x-ratelimit-remaining-requests: {'9' * 30_000}",
        )
    ),
    "retry-after": with_header("Retry-After", "9" * 30_000, "503 Unavailable"),
    "retry-date": with_header("Retry-After", "Mon, " * 10_000, "503 Unavailable"),
    "retry-comments": with_header("Retry-After", "(" * 30_000, "503 Unavailable"),
    "content-type": with_header("Content-Type", "text/html; " + "a=(" * 10_000),
    "many": bytes_of(lambda r: whole(embedded(r.texts), *(f"x-ratelimit-limit-{n}: {'1' * 600}" for n in range(90)))),
}


def without_end(start: bytes, piece: bytes) -> Case:
    """A start, and then a piece ten times a second, for ever."""

    def answer(request: Request) -> Iterator[bytes]:
        yield start
        while True:
            # The answer of a slow provider is the case itself: faster, it would end by its size and not by its time.
            time.sleep(0.1)
            yield piece

    return answer


# Answers that go on and on, always with something to read.
ENDLESS: dict[str, Case] = {
    "status-line": without_end(b"HTTP/1.1 200 ", b"O"),
    "header": without_end(b"HTTP/1.1 200 OK\r\nX-Header: ", b"x"),
    "headers": without_end(b"HTTP/1.1 200 OK\r\n", b"X-Header: x\r\n"),
    "continue": without_end(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body": without_end(head("Content-Length: 100000"), b" "),
    "body-without-length": without_end(head(), b" "),
    "chunks": without_end(head("Transfer-Encoding: chunked"), b"1\r\n \r\n"),
    "chunk-length": without_end(head("Transfer-Encoding: chunked"), b"0"),
    "trailers": without_end(head("Transfer-Encoding: chunked") + b"1\r\n \r\n0\r\n", b"X-Trailer: x\r\n"),
}

# Counts of tokens that are none, or that no database should add up.
COUNTS: dict[str, Any] = {
    "true": True,
    "false": False,
    "half": 0.5,
    "text": "7",
    "negative": -(10**12),
    "int4": 2**31,
    "int8": 2**63 - 1,
    "int8-and-one": 2**63,
    "uint8": 2**64 - 1,
    "huge": 10**400,
    "list": [1],
    "object": {"tokens": 1},
    "nothing": None,
}


def counting(count: Any) -> Case:
    return bytes_of(lambda r: whole(embedded(r.texts, usage={"total_tokens": count, "prompt_tokens": count})))


def wants_token(request: Request) -> Iterator[bytes]:
    """Vectors for who has the right token in a header of its own."""
    if request.headers.get("x-auth-token") == "sk-test":
        yield whole(embedded(request.texts))
    else:
        yield whole(b'{"error": {"message": "no token"}}', status="401 Unauthorized")


CASES: dict[str, Case] = {
    **{f"echo/{name}": case for name, case in ECHOES.items()},
    **{f"bomb/{name}": case for name, case in BOMBS.items()},
    **{f"header/{name}": case for name, case in LONG_HEADERS.items()},
    **{f"endless/{name}": case for name, case in ENDLESS.items()},
    **{f"count/{name}": counting(count) for name, count in COUNTS.items()},
    "token": wants_token,
}


def serve(connection: socket.socket) -> None:
    with connection, connection.makefile("rb") as stream:
        path = stream.readline().split(b" ")[1].decode()
        headers: dict[str, str] = {}
        while line := stream.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        body = json.loads(stream.read(int(headers.get("content-length", 0))))
        secret = headers.get("authorization", "") or headers.get("x-auth-token", "")
        case = CASES[path.removeprefix("/").removesuffix("/embeddings")]
        try:
            for piece in case(Request(secret, len(body["input"]), headers)):
                connection.sendall(piece)
        except OSError:
            # The client has gone.
            pass


def main() -> None:
    with socket.create_server(("127.0.0.1", PORT)) as listener:
        while True:
            threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()


if __name__ == "__main__":
    main()
