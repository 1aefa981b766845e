"""Asks a lane, at a Unix socket, for the embedding of a search text.

A new session imports this in place of a model and its libraries, and so it imports little itself: no typing, no json.
"""

from __future__ import annotations

import os
import socket
import struct
import time

# The import of typing takes as long as all of these.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Each backend works in the data directory, so the path is short wherever that lies. What is in pg_stat_tmp is in no
# backup. The number is that of the protocol.
ADDRESS = "pg_stat_tmp/autoembed.1.socket"
# A question in bytes, all of it: the work for one is bounded, and a longer one is the session's own.
MAX_QUESTION_BYTES = 4000
MAX_ANSWER_BYTES = 1 << 17
# The answers that are no embedding: that it is being made, and that it is not.
WAIT, REFUSED = b".", b"-"
# A lane that says nothing for so long, in seconds, is given up. On a busy machine it is given more: a model in each of
# the sessions that wait would make it worse.
SILENCE_SECONDS = 0.2
# A session looks for a cancel so often, in seconds.
ASK_SLICE_SECONDS = 0.05
# No session waits longer, in seconds.
LONGEST_WAIT_SECONDS = 10.0


class Question:
    """asker: whose sessions share the time of the lane. folder, max_tokens: the model."""

    def __init__(self, asker: str, folder: str, max_tokens: int, text: str) -> None:
        self.asker = asker
        self.folder = folder
        self.max_tokens = max_tokens
        self.text = text

    @property
    def model(self) -> tuple[str, int]:
        return self.folder, self.max_tokens

    def packed(self) -> bytes:
        return "\0".join([self.asker, self.folder, str(self.max_tokens), self.text]).encode()

    @classmethod
    def unpacked(cls, data: bytes) -> Question:
        """Raises ValueError if it is no question."""
        asker, folder, max_tokens, text = data.decode().split("\0")
        return cls(asker, folder, int(max_tokens), text)


class Answer:
    """literal: the embedding in pgvector's text form. tokens: those of the text."""

    def __init__(self, literal: str, tokens: int) -> None:
        self.literal = literal
        self.tokens = tokens

    def packed(self) -> bytes:
        return f"{self.tokens} {self.literal}".encode()

    @classmethod
    def unpacked(cls, data: bytes) -> Answer:
        """Raises ValueError if it is no answer."""
        tokens, literal = data.decode().split(" ")
        return cls(literal, int(tokens))


def ask(question: Question, between_waits: Callable[[], object], address: str = ADDRESS) -> Answer | None:
    """The answer of the lane that serves; None: there is none. between_waits: is called while the answer is made."""
    try:
        packed = question.packed()
        if len(packed) > MAX_QUESTION_BYTES:
            return None
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(ASK_SLICE_SECONDS)
            connection.connect(address)
            if not is_own_peer(connection):
                return None
            connection.send(packed)
            answer = _answer(connection, between_waits)
            return Answer.unpacked(answer) if answer and answer != REFUSED else None
    except (OSError, ValueError):
        return None


def _answer(connection: socket.socket, between_waits: Callable[[], object]) -> bytes | None:
    heard_at = time.monotonic()
    end = heard_at + LONGEST_WAIT_SECONDS
    while (now := time.monotonic()) < end:
        try:
            answer = connection.recv(MAX_ANSWER_BYTES)
            if answer != WAIT:
                return answer
            heard_at = now
        except TimeoutError:
            if now - heard_at > SILENCE_SECONDS * crowd():
                return None
        between_waits()
    return None


def crowd() -> float:
    """The processes and threads that want each core of the machine; at least 1, and 1 if it is not known."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            running = int(file.read().split()[3].partition("/")[0])
    except (OSError, ValueError, IndexError):
        return 1.0
    return max(1.0, running / (os.cpu_count() or 1))


def is_own_peer(connection: socket.socket) -> bool:
    """Whether the other end runs as the same user of the system."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return bool(user == os.geteuid())
