"""Readings of a server and a system: CPU time, memory, WAL, rows over time."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import Connection

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PART_SECONDS = 10


@dataclass(frozen=True)
class Usage:
    """The server's use of resources so far."""

    cpu_seconds: float
    wal_bytes: int

    @classmethod
    def of(cls, db: Connection) -> Usage:
        [(wal,)] = db.execute("SELECT pg_current_wal_insert_lsn() - '0/0'")
        return cls(postgres_cpu_seconds(db), int(wal))

    def __sub__(self, before: Usage) -> Usage:
        return Usage(self.cpu_seconds - before.cpu_seconds, self.wal_bytes - before.wal_bytes)


def postgres_cpu_seconds(db: Connection) -> float:
    """The sum over the server's processes, gone ones too: the postmaster, process 1, has their times."""
    stats = db.execute(
        "SELECT pg_read_file(format('/proc/%s/stat', pid), true)"
        " FROM (SELECT 1 AS pid UNION ALL SELECT pid FROM pg_stat_activity) AS process"
    ).fetchall()
    return sum(_cpu_seconds(stat, with_children=stat.startswith("1 ")) for (stat,) in stats if stat)


def lane_cpu_percent(db: Connection, seconds: float) -> float:
    """The CPU time of the lanes of autoembed over so many seconds, those for backfills not counted; 100: one core.

    Parts in which a lane began again, every five minutes, are left out: nobody knows what the old one took.
    """
    used, counted = 0.0, 0.0
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        part = min(left, PART_SECONDS)
        before = _lane_cpu_seconds(db)
        time.sleep(part)
        after = _lane_cpu_seconds(db)
        if before.keys() == after.keys():
            used += sum(after.values()) - sum(before.values())
            counted += part
    return 100 * used / counted


def _lane_cpu_seconds(db: Connection) -> dict[int, float]:
    """By process, from the scheduler's nanoseconds."""
    if db.execute("SELECT to_regclass('autoembed.lane')").fetchone() == (None,):
        return {}
    read = "SELECT pid, pg_read_file(format('/proc/%s/schedstat', pid)) FROM autoembed.lane WHERE NOT backfill"
    return {pid: int(schedstat.split()[0]) / 1e9 for pid, schedstat in db.execute(read)}


def process_cpu_seconds(pid: int) -> float:
    return _cpu_seconds(Path(f"/proc/{pid}/stat").read_text(), with_children=False)


def _cpu_seconds(stat: str, with_children: bool) -> float:
    fields = stat.rpartition(") ")[2].split()  # from the third of proc(5) on
    return sum(map(int, fields[11 : 15 if with_children else 13])) / TICKS_PER_SECOND


def machine_cpu_seconds() -> float:
    """The sum over everything on the machine, so that neighbours of the bench are seen."""
    fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]  # user to steal; proc(5)
    idle_and_iowait = fields[3:5]
    return (sum(map(int, fields)) - sum(map(int, idle_and_iowait))) / TICKS_PER_SECOND


def backend_private_bytes(db: Connection, pid: int) -> int:
    [(smaps,)] = db.execute("SELECT pg_read_file('/proc/' || %s::int || '/smaps', true)", [pid])
    return _private_bytes(smaps or "")


def process_private_bytes(pid: int) -> int:
    return _private_bytes(Path(f"/proc/{pid}/smaps").read_text())


def _private_bytes(smaps: str) -> int:
    """Not of shared mappings: a buffer of the server that one process alone has touched is no memory of its own."""
    total, is_private = 0, False
    for line in smaps.splitlines():
        if mapping := re.match(r"[0-9a-f]+-[0-9a-f]+ ...(.)", line):
            is_private = mapping[1] == "p"
        elif is_private and (private := re.match(r"Private_(?:Clean|Dirty):\s+(\d+) kB", line)):
            total += 1024 * int(private[1])
    return total


def stored_at(db: Connection) -> list[float]:
    """When each vector became visible, in seconds since 1970, in order."""
    rows = db.execute(
        "SELECT extract(epoch FROM pg_xact_commit_timestamp(xmin))::float8 AS at"
        " FROM documents WHERE embedding IS NOT NULL ORDER BY at"
    )
    return [at for (at,) in rows]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that so many percent of the values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
