"""Waiting in tests and in the bench: always for a condition, never for a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# No event tells a test of a row, a process or a line of a log; without a pause the looks would take the core from what
# they wait for.
PAUSE_SECONDS = 0.02


def wait_until(condition: Callable[[], T | None], seconds: float = 20, pause_seconds: float = PAUSE_SECONDS) -> T:
    """The first true value of a condition; fails when it stays false for so long."""
    value = soon(condition, seconds, pause_seconds)
    assert value, f"not true within {seconds} s"
    return value


def soon(condition: Callable[[], T | None], seconds: float, pause_seconds: float = PAUSE_SECONDS) -> T | None:
    """The first true value of a condition, or its last one when it stays false for so long."""
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(pause_seconds)
    return value
