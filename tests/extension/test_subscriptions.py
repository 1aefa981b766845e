"""A table that a subscription of logical replication writes is embedded like any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from harness import Connection, Server, run_server
from waiting import wait_until

TABLE = "CREATE TABLE notes (id int PRIMARY KEY, body text)"


@pytest.fixture(scope="module")
def logical() -> Iterator[Server]:
    with ExitStack() as stack:
        yield run_server(stack, "-c", "wal_level=logical", AUTOEMBED_LANES="0")


@pytest.fixture
def publisher(logical: Server) -> Iterator[Connection]:
    with logical.database("publisher"), logical.connect("publisher") as db:
        db.execute(
            f"{TABLE}; INSERT INTO notes VALUES (1, 'before'); CREATE PUBLICATION notes FOR TABLE notes".encode()
        )
        # A subscription to its own server cannot make the slot by itself.
        db.execute("SELECT pg_create_logical_replication_slot('notes', 'pgoutput')")
        yield db


@pytest.fixture
def subscriber(logical: Server, publisher: Connection) -> Iterator[Connection]:
    with logical.database("subscriber"), logical.connect("subscriber") as db:
        db.execute(f"{TABLE}; CREATE EXTENSION autoembed CASCADE".encode())
        db.execute("SELECT autoembed.create_model('fake', 'fake', 3), autoembed.set_default_model('fake')")
        yield db
        db.execute("DROP SUBSCRIPTION notes")


def subscribe(db: Connection) -> None:
    db.execute(
        "CREATE SUBSCRIPTION notes CONNECTION 'dbname=publisher user=postgres' PUBLICATION notes"
        " WITH (create_slot = false)"
    )


def wait_for_copies(db: Connection) -> None:
    """A copy waits for all transactions of the publisher's server, and holds its table. Here both are one server."""
    wait_until(lambda: db.execute("SELECT FROM pg_subscription_rel WHERE srsubstate <> 'r'").fetchone() is None, 30)


def wait_for(db: Connection, bodies: list[str]) -> None:
    wait_until(lambda: [row.body for row in db.execute("SELECT body FROM notes ORDER BY id")] == bodies, 30)


def embedded(db: Connection) -> list[int]:
    while db.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass
    return [row.id for row in db.execute("SELECT id FROM notes WHERE embedding IS NOT NULL ORDER BY id")]


def triggers(db: Connection) -> tuple[bool, str, str | None]:
    [row] = db.execute(
        "SELECT ok, finding, advice FROM autoembed.doctor() WHERE subject LIKE 'triggers of%'"
    ).fetchall()
    return row.ok, row.finding, row.advice


def test_a_subscribed_table_is_recognized_when_it_is_attached(publisher: Connection, subscriber: Connection) -> None:
    subscribe(subscriber)
    subscriber.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    publisher.execute("INSERT INTO notes SELECT n, 'new ' || n FROM generate_series(2, 4) AS n")
    publisher.execute("UPDATE notes SET body = 'changed' WHERE id = 1")
    wait_for(subscriber, ["changed", "new 2", "new 3", "new 4"])

    assert embedded(subscriber) == [1, 2, 3, 4]
    assert triggers(subscriber) == (True, "in place", None)
    publisher.execute("DELETE FROM notes WHERE id = 1")
    wait_for(subscriber, ["new 2", "new 3", "new 4"])
    embedded(subscriber)
    assert subscriber.execute("SELECT count(*) FROM autoembed.embedded").fetchone() == (3,)


def test_a_subscription_that_comes_later_is_named_and_followed(publisher: Connection, subscriber: Connection) -> None:
    subscriber.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    subscribe(subscriber)
    wait_for(subscriber, ["before"])

    ok, finding, advice = triggers(subscriber)

    assert not ok and "does not fire for rows that a subscription writes" in finding and advice is not None
    subscriber.execute(advice.encode())
    publisher.execute("INSERT INTO notes VALUES (2, 'after')")
    wait_for(subscriber, ["before", "after"])
    assert embedded(subscriber) == [1, 2]
    assert triggers(subscriber) == (True, "in place", None)


def test_no_lane_stops_a_subscription_that_brings_embeddings(publisher: Connection, subscriber: Connection) -> None:
    for db in (publisher, subscriber):
        db.execute("CREATE SCHEMA own; CREATE TABLE own.pages (id int PRIMARY KEY, body text)")
    subscriber.execute("SELECT autoembed.enable('own.pages', content_columns => '{body}')")
    columns = "id int, chunk_number int, chunk_start int, chunk_end int, digest bytea, embedding text"
    publisher.execute(f"CREATE TABLE own.pages_embeddings ({columns}, PRIMARY KEY (id, chunk_number))")
    publisher.execute("ALTER PUBLICATION notes ADD TABLES IN SCHEMA own")
    subscribe(subscriber)
    wait_for_copies(subscriber)
    subscriber.execute("SELECT autoembed.resync('own.pages')")
    publisher.execute("INSERT INTO own.pages VALUES (1, 'one')")
    wait_until(lambda: subscriber.execute("SELECT FROM own.pages").rowcount == 1, 30)

    def embedded_pages() -> int:
        subscriber.execute("SELECT autoembed.process()")
        return subscriber.execute("SELECT FROM own.pages_embeddings").rowcount

    assert embedded_pages() == 0
    assert subscriber.execute("SELECT state, reason FROM autoembed.status").fetchone() == (
        "stopped",
        "a subscription writes the embeddings table own.pages_embeddings, too",
    )
    publisher.execute("INSERT INTO own.pages_embeddings VALUES (1, 1, 0, 3, '', '[1,2,3]')")
    wait_until(lambda: embedded_pages() == 1, 30)
    publisher.execute("ALTER PUBLICATION notes DROP TABLES IN SCHEMA own")
    publisher.execute("ALTER PUBLICATION notes ADD TABLE own.pages")
    subscriber.execute("ALTER SUBSCRIPTION notes REFRESH PUBLICATION")
    wait_for_copies(subscriber)
    subscriber.execute("SELECT autoembed.resync('own.pages')")
    publisher.execute("INSERT INTO own.pages VALUES (2, 'two')")
    wait_until(lambda: embedded_pages() == 2, 30)


def test_a_subscription_truncates_a_partition(publisher: Connection, subscriber: Connection) -> None:
    for db in (publisher, subscriber):
        db.execute("CREATE TABLE parts (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)")
        db.execute("CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (100)")
        db.execute("CREATE TABLE high PARTITION OF parts FOR VALUES FROM (100) TO (200)")
    publisher.execute("ALTER PUBLICATION notes ADD TABLE parts")
    subscribe(subscriber)
    subscriber.execute("SELECT autoembed.enable('parts', content_columns => '{body}')")
    publisher.execute("INSERT INTO parts SELECT n, 'part ' || n FROM generate_series(98, 101) AS n")
    count = "SELECT count(*) AS n FROM parts_embeddings"

    def embedded_parts() -> tuple[int, ...] | None:
        subscriber.execute("SELECT autoembed.process()")
        return subscriber.execute(count).fetchone()

    wait_until(lambda: embedded_parts() == (4,), 30)
    publisher.execute("TRUNCATE high")

    wait_until(lambda: subscriber.execute(count).fetchone() == (2,), 30)
    wait_until(lambda: embedded_parts() and subscriber.execute("SELECT FROM autoembed.embedded").rowcount == 2, 30)
