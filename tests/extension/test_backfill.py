"""Looking through tables that have rows already, beside everything else that lanes do; and messages of many rows."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, Server, run_server, waiting
from lanes import Lane, running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]

SCANNING = "SELECT EXISTS (SELECT FROM autoembed.backfill WHERE scanned_at IS NULL) AS scanning"
# Ten rows at a time.
TEN = "batch_size => 10, max_requests => 1"


def fill(db: Connection, rows: int, table: str = "documents") -> None:
    """A table of rows 1, 2, 3 … that say old 1, old 2, old 3 …, not attached."""
    db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, content text, embedding halfvec(1536))")
    db.execute(f"INSERT INTO {table} SELECT n, 'old ' || n FROM generate_series(1, {rows}) AS n")


def enable(db: Connection, table: str = "documents", arguments: str = "") -> None:
    db.execute(f"SELECT autoembed.enable('{table}', 'embedding', content_columns => '{{content}}' {arguments})")


def process(db: Connection, arguments: str = "") -> Any:
    return db.execute(f"SELECT * FROM autoembed.process({arguments})").fetchone()


def process_all(db: Connection, arguments: str = "") -> None:
    while process(db, arguments).read > 0:
        pass


def is_done(db: Connection) -> bool:
    """Nothing is being looked through, and nothing is due."""
    due = "SELECT EXISTS (SELECT FROM pgmq.q_embedding_jobs WHERE vt <= clock_timestamp() OR read_ct > 0)"
    return db.execute(SCANNING).fetchone() == (False,) and db.execute(due).fetchone() == (False,)


def is_fresh(db: Connection, table: str = "documents") -> bool:
    """Whether every row has the vector of what it says."""
    rows = db.execute(f"SELECT content, embedding::vector::real[] AS vector FROM {table}").fetchall()
    return all(row.vector is not None and np.allclose(row.vector, embedding_of(row.content), atol=1e-3) for row in rows)


def has_vector(db: Connection, key: int, table: str = "documents") -> bool:
    return db.execute(f"SELECT embedding IS NOT NULL FROM {table} WHERE id = {key}").fetchone() == (True,)


def wait_for_vector(db: Connection, key: int, table: str = "documents") -> None:
    wait_until(lambda: has_vector(db, key, table), 5)


def test_enabling_a_table_with_rows_queues_none_of_them(db: Connection, api: FakeApi) -> None:
    fill(db, 5000)

    enable(db)

    assert waiting(db) == 0
    assert db.execute("SELECT position, rows_queued, scanned_at FROM autoembed.backfill").fetchall() == [
        (None, 0, None)
    ]


@pytest.mark.parametrize("lanes", ["process", "live", "backfill", "both"])
def test_every_row_that_was_there_is_embedded_once_whoever_does_it(
    db: Connection, api: FakeApi, connect: Connect, lanes: str
) -> None:
    """By process(), by a lane that has nothing else to do, or by lanes for it; then nothing is left to look through."""
    fill(db, 2500)
    enable(db)
    arguments = "batch_size => 100, max_requests => 4"
    with ExitStack() as stack:
        if lanes == "process":
            process_all(db, arguments)
        if lanes in ("live", "both"):
            stack.enter_context(running_lanes(db, connect, 1, arguments))
        if lanes in ("backfill", "both"):
            stack.enter_context(running_lanes(db, connect, 2, f"{arguments}, backfill => true"))
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.backfill").fetchone() == (0,))

    assert is_fresh(db)
    assert waiting(db) == 0
    assert Counter(api.texts()).most_common(1)[0][1] == 1
    assert len(api.texts()) == 2500


def test_rows_are_left_alone_where_enqueue_existing_is_false(db: Connection, api: FakeApi) -> None:
    fill(db, 5)
    enable(db, arguments=", enqueue_existing => false")
    db.execute("INSERT INTO documents VALUES (6, 'new')")
    process_all(db)

    assert api.texts() == ["new"]


def test_a_backfill_goes_on_where_a_killed_lane_stood(db: Connection, api: FakeApi, connect: Connect) -> None:
    """If the position is lost with the lane, all is read again; if a claimed chunk is, its rows have no vector."""
    fill(db, 300)
    enable(db)
    api.behave(hold="old 125")
    lane = Lane(connect(), f"{TEN}, backfill => true")
    api.wait_for(held=1)
    db.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
    lane.join()
    api.release()
    api.wait_until_idle()
    before = len(api.texts())
    assert before == 130

    with running_lanes(db, connect, 1, TEN), running_lanes(db, connect, 1, f"{TEN}, backfill => true"):
        wait_until(lambda: is_done(db))

    assert is_fresh(db)
    sent = Counter(api.texts())
    assert len(sent) == 300
    assert {text for text, times in sent.items() if times > 1} <= {f"old {n}" for n in range(121, 131)}
    assert max(sent.values()) <= 2


def inputs(db: Connection) -> int:
    row = db.execute("SELECT coalesce(sum(inputs), 0) FROM autoembed.usage").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("partitioned", [False, True])
def test_there_is_nothing_to_scan_in_an_empty_table(db: Connection, api: FakeApi, partitioned: bool) -> None:
    """Rows that come at once were found twice: by the trigger, and by the scan of a table that had none."""
    db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)" + " PARTITION BY RANGE (id)" * partitioned)
    if partitioned:
        db.execute("CREATE TABLE part PARTITION OF documents DEFAULT")

    enable(db)

    assert db.execute(SCANNING).fetchone() == (False,)
    db.execute("INSERT INTO documents SELECT n, 'text ' || n FROM generate_series(1, 30) AS n")
    process_all(db)
    assert is_fresh(db)
    assert inputs(db) == 30


@pytest.mark.parametrize("key", ["id int PRIMARY KEY", "id bigint, note text DEFAULT 'a, b', PRIMARY KEY (note, id)"])
def test_rows_that_come_while_a_table_is_scanned_are_sent_once(
    db: Connection, api: FakeApi, connect: Connect, key: str
) -> None:
    """A scan that does not look into the queue sends rows whose message is in flight or waits."""
    db.execute(f"CREATE TABLE documents ({key}, content text, embedding halfvec(1536))")
    db.execute("INSERT INTO documents (id, content) SELECT n, 'old ' || n FROM generate_series(1, 50) AS n")
    enable(db)
    api.behave(hold="new")
    # A message that names no row stops no scan.
    db.execute("SELECT pgmq.send('embedding_jobs', '{\"pipeline\": 1, \"keys\": 5}')")
    db.execute("INSERT INTO documents (id, content) SELECT n, 'new ' || n FROM generate_series(51, 90) AS n")
    with running_lanes(db, connect, 1, TEN):
        api.wait_for(held=1)
        with running_lanes(db, connect, 1, f"{TEN}, backfill => true"):
            wait_until(lambda: db.execute(SCANNING).fetchone() == (False,))
            api.release()
            wait_until(lambda: is_done(db))

    assert is_fresh(db)
    assert max(Counter(api.texts()).values()) == 1


def test_rows_that_wait_are_embedded_again_where_all_are_asked_for(db: Connection, api: FakeApi) -> None:
    """If a forced scan left out rows that wait, a row that is queued for nothing would keep its vector."""
    fill(db, 10)
    enable(db)
    process_all(db)
    with db.transaction():
        db.execute("UPDATE documents SET content = 'x' WHERE id = 1")
        db.execute("UPDATE documents SET content = 'old 1' WHERE id = 1")
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now() + interval '1 hour'")
    db.execute("SELECT autoembed.reembed('documents')")
    process_all(db)

    assert Counter(api.texts()) == {f"old {n}": 2 for n in range(1, 11)}


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize(("ago", "left"), [("1 second", True), ("1 hour", False)])
def test_a_backfill_is_left_to_the_lane_that_is_scheduled_for_it_for_a_while(
    db: Connection, api: FakeApi, ago: str, left: bool, active: bool
) -> None:
    """Between two lanes for backfills there is none. A live lane took 2,000 rows then, and live rows waited."""
    fill(db, 10)
    enable(db)
    # In the place of pg_cron, which is in one database of a server.
    db.execute("CREATE SCHEMA cron CREATE TABLE job (jobname text, active boolean, database name, schedule text)")
    db.execute("INSERT INTO cron.job VALUES ('autoembed-backfill-1', %s, current_database(), '1 second')", [active])
    served = f"UPDATE autoembed.backfill SET served_at = now() - interval '{ago}'"

    db.execute(served.encode())
    assert db.execute("SELECT FROM autoembed._next_backfill(true, '{}', '{}')").rowcount == 1
    db.execute(served.encode())
    assert db.execute("SELECT FROM autoembed._next_backfill(false, '{}', '{}')").rowcount == int(not (left and active))


def test_no_more_of_a_table_is_scanned_while_its_model_does_not_answer(
    db: Connection, api: FakeApi, connect: Connect
) -> None:
    """A lane whose model hung for a second went on to claim the whole table."""
    fill(db, 200)
    enable(db)
    api.behave(hold="old")
    with running_lanes(db, connect, 1, f"{TEN}, backfill => true"):
        api.wait_for(held=1)
        began_at = time.monotonic()
        # Busy after a second, and another second of looks.
        wait_until(lambda: time.monotonic() - began_at > 3)
        assert db.execute("SELECT rows_queued <= 20 FROM autoembed.backfill").fetchone() == (True,)
        api.release()
        wait_until(lambda: is_done(db), 60)

    assert is_fresh(db)


def test_a_fresh_row_does_not_wait_for_a_backfill(db: Connection, api: FakeApi, connect: Connect) -> None:
    """With every request of the backfill held, a live lane that takes part in it has no hand free."""
    fill(db, 100)
    fill(db, 0, "notes")
    enable(db, "notes")
    enable(db)
    api.behave(hold="old")
    with running_lanes(db, connect, 1, f"{TEN}, backfill => true"):
        api.wait_for(held=1)
        with running_lanes(db, connect, 1, TEN):
            for number in range(3):
                db.execute(f"INSERT INTO documents VALUES (1000 + {number}, 'fresh {number}')")
                db.execute(f"INSERT INTO notes VALUES ({number}, 'a fresh note {number}')")
                db.execute(f"UPDATE documents SET content = 'fresh, too' WHERE id = 90 + {number}")
                for key, table in ((1000 + number, "documents"), (number, "notes"), (90 + number, "documents")):
                    wait_for_vector(db, key, table)
            assert db.execute(SCANNING).fetchone() == (True,)
            assert not has_vector(db, 1)
            api.release()
            wait_until(lambda: is_done(db))

    assert is_fresh(db)
    assert is_fresh(db, "notes")


def test_a_lane_without_another_for_backfills_does_live_rows_before_the_next_chunk(
    db: Connection, api: FakeApi, connect: Connect
) -> None:
    fill(db, 100)
    enable(db)
    api.behave(hold="old 15")
    with running_lanes(db, connect, 1, TEN):
        api.wait_for(held=1)
        db.execute("INSERT INTO documents VALUES (1000, 'fresh')")
        api.release()
        wait_until(lambda: is_done(db))

    assert is_fresh(db)
    assert api.texts().index("fresh") == 20


def test_rows_that_change_behind_within_and_ahead_of_a_backfill_end_fresh(
    db: Connection, api: FakeApi, connect: Connect
) -> None:
    fill(db, 100)
    enable(db)
    api.behave(hold=["old 50"])
    with running_lanes(db, connect, 1, f"{TEN}, backfill => true"):
        api.wait_for(held=1)
        for number in (40, 50, 60):
            db.execute(f"UPDATE documents SET content = 'changed' WHERE id = {number} + 0")
            db.execute(f"DELETE FROM documents WHERE id = {number} - 1")
            db.execute(f"UPDATE documents SET id = id + 1000 WHERE id = {number} - 2")
            db.execute(f"UPDATE documents SET id = id - 1000 WHERE id = {number} - 3")
            db.execute(f"INSERT INTO documents VALUES ({number} - 1, 'inserted')")
        with running_lanes(db, connect, 1, TEN):
            api.release()
            wait_until(lambda: is_done(db) and is_fresh(db))

    assert db.execute("SELECT count(*) FROM documents").fetchone() == (100,)
    assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)


KEYS = {
    "composite": (
        'a text COLLATE "de-x-icu", b int, PRIMARY KEY (b, a)',
        "('{a,B,Ä,ä,Z,é,\"a b\",[1]}'::text[])[1 + n % 8], n / 8 - 10",
    ),
    "composite, the other way round": (
        'a text COLLATE "de-x-icu", b int, PRIMARY KEY (a, b)',
        "('{a,B,Ä,ä,Z,é,\"a b\",[1]}'::text[])[1 + n % 8], n / 8 - 10",
    ),
    "text": ("a text PRIMARY KEY, b int", "md5(n::text) || chr(n + 60), n"),
    "uuid": ("a uuid PRIMARY KEY, b int", "md5(n::text)::uuid, n"),
    "timestamptz": (
        "a timestamptz PRIMARY KEY, b int",
        "CASE n WHEN 1 THEN 'infinity' WHEN 2 THEN '-infinity' ELSE"
        " '2024-03-30 12:00Z'::timestamptz + n * interval '1 hour' END, n",
    ),
    "numeric": ("a numeric PRIMARY KEY, b int", "CASE n WHEN 1 THEN 'NaN' ELSE 1.0 / n - 0.01 END, n"),
    "double precision": ("a float8 PRIMARY KEY, b int", "CASE n WHEN 1 THEN '-Infinity' ELSE 1.0 / n END, n"),
    "range": ("a int4range PRIMARY KEY, b int", "int4range(n % 7, n + 7), n"),
    "citext": ("a citext PRIMARY KEY, b int", "(CASE n % 2 WHEN 0 THEN 'K' ELSE 'k' END) || md5(n::text), n"),
    "citext of another schema": (
        "a elsewhere.citext PRIMARY KEY, b int",
        "(CASE n % 2 WHEN 0 THEN 'K' ELSE 'k' END) || md5(n::text), n",
    ),
    "enum and domain": (
        "a colour, b number, PRIMARY KEY (a, b)",
        "('{red,blue,amber}'::colour[])[1 + n % 3], n",
    ),
    "partitions": ("a int, b int, PRIMARY KEY (b, a)", "n % 5, n"),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_any_kind_are_gone_through_without_a_gap_or_a_repetition(
    db: Connection, api: FakeApi, kind: str
) -> None:
    """In chunks of seven; a row that another order puts elsewhere would be left out, or come twice."""
    columns, values = KEYS[kind]
    db.execute("CREATE TYPE colour AS ENUM ('red', 'blue', 'amber'); CREATE DOMAIN number AS int CHECK (VALUE > 0)")
    db.execute("CREATE SCHEMA elsewhere; CREATE EXTENSION citext")
    if kind == "citext of another schema":
        db.execute("ALTER EXTENSION citext SET SCHEMA elsewhere")
    db.execute(
        f"CREATE TABLE documents ({columns}, content text)" + (" PARTITION BY HASH (a)" if kind == "partitions" else "")
    )
    if kind == "partitions":
        for remainder in range(2):
            db.execute(
                f"CREATE TABLE p{remainder} PARTITION OF documents FOR VALUES WITH (MODULUS 2, REMAINDER {remainder})"
            )
    db.execute(f"INSERT INTO documents SELECT {values}, 'old ' || n FROM generate_series(1, 100) AS n")
    db.execute("SET TimeZone = 'Europe/Berlin'; SET DateStyle = 'SQL, DMY'; SET extra_float_digits = -5")
    enable(db)

    process_all(db, "batch_size => 7, max_requests => 1")

    assert len(api.texts()) == len(set(api.texts())) == 100
    assert db.execute("SELECT count(*) FROM documents WHERE embedding IS NULL").fetchone() == (0,)


def test_a_paused_backfill_goes_on_behind_the_last_row(db: Connection, api: FakeApi) -> None:
    fill(db, 50)
    enable(db)
    process(db, TEN)
    db.execute("SELECT autoembed.pause('documents')")

    assert process(db, TEN).read == 0
    assert db.execute("SELECT position, rows_queued FROM autoembed.backfill").fetchone() == ("[10]", 10)

    db.execute("SELECT autoembed.resume('documents')")
    process_all(db, TEN)
    assert api.texts() == [f"old {n}" for n in range(1, 51)]


def test_a_blocked_backfill_does_not_hold_up_another(db: Connection, api: FakeApi) -> None:
    fill(db, 3)
    fill(db, 3, "others")
    enable(db)
    enable(db, "others")
    db.execute("ALTER TABLE documents ALTER embedding TYPE halfvec(10) USING NULL")
    process_all(db)

    assert is_fresh(db, "others")


def test_tables_take_turns_so_that_a_long_one_does_not_hold_up_a_short_one(db: Connection, api: FakeApi) -> None:
    fill(db, 200)
    fill(db, 5, "others")
    enable(db)
    enable(db, "others")
    for _ in range(4):
        process(db, TEN)

    assert is_fresh(db, "others")


def test_a_reembedding_whose_condition_fails_ends_on_the_failed_list_and_can_be_tried_again(
    db: Connection, api: FakeApi, connect: Connect
) -> None:
    fill(db, 20)
    fill(db, 3, "others")
    enable(db)
    process_all(db)
    db.execute("SELECT autoembed.reembed('documents', condition => '1 / (id - 5) < 2')")
    enable(db, "others")
    with running_lanes(db, connect, 1, f"{TEN}, backfill => true") as [lane]:
        wait_until(lambda: is_fresh(db, "others"))
        wait_until(lambda: is_done(db))
        assert lane.error is None

    [failure] = db.execute("SELECT table_name, reason, message FROM autoembed.failed").fetchall()
    assert failure.reason == "division by zero"
    db.execute("DELETE FROM documents WHERE id = 5")
    before = len(api.texts())
    db.execute("SELECT autoembed.retry_failed()")
    process_all(db)
    assert len(api.texts()) - before == 19
    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []


@pytest.mark.parametrize(
    "end",
    [
        "SELECT autoembed.disable('documents')",
        "DROP TABLE documents",
        "TRUNCATE documents",
        "ALTER TABLE documents DROP content",
        "ALTER TABLE documents RENAME id TO number",
        "ALTER TABLE documents ALTER id TYPE bigint",
    ],
)
def test_a_lane_for_backfills_takes_what_becomes_of_its_table_calmly(
    db: Connection, api: FakeApi, connect: Connect, end: str
) -> None:
    fill(db, 50)
    enable(db)
    api.behave(hold="old 15")
    with running_lanes(db, connect, 1, f"{TEN}, backfill => true") as [lane]:
        api.wait_for(held=1)
        db.execute(end)
        api.release()
        fill(db, 3, "others")
        enable(db, "others")
        wait_until(lambda: lane.error or is_fresh(db, "others"))
        assert lane.error is None
        if "RENAME" in end or "TYPE" in end:
            wait_until(lambda: is_fresh(db))
        wait_until(lambda: db.execute("SELECT * FROM autoembed.failed").fetchall() == [])


# Messages of many rows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tables", [1, 5])
def test_a_pass_never_takes_more_rows_than_it_may(db: Connection, api: FakeApi, tables: int) -> None:
    """The messages have a hundred rows each."""
    names = [f"documents{number}" for number in range(tables)]
    for name in names:
        fill(db, 0, name)
        enable(db, name)
        db.execute(f"INSERT INTO {name} SELECT n, '{name} ' || n FROM generate_series(1, 250) AS n")
    assert waiting(db) == 3 * tables

    while (report := process(db, "batch_size => 20, max_requests => 3")).read > 0:
        assert report.read <= 60
        # A lane sends what it has after a tenth of a second, so a busy machine makes more of them.
        assert report.requests <= 3 + tables

    assert all(is_fresh(db, name) for name in names)
    assert len(api.texts()) == len(set(api.texts())) == 250 * tables
    assert max(len(request["texts"]) for request in api.log()) <= 20


def test_a_row_that_kills_its_lane_takes_none_of_its_message_with_it(
    db: Connection, api: FakeApi, connect: Connect
) -> None:
    """While a hundred rows die together, their tries count for all of them."""
    fill(db, 0)
    enable(db, arguments=", enqueue_existing => false")
    db.execute(
        "INSERT INTO documents SELECT n, CASE n WHEN 50 THEN 'deadly' ELSE 'harmless ' || n END"
        " FROM generate_series(1, 100) AS n"
    )
    api.behave(hold="deadly")
    killed = 0
    while waiting(db):
        lane = Lane(connect())
        wait_until(lambda: api.counters()["held"] or not waiting(db))
        if waiting(db):
            db.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
            killed += 1
            assert killed <= 5
        else:
            db.execute("UPDATE autoembed.lane SET stop = true")
        lane.join()
        api.wait_until_idle()

    [failure] = db.execute("SELECT key, reason FROM autoembed.failed").fetchall()
    assert failure == ("[50]", "5 lanes ended while they worked on it")
    assert db.execute("SELECT id FROM documents WHERE embedding IS NULL").fetchall() == [(50,)]


def test_a_locked_table_holds_up_no_other_and_costs_no_request_again_and_again(
    db: Connection, api: FakeApi, connect: Connect
) -> None:
    fill(db, 30)
    fill(db, 0, "others")
    fill(db, 0, "looked_through")
    for table in ("documents", "others", "looked_through"):
        enable(db, table)
    db.execute("UPDATE documents SET content = 'new ' || id WHERE id <= 3")
    with connect() as application, application.transaction():
        application.execute("LOCK TABLE documents IN ACCESS EXCLUSIVE MODE")
        with running_lanes(db, connect), running_lanes(db, connect, 1, "backfill => true"):
            for number in range(20):
                db.execute(f"INSERT INTO others VALUES ({number}, 'other {number}')")
                wait_for_vector(db, number, "others")
            db.execute("INSERT INTO looked_through VALUES (1, 'a text')")
            wait_for_vector(db, 1, "looked_through")
            db.execute("SELECT autoembed.reembed('looked_through')")
            wait_until(lambda: api.texts().count("a text") == 2)
            assert [text for text in api.texts() if text.startswith(("old", "new"))] == []
            application.execute("COMMIT")
            wait_until(lambda: is_done(db) and is_fresh(db))

    # A row that has changed during a backfill may be in the hands of both lanes.
    assert max(Counter(api.texts()).values()) <= 2
    assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)


# The index ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scheduled() -> Iterator[Server]:
    """A server with pg_cron in its database postgres, a lane and one for backfills."""
    with ExitStack() as stack:
        yield run_server(stack, AUTOEMBED_LANES="1")


@pytest.mark.parametrize(("version", "workers"), [("0.8.0", "0"), ("0.8.1", "0"), ("0.8.2", "3"), ("0.10.0", "3")])
def test_an_index_is_built_without_workers_where_they_are_a_fault_of_pgvector(
    scheduled: Server, version: str, workers: str
) -> None:
    name = f"by_{version.replace('.', '_')}"
    with scheduled.connect() as db:
        given = db.execute("SELECT pg_get_functiondef('autoembed._vector_version'::regproc)").fetchone()
        assert given is not None
        db.execute("ALTER DATABASE postgres SET max_parallel_maintenance_workers = 3")
        db.execute(
            "CREATE OR REPLACE FUNCTION autoembed._vector_version() RETURNS text LANGUAGE sql STABLE"
            f" SET search_path = pg_catalog, pg_temp AS $$SELECT '{version}'$$"
        )
        db.execute("CREATE TABLE seen (workers text)")
        db.execute("""
            CREATE FUNCTION see() RETURNS event_trigger LANGUAGE plpgsql AS $$BEGIN
                INSERT INTO public.seen VALUES (current_setting('max_parallel_maintenance_workers'));
            END$$;
            CREATE EVENT TRIGGER see ON ddl_command_end WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION see()
        """)
        fill(db, 1, name)

        db.execute("SELECT autoembed.create_model(%s, 'fake', 1536)", [name])
        enable(db, name, f", model => '{name}', create_index => true")

        try:
            wait_until(lambda: db.execute("SELECT count(*) FROM seen").fetchone() == (1,), 60)
            assert db.execute("SELECT workers FROM seen").fetchall() == [(workers,)]
            # A session of anybody else keeps its own.
            with scheduled.connect() as session:
                session.execute(f"CREATE INDEX ON {name} (content)")
                assert session.execute("SHOW max_parallel_maintenance_workers").fetchone() == ("3",)
        finally:
            db.execute("DROP EVENT TRIGGER see; DROP FUNCTION see; DROP TABLE seen")
            db.execute("ALTER DATABASE postgres RESET max_parallel_maintenance_workers")
            db.execute(given[0])
            db.execute(f"DROP TABLE {name}")


def test_the_index_is_built_concurrently_once_the_rows_are_embedded(scheduled: Server) -> None:
    api = scheduled.fake_api("index")
    long = 'Ein langer Name mit "Anführungszeichen"; der 63 Bytes hat ........'[:58]
    name = '"' + long.replace('"', '""') + '"'
    with scheduled.connect() as db:
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
        db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
        [before] = db.execute("SELECT coalesce(max(runid), 0) AS run FROM cron.job_run_details").fetchall()
        fill(db, 200)
        fill(db, 200, name)
        api.behave(hold=["old 100"])
        enable(db, arguments=", create_index => true")
        enable(db, name, ", create_index => true")
        index_of = (
            "SELECT indexdef FROM pg_indexes"
            " JOIN pg_index ON indexrelid = format('%%I.%%I', schemaname, indexname)::regclass"
            " WHERE tablename = %s AND indexdef LIKE '%%hnsw%%' AND indisvalid"
        )
        api.wait_for(held=1)
        for table in ("documents", long):
            assert db.execute(index_of, [table]).fetchall() == []
        api.release()
        for table in ("documents", long):
            [definition] = wait_until(partial(lambda table: db.execute(index_of, [table]).fetchone(), table), 60)
            assert definition.endswith("USING hnsw (embedding halfvec_cosine_ops)")
            assert db.execute(f"SELECT count(*) FROM {name} WHERE embedding IS NULL").fetchone() == (0,)
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.backfill").fetchone() == (0,))
        assert db.execute("SELECT jobname FROM cron.job WHERE jobname LIKE 'autoembed-index%'").fetchall() == []
        # pg_cron need not have noted its end.
        builds = "SELECT count(*) FROM cron.job_run_details WHERE command LIKE 'CREATE INDEX CONCURRENTLY %'"
        assert db.execute(f"{builds} AND runid > {before.run}".encode()).fetchone() == (2,)


@pytest.fixture
def cron(scheduled: Server) -> Iterator[Connection]:
    """A session in the database of pg_cron, with its lanes and the table documents."""
    api = scheduled.fake_api("index")
    api.behave()
    with scheduled.connect() as db:
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
        db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
        db.execute("DROP TABLE IF EXISTS documents")
        fill(db, 20)
        yield db


HNSW = """
    SELECT pg_get_indexdef(indexrelid) FROM pg_index
    WHERE indrelid = 'documents'::regclass AND indisvalid AND NOT indisprimary"""


def index_jobs(db: Connection) -> list[Any]:
    return db.execute("SELECT jobname FROM cron.job WHERE jobname LIKE 'autoembed-index%'").fetchall()


def wait_until_no_backfill(db: Connection) -> None:
    wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.backfill").fetchone() == (0,), 60)


def test_a_vector_too_long_for_an_index_of_its_own_gets_one_of_its_halves(cron: Connection, scheduled: Server) -> None:
    api = scheduled.fake_api("index")
    api.behave(models={"long": 2500})
    cron.execute(
        "SELECT autoembed.create_model('long', 'openai', 2500, base_url => %s, api_key => 'env:OPENAI_API_KEY')",
        [api.base_url],
    )
    cron.execute("ALTER TABLE documents ALTER embedding TYPE vector(2500)")
    enable(cron, arguments=", model => 'long', create_index => true")

    wait_until_no_backfill(cron)

    [definition] = cron.execute(HNSW).fetchone() or ("",)
    assert "((embedding)::halfvec(2500)) halfvec_cosine_ops" in definition


def test_a_build_that_fails_ends_with_its_reason_and_begins_anew_when_that_is_mended(cron: Connection) -> None:
    state = "SELECT state, reason, hint FROM autoembed.status WHERE table_name = 'documents'"
    failed = "SELECT count(*) FROM cron.job_run_details WHERE return_message LIKE '%does not have dimensions%'"
    with cron.transaction():
        enable(cron, arguments=", create_index => true")
        cron.execute("ALTER TABLE documents ALTER embedding TYPE halfvec")

    row = wait_until(lambda: next((row for row in cron.execute(state).fetchall() if row.reason), None), 60)
    assert (row.state, row.reason) == ("idle", "the index could not be built: column does not have dimensions")
    assert "SELECT autoembed.resync('documents')" in row.hint
    assert index_jobs(cron) == []
    failures = cron.execute(failed).fetchone()
    check = "SELECT * FROM autoembed.doctor() WHERE subject LIKE 'index of %.documents.embedding'"
    [index] = cron.execute(check).fetchall()
    assert (index.ok, index.finding) == (False, "none, it could not be built: column does not have dimensions")

    cron.execute(index.advice.split(";")[0].encode())

    wait_until_no_backfill(cron)
    assert len(cron.execute(HNSW).fetchall()) == 1
    assert cron.execute(failed).fetchone() == failures
    assert cron.execute(state).fetchall() == [("idle", None, None)]


ENDED = """
    SELECT FROM cron.job_run_details
    WHERE command LIKE 'CREATE INDEX CONCURRENTLY%documents%' AND return_message LIKE 'ERROR%cancel%'"""


@contextmanager
def a_build_held_up(db: Connection, server: Server) -> Iterator[None]:
    """The build of documents' index, five seconds old, waits for an application until the end of this."""
    lasts = """
        SELECT FROM cron.job_run_details AS d JOIN cron.job AS j USING (jobid)
        WHERE j.jobname LIKE 'autoembed-index%' AND d.status = 'running'
          AND clock_timestamp() - d.start_time > interval '5 seconds'"""
    api = server.fake_api("index")
    api.behave(hold=True)
    enable(db, arguments=", create_index => true")
    api.wait_for(held=1)
    with server.connect() as application, application.transaction(force_rollback=True):
        application.execute("INSERT INTO documents VALUES (100, 'never committed')")
        api.release()
        wait_until(lambda: db.execute(lasts).fetchall(), 60)
        yield


def test_a_build_that_takes_long_is_made_once(cron: Connection, scheduled: Server) -> None:
    """pg_cron would begin the next run as soon as the first one ends."""
    with a_build_held_up(cron, scheduled):
        job = cron.execute("SELECT jobid FROM cron.job WHERE jobname LIKE 'autoembed-index%'").fetchone()
    wait_until_no_backfill(cron)

    assert len(cron.execute(HNSW).fetchall()) == 1
    assert cron.execute("SELECT count(*) FROM cron.job_run_details WHERE jobid = %s", job).fetchone() == (1,)


def test_a_build_that_is_killed_begins_anew(cron: Connection, scheduled: Server) -> None:
    with a_build_held_up(cron, scheduled):
        [killed] = cron.execute(
            "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_progress_create_index"
            " WHERE relid = 'documents'::regclass"
        ).fetchall()
    wait_until_no_backfill(cron)

    assert killed == (True,)
    assert len(cron.execute(HNSW).fetchall()) == 1


def test_a_build_that_ends_in_an_error_that_passes_is_tried_again(cron: Connection, scheduled: Server) -> None:
    """A deadlock with an ANALYZE ends it, as a cancel does."""
    with a_build_held_up(cron, scheduled):
        [cancelled] = cron.execute(
            "SELECT pg_cancel_backend(pid) FROM pg_stat_progress_create_index WHERE relid = 'documents'::regclass"
        ).fetchall()
        wait_until(lambda: cron.execute(ENDED).fetchall())
    wait_until_no_backfill(cron)

    assert cancelled == (True,)
    assert len(cron.execute(HNSW).fetchall()) == 1


@pytest.mark.parametrize("place", ["embedding", None])
def test_without_pg_cron_it_is_said_that_no_index_is_built(
    documents: Connection, connect: Connect, place: str | None
) -> None:
    said: list[str] = []
    documents.add_notice_handler(lambda notice: said.append(f"{notice.message_primary}; {notice.message_hint}"))
    documents.execute("DROP INDEX documents_embedding_idx; SELECT autoembed.disable('documents')")
    documents.execute(
        "SELECT autoembed.enable('documents', %s, content_columns => '{title}', create_index => true)", [place]
    )
    [warning] = [words for words in said if "cannot be built" in words]
    assert "pg_cron is not installed in this database" in warning
    statement = warning[warning.index("CREATE INDEX") :]

    documents.execute("INSERT INTO documents (title, content) VALUES ('one', 'x')")
    with running_lanes(documents, connect):
        state = "SELECT state, reason FROM autoembed.status"
        wait_until(lambda: [row.state for row in documents.execute(state)] == ["idle"])
        [row] = wait_until(lambda: [row for row in documents.execute(state) if row.reason])
        assert row.reason.startswith("the index could not be built: pg_cron")

        documents.execute(statement.encode())

        wait_until(lambda: documents.execute("SELECT count(*) FROM autoembed.backfill").fetchone() == (0,))
        assert documents.execute(state).fetchall() == [("idle", None)]


@pytest.mark.parametrize(
    "end", ["SELECT autoembed.disable('documents')", "DROP TABLE documents", "SELECT autoembed.unschedule()"]
)
def test_no_build_outlives_what_it_is_for(cron: Connection, end: str) -> None:
    enable(cron, arguments=", enqueue_existing => false")
    cron.execute("SELECT cron.schedule('autoembed-index-' || max(id), '1 second', 'SELECT 1') FROM autoembed.pipeline")
    try:
        cron.execute(end.encode())
        wait_until(lambda: not index_jobs(cron))
    finally:
        cron.execute("SELECT autoembed.schedule()")


def test_an_index_finds_a_name_where_the_obvious_one_is_taken(cron: Connection) -> None:
    cron.execute("CREATE TABLE documents_embedding_idx ()")
    enable(cron, arguments=", create_index => true")
    [number] = cron.execute("SELECT max(id) FROM autoembed.pipeline").fetchone() or (0,)
    try:
        wait_until_no_backfill(cron)
    finally:
        cron.execute("DROP TABLE documents_embedding_idx")

    [definition] = cron.execute(HNSW).fetchone() or ("",)
    assert definition.startswith(f"CREATE INDEX autoembed_{number}_idx ON ")


INDEXES = """
    SELECT c.relname AS name, pg_get_indexdef(i.indexrelid) ~ 'bit_hamming_ops' AS is_binary
    FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
    WHERE i.indrelid = %s::regclass AND NOT i.indisprimary ORDER BY 1"""


@pytest.mark.parametrize("place", ["embedding", None])
def test_an_index_gives_way_to_one_of_the_other_kind_when_that_is_complete(
    cron: Connection, scheduled: Server, place: str | None
) -> None:
    table = "documents" if place else "documents_embeddings"
    cron.execute("DROP ROLE IF EXISTS librarian; CREATE ROLE librarian LOGIN PASSWORD 'postgres'")
    cron.execute("SELECT autoembed.grant_usage('librarian')")
    cron.execute("GRANT USAGE, CREATE ON SCHEMA public TO librarian; ALTER TABLE documents OWNER TO librarian")
    api = scheduled.fake_api("index")

    def altered(*, binary: bool) -> list[tuple[str, bool]]:
        owner.execute("SELECT autoembed.alter_pipeline('documents', binary_index => %s)", [binary])
        owner.execute("SELECT autoembed.alter_pipeline('documents', binary_index => %s)", [binary])
        wait_until_no_backfill(cron)
        return [tuple(row) for row in cron.execute(INDEXES, [table]).fetchall()]

    try:
        with scheduled.connect(user="librarian") as owner:
            owner.execute("SELECT autoembed.enable('documents', %s, content_columns => '{content}')", [place])
            wait_until_no_backfill(cron)
            [number] = cron.execute("SELECT max(id) FROM autoembed.pipeline").fetchone() or (0,)
            sent = len(api.texts())

            # There is no index to replace.
            assert altered(binary=True) == [(f"{table}_embedding_idx", True)]
            assert altered(binary=False) == [(f"autoembed_{number}_idx", False)]
            # An index of another name is not dropped.
            cron.execute(f"ALTER INDEX autoembed_{number}_idx RENAME TO mine")
            assert altered(binary=True) == [(f"{table}_embedding_idx", True), ("mine", False)]
            assert len(api.texts()) == sent
    finally:
        cron.execute("DROP OWNED BY librarian CASCADE; DROP ROLE librarian; CREATE TABLE IF NOT EXISTS documents ()")


def test_an_index_that_is_not_there_is_not_built_as_one_of_numbers(documents: Connection) -> None:
    documents.execute("DROP INDEX documents_embedding_idx")
    pipeline = "UPDATE autoembed.pipeline SET binary_index = true"
    documents.execute(pipeline)
    documents.execute("SELECT autoembed.alter_pipeline('documents', binary_index => false)")

    assert documents.execute("SELECT count(*) FROM autoembed.backfill WHERE create_index").fetchone() == (0,)
    assert documents.execute("SELECT binary_index FROM autoembed.pipeline").fetchone() == (False,)
