"""Calls that run side by side in threads, while the backend stays able to be interrupted."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from autoembed.errors import Trouble

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
    """Up to max_calls calls at a time, in threads. Leaving the context ends those that still run: abort() is called.

    Calls that are for the backend's own thread are made in landed(), one after the other.
    """

    def __init__(self, max_calls: int, breathe: Callable[[], None], abort: Callable[[], None]) -> None:
        self._executor = ThreadPoolExecutor(max_calls, thread_name_prefix="autoembed")
        self._breathe = breathe
        self._abort = abort
        self._tags: dict[Future[Result], Tag] = {}
        self._here: deque[tuple[Tag, Callable[[], Result]]] = deque()

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
        return len(self._tags) + len(self._here)

    def submit(self, tag: Tag, call: Callable[[], Result], *, here: bool = False) -> None:
        """Has a call made; landed() gives its tag back with the outcome. here: in the backend's own thread."""
        if here:
            self._here.append((tag, call))
            return
        with signals_blocked():
            self._tags[self._executor.submit(call)] = tag

    def withdraw(self, unwanted: Callable[[Tag], bool]) -> list[Tag]:
        """Takes back calls that have not begun; returns their tags."""
        taken = [future for future, tag in self._tags.items() if unwanted(tag) and future.cancel()]
        taken_here = [(tag, call) for tag, call in self._here if unwanted(tag)]
        for mine in taken_here:
            self._here.remove(mine)
        return [*(self._tags.pop(future) for future in taken), *(tag for tag, _ in taken_here)]

    def landed(self) -> Iterator[tuple[Tag, Result | BaseException]]:
        """The outcome of every call, those submitted meanwhile included, as they come; breathe() runs before each.

        Of those that are there, that of the newest call comes first.
        """
        while self._tags or self._here:
            if self._here:
                yield self._make_here()
            done = wait(self._tags, timeout=0 if self._here else SLICE_SECONDS, return_when=FIRST_COMPLETED).done
            self._breathe()
            # One, as the others may wait while something newer is sent.
            if future := next((future for future in reversed(self._tags) if future in done), None):
                tag = self._tags.pop(future)
                error = future.exception()
                yield tag, future.result() if error is None else error

    def _make_here(self) -> tuple[Tag, Result | BaseException]:
        """Makes the next call of the backend's own thread. What is no Trouble, a cancel, ends more than this call."""
        tag, call = self._here.popleft()
        try:
            return tag, call()
        except Trouble as trouble:
            return tag, trouble
