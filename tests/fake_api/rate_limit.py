"""Rate limits: what a tenant's buckets hold, and which of them refuses a request until when."""

from __future__ import annotations

import math
from collections.abc import Mapping
from time import monotonic
from typing import NamedTuple

from fake_api.behaviour import RateLimit


class Allowance(NamedTuple):
    """One of the limits as a request finds it, for the provider to tell in its way."""

    unit: str  # requests or tokens
    per_minute: int
    most: float  # at once
    left: float
    asked: int = 0

    @property
    def wait_seconds(self) -> float:
        """Until there is what was asked for: never, if there is never so much."""
        return math.inf if self.asked > self.most else self._seconds(self.asked - self.left)

    @property
    def reset_seconds(self) -> float:
        return self._seconds(self.most - self.left)

    def _seconds(self, amount: float) -> float:
        return max(0.0, amount * 60 / self.per_minute)


class Bucket:
    """An allowance per minute that refills evenly."""

    def __init__(self, unit: str, per_minute: int, most: float) -> None:
        self.unit, self.per_minute, self.most = unit, per_minute, most
        self.left, self.at = most, monotonic()

    def look(self, asked: int = 0) -> Allowance:
        now = monotonic()
        self.left = min(self.most, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        return Allowance(self.unit, self.per_minute, self.most, self.left, asked)


class RateLimiter:
    """The buckets of a tenant."""

    def __init__(self, limit: RateLimit) -> None:
        self.counts_refused = limit.counts_refused
        self.buckets = [
            Bucket(unit, per_minute, burst or max(1.0, per_minute * limit.burst_seconds / 60))
            for unit, per_minute, burst in (
                ("requests", limit.requests_per_minute, limit.burst_requests),
                ("tokens", limit.tokens_per_minute, limit.burst_tokens),
            )
            if per_minute is not None
        ]

    def look(self) -> list[Allowance]:
        return [bucket.look() for bucket in self.buckets]

    def admit(self, costs: Mapping[str, int]) -> Allowance | None:
        """Take what a request costs, by unit, if there is all of it; else the allowance to wait for the longest."""
        found = [bucket.look(costs[bucket.unit]) for bucket in self.buckets]
        missing = max(found, key=lambda allowance: allowance.wait_seconds, default=None)
        refusing = missing if missing and missing.wait_seconds else None
        for bucket in self.buckets:
            if not refusing or (self.counts_refused and bucket.unit == "requests"):
                bucket.left = max(0.0, bucket.left - costs[bucket.unit])
        return refusing
