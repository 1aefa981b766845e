"""The guide "Automatic embeddings": pgmq and pg_cron in the server, and its Edge Function on Node."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from bench import CACHE
from bench.server import api, free_port
from bench.systems import Processes, running_processes
from harness import HOST, Connection, Server

SOURCES = Path(__file__).resolve().parent.parent / "guide"
INSTALLED = CACHE / "guide"

TRIGGERS = """
CREATE TRIGGER embed_documents_on_insert
    AFTER INSERT ON documents
    FOR EACH ROW EXECUTE FUNCTION util.queue_embeddings('embedding_input', 'embedding');
CREATE TRIGGER embed_documents_on_update
    AFTER UPDATE OF title, content ON documents
    FOR EACH ROW EXECUTE FUNCTION util.queue_embeddings('embedding_input', 'embedding');
"""


@dataclass(frozen=True)
class Guide:
    settings: str
    schedule: str = "10 seconds"
    arguments: str = ""
    name: str = "guide"
    sees_rows_by_itself: bool = True

    def install(self) -> str:
        if not shutil.which("npm"):
            if os.geteuid() or not shutil.which("apt-get"):
                raise SystemExit("The guide runs on Node: install nodejs and npm, then run this again.")
            subprocess.run(["apt-get", "update", "-qq"], check=True)
            subprocess.run(["apt-get", "install", "-qq", "-y", "--no-install-recommends", "nodejs", "npm"], check=True)
        shutil.copytree(SOURCES, INSTALLED, dirs_exist_ok=True)
        subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=INSTALLED, check=True)
        node = subprocess.run(["node", "--version"], check=True, capture_output=True, text=True).stdout.strip()
        packages = json.loads((SOURCES / "package.json").read_text())["dependencies"]
        return ", ".join(
            [f"Node {node.removeprefix('v')}", *(f"{name} {version}" for name, version in packages.items())]
        )

    def attach(self, server: Server, db: Connection) -> None:
        db.execute((SOURCES / "guide.sql").read_text())
        db.execute(TRIGGERS)

    def older_rows(self, db: Connection) -> AbstractContextManager[None]:
        return nullcontext()

    @contextmanager
    def running(self, server: Server, db: Connection) -> Iterator[Processes]:
        port = free_port()
        environment = {
            "DATABASE_URL": server.url,
            "OPENAI_API_KEY": "sk-bench",
            "OPENAI_BASE_URL": api(server).base_url,
            "PORT": str(port),
        }
        db.execute("INSERT INTO util.setting VALUES (%s)", [f"http://{HOST}:{port}"])
        db.execute(
            "SELECT cron.schedule('process-embeddings', %s, %s)",
            [self.schedule, f"SELECT util.process_embeddings({self.arguments})"],
        )
        commands = [["node", str(INSTALLED / script)] for script in ("embed.mjs", "pump.mjs")]
        with running_processes(commands, environment, CACHE / "guide.log") as processes:
            yield processes
