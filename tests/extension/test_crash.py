"""The whole server killed in the midst of a drain, and a replica promoted in its place."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import psycopg
import pytest
from testcontainers.core.container import DockerContainer

from harness import (
    FAKE_API_PORT,
    GUIDE_TABLE,
    GUIDE_TRIGGERS,
    IMAGE,
    PASSWORD,
    Connection,
    Server,
    assert_fresh,
    is_settled,
    run_server,
    waiting,
)
from waiting import PAUSE_SECONDS, wait_until

ROWS = 5000
KILLS = 10


def attach(db: Connection, server: Server, delay_seconds: float) -> None:
    """The guide's table, whose model is the fake API."""
    api = server.fake_api("crash")
    api.behave(delay_seconds=delay_seconds)
    db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    # The index is the wall of a drain, and nothing of what is tested here.
    db.execute("DROP INDEX documents_embedding_idx")
    db.execute(GUIDE_TRIGGERS)


def is_filled(db: Connection) -> bool:
    return db.execute("SELECT count(*) FROM documents WHERE embedding IS NULL").fetchone() == (0,)


class Updates(threading.Thread):
    """An application that changes rows until its server dies."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.done = 0
        self._session = server.connect()
        self._ended = threading.Event()
        self.start()

    def run(self) -> None:
        with suppress(psycopg.OperationalError):
            while not self._ended.is_set():
                self._session.execute(
                    "UPDATE documents SET content = content || '.' WHERE id = 1 + (random() * %s)::integer", [ROWS - 1]
                )
                self.done += 1
                # The lanes are to be in the midst of writing too, not always behind.
                self._ended.wait(PAUSE_SECONDS)

    def end(self) -> None:
        self._ended.set()
        self.join()


def test_after_ten_kills_of_the_server_every_row_is_fresh() -> None:
    """If nobody frees the jobs of dead lanes, those in flight at a kill stay hidden.

    If jobs are settled before their vectors are committed, rows without a vector have no job left.
    """
    with ExitStack() as stack:
        server = run_server(stack, "-c", "fsync=on", on_disk=True, AUTOEMBED_LANES="2")
        with server.connect() as db:
            attach(db, server, 0.2)
            db.execute(
                "INSERT INTO documents (title, content) SELECT 't', 'text ' || n FROM generate_series(1, %s) AS n",
                [ROWS],
            )
        container = server.container.get_wrapped_container()
        api = server.fake_api("crash")
        updates = 0
        for kill in range(KILLS):
            application = Updates(server)
            wait_until(lambda: api.counters()["in_flight"] > 0, 30)  # noqa: B023
            if kill % 2:
                # Not in the midst of requests, but while their answers are written.
                wait_until(lambda: api.counters()["in_flight"] == 0, 30)  # noqa: B023
            container.kill()
            application.end()
            updates += application.done
            container.start()
            server = server.restarted()
            api = server.fake_api("crash")
            api.behave(delay_seconds=0.2)

        with server.connect() as db:
            # Jobs that several lanes may have died of are claimed a few at a time.
            wait_until(lambda: is_settled(db), 240)
            # A row that was in flight at six kills is given up, because it may have caused them. It is not lost.
            given_up = db.execute("SELECT reason FROM autoembed.failed").fetchall()
            assert [row for row in given_up if "lanes ended while they worked on it" not in row.reason] == []
            db.execute("SELECT autoembed.retry_failed()")
            wait_until(lambda: is_settled(db) and is_filled(db), 60)
            assert db.execute("TABLE autoembed.failed").fetchall() == []
            assert_fresh(db)
            assert db.execute("SELECT count(*) FROM documents").fetchone() == (ROWS,)
        assert updates > KILLS


@pytest.fixture
def namespace() -> Iterator[DockerContainer]:
    """A network of its own that two servers share on loopback, and that outlives either."""
    container = DockerContainer(IMAGE).with_kwargs(entrypoint=["sleep", "infinity"])
    published: dict[str, Any] = {f"{port}/tcp": ("127.0.0.1", None) for port in (5432, 5433, FAKE_API_PORT)}
    container.ports = published
    with container:
        yield container


def inside(namespace: DockerContainer, *command: str) -> DockerContainer:
    return (
        DockerContainer(IMAGE)
        .with_kwargs(network_mode=f"container:{namespace.get_wrapped_container().id}")
        .with_env("POSTGRES_PASSWORD", PASSWORD)
        .with_env("OPENAI_API_KEY", "sk-test")
        .with_command(list(command))
    )


def test_a_promoted_replica_takes_over_where_the_killed_primary_was(namespace: DockerContainer) -> None:
    """If nobody frees the jobs of dead lanes, those that the primary had in flight stay hidden."""
    follow = (
        "rm -rf $PGDATA/* && gosu postgres pg_basebackup -h 127.0.0.1 -U postgres -D $PGDATA -R -X stream -c fast"
        " && exec docker-entrypoint.sh postgres -c port=5433"
    )
    with ExitStack() as stack:
        primary = stack.enter_context(inside(namespace, "postgres"))
        server = Server.of(namespace)
        with server.connect() as db:
            attach(db, server, 0.2)
            stack.enter_context(inside(namespace, "bash", "-c", follow))
            replica = Server(namespace, int(namespace.get_exposed_port(5433)))
            wait_until(replica._is_up, 60)
            db.execute(
                "INSERT INTO documents (title, content) SELECT 't', 'text ' || n FROM generate_series(1, %s) AS n",
                [ROWS],
            )
            wait_until(lambda: waiting(db) < ROWS, 30)
            wait_until(
                lambda: (
                    db.execute("SELECT count(*) FROM pg_stat_replication WHERE replay_lag < '1s'").fetchone() == (1,)
                )
            )
        primary.get_wrapped_container().kill()

        with replica.connect() as db:
            assert db.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
            lanes = db.execute("SELECT ok, finding, advice FROM autoembed.doctor() WHERE subject = 'lanes'").fetchone()
            assert lanes == (True, "a standby, the lanes of its primary do the work", None)
            wait_until(lambda: db.execute("SELECT count(*) FROM documents").fetchone() == (ROWS,))
            db.execute("SELECT pg_promote()")
            wait_until(lambda: is_settled(db), 60)
            assert_fresh(db)
