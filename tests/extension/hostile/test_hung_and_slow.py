"""No tenant waits for another tenant's provider, code or number of tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from extension.hostile.attacks import ATTACKS, SLOW, SLOW_PLACES
from extension.hostile.tenants import (
    ENABLE_COLUMNS,
    ENABLE_FUNCTION,
    NOTES,
    Tenant,
    content_function,
    failures_of,
    has_vector_of,
    make_due,
    stays_fresh,
    trigger,
    waiting_of,
)
from fake_api import FakeApi
from harness import Connection, Server
from lanes import Lane
from waiting import wait_until

StartLane = Callable[[], Lane]

ENABLE_SLOW = ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'slow'")
# How a provider keeps a request, as the fake API is told.
HUNG: dict[str, dict[str, Any]] = {
    "no answer": {"hold": True},
    "an answer a few bytes at a time": {"faults": [{"slow_body": 200, "times": "forever"}]},
}


@pytest.mark.parametrize("how", HUNG)
def test_a_provider_that_hangs_holds_up_its_own_tables_alone(
    mallory: Tenant, bob: Tenant, api: FakeApi, lane: Lane, how: str
) -> None:
    api.behave(**HUNG[how])
    mallory.run(NOTES, ENABLE_SLOW, "INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 300) AS n")
    api.wait_for(in_flight=1)

    # A lane that claims nothing more while it waits for the answer does so after a while.
    end = time.monotonic() + 7
    while time.monotonic() < end:
        stays_fresh(bob)

    assert api.counters()["in_flight"] > 0
    assert lane.error is None


def test_many_providers_that_hang_hold_up_their_own_tables_alone(
    db: Connection, mallory: Tenant, bob: Tenant, api: FakeApi, lane: Lane
) -> None:
    """More requests than a lane has in flight at a time."""
    api.behave(hold=True)
    for n in range(25):
        db.execute(
            "SELECT autoembed.create_model(%s, 'openai', 8, 'text-embedding-3-small', %s, 'env:OPENAI_API_KEY')",
            [f"slow_{n}", api.base_url],
        )
        mallory.run(
            f"CREATE TABLE notes_{n} (id int PRIMARY KEY, content text)",
            f"SELECT autoembed.enable('notes_{n}', 'embedding', content_columns => '{{content}}', model => 'slow_{n}')",
            f"INSERT INTO notes_{n} VALUES (1, 'note {n}')",
        )
    api.wait_for(in_flight=10)

    for _ in range(2):
        stays_fresh(bob)

    assert lane.error is None


@pytest.mark.parametrize(
    ("place", "act"),
    [
        *((place, "sleep") for place in SLOW_PLACES),
        *(("content function", act) for act in SLOW if act != "sleep"),
        ("trigger", "lock"),
        ("trigger", "caught"),
    ],
)
def test_slow_code_of_an_owner_holds_up_its_own_rows_alone(
    mallory: Tenant, bob: Tenant, start_lane: StartLane, place: str, act: str
) -> None:
    """Neither the vectors of another tenant, nor that tenant's own writes: see stays_fresh()."""
    mallory.run(
        "CREATE TABLE entry (id int)",
        SLOW_PLACES[place](SLOW[act]),
        "INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 6) AS n",
    )
    holder = mallory.enter()
    holder.execute("BEGIN; LOCK TABLE entry")
    # Written, so that the first claim has rows of both.
    bob.run("UPDATE letters SET content = 'changed'")

    lane = start_lane()
    for _ in range(3):
        stays_fresh(bob)

    assert lane.error is None


@pytest.mark.parametrize("place", ["content function", "trigger"])
@pytest.mark.parametrize("door", ["lane", "process"])
def test_a_row_whose_code_is_too_slow_ends_on_the_failed_list(
    db: Connection, mallory: Tenant, start_lane: StartLane, place: str, door: str
) -> None:
    column = "n.content" if place == "content function" else "NEW.content"
    mallory.run(
        SLOW_PLACES[place](f"IF {column} = 'slow' THEN PERFORM pg_sleep(40); END IF;"),
        "INSERT INTO notes VALUES (1, 'slow'), (2, 'quick')",
    )
    if door == "lane":
        start_lane()

    def ended() -> bool:
        if door == "process":
            db.execute("SELECT autoembed.process()")
        make_due(db)
        return failures_of(db, mallory).keys() == {"[1]"} and waiting_of(db, mallory) == 0

    wait_until(ended, 40)

    assert has_vector_of(db, f"{mallory.name}.notes", 2, "quick")


def test_a_slow_embedding_function_holds_up_its_own_tables_alone(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane
) -> None:
    mallory.run(
        NOTES,
        """CREATE FUNCTION vectors(texts text[]) RETURNS public.vector[] LANGUAGE plpgsql AS
               $$BEGIN PERFORM pg_sleep(40); RETURN NULL; END$$""",
    )
    db.execute(
        "SELECT autoembed.create_model('its', 'function', 8, %s, timeout_seconds => 1)", [f"{mallory.name}.vectors"]
    )
    mallory.run(ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'its'"))
    mallory.run("INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 6) AS n")

    for _ in range(2):
        stays_fresh(bob)

    assert lane.error is None


@pytest.mark.parametrize("asked", ["slow", "all-MiniLM-L6-v2", "delayed"])
def test_an_owners_code_that_asks_a_model_ends_no_request_of_others(
    db: Connection, mallory: Tenant, bob: Tenant, api: FakeApi, start_lane: StartLane, asked: str
) -> None:
    """Its own request is cancelled again and again, while those of the lane are in flight."""
    api.behave(delay_seconds=0.5, faults=[{"hang": True, "match": "mallory", "times": "forever"}])
    db.execute("SELECT autoembed.create_model('delayed', 'fake', 8, options => '{\"delay_seconds\": 0.5}')")
    bob.run(
        "SELECT autoembed.disable('letters'); ALTER TABLE letters DROP embedding",
        f"SELECT autoembed.enable('letters', 'embedding', content_columns => '{{content}}', model => '{asked}')",
    )
    mallory.run(
        NOTES,
        content_function(
            f"""PERFORM autoembed._run_as_owner(
                    '{{me}}.notes', 'SELECT autoembed.embed(repeat(''mallory '' || random(), 5000), ''{asked}'')', 0.05
                );"""
        ),
        ENABLE_FUNCTION,
    )

    fresh = "SELECT FROM autoembed.status WHERE embedded = 1 AND waiting + in_flight = 0"
    lane = start_lane()
    for n in range(5):
        mallory.run(f"INSERT INTO notes SELECT n, 'note ' || n FROM generate_series({100 * n}, {100 * n + 20}) AS n")
        bob.run(f"UPDATE letters SET content = repeat('letter {n} ', 100)")
        wait_until(lambda: bob.session.execute(fresh).fetchone() is not None)
        # A provider that seems to be down makes its model rest.
        assert db.execute("TABLE autoembed.model_rest").fetchall() == []

    assert lane.error is None


def test_a_definition_that_is_slow_to_check_holds_up_its_own_table_alone(
    mallory: Tenant, bob: Tenant, start_lane: StartLane
) -> None:
    mallory.run(NOTES, ENABLE_COLUMNS, "INSERT INTO notes VALUES (1, 'a note')")
    try:
        mallory.run(
            """UPDATE autoembed.pipeline SET condition = 'true', condition_objects = (
                   SELECT jsonb_object_agg('x' || n, '{"name": "=", "type": "operator"}'::jsonb)
                   FROM generate_series(1, 200) AS n)"""
        )
    finally:
        start_lane()
        for _ in range(2):
            stays_fresh(bob)


@pytest.mark.parametrize("message", ["", "input is too large to process. increase the physical batch size"])
def test_a_text_that_makes_the_provider_fail_holds_up_its_own_row_alone(
    db: Connection, mallory: Tenant, bob: Tenant, api: FakeApi, lane: Lane, message: str
) -> None:
    """500 is what many servers answer where they should say that the text is to blame."""
    body = {"error": {"message": message}} if message else None
    api.behave(faults=[{"status": 500, "match": "poison", "times": "forever", "body": body}])
    bob.run("SELECT autoembed.alter_pipeline('letters', model => 'slow')")
    mallory.run(NOTES, ENABLE_SLOW, "INSERT INTO notes VALUES (1, 'poison')")
    bob.run("INSERT INTO letters SELECT n, 'letter ' || n FROM generate_series(2, 21) AS n")

    fresh = f"SELECT count(*) FROM {bob.name}.letters WHERE embedding IS NOT NULL"
    wait_until(lambda: db.execute(fresh).fetchone() == (21,), 30)

    assert lane.error is None


def test_many_tables_of_a_tenant_hold_up_no_other_tenant(
    db: Connection, mallory: Tenant, bob: Tenant, start_lane: StartLane
) -> None:
    """Each table takes its time in a claim, and one text of all of them many writes."""
    with ATTACKS["neighbour-tables"].going_on(db, mallory, hung=""):
        lane = start_lane()
        for _ in range(4):
            stays_fresh(bob)

    assert lane.error is None


def test_many_wide_tables_of_a_tenant_hold_up_no_other_tenant(
    db: Connection, mallory: Tenant, bob: Tenant, start_lane: StartLane
) -> None:
    """What a lane looks at in a claim grew with the square of the columns, for each table."""
    columns = [f"c{n}" for n in range(1500)]
    for n in range(15):
        mallory.run(
            f"CREATE TABLE wide_{n} (id int PRIMARY KEY, {' text, '.join(columns)} text)",
            f"SELECT autoembed.enable('wide_{n}', 'embedding', content_columns => '{{{','.join(columns)}}}')",
            f"INSERT INTO wide_{n} (id, c1) VALUES (1, 'a note')",
        )

    lane = start_lane()
    for _ in range(4):
        stays_fresh(bob)

    assert lane.error is None


def test_a_long_template_is_not_read_for_each_column_of_a_wide_table(db: Connection, mallory: Tenant) -> None:
    """A lane compares these facts in each claim."""
    columns = ", ".join(f"c{n} int" for n in range(1000))
    mallory.run(
        f"CREATE TABLE wide (id int PRIMARY KEY, content text, {columns})",
        "SELECT autoembed.enable('wide', content_template => '{content}' || repeat('{{', 1000))",
    )

    with db.transaction():
        db.execute("SET LOCAL track_functions = 'all'")
        db.execute("SELECT autoembed._slots(p), autoembed._text_facts(p) FROM autoembed.pipeline AS p")
        row = db.execute("SELECT calls FROM pg_stat_xact_user_functions WHERE funcname = '_template'").fetchone()

    assert row is not None
    assert row.calls < 100


def test_a_long_text_is_cut_into_chunks_while_others_are_embedded(
    mallory: Tenant, bob: Tenant, start_lane: StartLane
) -> None:
    """The tokenizer of the local model takes half a minute for 30 MB."""
    mallory.run(
        NOTES,
        "SELECT autoembed.enable('notes', content_columns => '{content}', model => 'all-MiniLM-L6-v2')",
        "INSERT INTO notes SELECT 1, string_agg(md5(n::text), ' ') FROM generate_series(1, 900000) AS n",
    )

    lane = start_lane()
    claimed = "SELECT in_flight FROM autoembed.status"
    wait_until(lambda: mallory.session.execute(claimed).fetchone() == (1,))
    for _ in range(3):
        stays_fresh(bob)

    assert lane.error is None
    assert mallory.session.execute("SELECT count(*) FROM notes_embeddings").fetchone() == (0,)


# Without a scan, in which the rows that have failed would be tried again.
ENABLE_NEW = ENABLE_COLUMNS.replace("'{content}'", "'{content}', enqueue_existing => false")
# Tables that take no vector, and code that gives another text each time.
NEVER_TAKEN = {
    "a trigger that skips the row": f"{NOTES}; {ENABLE_NEW};" + trigger("RETURN NULL;"),
    "a trigger that fails as if for concurrency": f"""
        {NOTES}; {ENABLE_NEW}; {trigger("RAISE 'again' USING ERRCODE = 'serialization_failure';")}""",
    "a trigger that fails as if for a lock": f"""
        {NOTES}; {ENABLE_NEW}; {trigger("RAISE 'again' USING ERRCODE = 'lock_not_available';")}""",
    "a trigger that fails as if for use": f"""
        {NOTES}; {ENABLE_NEW}; {trigger("RAISE 'again' USING ERRCODE = 'object_in_use';")}""",
    "a table that cannot be updated": f"""
        CREATE TABLE notes (id int NOT NULL UNIQUE, content text);
        {ENABLE_NEW}""",
    "a text that is another each time": f"""
        {NOTES};
        CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT gen_random_uuid()::text';
        {ENABLE_FUNCTION.replace("'note_text'", "'note_text', enqueue_existing => false")}""",
}


@pytest.mark.parametrize("table", NEVER_TAKEN)
def test_a_row_that_never_takes_its_vector_is_not_paid_for_for_ever(
    db: Connection, mallory: Tenant, api: FakeApi, table: str
) -> None:
    db.execute("SELECT autoembed.set_default_model('slow')")
    mallory.run(NEVER_TAKEN[table], "INSERT INTO notes VALUES (1, 'a note')")
    if table == "a table that cannot be updated":
        db.execute(f"CREATE PUBLICATION published_{mallory.name} FOR TABLE {mallory.name}.notes")

    for _ in range(12):
        db.execute("SELECT autoembed.process(timeout_milliseconds => 5000)")
        make_due(db)

    assert api.counters()["requests"] <= 6
    reasons = mallory.session.execute(
        "SELECT reason FROM autoembed.failed UNION ALL SELECT reason FROM autoembed.status WHERE reason IS NOT NULL"
    ).fetchall()
    assert len(reasons) == 1


def test_a_model_without_a_name_at_its_provider_is_refused_or_works(db: Connection, mallory: Tenant) -> None:
    """Its identity is written in two languages, and an empty name was left out in one of them."""
    try:
        db.execute("SELECT autoembed.create_model('blank', 'fake', 8, model_id => '')")
    except Exception as error:
        assert "model_id" in str(error)
        return
    mallory.run(NOTES, ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'blank'"))
    mallory.run("INSERT INTO notes VALUES (1, 'a note')")

    db.execute("SELECT autoembed.process()")

    assert has_vector_of(db, f"{mallory.name}.notes", 1, "a note")


@pytest.fixture
def cron(server: Server) -> Iterator[Connection]:
    """A superuser's session in the database that has pg_cron, and a schema there."""
    with closing(server.connect()) as db:
        db.execute("SELECT autoembed.create_model('fast', 'fake', 8); CREATE SCHEMA crowd")
        yield db
        db.execute("SELECT cron.unschedule(jobid) FROM cron.job; SELECT autoembed.unschedule()")
        # PostgreSQL cannot drop a table whose index is being built CONCURRENTLY: "tuple concurrently updated".
        wait_until(lambda: has_ended(db) and not is_building(db))
        db.execute("DROP SCHEMA crowd CASCADE")
        wait_until(lambda: has_ended(db))
        db.execute("SELECT autoembed.drop_model('fast')")


def has_ended(db: Connection) -> bool:
    """Whether no lane works. A pass takes the entries of those away that were terminated."""
    db.execute("SELECT FROM autoembed.process()")
    return db.execute("SELECT FROM autoembed.lane").fetchone() is None


def is_building(db: Connection) -> bool:
    building = "SELECT FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONC%' AND state = 'active'"
    return db.execute(building).fetchone() is not None


def test_builds_of_indexes_leave_workers_for_the_lanes(cron: Connection, server: Server) -> None:
    """A build waits for every transaction that is open, a dump's for instance."""
    cron.execute("SELECT autoembed.schedule(1)")
    cron.execute("CREATE TABLE crowd.letters (id int PRIMARY KEY, content text)")
    cron.execute(
        "SELECT autoembed.enable('crowd.letters', 'embedding', content_columns => '{content}', model => 'fast')"
    )
    cron.execute("INSERT INTO crowd.letters VALUES (1, 'a letter')")
    with closing(server.connect()) as dump:
        dump.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM pg_class")
        for n in range(9):
            cron.execute(f"CREATE TABLE crowd.t_{n} (id int PRIMARY KEY, content text)")
            cron.execute(f"INSERT INTO crowd.t_{n} VALUES (1, 'a text')")
            cron.execute(
                f"SELECT autoembed.enable('crowd.t_{n}', 'embedding', content_columns => '{{content}}',"
                " model => 'fast',"
                " create_index => true)"
            )
        wait_until(lambda: is_building(cron))
        waiting = "SELECT count(*) FROM autoembed.status WHERE waiting + in_flight > 0 OR state = 'backfilling'"
        wait_until(lambda: cron.execute(waiting).fetchone() == (0,))
        # Every lane ends after five minutes, and pg_cron begins another.
        cron.execute("SELECT pg_terminate_backend(pid) FROM autoembed.lane")
        cron.execute("UPDATE crowd.letters SET content = 'changed'")

        wait_until(lambda: has_vector_of(cron, "crowd.letters", 1, "changed"))


def test_backfills_of_many_tables_of_a_tenant_hold_up_no_other_tenant(
    db: Connection, mallory: Tenant, bob: Tenant
) -> None:
    """Chance decides between the owners, and a lane looks at no more tables than it takes."""
    for n in range(20):
        mallory.run(
            f"CREATE TABLE notes_{n} (id int PRIMARY KEY, content text)",
            f"SELECT autoembed.enable('notes_{n}', 'embedding', content_columns => '{{content}}')",
        )
    mallory.run("SELECT autoembed.resync(p.table_id) FROM autoembed.pipeline AS p")
    bob.run("SELECT autoembed.resync('letters')")

    with db.transaction():
        db.execute("SET LOCAL track_functions = 'all'")
        served = [
            db.execute("SELECT owner::oid::regrole::text FROM autoembed._next_backfill(true, '{}', '{}')").fetchone()
            for _ in range(40)
        ]
        looked = db.execute(
            "SELECT calls FROM pg_stat_xact_user_functions WHERE funcname = '_check_pipeline'"
        ).fetchone()

    assert 5 <= served.count((bob.name,)) <= 35
    assert looked is not None
    assert looked.calls <= 120
