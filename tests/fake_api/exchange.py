"""One request to a provider's endpoint, and its answer."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fake_api.behaviour import Fault
from fake_api.faults import FAULTS
from fake_api.protocol import Ask, Item, Protocol, Refusal, Reply, key_in
from fake_api.tenants import POLL_SECONDS, Tenant
from fake_api.vectors import relevance_of, tokens_in

if TYPE_CHECKING:
    from fake_api.server import Handler


class ClientGone(Exception):
    """The client hung up while its request waited."""


class Exchange:
    """One request to a provider's endpoint."""

    def __init__(
        self, handler: Handler, protocol: Protocol, tenant: Tenant, body: bytes, address: Mapping[str, str]
    ) -> None:
        self.handler, self.protocol, self.tenant, self.address = handler, protocol, tenant, address
        self.changed, self.counted = handler.state.changed, handler.state.counted
        try:
            self.body = json.loads(body)
        except ValueError:
            self.body = None
        self.texts = protocol.texts(self.body)
        self.ask: Ask | None = None
        self.entry = self._enter()

    def _enter(self) -> dict[str, Any]:
        key = key_in(self.handler.headers, self.protocol.key_header)
        fields = self.protocol.settings(self.body)
        entry = {
            "method": self.handler.command,
            "path": self.handler.path,
            "headers": sorted(self.handler.headers.keys()),
            "key_sha256": key and hashlib.sha256(key.encode()).hexdigest(),
            "inputs": len(self.texts),
            "model": fields.get("model"),
            "dimensions": fields.get("dimensions"),
            "encoding_format": fields.get("encoding_format"),
            "settings": fields,  # all of the body but the texts
            "extra_fields": {name: fields[name] for name in fields.keys() - self.protocol.fields},
            "texts": None,
            "fault": None,
            "status": None,
            "started_at": time.monotonic(),
            "finished_at": None,
        }
        with self.changed:
            tenant = self.tenant
            if tenant.behaviour.keep_texts:
                entry["texts"] = self.texts
            tenant.log.append(entry)
            tenant.inputs += len(self.texts)
            tenant.distinct.update(map(hash, self.texts))
            tenant.in_flight += 1
            tenant.max_in_flight = max(tenant.max_in_flight, tenant.in_flight)
            if tenant not in self.handler.tenants_seen:
                self.handler.tenants_seen.append(tenant)
                tenant.connections += 1
            self.counted.notify_all()
        return entry

    def finish(self, status: int | None) -> None:
        """Enter the outcome, once; before the last byte goes out: who has the answer finds it logged."""
        with self.changed:
            if self.entry["finished_at"] is None:
                self.entry.update(status=status, finished_at=time.monotonic())
                self.tenant.statuses[str(status or "none")] += 1
                self.tenant.in_flight -= 1
                self.tenant.tokens += self.ask.tokens if self.ask and status == 200 else 0
                self.counted.notify_all()

    def run(self) -> Reply | None:
        """The answer, when it is due; None for none at all."""
        fault = self._wait_while_held()
        behaviour = self.behaviour
        due = time.monotonic() + behaviour.delay_seconds + behaviour.delay_seconds_per_input * len(self.texts)
        try:
            if fault:
                self.wait(due - time.monotonic())
                reply = FAULTS[fault.kind](self, fault)
            else:
                # Within its time: a client waits no longer because this machine is slow.
                reply = self.reply(self.items())
        except Refusal as refusal:
            reply = Reply(refusal.status, self.protocol.error(refusal), refusal.headers)
        self.wait(due - time.monotonic())
        if reply:
            reply.headers = {**self._limit_headers(reply.status), **reply.headers}
        return reply

    def _wait_while_held(self) -> Fault | None:
        with self.changed:
            if self.tenant.behaviour.holds(self.texts):
                self.tenant.held += 1
                self.counted.notify_all()
                try:
                    self.wait(math.inf, lambda: not self.tenant.behaviour.holds(self.texts))
                finally:
                    self.tenant.held -= 1
            self.behaviour = self.tenant.behaviour
            fault = self.tenant.next_fault(self.texts)
            self.entry["fault"] = fault.kind if fault else None
            return fault

    def wait(self, seconds: float, done: Callable[[], bool] = lambda: False) -> None:
        """Wait until done, until the time is over, or until the tenant is reset; raise if the client goes."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while not done() and not self.tenant.gone and (left := deadline - time.monotonic()) > 0:
                self.changed.wait(min(left, POLL_SECONDS))
                if self.handler.client_has_gone():
                    raise ClientGone

    def items(self) -> list[Item]:
        """The right embeddings, if the request is in order and within its limits."""
        self._authorize()
        self._limit()
        self.ask = ask = self.protocol.check(self.body, self.behaviour, self.address)
        if ask.query is not None:
            return [Item(index, relevance_of(ask.query, text)) for index, text in enumerate(ask.texts)]
        vectors = (self.protocol.embed(text, ask.dimensions, ask.model) for text in ask.texts)
        return [Item(index, vector) for index, vector in enumerate(vectors)]

    def reply(self, items: list[Item]) -> Reply:
        assert self.ask
        return Reply(200, self.protocol.answer(self.ask, items))

    def _authorize(self) -> None:
        key = key_in(self.handler.headers, self.protocol.key_header)
        if key is None or self.behaviour.api_key not in (None, key):
            refusal = self.protocol.bad_key(key)
            if refusal:
                raise refusal

    def _limit(self) -> None:
        costs = {"requests": self.protocol.requests_in(self.texts), "tokens": sum(map(tokens_in, self.texts))}
        with self.changed:
            refusing = self.tenant.limiter.admit(costs)
        if refusing:
            raise self.protocol.over_limit(refusing, self.protocol.usual_refusal(429))

    def _limit_headers(self, status: int) -> dict[str, str]:
        with self.changed:
            return self.protocol.limit_headers(self.tenant.limiter.look(), status)
