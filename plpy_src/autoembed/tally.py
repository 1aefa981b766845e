"""The figures of searches, in one small file of the server for each pipeline.

They are in no table: a search may run on a standby or in a transaction that only reads, and is to write nothing that
has to be logged, vacuumed or committed. A file is written with pwrite() and not mapped: a full disk is then an error
that can be ignored, and no signal that ends the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import math
import os
import struct
import time

# The import of typing takes as long as all of these.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

# Limits of the buckets, in milliseconds: each is 2 ** 0.25 times the one before.
FIRST_LIMIT = 0.1
STEP = 0.25
BUCKETS = 96
# A session writes what it has counted at most once in this time, in seconds.
WRITE_SECONDS = 1.0
# The counts of a search.
COUNTS = ("calls", "exact", "by_index", "short", "empty", "from_cache", "fell_back")
FORM = struct.Struct(f"<{1 + len(COUNTS) + BUCKETS}q")


class Figures:
    """The figures of one pipeline. since: in microseconds since 1970. numbers: COUNTS, and the buckets."""

    def __init__(self, since: int, numbers: Iterable[int] = (0,) * (len(COUNTS) + BUCKETS)) -> None:
        self.since = since
        self.numbers = list(numbers)

    @property
    def buckets(self) -> list[int]:
        return self.numbers[len(COUNTS) :]

    @property
    def counts(self) -> dict[str, int]:
        return dict(zip(COUNTS, self.numbers, strict=False))

    def add(self, milliseconds: float, facts: Sequence[bool]) -> None:
        """Counts a search. facts: which of COUNTS it adds to, after the first."""
        self.numbers[0] += 1
        for place, is_so in enumerate(facts, 1):
            self.numbers[place] += is_so
        self.numbers[len(COUNTS) + bucket_of(milliseconds)] += 1

    def merge(self, other: Figures) -> None:
        self.numbers = list(map(sum, zip(self.numbers, other.numbers, strict=True)))

    def packed(self) -> bytes:
        return FORM.pack(self.since, *self.numbers)

    @classmethod
    def unpacked(cls, data: bytes) -> Figures:
        since, *numbers = FORM.unpack(data)
        return cls(since, numbers)


def bucket_of(milliseconds: float) -> int:
    if not milliseconds > FIRST_LIMIT:
        return 0
    return math.ceil(min(math.log2(milliseconds / FIRST_LIMIT) / STEP, BUCKETS - 1))


def quantile(buckets: Sequence[int], share: float) -> float | None:
    """The time that this share of the searches has not exceeded, in milliseconds, by the middle of its bucket."""
    wanted = share * sum(buckets)
    if not wanted:
        return None
    number = next(number for number, total in enumerate(itertools.accumulate(buckets)) if total >= wanted)
    return round(float(FIRST_LIMIT * 2.0 ** ((number - 0.5) * STEP)), 3)


class Tally:
    """The files of one database. A session adds its figures once a second, with a search: a write takes some 25 us.

    It waits for nobody: what it cannot write goes with a later search. A pipeline is its number and the OID of its
    table: a new extension begins with the same numbers.
    """

    def __init__(self, folder: str, database: int) -> None:
        self._folder = folder
        self._start, self._end = f"autoembed.{database}.", ".stat"
        self._kept: dict[tuple[int, int], Figures] = {}
        self._write_at = 0.0

    def add(self, pipeline: tuple[int, int], milliseconds: float, facts: Sequence[bool]) -> None:
        if pipeline not in self._kept:
            self._kept[pipeline] = Figures(time.time_ns() // 1000)
        self._kept[pipeline].add(milliseconds, facts)
        if time.monotonic() >= self._write_at:
            self.write()

    def write(self) -> None:
        for pipeline, figures in list(self._kept.items()):
            try:
                file = os.open(self._path(pipeline), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    whole = _read(file) or Figures(figures.since)
                    whole.merge(figures)
                    os.pwrite(file, whole.packed(), 0)
                finally:
                    # This frees the lock, too.
                    os.close(file)
                del self._kept[pipeline]
            except OSError:
                # Another session writes, or the disk is full.
                continue
        self._write_at = time.monotonic() + WRITE_SECONDS

    def all(self) -> dict[tuple[int, int], Figures]:
        """The figures of all pipelines, with those that this session has not written yet."""
        self.write()
        found = {}
        for name in os.listdir(self._folder):
            numbers = name[len(self._start) : -len(self._end)].split(".")
            if name.startswith(self._start) and name.endswith(self._end) and len(numbers) == 2:
                pipeline = (int(numbers[0]), int(numbers[1]))
                try:
                    file = os.open(self._path(pipeline), os.O_RDONLY | os.O_CLOEXEC)
                except FileNotFoundError:
                    continue
                try:
                    if figures := _read(file):
                        found[pipeline] = figures
                finally:
                    os.close(file)
        return found

    def remove(self, pipeline: tuple[int, int]) -> None:
        """Forgets the figures of a pipeline: they begin again with its next search."""
        self._kept.pop(pipeline, None)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(pipeline))

    def _path(self, pipeline: tuple[int, int]) -> str:
        return f"{self._folder}/{self._start}{pipeline[0]}.{pipeline[1]}{self._end}"


def _read(file: int) -> Figures | None:
    """None: the file is new, or has been cut."""
    data = os.pread(file, FORM.size, 0)
    return Figures.unpacked(data) if len(data) == FORM.size else None


_of_databases: dict[int, Tally] = {}


def of_database(database: int) -> Tally:
    """The files of this database, in the server's folder for those of extensions, which no base backup has."""
    return _of_databases.setdefault(database, Tally("pg_stat_tmp", database))
