"""Tenants: what each was ordered and what it has seen."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fake_api.behaviour import Behaviour, Fault, RateLimit
from fake_api.rate_limit import RateLimiter

POLL_SECONDS = 0.02  # how soon a waiting request notices that its client has gone


class Tenant:
    """One tenant's behaviour, log and counters; guarded by the lock of its State."""

    def __init__(self) -> None:
        self.log: list[dict[str, Any]] = []
        self.statuses: Counter[str] = Counter()
        self.distinct: set[int] = set()
        self.inputs = self.tokens = self.in_flight = self.max_in_flight = self.held = self.connections = 0
        self.gone = False
        self.down_until = 0.0
        self.order: dict[str, Any] = {}
        self.behave({}, amend=False)

    def behave(self, order: Mapping[str, Any], amend: bool) -> None:
        whole = {**self.order, **order} if amend else dict(order)
        self.behaviour = Behaviour.from_json(whole)
        self.order = whole
        if not amend or "faults" in order:
            self.faults = [[fault, fault.most] for fault in self.behaviour.faults]
        if not amend or "rate_limit" in order:
            self.limiter = RateLimiter(self.behaviour.rate_limit or RateLimit())

    def next_fault(self, texts: list[str]) -> Fault | None:
        if time.monotonic() < self.down_until:
            return Fault(close=True)
        for left in self.faults:
            fault: Fault = left[0]
            if left[1] > 0 and (not fault.match or any(fault.match in text for text in texts)):
                left[1] -= 1
                return fault
        return None

    def counters(self) -> dict[str, Any]:
        return {
            "requests": len(self.log),
            "inputs": self.inputs,  # received, whatever they were answered
            "distinct_texts": len(self.distinct),
            "tokens": self.tokens,  # reported as usage
            "in_flight": self.in_flight,
            "max_in_flight": self.max_in_flight,
            "held": self.held,
            "connections": self.connections,
            "rate_limited": self.statuses["429"],  # by the limit or by a fault
            "statuses": dict(self.statuses),  # "none" counts requests that got no answer
        }


class State:
    """All tenants behind one lock; `changed` wakes the requests that wait, `counted` the tests that do."""

    def __init__(self) -> None:
        lock = threading.RLock()
        self.changed = threading.Condition(lock)
        self.counted = threading.Condition(lock)
        self.tenants: dict[str, Tenant] = {}

    def tenant(self, name: str) -> Tenant:
        with self.changed:
            return self.tenants.setdefault(name, Tenant())

    def behave(self, name: str, order: object, amend: bool) -> None:
        if not isinstance(order, dict):
            raise TypeError(f"behaviour must be an object, not {json.dumps(order)}")
        with self.changed:
            self.tenant(name).behave(order, amend)
            self.changed.notify_all()

    def look(self, name: str, with_log: bool) -> dict[str, Any]:
        with self.changed:
            tenant = self.tenant(name)
            requests = [dict(entry) for entry in tenant.log] if with_log else None
            return {"behaviour": tenant.order, "counters": tenant.counters(), "requests": requests}

    def wait(self, name: str, seconds: float, least: Mapping[str, int], most: Mapping[str, int]) -> dict[str, Any]:
        """The counters as soon as they are within these bounds, or when the time is over; and whether they are."""
        deadline = time.monotonic() + seconds
        with self.counted:
            while True:
                counters = self.tenant(name).counters()
                if unknown := sorted((least.keys() | most.keys()) - counters.keys()):
                    raise ValueError(f"no such counters: {', '.join(unknown)}")
                reached = all(counters[each] >= least[each] for each in least)
                reached = reached and all(counters[each] <= most[each] for each in most)
                left = deadline - time.monotonic()
                if reached or left <= 0:
                    return {"reached": reached, "counters": counters}
                self.counted.wait(left)

    def reset(self, name: str) -> None:
        """Forget the tenant; requests that still wait are let go and belong to nobody."""
        with self.changed:
            self.tenant(name).gone = True
            del self.tenants[name]
            self.changed.notify_all()
            self.counted.notify_all()
