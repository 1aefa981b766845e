"""Calls that run side by side in threads, while the backend stays able to be interrupted."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

Tag = TypeVar("Tag")
Result = TypeVar("Result")

# How long a cancel or a shutdown may have to wait before it is noticed.
SLICE_SECONDS = 0.05


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Threads started inside never receive a signal: PostgreSQL's handlers must run in its own thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# How long a backend that is told to leave may be kept by a thread that does not end.
EXIT_SECONDS = 1.0


def _flights() -> set[Flight[Any, Any]]:
    """The flights of this process. A set of its own in sys.modules, which outlives a new version of these modules."""
    name = "_autoembed_flights"
    if name not in sys.modules:
        holder: Any = types.ModuleType(name)
        holder.flights = set()
        holder.callback = _end_flights_before_exit(holder.flights)
        sys.modules[name] = holder
    return sys.modules[name].flights  # type: ignore[no-any-return]


def _end_flights_before_exit(flights: set[Flight[Any, Any]]) -> Any:
    """Has PostgreSQL end all flights before it leaves the process.

    exit() tears down libraries, OpenSSL first, under threads that still use them: a segmentation fault then, which
    restarts the whole server. PostgreSQL's own exit callbacks run before that.
    """
    on_proc_exit = getattr(ctypes.CDLL(None), "on_proc_exit", None)
    if on_proc_exit is None:
        # Not inside a backend.
        return None

    def end_all(code: int, _argument: int) -> None:
        for flight in list(flights):
            if not flight.end(EXIT_SECONDS):
                os._exit(code)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t)(end_all)
    on_proc_exit(callback, ctypes.c_size_t(0))
    return callback


class Flight(Generic[Tag, Result]):
    """Up to max_calls calls at a time. Leaving the context ends those that still run: abort() is called for that."""

    def __init__(self, max_calls: int, breathe: Callable[[], None], abort: Callable[[], None]) -> None:
        self._executor = ThreadPoolExecutor(max_calls, thread_name_prefix="autoembed")
        self._breathe = breathe
        self._abort = abort
        self._tags: dict[Future[Result], Tag] = {}

    def __enter__(self) -> Flight[Tag, Result]:
        _flights().add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        _flights().discard(self)

    def end(self, seconds: float = math.inf) -> bool:
        """Ends all calls and their threads; False if one is still there after so many seconds."""
        until = time.monotonic() + seconds
        self._executor.shutdown(wait=False, cancel_futures=True)
        # Not wait() on all: a call cancelled before it began is never done for it.
        while running := [future for future in self._tags if not future.done()]:
            if time.monotonic() > until:
                return False
            self._abort()
            wait(running, timeout=SLICE_SECONDS)
        self._executor.shutdown(wait=True)
        return True

    def __len__(self) -> int:
        """How many calls are made or wait to be."""
        return len(self._tags)

    def submit(self, tag: Tag, call: Callable[[], Result]) -> None:
        """Has a call made; landed() gives its tag back with the outcome."""
        with signals_blocked():
            self._tags[self._executor.submit(call)] = tag

    def withdraw(self, unwanted: Callable[[Tag], bool]) -> list[Tag]:
        """Takes back calls that have not begun; returns their tags."""
        taken = [future for future, tag in self._tags.items() if unwanted(tag) and future.cancel()]
        return [self._tags.pop(future) for future in taken]

    def landed(self) -> Iterator[tuple[Tag, Result | BaseException]]:
        """The outcome of every call, those submitted meanwhile included, as they come; breathe() runs between."""
        while self._tags:
            done = wait(self._tags, timeout=SLICE_SECONDS, return_when=FIRST_COMPLETED).done
            self._breathe()
            for future in done:
                if future not in self._tags:
                    continue
                tag = self._tags.pop(future)
                error = future.exception()
                yield tag, future.result() if error is None else error
