"""autoembed: lanes inside the server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.documents import MODEL
from bench.measure import backend_private_bytes
from bench.server import api
from harness import Connection, Server
from waiting import wait_until

ENABLE = r"""
SELECT autoembed.enable('documents', 'embedding', content_template => E'# {title}\n\n{content}', enqueue_existing => %s)
"""
ARE_UP = "SELECT (SELECT count(*) FROM autoembed.lane) = (SELECT count(*) FROM cron.job)"


@dataclass(frozen=True)
class Lanes:
    db: Connection

    def pids(self) -> list[int]:
        return [pid for (pid,) in self.db.execute("SELECT pid FROM autoembed.lane")]

    def cpu_seconds(self) -> float:
        return 0.0

    def private_bytes(self) -> int:
        return max((backend_private_bytes(self.db, pid) for pid in self.pids()), default=0)


@dataclass(frozen=True)
class Autoembed:
    settings: str
    lanes: int
    model: str = MODEL
    name: str = "autoembed"
    sees_rows_by_itself: bool = True

    def install(self) -> str:
        return ""

    def attach(self, server: Server, db: Connection) -> None:
        self.create(server, db)
        self.enable(db, enqueue_existing=False)

    def create(self, server: Server, db: Connection) -> None:
        db.execute("CREATE EXTENSION autoembed CASCADE")
        db.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api(server).base_url])
        db.execute("SELECT autoembed.set_default_model(%s)", [self.model])

    def enable(self, db: Connection, enqueue_existing: bool) -> None:
        db.execute(ENABLE, [enqueue_existing])

    @contextmanager
    def older_rows(self, db: Connection) -> Iterator[None]:
        db.execute("ALTER TABLE documents DISABLE TRIGGER USER")
        yield
        db.execute("ALTER TABLE documents ENABLE TRIGGER USER")
        db.execute("SELECT autoembed.resync('documents')")

    @contextmanager
    def running(self, server: Server, db: Connection) -> Iterator[Lanes]:
        db.execute("SELECT autoembed.schedule(%s)", [self.lanes])
        wait_until(lambda: db.execute(ARE_UP).fetchone() == (True,), 30)
        yield Lanes(db)
