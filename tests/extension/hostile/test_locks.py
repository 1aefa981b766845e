"""No lock that somebody may take keeps a lane, another tenant or an application waiting."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import psycopg
import pytest

from extension.hostile.tenants import (
    ENABLE_COLUMNS,
    ENABLE_FUNCTION,
    NOTES,
    WRITE_TIMEOUT,
    Tenant,
    content_function,
    failures_of,
    make_due,
    stays_fresh,
    trigger,
    waiting_of,
)
from fake_api import FakeApi
from harness import Connection
from lanes import Lane
from waiting import wait_until

StartLane = Callable[[], Lane]
ENABLE_SLOW = ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'slow'")

# A table that is not embedded, and that has a trigger which may be deferred.
DEFERRABLE = """
CREATE {kind} TABLE entry (id int);
CREATE FUNCTION {schema}.noted() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END';
CREATE CONSTRAINT TRIGGER noted AFTER INSERT ON entry DEFERRABLE INITIALLY DEFERRED
    FOR EACH ROW EXECUTE FUNCTION {schema}.noted();
"""


def deferrable(kind: str, schema: str) -> str:
    return DEFERRABLE.replace("{kind}", kind).replace("{schema}", schema)


def alter_a_table(session: Connection) -> None:
    """An application's statements that have nothing to do with embeddings."""
    session.execute(f"SET statement_timeout = '{WRITE_TIMEOUT}'")
    session.execute("CREATE TEMPORARY TABLE mine (id int)")
    session.execute("ALTER TABLE mine ADD word text")
    session.execute("DROP TABLE mine")


# A tenant's statements in a transaction that stays open.
LEFT_OPEN = {
    "the pipelines locked": "LOCK TABLE autoembed.pipeline",
    "the pipelines locked in a weaker mode": "LOCK TABLE autoembed.pipeline IN SHARE MODE",
    "the backfills locked": "LOCK TABLE autoembed.backfill",
    "a pipeline's row locked": "SELECT FROM autoembed.pipeline FOR UPDATE",
    "a pipeline's row locked for sharing": "SELECT FROM autoembed.pipeline FOR SHARE",
    "a backfill's row locked": "SELECT autoembed.resync('notes'); SELECT FROM autoembed.backfill FOR UPDATE",
    "the table locked": "LOCK TABLE notes",
    "the rows locked": "SELECT FROM notes FOR UPDATE",
    "the rows changed": "UPDATE notes SET content = 'changed'",
    "another table locked": "LOCK TABLE entry",
    "another table written": "INSERT INTO entry VALUES (1)",
    "the table altered": "ALTER TABLE notes ADD word text",
    "the embedding column altered": "ALTER TABLE notes ALTER embedding TYPE vector(8)",
    "the table dropped": "DROP TABLE notes",
    "the table emptied": "TRUNCATE notes",
    "the pipeline ended": "SELECT autoembed.disable('notes')",
    "the pipeline changed": "SELECT autoembed.alter_pipeline('notes', model => 'limited')",
    "the pipeline paused": "SELECT autoembed.pause('notes')",
    "a table enabled": "SELECT autoembed.enable('others', 'embedding', content_columns => '{content}')",
    "all rows asked for again": "SELECT autoembed.reembed('notes')",
    "a search": "SELECT autoembed.embed('a question', 'limited')",
}


@pytest.mark.parametrize("what", LEFT_OPEN)
def test_a_tenants_open_transaction_keeps_nobody_waiting(
    db: Connection, mallory: Tenant, bob: Tenant, nobody: Connection, start_lane: StartLane, what: str
) -> None:
    db.execute("SELECT autoembed.create_model('limited', 'fake', 8, requests_per_minute => 6000)")
    mallory.run(
        deferrable("", "{me}"),
        "CREATE TABLE others (id int PRIMARY KEY, content text)",
        NOTES,
        ENABLE_COLUMNS,
        "INSERT INTO notes VALUES (1, 'a note')",
    )
    session = mallory.enter()
    session.execute("BEGIN")
    with suppress(psycopg.errors.InsufficientPrivilege):
        session.execute(LEFT_OPEN[what].encode())

    lane = start_lane()
    for _ in range(2):
        stays_fresh(bob)
    alter_a_table(nobody)

    assert lane.error is None
    session.close()
    wait_until(lambda: waiting_of(db, mallory) == 0)
    assert failures_of(db, mallory) == {}


def test_a_pass_in_a_transaction_that_stays_open_ends_no_lane(
    db: Connection, bob: Tenant, connect: Callable[..., Connection], start_lane: StartLane
) -> None:
    """It removes the entry of a lane that is dead, as lanes do."""
    db.execute("SELECT autoembed.process()")
    dead = Lane(connect())
    dead.wait_until_up(db)
    db.execute("SELECT pg_terminate_backend(%s)", [dead.pid])
    dead.join()
    session = connect()
    session.execute("BEGIN; SELECT autoembed.process()")

    lane = start_lane()
    for _ in range(2):
        stays_fresh(bob)
    session.execute("ROLLBACK")

    assert lane.error is None


# What a pass notes of a model or a pipeline: how the table is attached, whether the provider fails before, and then.
NOTED: dict[str, tuple[str, bool, bool]] = {
    "that a model rests": (ENABLE_SLOW, False, True),
    "that a model rests on": (ENABLE_SLOW, True, True),
    "that a model works again": (ENABLE_SLOW, True, False),
    "that a pipeline rests": (
        content_function("RAISE 'feigned' USING ERRCODE = 'query_canceled';") + "; " + ENABLE_FUNCTION,
        False,
        False,
    ),
}


@pytest.mark.parametrize("what", NOTED)
def test_what_a_pass_in_an_open_transaction_has_noted_ends_no_lane(
    db: Connection,
    mallory: Tenant,
    bob: Tenant,
    api: FakeApi,
    connect: Callable[..., Connection],
    start_lane: StartLane,
    what: str,
) -> None:
    enable, fails_before, fails = NOTED[what]
    fault = {"status": 500, "times": "forever"}
    db.execute("SELECT autoembed.process()")
    mallory.run(NOTES, enable)
    if fails_before:
        api.behave(faults=[fault])
        mallory.run("INSERT INTO notes VALUES (1, 'a note')")
        db.execute("SELECT autoembed.process()")
        db.execute("UPDATE autoembed.model_rest SET until = now()")
        make_due(db)
    mallory.run("INSERT INTO notes VALUES (2, 'a note too')")
    api.behave(faults=[fault] if fails else [])

    with connect() as session:
        session.execute("BEGIN; SELECT autoembed.process()")
        mallory.run("INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(3, 5) AS n")
        lane = start_lane()
        for _ in range(3):
            stays_fresh(bob)
        session.execute("ROLLBACK")

    assert lane.error is None


def test_a_locked_pipeline_whose_rows_fail_ends_no_lane(mallory: Tenant, bob: Tenant, start_lane: StartLane) -> None:
    mallory.run(NOTES, ENABLE_COLUMNS, trigger("RAISE EXCEPTION 'no';"), "INSERT INTO notes VALUES (1, 'a note')")
    session = mallory.enter()
    session.execute("BEGIN; SELECT FROM autoembed.pipeline FOR UPDATE")

    lane = start_lane()
    for _ in range(3):
        stays_fresh(bob)

    assert lane.error is None


@pytest.mark.parametrize("audience", ["nobody", "usage", "monitor"])
def test_no_audience_may_lock_a_table_of_the_extension(
    db: Connection, mallory: Tenant, nobody: Connection, audience: str
) -> None:
    session = mallory.session if audience == "usage" else nobody
    if audience == "monitor":
        db.execute("SELECT autoembed.grant_monitor(%s)", [nobody.info.user])
    relations = db.execute(
        """SELECT format('%I.%I', n.nspname, c.relname) AS name FROM pg_class AS c
           JOIN pg_namespace AS n ON n.oid = c.relnamespace AND n.nspname IN ('autoembed', 'pgmq')
           WHERE c.relkind IN ('r', 'p', 'v')"""
    ).fetchall()
    assert len(relations) > 20

    locked = []
    for relation in relations:
        with suppress(psycopg.errors.InsufficientPrivilege):
            session.execute(f"BEGIN; LOCK TABLE {relation.name} IN SHARE MODE NOWAIT")
            locked.append(relation.name)
        session.execute("ROLLBACK")

    assert locked == []


# Locks that a role without a grant takes, and keeps for as long as its session lasts.
KEPT_BY_NOBODY = {
    "a temporary table with a deferrable trigger": deferrable("TEMPORARY", "pg_temp"),
    "a temporary table with a deferrable exclusion constraint": """
        CREATE TEMPORARY TABLE entry (id int, EXCLUDE USING btree (id WITH =) DEFERRABLE)""",
    "a temporary table with a deferrable foreign key": """
        CREATE TEMPORARY TABLE parent (id int PRIMARY KEY);
        CREATE TEMPORARY TABLE entry (id int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)""",
    "a temporary table locked": deferrable("TEMPORARY", "pg_temp") + "BEGIN; LOCK TABLE entry",
    "a temporary table altered": "BEGIN; CREATE TEMPORARY TABLE entry (id int); ALTER TABLE entry ADD word text",
    "a temporary table dropped": "CREATE TEMPORARY TABLE entry (id int); BEGIN; DROP TABLE entry",
    "the advisory locks of turns": "SELECT pg_advisory_lock(hashtextextended('autoembed ' || m, 0))"
    " FROM unnest('{fast,limited,narrow}'::text[]) AS m",
    "the advisory locks of slots": "SELECT pg_advisory_lock(hashtextextended('autoembed ' || m, s))"
    " FROM unnest('{fast,limited,narrow}'::text[]) AS m, generate_series(1, 9) AS s",
}


# By what is kept, and the model of the tenant who is not to wait for it.
@pytest.mark.parametrize(
    ("what", "model"),
    [
        *((what, "fast") for what in KEPT_BY_NOBODY),
        ("the advisory locks of turns", "limited"),
        ("the advisory locks of slots", "narrow"),
    ],
)
def test_what_a_role_without_rights_keeps_holds_up_no_lane(
    db: Connection, bob: Tenant, nobody: Connection, start_lane: StartLane, what: str, model: str
) -> None:
    db.execute("SELECT autoembed.create_model('limited', 'fake', 8, requests_per_minute => 6000)")
    db.execute("SELECT autoembed.create_model('narrow', 'fake', 8, max_requests_in_flight => 2)")
    bob.session.execute("SELECT autoembed.alter_pipeline('letters', model => %s)", [model])
    nobody.execute(KEPT_BY_NOBODY[what].encode())

    lane = start_lane()
    stays_fresh(bob)

    assert lane.error is None
    assert failures_of(db, bob) == {}


def test_a_lane_holds_no_lock_that_any_role_may_take_before_it(
    db: Connection, mallory: Tenant, api: FakeApi, lane: Lane
) -> None:
    """Advisory locks have no owner."""
    api.behave(hold=True)
    db.execute("SELECT autoembed.alter_model('slow', max_requests_in_flight => 1, requests_per_minute => 6000)")
    mallory.run(
        NOTES,
        ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'slow'"),
        "INSERT INTO notes VALUES (1, 'a note')",
    )
    api.wait_for(held=1)

    assert db.execute("SELECT * FROM pg_locks WHERE locktype = 'advisory' AND pid = %s", [lane.pid]).fetchall() == []


def test_no_more_requests_are_in_flight_than_a_model_may_have(
    db: Connection, mallory: Tenant, api: FakeApi, lane: Lane, connect: Callable[..., Connection]
) -> None:
    """Whatever keeps count of them, a lane that dies gives its place back."""
    api.behave(hold=True)
    db.execute("SELECT autoembed.alter_model('slow', max_requests_in_flight => 1)")
    mallory.run(
        NOTES,
        ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'slow'"),
        "INSERT INTO notes VALUES (1, 'a note')",
    )
    api.wait_for(held=1)
    db.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
    lane.join()
    api.release()

    other = Lane(connect())
    try:
        wait_until(lambda: waiting_of(db, mallory) == 0)
    finally:
        db.execute("SELECT pg_terminate_backend(%s)", [other.pid])
        other.join(60)

    assert api.counters()["max_in_flight"] == 1


def test_what_depends_on_a_dropped_table_and_is_locked_ends_no_lane(
    db: Connection, mallory: Tenant, bob: Tenant, start_lane: StartLane
) -> None:
    tables = ["first", "second", "third"]
    session = mallory.enter()
    for table in tables:
        mallory.run(
            f"CREATE TABLE {table} (id int PRIMARY KEY, content text)",
            f"SELECT autoembed.enable('{table}', content_columns => '{{content}}')",
        )
        [pipeline] = db.execute("SELECT max(id) AS id FROM autoembed.pipeline").fetchall()
        mallory.run(
            f"CREATE TABLE guarded_{table} (id int)",
            f"CREATE POLICY readers ON guarded_{table} USING (autoembed._may_read_{pipeline.id}(id))",
            f"DROP TABLE {table}",
        )
    session.execute("BEGIN; LOCK TABLE " + ", ".join(f"guarded_{table}" for table in tables))

    lane = start_lane()
    for _ in range(3):
        stays_fresh(bob)

    assert lane.error is None
    session.close()
    wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.pipeline").fetchone() == (1,))


def test_pipelines_that_are_stopped_are_not_looked_at_when_another_table_is_altered(
    db: Connection, mallory: Tenant, bob: Tenant
) -> None:
    mallory.run(NOTES, ENABLE_COLUMNS, "ALTER TABLE notes DROP content")
    assert db.execute("SELECT built_from FROM autoembed.pipeline WHERE built_from = 'stopped'").fetchall() != []

    with db.transaction():
        db.execute("SET LOCAL track_functions = 'pl'")
        db.execute(f"ALTER TABLE {bob.name}.letters ADD remark text")
        followed = db.execute(
            "SELECT calls FROM pg_stat_xact_user_functions WHERE funcname = '_after_renames'"
        ).fetchall()

    assert [row.calls for row in followed] == [1]


# A type and a function of bob's that mallory's table uses, by its own will.
SHARED = """
    CREATE TYPE {bob}.mood AS ENUM ('glad', 'sad');
    CREATE FUNCTION {bob}.wanted(content text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';
    GRANT USAGE ON SCHEMA {bob} TO {me};
"""
USES = """
    CREATE FUNCTION {me}.slow() RETURNS text LANGUAGE plpgsql IMMUTABLE AS
        'BEGIN PERFORM pg_sleep(100); RETURN NULL; END';
    CREATE TABLE notes (mood {bob}.mood PRIMARY KEY, content text);
    SELECT autoembed.enable('notes', content_columns => '{mood,content}', condition => '{bob}.wanted(content)');
    INSERT INTO notes VALUES ('glad', 'a note');
"""
HELD = {
    "a pipeline's row locked": "SELECT FROM autoembed.pipeline FOR UPDATE",
    "a pipeline changed": "SELECT autoembed.pause('notes')",
    "the table locked": "LOCK TABLE notes",
    "the embeddings locked": "LOCK TABLE notes_embeddings",
    "nothing, but an index whose expression takes long": "COMMIT; SET plan_cache_mode = auto;"
    " ALTER TABLE notes ADD word text; CREATE STATISTICS slow ON (slow() || content) FROM notes; BEGIN",
}
OF_OTHERS = [
    "ALTER TYPE mood RENAME VALUE 'sad' TO 'unhappy'",
    "ALTER TYPE mood ADD VALUE 'new'",
    "CREATE OR REPLACE FUNCTION wanted(content text) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT false'",
    "ALTER FUNCTION wanted RENAME TO unwanted",
    "DROP FUNCTION unwanted CASCADE",
]


@pytest.mark.parametrize("held", HELD)
def test_a_table_that_uses_a_type_of_another_role_does_not_keep_it_from_changing(
    db: Connection, mallory: Tenant, bob: Tenant, held: str
) -> None:
    bob.run(SHARED.replace("{bob}", bob.name).replace("{me}", mallory.name))
    mallory.run(USES.replace("{bob}", bob.name))
    db.execute("SELECT autoembed.process()")
    mallory.run("BEGIN", HELD[held])

    for statement in OF_OTHERS:
        bob.run(statement)
    db.execute("SET statement_timeout = '5s'")
    db.execute("SELECT autoembed.alter_model('fast', model_id => 'another')")

    # The owner's own statements, and those of lanes, see to it that nothing stays behind.
    mallory.run("ROLLBACK", "SELECT autoembed.alter_pipeline('notes', condition => '')")
    mallory.run("DROP STATISTICS IF EXISTS slow", "SELECT autoembed.resync('notes')")
    db.execute("SELECT autoembed.process()")
    assert waiting_of(db, mallory) == 0
    assert failures_of(db, mallory) == {}


# What a tenant does to objects that no embedded table uses.
UNUSED = {
    "type": ("CREATE TYPE unused AS ENUM ('a')", "ALTER TYPE unused ADD VALUE 'b'"),
    "composite type": ("CREATE TYPE unused AS (a int)", "ALTER TYPE unused ADD ATTRIBUTE b int"),
    "new function": ("SELECT", "CREATE FUNCTION unused(a int) RETURNS int LANGUAGE sql AS 'SELECT 1'"),
    "new function of the same name": (
        "SELECT",
        "CREATE FUNCTION cut(a text) RETURNS SETOF text LANGUAGE sql AS 'SELECT $1'",
    ),
    "new trigger function": (
        "SELECT",
        "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'",
    ),
    "temporary table": ("SELECT", "CREATE TEMPORARY TABLE unused (a int); DROP TABLE unused"),
    "function": (
        "CREATE FUNCTION unused(a text) RETURNS SETOF text LANGUAGE sql AS 'SELECT $1'",
        "ALTER FUNCTION unused RENAME TO unused_as_before",
    ),
}


@pytest.mark.parametrize("what", UNUSED)
def test_many_tables_of_another_owner_do_not_delay_a_change_of_what_they_do_not_use(
    db: Connection, mallory: Tenant, bob: Tenant, what: str
) -> None:
    mallory.run(
        "CREATE TYPE mood AS ENUM ('glad')",
        "CREATE TABLE notes (id int PRIMARY KEY, content text, mood mood)",
        "CREATE FUNCTION text_of(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.content'",
        "CREATE FUNCTION cut(content text) RETURNS SETOF text LANGUAGE sql AS 'SELECT $1'",
        "SELECT autoembed.enable('notes', content_function => 'text_of', chunking => 'cut')",
    )
    before, change = UNUSED[what]
    bob.run(before)

    with db.transaction():
        db.execute(f"SET LOCAL track_functions = 'all'; SET LOCAL ROLE {bob.name}; SET LOCAL search_path = {bob.name}")
        db.execute(change)
        db.execute("RESET ROLE")
        looked = db.execute(
            """SELECT funcname FROM pg_stat_xact_user_functions
               WHERE funcname IN ('_labels', '_follow_one', '_content_function_of', '_chunk_function_of', '_is_key')"""
        ).fetchall()

    assert looked == []


# So many that a look at all of them takes seconds.
MANY_PIPELINES = """
    INSERT INTO autoembed.pipeline (table_id, embedding_column, key_columns, content_columns, built_from)
    SELECT '{me}.notes'::regclass, 'embedding_' || n, '{id}', '{content}', 'stopped'
    FROM generate_series(1, 2500) AS n
"""


def test_many_pipelines_that_are_stopped_do_not_keep_a_lane_from_its_work(db: Connection, mallory: Tenant) -> None:
    mallory.run(NOTES)
    db.execute(MANY_PIPELINES.replace("{me}", mallory.name).encode())

    told = []
    for _ in range(2):
        db.execute("SELECT autoembed._warn_of_blocked_pipelines(true, '{}')")
        told += [row.n for row in db.execute("SELECT count(warned_of) AS n FROM autoembed.pipeline")]

    assert 0 < told[0] < told[1] < 2500


def test_many_tables_that_are_dropped_at_once_do_not_hold_up_a_lane(db: Connection, mallory: Tenant) -> None:
    tables = [f"notes_{number}" for number in range(200)]
    for table in tables:
        mallory.run(
            f"CREATE TABLE {table} (id int PRIMARY KEY, content text)",
            f"SELECT autoembed.enable('{table}', content_columns => '{{content}}')",
        )
    mallory.run(f"DROP TABLE {', '.join(tables)}")

    left = [len(tables)]
    while left[-1]:
        db.execute("SELECT autoembed._clean_up()")
        left += [row.left for row in db.execute("SELECT count(*) AS left FROM autoembed.pipeline")]

    assert left == sorted(set(left), reverse=True)
    assert len(left) > 2


def test_a_model_that_an_open_transaction_uses_keeps_nobody_waiting_for_ever(db: Connection, mallory: Tenant) -> None:
    db.execute("SELECT autoembed.create_model('other', 'fake', 8)")
    mallory.run("BEGIN", NOTES, ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'other'"))
    db.execute("SET statement_timeout = '30s'")

    with pytest.raises(psycopg.errors.LockNotAvailable):
        db.execute("SELECT autoembed.drop_model('other')")
