"""The machine and the software behind the figures."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path

from bench import ROOT
from bench.server import POSTGRES_SETTINGS
from harness import Connection


def describe(db: Connection, rivals: list[str]) -> dict[str, str]:
    [(server,)] = db.execute("SHOW server_version")
    extensions = db.execute("SELECT extname, extversion FROM pg_extension WHERE extname <> 'plpgsql' ORDER BY extname")
    installed = ", ".join(f"{name} {version}" for name, version in extensions)
    linux = platform.release().split("-")[0]
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores ({_processor()}), {_memory_gib():.0f} GiB, Linux {linux}",
        "server": f"PostgreSQL {server.split()[0]} ({', '.join(f'{k}={v}' for k, v in POSTGRES_SETTINGS.items())})",
        "extensions": installed,
        "rivals": "; ".join(dict.fromkeys(filter(None, rivals))),
    }


def _commit() -> str:
    described = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(described, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
