"""A container of the image with the fake API in it, for the tests of the extension and the bench."""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psycopg
from psycopg.rows import namedtuple_row
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from fake_api import FakeApi, embedding_of
from waiting import wait_until

TESTS = Path(__file__).resolve().parent
# Another image, to see a test fail: AUTOEMBED_TEST_IMAGE=… pytest ….
IMAGE = os.environ.get("AUTOEMBED_TEST_IMAGE", "autoembed")
PASSWORD = "postgres"
# Ports are published on loopback only.
HOST = "127.0.0.1"
FAKE_API_PORT = 8000

# Databases come and go with each test: on a disk their many small files take most of its time. The images of each
# major take a mount there.
DATA_IN_MEMORY = "/var/lib/postgresql/data/in_memory"

# The stack removes what it started; the reaper is an image from a registry that may be out of reach.
testcontainers_config.ryuk_disabled = True

Connection = psycopg.Connection[Any]
# SQL in a line of CONTEXT, and behind it the line of the function of autoembed that it is a part of. A call that has
# failed before in the same transaction is named.
SQL_OF_AUTOEMBED = re.compile(
    r'^(?:SQL statement "|PL/pgSQL expression "(?!\(*autoembed\.))(?:(?!^PL/)[\s\S])*?"\n'
    r'PL/(?:pgSQL|Python) function "?autoembed\.',
    re.MULTILINE,
)
# PostgreSQL's functions in which RAISE and plpy.error() end.
RAISED_IN = {"exec_stmt_raise", "PLy_output"}


class Cursor(psycopg.Cursor[Any]):
    """A cursor that fails the test if a refusal of autoembed's shows SQL that its user has not written."""

    def execute(self, *arguments: Any, **options: Any) -> Self:
        try:
            return super().execute(*arguments, **options)
        except psycopg.Error as error:
            if error.diag.source_function in RAISED_IN and SQL_OF_AUTOEMBED.search(error.diag.context or ""):
                error.add_note(error.diag.context or "")
                raise AssertionError("CONTEXT shows SQL of autoembed") from error
            raise


GUIDE_TABLE = """
create table documents (
  id integer primary key generated always as identity,
  title text not null,
  content text not null,
  embedding halfvec({dimensions}),
  created_at timestamp with time zone default now()
);
create index on documents using hnsw (embedding halfvec_cosine_ops);
create or replace function embedding_input(doc documents)
returns text
language plpgsql
immutable
as $$
begin
  return '# ' || doc.title || E'\\n\\n' || doc.content;
end;
$$;
"""

GUIDE_TRIGGERS = """
create trigger embed_documents_on_insert
  after insert
  on documents
  for each row
  execute function autoembed.queue_embeddings('embedding_input', 'embedding');
create trigger embed_documents_on_update
  after update of title, content
  on documents
  for each row
  execute function autoembed.queue_embeddings('embedding_input', 'embedding');
create trigger clear_document_embedding_on_update
  before update of title, content
  on documents
  for each row
  execute function autoembed.clear_column('embedding');
"""


@dataclass(frozen=True)
class Server:
    """A running container of the image."""

    container: DockerContainer
    port: int
    # In the host's network, where nothing is published, the fake API has a port of its own.
    host_api_port: int | None = None

    @classmethod
    def of(cls, container: DockerContainer) -> Server:
        """A container that has been started, once its server answers and the fake API runs in it."""
        # Docker publishes other ports after each start.
        return cls(container, int(container.get_exposed_port(5432))).with_fake_api()

    def with_fake_api(self) -> Server:
        """The same, once its server answers and the fake API runs in it."""
        wait_until(self._is_up, 60)
        put_file(self.container, TESTS / "fake_api", "/tmp")
        host, port = (HOST, self.host_api_port) if self.host_api_port else ("0.0.0.0", FAKE_API_PORT)
        self.container.get_wrapped_container().exec_run(
            ["python3", "/tmp/fake_api", "--host", host, "--port", str(port)], detach=True
        )
        wait_until(self._api_is_up, 20)
        return self

    def restarted(self) -> Server:
        """The same container, with its data on disk, after it was stopped and started."""
        return Server.of(self.container)

    def _is_up(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _api_is_up(self) -> bool:
        try:
            self.fake_api("up").counters()
        except OSError:
            return False
        return True

    @property
    def url(self) -> str:
        return f"postgresql://postgres:{PASSWORD}@{HOST}:{self.port}/postgres"

    def connect(self, dbname: str = "postgres", **options: Any) -> Connection:
        return psycopg.connect(
            host=HOST,
            port=self.port,
            user=options.pop("user", "postgres"),
            password=PASSWORD,
            dbname=dbname,
            autocommit=True,
            row_factory=namedtuple_row,
            cursor_factory=Cursor,
            **options,
        )

    @contextmanager
    def database(self, name: str, template: str = "template1") -> Iterator[None]:
        """A database, dropped at the end with all its sessions."""
        with self.connect() as db:
            # A copy of the files takes less time than one through the log.
            db.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY".encode())
        try:
            yield
        finally:
            self.drop_database(name)

    def drop_database(self, name: str) -> None:
        with self.connect() as db:
            db.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)".encode())

    def fake_api(self, tenant: str) -> FakeApi:
        """A tenant of the fake API that runs in this container; the database reaches it on its own loopback."""
        port = self.host_api_port or self.container.get_exposed_port(FAKE_API_PORT)
        inner_port = self.host_api_port or FAKE_API_PORT
        return FakeApi(f"http://{HOST}:{port}", f"http://127.0.0.1:{inner_port}/{tenant}/v1", tenant)


def put_file(container: DockerContainer, source: Path, folder: str) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(source, arcname=source.name)
    container.get_wrapped_container().put_archive(folder, archive.getvalue())


def run_server(
    stack: ExitStack, *arguments: str, image: str = IMAGE, on_disk: bool = False, **environment: str
) -> Server:
    """Starts a container of the image, with the fake API in it, until the stack unwinds.

    On disk the data outlives a stop of the container.
    """
    container = DockerContainer(image)
    if not on_disk:
        container.with_tmpfs_mount(DATA_IN_MEMORY)
        container.with_env("PGDATA", DATA_IN_MEMORY)
    published: dict[str, Any] = {f"{port}/tcp": (HOST, None) for port in (5432, FAKE_API_PORT)}
    container.ports = published
    for name, value in {"POSTGRES_PASSWORD": PASSWORD, "OPENAI_API_KEY": "sk-test", **environment}.items():
        container.with_env(name, value)
    container.with_command(["postgres", "-c", "fsync=off", *arguments])
    stack.enter_context(container)
    return Server.of(container)


def rows_read(db: Connection, statement: str, *tables: str) -> dict[str, int]:
    """How many rows of tables a statement reads, whatever plans it has."""

    def counts() -> dict[str, int]:
        read = "SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_all_tables"
        return {
            table: row[0]
            for table in tables
            for row in db.execute(f"{read} WHERE relid = %s::regclass".encode(), [table])
        }

    with db.transaction(force_rollback=True):
        before = counts()
        db.execute(statement.encode())
        return {table: count - before[table] for table, count in counts().items()}


def toast_table_of(db: Connection, table: str) -> str:
    """The table with the long values of a table."""
    [(name,)] = db.execute("SELECT reltoastrelid::regclass::text FROM pg_class WHERE oid = %s::regclass", [table])
    return str(name)


@contextmanager
def warnings_of(connection: Connection) -> Iterator[list[str]]:
    """The messages, with their hints, that a session is sent meanwhile."""
    heard: list[str] = []

    def listen(diagnostic: psycopg.errors.Diagnostic) -> None:
        heard.append(f"{diagnostic.message_primary} {diagnostic.message_hint or ''}".strip())

    connection.add_notice_handler(listen)
    yield heard
    connection.remove_notice_handler(listen)


def insert(db: Connection, *contents: str) -> None:
    db.cursor().executemany("INSERT INTO documents (title, content) VALUES ('t', %s)", [(c,) for c in contents])


def stored(db: Connection) -> dict[int, list[float] | None]:
    return dict(db.execute("SELECT id, embedding::vector::real[] FROM documents ORDER BY id").fetchall())


def waiting(db: Connection) -> int:
    row = db.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone()
    assert row is not None
    return int(row[0])


def is_settled(db: Connection) -> bool:
    return waiting(db) == 0


def assert_fresh(db: Connection) -> None:
    """Every row has the vector of what it says, and nothing waits."""
    for row in db.execute("SELECT embedding_input(d) AS content, embedding::vector::real[] AS v FROM documents AS d"):
        assert row.v is not None
        assert np.allclose(row.v, embedding_of(row.content), atol=1e-3)
    assert waiting(db) == 0
