"""pgai's vectorizer: triggers in the server, and a worker in Python beside it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from bench import CACHE
from bench.documents import DIMENSIONS, MODEL
from bench.server import api
from bench.systems import Processes, running_processes
from harness import Connection, Server

REQUIREMENTS = Path(__file__).resolve().parent.parent / "pgai" / "requirements.txt"
INSTALLED = CACHE / "pgai"

CREATE_VECTORIZER = f"""
SELECT ai.create_vectorizer(
    'documents',
    loading => ai.loading_column('content'),
    embedding => ai.embedding_openai('{MODEL}', {DIMENSIONS}, base_url => %(base_url)s),
    chunking => ai.chunking_none(),
    formatting => ai.formatting_python_template(E'# $title\\n\\n$chunk'),
    destination => ai.destination_column('embedding'),
    indexing => ai.indexing_none(),
    scheduling => ai.scheduling_none(),
    processing => ai.processing_default(batch_size => %(batch_size)s, concurrency => %(concurrency)s)
)
"""


@dataclass(frozen=True)
class Pgai:
    settings: str
    batch_size: int | None = None
    concurrency: int | None = None
    processes: int = 1
    poll_interval: str | None = None  # five minutes, unless told
    name: str = "pgai"

    @property
    def sees_rows_by_itself(self) -> bool:
        return self.poll_interval is not None

    def install(self) -> str:
        requirements = REQUIREMENTS.read_text()
        stamp = INSTALLED / "requirements.txt"
        if not stamp.exists() or stamp.read_text() != requirements:
            subprocess.run([sys.executable, "-m", "venv", "--clear", INSTALLED], check=True)
            # The lock is complete but for what bench/pgai/unused.txt leaves out.
            install: list[str | Path] = ["install", "--quiet", "--no-deps", "--require-hashes", "-r", REQUIREMENTS]
            subprocess.run([INSTALLED / "bin" / "pip", *install], check=True)
            stamp.write_text(requirements)
        [version] = re.findall(r"^pgai==(\S+)", requirements, re.MULTILINE)
        return f"pgai {version}"

    def attach(self, server: Server, db: Connection) -> None:
        subprocess.run([INSTALLED / "bin" / "pgai", "install", "--db-url", server.url], check=True, capture_output=True)
        settings = {"batch_size": self.batch_size, "concurrency": self.concurrency, "base_url": api(server).base_url}
        db.execute(CREATE_VECTORIZER, settings)

    def older_rows(self, db: Connection) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def running(self, server: Server, db: Connection) -> Iterator[Processes]:
        worker: list[str | Path] = [INSTALLED / "bin" / "pgai", "vectorizer", "worker", "--db-url", server.url]
        if self.concurrency:
            worker += ["--concurrency", str(self.concurrency)]
        if self.poll_interval:
            worker += ["--poll-interval", self.poll_interval]
        [cache] = INSTALLED.glob("lib/*/site-packages/pgai/vectorizer/tiktoken_cache")
        environment = {
            "OPENAI_API_KEY": "sk-bench",
            # Otherwise it is downloaded.
            "TIKTOKEN_CACHE_DIR": str(cache),
            "DD_TRACE_ENABLED": "false",
            "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
        }
        with running_processes([worker] * self.processes, environment, CACHE / "pgai.log") as processes:
            yield processes
