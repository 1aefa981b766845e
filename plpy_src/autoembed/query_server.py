"""Embeds search texts for other sessions, in two threads of a lane. These never touch plpy."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from autoembed.flight import ended_before_exit, signals_blocked
from autoembed.query_client import ADDRESS, MAX_QUESTION_BYTES, REFUSED, WAIT, Answer, Question, is_own_peer

# Sessions that have not asked yet, and questions of one asker that wait. Others are refused.
MAX_SILENT = 100
MAX_WAITING_OF_ASKER = 100
# All questions that wait.
MAX_WAITING = 400
# A session that has connected asks within this time, in seconds.
QUESTION_SECONDS = 1.0
# Questions to one model are embedded so many at a time.
MAX_TOGETHER = 8
# The name of both threads.
THREADS = "autoembed search texts"
# Those that wait are told so this often, in seconds.
WAIT_SECONDS = 0.05


class _Waiting(NamedTuple):
    connection: socket.socket
    question: Question


class QueryServer:
    """One lane of a server serves: the one that holds a lock, which ends with its process.

    embed: gives the answers to questions to one model; None: they are refused. It may raise anything.
    stop: makes the embedding that is under way fail. address: of the socket.
    """

    def __init__(
        self,
        embed: Callable[[Sequence[Question]], Sequence[Answer] | None],
        stop: Callable[[], None],
        address: str = ADDRESS,
    ) -> None:
        self._embed = embed
        self._stop = stop
        self._address = address
        self._threads: list[threading.Thread] = []
        self._opened = contextlib.ExitStack()
        self._ends = False
        # The thread that listens uses these. The selector wakes it when a socket has something to read.
        self._selector: selectors.BaseSelector
        self._waker: socket.socket
        self._silent: dict[socket.socket, float] = {}
        self._tell_at = 0.0
        # The lock guards the questions, which both threads use: those that wait, by asker, and the present ones.
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[_Waiting]] = {}
        self._present: list[_Waiting] = []

    def __enter__(self) -> QueryServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def __len__(self) -> int:
        """The number of questions that wait, but for those that are being embedded."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def offer(self) -> None:
        """Begins to serve, unless a lane does, or this system cannot."""
        if self._threads or self._ends:
            return
        with contextlib.suppress(OSError), contextlib.ExitStack() as opened:
            listener = self._listen(opened)
            self._selector = opened.enter_context(selectors.DefaultSelector())
            self._waker, woken = map(opened.enter_context, socket.socketpair())
            self._selector.register(listener, selectors.EVENT_READ, self._accept)
            self._selector.register(woken, selectors.EVENT_READ, lambda _: None)
            opened.enter_context(ended_before_exit(self))
            self._opened = opened.pop_all()
            self._threads = [
                threading.Thread(target=work, name=THREADS, daemon=True) for work in (self._converse, self._compute)
            ]
            try:
                with signals_blocked():
                    for thread in self._threads:
                        thread.start()
            except RuntimeError:
                # The system has no thread left.
                self.end()

    def _listen(self, opened: contextlib.ExitStack) -> socket.socket:
        lock = os.open(f"{self._address}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        opened.callback(os.close, lock)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        listener = opened.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        # A lane that was killed has left it.
        self._unlink()
        listener.bind(self._address)
        opened.callback(self._unlink)
        # Before it listens, nobody can connect.
        os.chmod(self._address, 0o600)
        listener.listen(MAX_WAITING)
        listener.setblocking(False)
        return listener

    def _unlink(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address)

    def end(self, seconds: float = math.inf) -> bool:
        """Ends both threads. Returns False if one is still there after so many seconds."""
        until = time.monotonic() + seconds
        if self._threads:
            with self._changed:
                self._ends = True
                self._changed.notify()
            self._waker.send(WAIT)
        for thread in self._threads:
            while thread.is_alive():
                if time.monotonic() > until:
                    return False
                self._stop()
                thread.join(WAIT_SECONDS)
        self._threads = []
        for connection in (*self._silent, *(one.connection for queue in self._waiting.values() for one in queue)):
            connection.close()
        self._opened.close()
        return True

    # The thread that listens ----------------------------------------------------------------------

    def _converse(self) -> None:
        while not self._ends:
            for key, _ in self._selector.select(WAIT_SECONDS if self._silent or self._is_busy() else None):
                try:
                    key.data(key.fileobj)
                except OSError:
                    # No descriptor is free, or the session is gone.
                    time.sleep(WAIT_SECONDS)
            if time.monotonic() >= self._tell_at:
                self._tell_at = time.monotonic() + WAIT_SECONDS
                self._tell()

    def _is_busy(self) -> bool:
        with self._changed:
            return bool(self._waiting or self._present)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                connection, _ = listener.accept()
                connection.setblocking(False)
                if len(self._silent) >= MAX_SILENT or not is_own_peer(connection):
                    connection.close()
                elif not self._read(connection):
                    self._silent[connection] = time.monotonic() + QUESTION_SECONDS
                    self._selector.register(connection, selectors.EVENT_READ, self._read_late)

    def _read_late(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._silent[connection]
        self._read(connection)

    def _read(self, connection: socket.socket) -> bool:
        """Takes the question of a session. Returns False if it has not asked yet."""
        try:
            # A longer one is cut here, and then too long.
            data = connection.recv(MAX_QUESTION_BYTES + 1)
            question = Question.unpacked(data) if len(data) <= MAX_QUESTION_BYTES else None
        except BlockingIOError:
            return False
        except (OSError, ValueError):
            question = None
        if question is None or not self._enqueue(_Waiting(connection, question)):
            _say(connection, REFUSED)
            connection.close()
        return True

    def _enqueue(self, new: _Waiting) -> bool:
        with self._changed:
            queue = self._waiting.get(new.question.asker, deque())
            if len(queue) >= MAX_WAITING_OF_ASKER or sum(map(len, self._waiting.values())) >= MAX_WAITING:
                return False
            queue.append(new)
            self._waiting[new.question.asker] = queue
            self._changed.notify()
            return True

    def _tell(self) -> None:
        """Tells all who wait that they are not forgotten. Those who are gone, or do not listen, are."""
        for connection in [one for one, until in self._silent.items() if until < time.monotonic()]:
            self._selector.unregister(connection)
            del self._silent[connection]
            connection.close()
        with self._changed:
            for one in self._present:
                _say(one.connection, WAIT)
            for asker, queue in list(self._waiting.items()):
                for one in [one for one in queue if not _say(one.connection, WAIT)]:
                    one.connection.close()
                    queue.remove(one)
                if not queue:
                    del self._waiting[asker]

    # The thread that embeds -----------------------------------------------------------------------

    def _compute(self) -> None:
        while present := self._next():
            try:
                answers = self._embed([one.question for one in present])
            except Exception:
                # The sessions try it by themselves, and tell what is wrong.
                answers = None
            words = [REFUSED] * len(present) if answers is None else [answer.packed() for answer in answers]
            with self._changed:
                self._present = []
                for one, answer in zip(present, words, strict=True):
                    _say(one.connection, answer)
                    one.connection.close()

    def _next(self) -> list[_Waiting]:
        """The next questions to one model, of each asker in turn; none: the server ends."""
        with self._changed:
            while not self._waiting and not self._ends:
                self._changed.wait()
            while self._waiting and not self._ends and len(self._present) < MAX_TOGETHER:
                asker, queue = next(iter(self._waiting.items()))
                if self._present and queue[0].question.model != self._present[0].question.model:
                    break
                self._present.append(queue.popleft())
                del self._waiting[asker]
                if queue:
                    self._waiting[asker] = queue
            return self._present


def _say(connection: socket.socket, words: bytes) -> bool:
    try:
        return connection.send(words) == len(words)
    except OSError:
        return False
