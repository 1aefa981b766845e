"""A name is a table's own: one who gives it to another table, or to a function, gets nothing by it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psycopg
import pytest

from extension.hostile.tenants import ATTACK, Tenant, assert_nothing_gained, ran_as
from harness import Connection
from lanes import Lane
from waiting import wait_until

# A superuser's table in a schema that mallory owns.
DOC = """
    CREATE SCHEMA app AUTHORIZATION {mallory};
    CREATE TABLE app.doc (id int PRIMARY KEY, body text);
    SELECT autoembed.enable('app.doc', content_columns => '{body}', text_config => 'english' {more});
    INSERT INTO app.doc SELECT n, 'text ' || n FROM generate_series(1, 5) AS n;
    SELECT autoembed.process();
    GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON app.doc TO {bob};
"""
# Both have code of mallory: a write of a table, and a read of a view.
FAKES = """
    CREATE SCHEMA app; GRANT USAGE ON SCHEMA app, {me} TO PUBLIC;
    CREATE DOMAIN app.word AS text CHECK ({me}.attack() IS NOT NULL)
"""
FAKE_TABLES = """
    CREATE TABLE app.doc (id int PRIMARY KEY, body app.word);
    CREATE TABLE app.doc_embeddings (LIKE renamed.doc_embeddings INCLUDING INDEXES);
    GRANT ALL ON app.doc, app.doc_embeddings TO PUBLIC;
    CREATE TRIGGER a BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON app.doc
        FOR EACH STATEMENT EXECUTE FUNCTION {me}.attack_of_trigger();
    CREATE TRIGGER a BEFORE INSERT OR UPDATE OR DELETE OR TRUNCATE ON app.doc_embeddings
        FOR EACH STATEMENT EXECUTE FUNCTION {me}.attack_of_trigger()
"""
FAKE_VIEWS = """
    CREATE VIEW app.doc AS SELECT 1 AS id, {me}.attack() AS body;
    CREATE VIEW app.doc_embeddings AS SELECT 1 AS id, {me}.attack() AS digest;
    GRANT ALL ON app.doc, app.doc_embeddings TO PUBLIC
"""
# What a role does, and the session that does it: that of bob, or a superuser's.
USES = {
    "a delete": ("bob", "DELETE FROM renamed.doc WHERE id = 1"),
    "another key": ("bob", "UPDATE renamed.doc SET id = 10 WHERE id = 1"),
    "a truncate": ("bob", "TRUNCATE renamed.doc"),
    "a change": ("bob", "UPDATE renamed.doc SET body = 'another text' WHERE id = 1"),
    "an insert": ("bob", "INSERT INTO renamed.doc VALUES (6, 'a text')"),
    "a look at the embeddings": ("bob", "SELECT * FROM renamed.doc_embeddings"),
    "a look at the chunks": ("db", "SELECT * FROM renamed.doc_chunks"),
    "a search": ("db", "SELECT * FROM autoembed.search('renamed.doc', 'text 1')"),
    "a scan": ("db", "SELECT autoembed.reembed('renamed.doc')"),
}
MORE = {
    "plain": "",
    "a condition": ", condition => 'body IS NOT NULL'",
}


@pytest.fixture
def owner_of_schema(db: Connection, dbname: str, mallory: Tenant) -> Tenant:
    db.execute(f"GRANT CREATE ON DATABASE {dbname} TO {mallory.name}".encode())
    mallory.run(ATTACK)
    return mallory


def attach(db: Connection, mallory: Tenant, bob: Tenant, more: str = "") -> None:
    script = DOC.replace("{mallory}", mallory.name).replace("{bob}", bob.name).replace("{more}", more)
    db.execute(script.encode())
    mallory.run("GRANT USAGE ON SCHEMA app TO PUBLIC")


def rename(db: Connection, mallory: Tenant, *, followed: bool) -> None:
    if followed:
        mallory.run("ALTER SCHEMA app RENAME TO renamed")
    else:
        db.execute("SET event_triggers = off; ALTER SCHEMA app RENAME TO renamed; RESET event_triggers")


def grant(db: Connection, table: str, tenant: Tenant) -> None:
    """A right to the rows is one to the embeddings, whose columns the fake table has."""
    db.execute(f"GRANT SELECT ON {table} TO {tenant.name}".encode())


def assert_fresh(db: Connection) -> None:
    """Each row has its own embeddings, and nothing else has any."""
    # Lanes look at a table that has a job.
    db.execute("SELECT autoembed.resync('renamed.doc'); SELECT autoembed.process(); SELECT autoembed.process()")
    rows = db.execute("SELECT id, body FROM renamed.doc ORDER BY id").fetchall()
    chunks = db.execute("SELECT id, chunk FROM renamed.doc_chunks ORDER BY id").fetchall()
    assert chunks == rows


@pytest.mark.parametrize("followed", [True, False], ids=["followed", "event triggers off"])
@pytest.mark.parametrize("fakes", [FAKE_TABLES, FAKE_VIEWS], ids=["tables", "views"])
@pytest.mark.parametrize("more", MORE)
def test_the_owner_of_a_schema_gains_nothing_by_its_former_name(
    db: Connection, owner_of_schema: Tenant, bob: Tenant, followed: bool, fakes: str, more: str
) -> None:
    for use, (who, statement) in USES.items():
        attach(db, owner_of_schema, bob, MORE[more])
        rename(db, owner_of_schema, followed=followed)
        grant(db, "renamed.doc", owner_of_schema)
        owner_of_schema.run(FAKES, fakes)
        session = bob.session if who == "bob" else db
        try:
            session.execute(statement.encode())
        except psycopg.Error as error:
            assert not followed, (use, error)

        assert ran_as(db, owner_of_schema) <= {owner_of_schema.name}, use
        assert_nothing_gained(db, owner_of_schema)
        assert_fresh(db)
        assert_nothing_gained(db, owner_of_schema)
        db.execute("DROP SCHEMA app, renamed CASCADE; SELECT autoembed.process()")


def seen(session: Connection, table: str = "renamed.doc_embeddings") -> int:
    """The embeddings that a role sees; most have no right to see any."""
    try:
        return session.execute(f"SELECT * FROM {table}").rowcount
    except psycopg.errors.InsufficientPrivilege:
        return 0


@pytest.mark.parametrize("followed", [True, False], ids=["followed", "event triggers off"])
@pytest.mark.parametrize("key", ["int", "numeric"])
def test_a_table_of_the_former_name_shows_nobody_the_embeddings(
    db: Connection, owner_of_schema: Tenant, bob: Tenant, followed: bool, key: str
) -> None:
    mallory = owner_of_schema
    db.execute(
        DOC.replace("{mallory}", mallory.name)
        .replace("{bob}", bob.name)
        .replace("{more}", "")
        .replace("id int", f"id {key}")
        .encode()
    )
    rename(db, mallory, followed=followed)

    mallory.run(
        "CREATE SCHEMA app; GRANT USAGE ON SCHEMA app, renamed TO PUBLIC",
        f"CREATE TABLE app.doc AS SELECT n::{key} AS id, 'x'::text AS body FROM generate_series(1, 5) AS n",
    )

    assert seen(mallory.session) == 0
    assert seen(bob.session) == (5 if followed else 0)
    assert_fresh(db)
    assert seen(mallory.session) == 0
    assert seen(bob.session) == 5


@pytest.mark.parametrize("view", [True, False], ids=["a view on the chunks", "no view"])
def test_a_table_in_the_place_of_a_dropped_one_shows_nobody_its_embeddings(
    db: Connection, bob: Tenant, mallory: Tenant, view: bool
) -> None:
    db.execute("GRANT CREATE ON SCHEMA public TO PUBLIC")
    bob.run(
        "CREATE TABLE public.people (email text PRIMARY KEY, diagnosis text)",
        "SELECT autoembed.enable('public.people', content_columns => '{diagnosis}')",
        "INSERT INTO public.people VALUES ('ann@x', 'well')",
    )
    db.execute("SELECT autoembed.process()")
    if view:
        mallory.run("CREATE VIEW public.keep AS SELECT * FROM public.people_chunks")
    bob.run("DROP TABLE public.people")
    mallory.run("CREATE TABLE public.people (email text, diagnosis text); INSERT INTO people VALUES ('ann@x', 'x')")

    assert seen(mallory.session, "public.people_embeddings") == 0
    assert seen(bob.session, "public.people_embeddings") == 1
    db.execute("SELECT autoembed.process()")
    assert db.execute("SELECT FROM pg_policy WHERE polname = 'autoembed_readers'").fetchall() == []
    if view:
        # The table stays for the view.
        assert seen(mallory.session, "public.people_embeddings") == 0


@pytest.mark.parametrize("owner", ["eve", "superuser"])
def test_a_model_calls_no_function_of_the_owner_of_a_schema(
    db: Connection, owner_of_schema: Tenant, bob: Tenant, owner: str
) -> None:
    """It may rename a schema only if the function in it is its own."""
    mallory = owner_of_schema
    mallory.run("CREATE SCHEMA models")
    vectors = """CREATE FUNCTION models.vectors(texts text[]) RETURNS vector[] LANGUAGE sql AS
                     $$SELECT array_fill('[1,0,0,0,0,0,0,1]'::vector, ARRAY[cardinality(texts)])$$"""
    (mallory.session if owner == "eve" else db).execute(vectors.encode())
    db.execute("SELECT autoembed.create_model('own', 'function', 8, 'models.vectors')")

    renames = "ALTER SCHEMA models RENAME TO other; ALTER SCHEMA other RENAME TO models"
    if owner == "eve":
        mallory.run(renames)
    else:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"a model of autoembed calls \w+\.vectors"):
            mallory.run(renames)
        db.execute(renames)
    mallory.run("CREATE SCHEMA unrelated; ALTER SCHEMA unrelated RENAME TO related; DROP SCHEMA related")


def test_a_schema_is_not_renamed_while_somebody_uses_its_table(
    db: Connection, owner_of_schema: Tenant, bob: Tenant
) -> None:
    attach(db, owner_of_schema, bob)
    with bob.session.transaction():
        bob.run("SELECT FROM app.doc_embeddings")
        with pytest.raises(psycopg.errors.LockNotAvailable, match="doc_embeddings is in use"):
            owner_of_schema.run("ALTER SCHEMA app RENAME TO renamed")
    owner_of_schema.run("ALTER SCHEMA app RENAME TO renamed")
    assert_fresh(db)


def test_schemas_that_change_places_all_the_time_mislead_no_lane(
    db: Connection, owner_of_schema: Tenant, bob: Tenant, start_lane: Callable[[], Lane]
) -> None:
    attach(db, owner_of_schema, bob)
    grant(db, "app.doc", owner_of_schema)
    owner_of_schema.run("ALTER SCHEMA app RENAME TO renamed", FAKES, FAKE_TABLES, "ALTER SCHEMA app RENAME TO fake_app")
    lane = start_lane()
    ends = time.monotonic() + 8
    swapped = 0
    while time.monotonic() < ends:
        db.execute("UPDATE renamed.doc SET body = 'text ' || random() WHERE id <= 3")
        for schema in ("renamed", "fake_app"):
            try:
                owner_of_schema.run(f"ALTER SCHEMA {schema} RENAME TO app")
            except psycopg.errors.LockNotAvailable:
                continue
            swapped += 1
            with suppress(psycopg.errors.LockNotAvailable):
                owner_of_schema.run(f"ALTER SCHEMA app RENAME TO {schema}")
        if db.execute("SELECT to_regclass('renamed.doc')").fetchone() == (None,):
            # It was in use at the second rename.
            db.execute("ALTER SCHEMA app RENAME TO renamed")
    assert swapped
    assert_nothing_gained(db, owner_of_schema)
    stale = """SELECT FROM renamed.doc AS d
               WHERE NOT EXISTS (SELECT FROM renamed.doc_chunks AS c WHERE c.id = d.id AND c.chunk = d.body)"""
    wait_until(lambda: db.execute(stale).rowcount == 0, 60)
    assert lane.error is None
    assert_nothing_gained(db, owner_of_schema)


# A model that takes as long as a lock is held.
SLOW = """
    CREATE SCHEMA models;
    CREATE FUNCTION models.vectors(texts text[]) RETURNS vector[] LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock_shared(1);
        RETURN array_fill('[1,0,0,0,0,0,0,1]'::vector, ARRAY[cardinality(texts)]);
    END $$;
    SELECT autoembed.create_model('waits', 'function', 8, 'models.vectors'), autoembed.set_default_model('waits');
"""


@contextmanager
def in_thread(run: Callable[[], Any]) -> Iterator[None]:
    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.parametrize("followed", [True, False], ids=["followed", "event triggers off"])
def test_a_request_in_flight_is_not_written_to_a_table_of_the_former_name(
    db: Connection, owner_of_schema: Tenant, bob: Tenant, connect: Callable[..., Connection], followed: bool
) -> None:
    db.execute(SLOW)
    attach(db, owner_of_schema, bob)
    session = connect()
    bob.run("INSERT INTO app.doc VALUES (6, 'a text')")
    db.execute("SELECT pg_advisory_lock(1)")

    with in_thread(lambda: session.execute("SELECT autoembed.process()")):
        try:
            waiting = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            wait_until(lambda: db.execute(waiting).rowcount == 1)
            rename(db, owner_of_schema, followed=followed)
            grant(db, "renamed.doc", owner_of_schema)
            owner_of_schema.run(FAKES, FAKE_TABLES, "ALTER TABLE app.doc ALTER body TYPE text")
            owner_of_schema.run("DELETE FROM ran; INSERT INTO app.doc VALUES (6, 'a text')")
        finally:
            db.execute("SELECT pg_advisory_unlock(1)")

    assert_nothing_gained(db, owner_of_schema)
    assert_fresh(db)
    assert_nothing_gained(db, owner_of_schema)


# Each keeps the names of the view of chunks from it, in a schema where others create tables.
SQUATTERS = {
    "views of the same columns": "CREATE VIEW public.{name} AS SELECT 1 AS id",
    "views of other columns": "CREATE VIEW public.{name} AS SELECT 1 AS other",
    "types": "CREATE DOMAIN public.{name} AS int",
}


@pytest.mark.parametrize("squatter", SQUATTERS)
def test_a_view_of_chunks_takes_no_name_and_no_view_of_another_role(
    db: Connection, mallory: Tenant, bob: Tenant, squatter: str
) -> None:
    db.execute(f"GRANT CREATE ON SCHEMA public TO {mallory.name}, {bob.name}")
    names = ["docs_chunks", *(f"autoembed_{id}_chunks" for id in range(1, 10))]
    for name in names:
        mallory.run(SQUATTERS[squatter].format(name=name))

    bob.run(
        "CREATE TABLE public.docs (id int PRIMARY KEY, body text)",
        "SELECT autoembed.enable('public.docs', content_columns => '{body}')",
        "INSERT INTO public.docs VALUES (1, 'one')",
    )
    db.execute("SELECT autoembed.process()")

    [(view,)] = bob.session.execute(
        "SELECT relname FROM pg_class WHERE relkind = 'v' AND relowner = current_user::regrole"
    ).fetchall()
    assert view not in names
    assert bob.session.execute(f"SELECT chunk FROM public.{view}").fetchall() == [("one",)]
