"""The systems that are measured: each knows how to install, attach and run itself."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from bench.measure import process_cpu_seconds, process_private_bytes
from harness import Connection, Server


class Workers(Protocol):
    """A running system that embeds."""

    def cpu_seconds(self) -> float:
        """Spent outside the server."""

    def private_bytes(self) -> int:
        """The private memory of the largest of them."""


class System(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> str:
        """defaults or best."""

    @property
    def sees_rows_by_itself(self) -> bool:
        """Whether it finds new rows within seconds; otherwise it is started when the rows are there."""

    def install(self) -> str:
        """Install what is missing; return the versions."""

    def attach(self, server: Server, db: Connection) -> None:
        """Have the table `documents` embedded."""

    def older_rows(self, db: Connection) -> AbstractContextManager[None]:
        """The rows inserted inside were there before the table was attached, as far as the system is concerned."""

    def running(self, server: Server, db: Connection) -> AbstractContextManager[Workers]:
        """The workers, ready for rows, until the end of the context."""


class Processes:
    """Workers that are processes beside the server."""

    def __init__(self, pids: Sequence[int]) -> None:
        self.pids = pids

    def cpu_seconds(self) -> float:
        return sum(map(process_cpu_seconds, self.pids))

    def private_bytes(self) -> int:
        return max(map(process_private_bytes, self.pids))


@contextmanager
def running_processes(
    commands: Sequence[Sequence[str | Path]],
    environment: Mapping[str, str],
    log: Path,
    are_ready: Callable[[], bool] = lambda: True,
) -> Iterator[Processes]:
    """Started with this environment alone: no proxy or key of the user's gets in."""
    with ExitStack() as stack:
        output = stack.enter_context(log.open("ab"))
        started = []
        for command in commands:
            process = subprocess.Popen(
                [str(part) for part in command],
                env={"PATH": os.environ["PATH"], **environment},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
            stack.callback(_stop, process)
            started.append(process)
        yield Processes([process.pid for process in started])


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
