"""Calls that run side by side in threads, while the backend stays able to be interrupted."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

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


class Flight(Generic[Tag, Result]):
    """Up to max_calls calls at a time. Leaving the context ends those that still run: abort() is called for that."""

    def __init__(self, max_calls: int, breathe: Callable[[], None], abort: Callable[[], None]) -> None:
        self._executor = ThreadPoolExecutor(max_calls, thread_name_prefix="autoembed")
        self._breathe = breathe
        self._abort = abort
        self._tags: dict[Future[Result], Tag] = {}

    def __enter__(self) -> Flight[Tag, Result]:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
        # Not wait() on all: a call cancelled before it began is never done for it.
        while running := [future for future in self._tags if not future.done()]:
            self._abort()
            wait(running, timeout=SLICE_SECONDS)
        self._executor.shutdown(wait=True)

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
