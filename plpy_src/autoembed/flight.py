"""Calls that run side by side in threads, while the backend can still be interrupted."""

from __future__ import annotations

import ctypes
import math
import os
import signal
import sys
import time
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from autoembed.errors import Trouble

Tag = TypeVar("Tag")
Result = TypeVar("Result")

# A cancel or a shutdown is noticed after at most this long, in seconds.
SLICE_SECONDS = 0.05
# An outcome that has waited for this long, in seconds, comes before newer ones.
NEWEST_FIRST_SECONDS = 0.3
# Kept, since Python makes the set again at each call.
SIGNALS = frozenset(signal.valid_signals())


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Threads started inside never receive a signal: PostgreSQL's handlers must run in the backend's own thread."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# A thread that does not end keeps a backend from leaving for at most this long, in seconds.
EXIT_SECONDS = 1.0


class Threads(Protocol):
    def end(self, seconds: float, /) -> bool:
        """Ends them. Returns False if one is still there after so many seconds."""


@contextmanager
def ended_before_exit(threads: Threads) -> Iterator[None]:
    """While the context lasts, threads do not outlive PostgreSQL's way out of the process."""
    every = _threads()
    every.add(threads)
    try:
        yield
    finally:
        every.discard(threads)


def _threads() -> set[Threads]:
    """Those of this process, in a module of their own: sys.modules keeps it when this module is loaded again."""
    name = "_autoembed_threads"
    if name not in sys.modules:
        holder: Any = types.ModuleType(name)
        holder.threads = set()
        holder.callback = _end_before_exit(holder.threads)
        sys.modules[name] = holder
    return sys.modules[name].threads  # type: ignore[no-any-return]


def _end_before_exit(every: set[Threads]) -> Any:
    """Has PostgreSQL end all these threads before it leaves the process.

    exit() tears down libraries, OpenSSL first, under threads that still use them. The segmentation fault that follows
    would restart the whole server. PostgreSQL's own exit callbacks run before that.
    """
    on_proc_exit = getattr(ctypes.CDLL(None), "on_proc_exit", None)
    if on_proc_exit is None:
        # This process is no backend.
        return None

    def end_all(code: int, _argument: int) -> None:
        # Each is ended, even if another one is left.
        ended = [threads.end(EXIT_SECONDS) for threads in list(every)]
        if not all(ended):
            os._exit(code)

    callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_size_t)(end_all)
    on_proc_exit(callback, ctypes.c_size_t(0))
    return callback


class Turns:
    """The turns of calls in the backend's own thread, which hold up those in threads, from one flight to the next."""

    def __init__(self) -> None:
        # The time that calls in threads have before the next one.
        self.seconds = 0.0

    def took(self, seconds: float) -> None:
        """Takes note of a call in the backend's own thread. A quick one does not make the next one quick."""
        self.seconds = max(seconds, self.seconds / 2)


class Flight(Generic[Tag, Result]):
    """Up to max_calls calls at a time, in threads. Calls for the backend's own thread are made in landed(), one by one.

    between_waits: is called between two waits for outcomes; a cancel comes out of it.
    abort: is called to end the calls that still run when the context is left.
    preferred: those of several tags whose outcomes come first, each second time.
    turns: those of flights before.
    """

    def __init__(
        self,
        max_calls: int,
        between_waits: Callable[[], None],
        abort: Callable[[], None],
        preferred: Callable[[Sequence[Tag]], Sequence[Tag]] = lambda tags: tags,
        turns: Turns | None = None,
    ) -> None:
        self._executor = ThreadPoolExecutor(max_calls, thread_name_prefix="autoembed")
        self._between_waits = between_waits
        self._abort = abort
        self._preferred = preferred
        self._is_turn_of_preferred = False
        self._tags: dict[Future[Result], Tag] = {}
        self._here: deque[tuple[Tag, Callable[[], Result]]] = deque()
        self._turns = turns or Turns()
        # When it became the turn of calls in threads; None: none was in flight since the last call here.
        self._turn_began_at: float | None = None

    def __enter__(self) -> Flight[Tag, Result]:
        _threads().add(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        _threads().discard(self)

    def end(self, seconds: float = math.inf) -> bool:
        """Ends all calls and their threads. Returns False if one is still there after so many seconds."""
        until = time.monotonic() + seconds
        self._executor.shutdown(wait=False, cancel_futures=True)
        # A wait() on all calls would not end: it does not count a call that was cancelled before it began.
        while running := [future for future in self._tags if not future.done()]:
            if time.monotonic() > until:
                return False
            self._abort()
            wait(running, timeout=SLICE_SECONDS)
        self._executor.shutdown(wait=True)
        return True

    def __len__(self) -> int:
        """The number of calls that are made or wait to be made."""
        return len(self._tags) + len(self._here)

    def outcomes(self) -> int:
        """The number of calls in threads whose outcomes have not landed yet."""
        return sum(future.done() for future in self._tags)

    def submit(self, tag: Tag, call: Callable[[], Result], *, here: bool = False) -> None:
        """Has a call made. landed() returns its tag with the outcome. here: in the backend's own thread."""
        if here:
            self._here.append((tag, call))
            return
        with signals_blocked():
            self._tags[self._executor.submit(call)] = tag

    def withdraw(self, unwanted: Callable[[Tag], bool]) -> list[Tag]:
        """Takes back calls that have not begun. Returns their tags."""
        taken = [future for future, tag in self._tags.items() if unwanted(tag) and future.cancel()]
        taken_here = [(tag, call) for tag, call in self._here if unwanted(tag)]
        for mine in taken_here:
            self._here.remove(mine)
        return [*(self._tags.pop(future) for future in taken), *(tag for tag, _ in taken_here)]

    def landed(self) -> Iterator[tuple[Tag, Result | BaseException]]:
        """The outcome of each call as it comes, including calls that are submitted meanwhile.

        Where several outcomes are there, each second time a preferred one comes first. Among equals it is that of the
        newest call, unless another has waited for a while.
        between_waits() runs before each. A call here holds up all others: those that are in flight have as much time as
        the last one took, before the next one.
        """
        seen_at: dict[Future[Result], float] = {}
        while self._tags or self._here:
            pause = 0 if self._is_time_for_here() else SLICE_SECONDS
            done = wait(self._tags, timeout=pause, return_when=FIRST_COMPLETED).done
            self._between_waits()
            now = time.monotonic()
            for future in done:
                seen_at.setdefault(future, now)
            # One at a time: the others may wait while something newer is sent.
            if landed := [future for future in reversed(self._tags) if future in seen_at]:
                landed = self._in_turn(landed)
                oldest = min(landed, key=lambda future: seen_at[future])
                future = oldest if now - seen_at[oldest] > NEWEST_FIRST_SECONDS else landed[0]
                del seen_at[future]
                tag = self._tags.pop(future)
                error = future.exception()
                yield tag, future.result() if error is None else error
            if self._is_time_for_here():
                yield self._make_here()

    def _in_turn(self, landed: list[Future[Result]]) -> list[Future[Result]]:
        """Those of these calls that may come next. The others have each second turn, so that none waits for ever."""
        self._is_turn_of_preferred = not self._is_turn_of_preferred
        if len(landed) == 1 or not self._is_turn_of_preferred:
            return landed
        preferred = self._preferred([self._tags[future] for future in landed])
        return [future for future in landed if self._tags[future] in preferred] or landed

    def _is_time_for_here(self) -> bool:
        if not self._here or not self._tags:
            return bool(self._here)
        if self._turn_began_at is None:
            self._turn_began_at = time.monotonic()
        return time.monotonic() >= self._turn_began_at + self._turns.seconds

    def _make_here(self) -> tuple[Tag, Result | BaseException]:
        """Makes the next call in the backend's own thread. An error that is no Trouble, such as a cancel, is raised."""
        tag, call = self._here.popleft()
        began_at = time.monotonic()
        try:
            return tag, call()
        except Trouble as trouble:
            return tag, trouble
        finally:
            self._turns.took(time.monotonic() - began_at)
            self._turn_began_at = None
