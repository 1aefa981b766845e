"""Lanes in tests: each a session of its own, in a thread, that calls autoembed.work()."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psycopg

from harness import Connection
from waiting import wait_until

LANE_SECONDS = 150


class Lane:
    """A running lane; error is what ended it, if anything did."""

    def __init__(self, connection: Connection, arguments: str = "") -> None:
        self.pid = connection.info.backend_pid
        self.error: psycopg.Error | None = None
        self._connection = connection
        self._call = f"CALL autoembed.work({', '.join([str(LANE_SECONDS), *filter(None, [arguments])])})"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._connection.execute(self._call)
        except psycopg.Error as error:
            self.error = error

    def wait_until_up(self, db: Connection) -> None:
        signed_on = "SELECT count(*) FROM autoembed.lane WHERE pid = %s"
        wait_until(lambda: self.error or db.execute(signed_on, [self.pid]).fetchone() == (1,))

    def has_ended(self, seconds: float) -> bool:
        """Whether it ends within so many seconds."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def join(self, seconds: float = 20) -> None:
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the lane still runs after {seconds} s"


@contextmanager
def running_lanes(
    db: Connection, connect: Callable[..., Connection], lanes: int = 1, arguments: str = ""
) -> Iterator[list[Lane]]:
    """So many lanes, up and running; asked to stop at the end, and joined."""
    started = [Lane(connect(), arguments) for _ in range(lanes)]
    try:
        for lane in started:
            lane.wait_until_up(db)
        yield started
    finally:
        stop_lanes(db)
        for lane in started:
            lane.join()


def stop_lanes(db: Connection) -> None:
    db.execute("UPDATE autoembed.lane SET stop = true")
