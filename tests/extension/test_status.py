"""What operators and owners see: status, progress, doctor, preview, estimate, usage, and a quiet log."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from fake_api import FakeApi
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection, Server, is_settled, run_server, waiting, warnings_of
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]
Role = Callable[[str], str]

MODEL = "text-embedding-3-small"


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    """A table that is enabled, sound and empty."""
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{content}', enqueue_existing => false)")
    return db


@pytest.fixture(scope="module")
def scheduled() -> Iterator[Server]:
    """A server as the image is run: with pg_cron, one lane, and the default level of the log."""
    with ExitStack() as stack:
        yield run_server(stack, AUTOEMBED_LANES="1")


@pytest.fixture
def cron(scheduled: Server) -> Iterator[Connection]:
    """A session in the database with pg_cron, the extension made anew, with its lanes."""
    with scheduled.connect() as db:
        db.execute("DROP TABLE IF EXISTS notes; DROP EXTENSION IF EXISTS autoembed CASCADE")
        db.execute("CREATE EXTENSION autoembed CASCADE")
        db.execute("SELECT autoembed.schedule()")
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (2,))
        yield db
        db.execute("DROP EXTENSION IF EXISTS autoembed CASCADE")


def one(db: Connection, sql: str, *arguments: object) -> Any:
    [row] = db.execute(sql.encode(), arguments or None).fetchall()
    return row


def status(db: Connection) -> Any:
    return one(db, "SELECT * FROM autoembed.status WHERE table_name = 'notes'::regclass")


def add(db: Connection, first: int, last: int, content: str = "note") -> None:
    db.execute(
        "INSERT INTO notes SELECT n, %s || n FROM generate_series(%s::int, %s::int) AS n", [content, first, last]
    )


def process(db: Connection) -> None:
    """Embeds all that can be."""
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
    while one(db, "SELECT read FROM autoembed.process()").read:
        pass
    db.execute("SELECT autoembed.process()")


def statements(advice: str) -> list[str]:
    """The SQL that stands in an advice: a call up to its bracket, a command up to a semicolon or an alternative."""
    return re.findall(r"SELECT .*?\)(?=[.; ]|$)|(?:ALTER|CREATE|DELETE) .*?(?=;|, or |$)", advice)


# status ------------------------------------------------------------------------------------------


def test_a_table_with_nothing_to_do_is_idle_and_done(notes: Connection) -> None:
    row = status(notes)

    assert (row.state, row.reason, row.hint, row.model) == ("idle", None, None, MODEL)
    assert (row.embedded, row.waiting, row.in_flight, row.failed, row.oldest_waiting) == (0, 0, 0, 0, None)
    assert (row.percent_done, row.time_left) == (100, timedelta(0))


def test_counts_are_right_while_a_request_is_held(notes: Connection, api: FakeApi, connect: Connect) -> None:
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    add(notes, 1, 3)
    process(notes)
    add(notes, 4, 4, "poison")
    process(notes)
    api.behave(hold=True)
    add(notes, 5, 9)
    # It has no room for more than the one request.
    with running_lanes(notes, connect, arguments="max_requests => 1"):
        api.wait_for(held=1)
        add(notes, 10, 11)
        notes.execute(
            "UPDATE pgmq.q_embedding_jobs SET enqueued_at = enqueued_at - interval '1 hour' WHERE read_ct = 1"
        )
        notes.execute("ANALYZE notes")

        row = status(notes)

        assert (row.state, row.reason) == ("embedding", None)
        assert (row.embedded, row.waiting, row.in_flight, row.failed) == (3, 2, 5, 1)
        assert row.estimated_rows == 11
        assert timedelta(hours=1) <= row.oldest_waiting < timedelta(hours=1, minutes=1)
        assert float(row.percent_done) == round(100 * (1 - 7 / 11), 1)
        api.release()
        wait_until(lambda: is_settled(notes))
    row = status(notes)
    assert (row.state, row.embedded, row.waiting, row.in_flight, row.failed) == ("idle", 10, 0, 0, 1)
    assert (row.percent_done, row.oldest_waiting) == (100, None)


def test_the_rate_is_of_what_was_embedded_lately(notes: Connection) -> None:
    add(notes, 1, 50)
    assert status(notes).rows_per_second == 0
    assert status(notes).time_left is None
    process(notes)

    rate = status(notes).rows_per_second
    assert 0 < rate <= 50
    add(notes, 51, 150)
    row = status(notes)
    assert timedelta(seconds=round(100 / rate) - 1) <= row.time_left <= timedelta(seconds=100 / float(rate) * 2 + 1)
    notes.execute("UPDATE autoembed.usage_entry SET at = at - interval '2 minutes'")
    assert status(notes).rows_per_second == 0


def test_a_table_that_is_looked_through_is_backfilling(notes: Connection, api: FakeApi, connect: Connect) -> None:
    notes.execute("ALTER TABLE notes DISABLE TRIGGER USER")
    add(notes, 1, 30)
    notes.execute("ALTER TABLE notes ENABLE TRIGGER USER")
    notes.execute("ANALYZE notes")
    notes.execute("SELECT autoembed.resync('notes')")
    row = status(notes)
    assert (row.state, row.reason, row.estimated_rows, row.percent_done) == ("backfilling", None, 30, 0)
    api.behave(hold=True)

    with running_lanes(notes, connect, arguments="batch_size => 10, max_requests => 1, backfill => true") as [lane]:
        api.wait_for(held=1)
        row = status(notes)
        progress = one(notes, "SELECT * FROM autoembed.progress")
        api.release()
        wait_until(lambda: status(notes).state == "idle")

    assert (row.state, row.waiting, row.in_flight, float(row.percent_done)) == ("backfilling", 0, 10, 0)
    assert (progress.pid, progress.lane, progress.phase) == (lane.pid, "backfill", "embedding")
    assert (progress.rows_in_flight, progress.backfill_rows_done, progress.backfill_rows_total) == (10, 10, 30)
    assert progress.since > timedelta(0)
    assert status(notes).embedded == 30


def test_a_table_whose_index_is_yet_to_be_built_is_indexing(notes: Connection) -> None:
    notes.execute(
        "INSERT INTO autoembed.backfill (pipeline_id, create_index, scanned_at)"
        " SELECT id, true, clock_timestamp() FROM autoembed.pipeline"
    )

    assert status(notes).state == "indexing"


def test_a_paused_table_says_so_and_its_hint_resumes_it(notes: Connection) -> None:
    notes.execute("SELECT autoembed.pause('notes')")
    add(notes, 1, 2)
    process(notes)

    row = status(notes)
    assert (row.state, row.reason, row.waiting) == ("paused", "it is paused", 2)

    notes.execute(statements(row.hint)[0].encode())
    process(notes)
    assert (status(notes).state, status(notes).embedded) == ("idle", 2)


def test_a_stopped_table_says_why_and_its_hint_mends_it(notes: Connection) -> None:
    notes.execute("ALTER TABLE notes ALTER COLUMN embedding TYPE halfvec(7)")
    add(notes, 1, 2)
    process(notes)

    row = status(notes)
    assert (row.state, row.reason) == (
        "stopped",
        f'column "embedding" of table public.notes has 7 dimensions, model "{MODEL}" has 1536',
    )

    notes.execute(statements(row.hint)[0].encode())
    process(notes)
    assert (status(notes).state, status(notes).embedded, status(notes).reason) == ("idle", 2, None)


@pytest.mark.parametrize(("fault", "hint"), [(503, None), (401, "resume_model")])
def test_a_table_whose_model_rests_says_why_and_whether_to_act(
    notes: Connection, api: FakeApi, fault: int, hint: str | None
) -> None:
    api.behave(faults=[{"status": fault, "retry_after": 60}])
    add(notes, 1, 2)
    notes.execute("SELECT autoembed.process()")

    row = status(notes)
    assert row.state == "resting"
    assert row.reason.startswith(f'model "{MODEL}" rests: ') and str(fault) in row.reason
    assert (row.waiting, row.in_flight) == (2, 0)
    assert (row.hint is None) if hint is None else (hint in row.hint)

    notes.execute(f"SELECT autoembed.resume_model('{MODEL}')")
    process(notes)
    assert status(notes).state == "idle"


def nodes(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes(child)


def test_the_status_of_a_large_table_reads_an_index_and_no_table(notes: Connection) -> None:
    """If it counted the user's rows, or looked for each of embedded, it would take thousands of buffers more."""
    with notes.transaction():
        notes.execute("SET LOCAL session_replication_role = replica")
        notes.execute("INSERT INTO notes SELECT n, repeat('x', 1500) FROM generate_series(1, 20000) AS n")
        notes.execute(
            "INSERT INTO autoembed.embedded SELECT p.id, '[' || n || ']', '\\x00', false"
            " FROM autoembed.pipeline AS p, generate_series(1, 200000) AS n"
        )
    notes.execute("VACUUM ANALYZE autoembed.embedded")
    notes.execute("ANALYZE notes")
    notes.execute("TABLE autoembed.status")
    pages = one(notes, "SELECT pg_relation_size('autoembed.embedded_pkey') / 8192 AS n").n

    [[[explained]]] = notes.execute("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) TABLE autoembed.status").fetchall()

    plan = explained["Plan"]
    assert "notes" not in json.dumps(plan)
    assert sum(node.get("Relation Name") == "embedded" for node in nodes(plan)) == 1
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < pages + 500
    assert status(notes).embedded == 200_000


# progress ----------------------------------------------------------------------------------------


def test_progress_says_what_a_lane_is_at(notes: Connection, api: FakeApi, connect: Connect) -> None:
    api.behave(hold=True)
    with running_lanes(notes, connect) as [lane]:
        idle = one(notes, "SELECT * FROM autoembed.progress")
        add(notes, 1, 5)
        api.wait_for(held=1)
        busy = one(notes, "SELECT * FROM autoembed.progress")
        api.release()
        wait_until(lambda: is_settled(notes))
        after = one(notes, "SELECT * FROM autoembed.progress")

    assert (idle.pid, idle.lane, idle.phase) == (lane.pid, "live", "waiting for work")
    assert (idle.table_name, idle.rows_in_flight, idle.since) == (None, None, None)
    assert (busy.pid, busy.table_name, busy.embedding_column) == (lane.pid, "notes", "embedding")
    assert (busy.lane, busy.phase, busy.rows_in_flight, busy.backfill_rows_done) == ("live", "embedding", 5, None)
    assert timedelta(0) < busy.since < timedelta(seconds=10)
    assert (after.phase, after.rows_in_flight) == ("waiting for work", None)


def test_a_lane_whose_model_rests_is_not_embedding(notes: Connection, api: FakeApi, connect: Connect) -> None:
    """A message that was given back still bears the time at which the lane had it."""
    api.behave(faults=[{"status": 503, "retry_after": 60, "times": "forever"}])
    with running_lanes(notes, connect):
        add(notes, 1, 5)
        wait_until(lambda: one(notes, "SELECT count(*) AS n FROM autoembed.model_rest").n)
        wait_until(lambda: status(notes).waiting == 5)
        row = one(notes, "SELECT * FROM autoembed.progress")

    assert (row.phase, row.rows_in_flight) == ("waiting for work", None)


def test_a_dead_lane_holds_nothing_and_is_shown_nowhere(notes: Connection, api: FakeApi, connect: Connect) -> None:
    """Nobody is there to clean up after the last one."""
    api.behave(hold=True)
    with running_lanes(notes, connect) as [lane]:
        add(notes, 1, 5)
        api.wait_for(held=1)
        assert (status(notes).waiting, status(notes).in_flight) == (0, 5)
        notes.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
        lane.join()
        api.release()

    assert one(notes, "SELECT count(*) AS n FROM autoembed.lane").n == 1
    assert (status(notes).waiting, status(notes).in_flight) == (5, 0)
    assert notes.execute("TABLE autoembed.progress").fetchall() == []


def test_an_owner_sees_the_lanes_that_have_his_rows_and_none_that_have_anothers(
    notes: Connection, api: FakeApi, connect: Connect, role: Role
) -> None:
    owner, other = role("owner"), role("other")
    for name in (owner, other):
        notes.execute("SELECT autoembed.grant_usage(%s)", [name])
    notes.execute(f"ALTER TABLE notes OWNER TO {owner}")
    api.behave(hold=True)
    with running_lanes(notes, connect) as [lane]:
        add(notes, 1, 5)
        api.wait_for(held=1)
        row = one(connect(user=owner), "SELECT * FROM autoembed.progress")
        held = one(connect(user=owner), "SELECT in_flight FROM autoembed.status").in_flight
        others = connect(user=other).execute("SELECT * FROM autoembed.progress").fetchall()
        api.release()

    assert (row.pid, row.table_name, row.phase, row.rows_in_flight) == (lane.pid, "notes", "embedding", 5)
    assert (held, others) == (5, [])


# doctor ------------------------------------------------------------------------------------------


def doctor(db: Connection) -> dict[str, Any]:
    return {row.subject: row for row in db.execute("SELECT * FROM autoembed.doctor()")}


def sick(db: Connection) -> dict[str, Any]:
    """What is not right, and belongs to the database: pg_cron lives elsewhere in most tests."""
    return {name: row for name, row in doctor(db).items() if not row.ok and name not in ("extension pg_cron", "lanes")}


def test_all_is_well_on_a_healthy_server_and_its_log_stays_quiet(cron: Connection, scheduled: Server) -> None:
    api = scheduled.fake_api("healthy")
    cron.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
    cron.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
    began = len(log_of(scheduled))
    cron.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    add(cron, 1, 50)
    cron.execute("SELECT autoembed.enable('notes', content_columns => '{content}', create_index => true)")
    assert one(cron, "SELECT autoembed.wait_until_fresh('notes') AS fresh").fresh
    wait_until(lambda: status(cron).state == "idle", 40)
    add(cron, 51, 60)
    assert one(cron, "SELECT autoembed.wait_until_fresh('notes') AS fresh").fresh
    cron.execute("SELECT autoembed.embed('a question')")
    cron.execute("SELECT * FROM autoembed.estimate('notes')")
    cron.execute("TABLE autoembed.progress")

    checks = doctor(cron)

    assert [row for row in checks.values() if not row.ok or row.advice] == []
    assert checks.keys() == {
        *(f"extension {name}" for name in ("autoembed", "pgmq", "pg_cron", "plpython3u", "vector")),
        "lanes",
        f"model {MODEL}",
        "table public.notes.embedding",
        "triggers of public.notes.embedding",
        "index of public.notes.embedding",
        "failed rows of public.notes.embedding",
        "queue",
    }
    assert checks["index of public.notes.embedding"].finding == "public.notes_embedding_idx"
    assert checks["lanes"].finding == "1 running, 2 jobs of pg_cron"
    assert [line for line in log_of(scheduled)[began:] if "checkpoint" not in line] == []


def log_of(server: Server) -> list[str]:
    """The lines of the server's log."""
    return str(server.container.get_wrapped_container().logs().decode(errors="replace")).splitlines()


def test_a_dead_provider_is_said_in_the_log_when_it_dies_and_only_then(cron: Connection, scheduled: Server) -> None:
    api = scheduled.fake_api("dead")
    cron.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
    cron.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
    cron.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    add(cron, 1, 200)
    began = len(log_of(scheduled))

    def said() -> list[str]:
        return [line for line in log_of(scheduled)[began:] if "notes.embedding is not being embedded" in line]

    try:
        api.behave(faults=[{"status": 503, "times": "forever"}])
        # Both lanes meet it: one by the rows that are there, one by those that come.
        cron.execute("SELECT autoembed.enable('notes', content_columns => '{content}')")
        add(cron, 201, 400)
        wait_until(said)
        wait_until(lambda: one(cron, "SELECT max(failures) >= 3 AS more FROM autoembed.model_rest").more, 40)
        # Lanes that start anew have nothing new to say.
        cron.execute("SELECT autoembed.schedule(2)")
        wait_until(lambda: doctor(cron)["lanes"].finding.startswith("2 running"))
        wait_until(lambda: one(cron, "SELECT max(failures) >= 4 AS more FROM autoembed.model_rest").more, 40)
        assert len(said()) == 1

        api.behave()
        assert one(cron, "SELECT autoembed.wait_until_fresh('notes') AS fresh").fresh
        api.behave(faults=[{"status": 503, "times": "forever"}])
        add(cron, 401, 402)
        wait_until(lambda: one(cron, "SELECT max(failures) >= 2 AS more FROM autoembed.model_rest").more, 40)
        assert len(said()) == 2
    finally:
        api.behave()


def test_missing_lanes_are_found_and_the_advice_starts_them(cron: Connection) -> None:
    cron.execute("SELECT autoembed.unschedule()")
    row = wait_until(lambda: next((r for r in [doctor(cron)["lanes"]] if r.finding.startswith("0 running")), None))
    assert (row.ok, row.finding) == (False, "0 running, 0 jobs of pg_cron")
    wait_until(lambda: cron.execute("TABLE autoembed.progress").fetchall() == [])

    cron.execute(row.advice.encode())

    wait_until(lambda: doctor(cron)["lanes"].ok)


def test_a_database_with_lanes_from_elsewhere_is_healthy_without_pg_cron(notes: Connection, connect: Connect) -> None:
    """pg_cron lives in one database of a server, and runs lanes in any."""
    assert not doctor(notes)["lanes"].ok
    with running_lanes(notes, connect):
        assert [row for row in doctor(notes).values() if not row.ok] == []


def test_without_lanes_the_advice_starts_them_from_the_database_of_pg_cron(
    notes: Connection, server: Server, connect: Connect
) -> None:
    rows = doctor(notes)
    assert (rows["lanes"].ok, rows["extension pg_cron"].ok) == (False, False)
    assert rows["lanes"].advice == rows["extension pg_cron"].advice
    [database, statement] = re.fullmatch(r'In database "(.*)": (SELECT .*;)', rows["lanes"].advice).groups()  # type: ignore[union-attr]

    with server.connect(database) as there:
        there.execute("CREATE EXTENSION IF NOT EXISTS pg_cron")
        try:
            there.execute(statement.encode())
            wait_until(lambda: not [row for row in doctor(notes).values() if not row.ok])
        finally:
            there.execute("SELECT cron.unschedule('autoembed-lane-1')")
            notes.execute("UPDATE autoembed.lane SET stop = true")
            wait_until(lambda: one(notes, "SELECT count(*) = 0 AS gone FROM autoembed.progress").gone)


def test_an_older_version_is_found(notes: Connection) -> None:
    version = one(notes, "SELECT extversion AS v FROM pg_extension WHERE extname = 'vector'").v
    notes.execute("UPDATE pg_extension SET extversion = '0.7.0' WHERE extname = 'vector'")

    row = sick(notes)["extension vector"]

    assert row.finding == f"version 0.7.0, {version} is available"
    assert row.advice == "ALTER EXTENSION vector UPDATE;"


def test_a_disabled_trigger_is_found_and_the_advice_catches_up(notes: Connection) -> None:
    notes.execute("ALTER TABLE notes DISABLE TRIGGER autoembed_1_insert")
    add(notes, 1, 2)
    row = sick(notes)["triggers of public.notes.embedding"]
    assert row.finding == "trigger autoembed_1_insert is disabled"

    for statement in statements(row.advice):
        notes.execute(statement.encode())
    process(notes)

    assert sick(notes) == {}
    assert status(notes).embedded == 2


def test_the_advice_keeps_the_triggers_of_a_replicated_table_firing_always(notes: Connection) -> None:
    notes.execute("CREATE TABLE copies (id int PRIMARY KEY, content text)")
    notes.execute("SELECT autoembed.enable('copies', content_columns => '{content}', replicated => true)")
    process(notes)
    notes.execute("ALTER TABLE copies DISABLE TRIGGER USER")

    for statement in statements(sick(notes)["triggers of public.copies.embedding"].advice):
        notes.execute(statement.encode())

    states = notes.execute(
        "SELECT DISTINCT tgenabled::text FROM pg_trigger WHERE tgrelid = 'copies'::regclass AND NOT tgisinternal"
    ).fetchall()
    assert states == [("A",)] or "triggers of public.copies.embedding" in sick(notes)


def test_the_advice_leaves_the_users_own_disabled_triggers_alone(notes: Connection) -> None:
    notes.execute("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$no$$; END'")
    notes.execute("CREATE TRIGGER refuse BEFORE INSERT ON notes FOR EACH ROW EXECUTE FUNCTION refuse()")
    notes.execute("ALTER TABLE notes DISABLE TRIGGER refuse")
    assert sick(notes) == {}
    notes.execute("ALTER TABLE notes DISABLE TRIGGER autoembed_1_insert")

    for statement in statements(sick(notes)["triggers of public.notes.embedding"].advice):
        notes.execute(statement.encode())

    add(notes, 1, 1)


@pytest.mark.parametrize(
    ("end", "finding"),
    [
        (
            "ALTER TABLE documents DISABLE TRIGGER embed_documents_on_insert",
            "trigger embed_documents_on_insert is disabled",
        ),
        (
            "ALTER TABLE documents DISABLE TRIGGER clear_document_embedding_on_update",
            "trigger clear_document_embedding_on_update is disabled",
        ),
        (
            "ALTER TABLE documents ENABLE REPLICA TRIGGER embed_documents_on_update",
            "trigger embed_documents_on_update is disabled",
        ),
        ("DROP TRIGGER embed_documents_on_insert ON documents", "no trigger for insert"),
        ("DROP TRIGGER embed_documents_on_update ON documents", "no trigger for update"),
    ],
)
def test_the_triggers_of_a_table_set_up_by_hand_are_looked_at(documents: Connection, end: str, finding: str) -> None:
    documents.execute(
        "CREATE TRIGGER own BEFORE INSERT ON documents FOR EACH ROW EXECUTE FUNCTION tsvector_update_trigger(a, b, c)"
    )
    documents.execute("ALTER TABLE documents DISABLE TRIGGER own")
    assert sick(documents) == {}
    documents.execute(end.encode())
    documents.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")
    row = sick(documents)["triggers of public.documents.embedding"]
    assert row.finding == finding

    for statement in row.advice.split(";"):
        documents.execute(statement.encode())
    process(documents)

    assert sick(documents) == {}
    assert one(documents, "SELECT tgenabled FROM pg_trigger WHERE tgname = 'own'").tgenabled == "D"
    documents.execute("UPDATE documents SET content = 'other'")
    documents.execute("INSERT INTO documents (title, content) VALUES ('t', 'more')")
    process(documents)
    assert one(documents, "SELECT count(embedding) AS n FROM documents").n == 2


def test_a_trigger_that_is_disabled_on_a_partition_is_found(notes: Connection) -> None:
    notes.execute("CREATE TABLE parts (id int PRIMARY KEY, content text) PARTITION BY RANGE (id)")
    notes.execute("CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100)")
    notes.execute("SELECT autoembed.enable('parts', content_columns => '{content}')")
    process(notes)
    assert sick(notes) == {}
    notes.execute("ALTER TABLE parts_1 DISABLE TRIGGER autoembed_2_insert")
    row = sick(notes)["triggers of public.parts.embedding"]
    assert row.finding == "trigger autoembed_2_insert is disabled"

    notes.execute(row.advice.encode())
    process(notes)

    assert sick(notes) == {}


@pytest.mark.parametrize("event", ["insert", "update", "delete", "truncate", "clear"])
def test_a_dropped_trigger_is_found_and_the_advice_brings_it_back(notes: Connection, api: FakeApi, event: str) -> None:
    """The rows that are fresh are not paid for again."""
    notes.execute("SELECT autoembed.alter_pipeline('notes', on_change => 'clear')")
    add(notes, 1, 3)
    process(notes)
    name = f"{'zz_' if event == 'clear' else ''}autoembed_1_{event}"
    notes.execute(f"DROP TRIGGER {name} ON notes")
    row = sick(notes)["triggers of public.notes.embedding"]
    assert row.finding == f"no trigger for {event}"

    for statement in statements(row.advice):
        notes.execute(statement.encode())
    process(notes)

    assert sick(notes) == {}
    assert api.counters()["inputs"] == 3 + sum(text == "autoembed" for text in api.texts())


@pytest.mark.parametrize(
    ("cause", "cure", "finding"),
    [
        ("api_key => 'env:NOT_THERE'", "api_key => 'env:OPENAI_API_KEY'", "NOT_THERE"),
        ("api_key => 'file:/nowhere'", "api_key => 'env:OPENAI_API_KEY'", "/nowhere"),
        ("base_url => 'http://127.0.0.1:9/v1'", "base_url => '{base_url}'", "127.0.0.1"),
        ("model_id => 'no-such-model'", "model_id => 'text-embedding-3-small'", "no-such-model"),
    ],
)
def test_a_model_that_does_not_answer_is_found(
    notes: Connection, api: FakeApi, cause: str, cure: str, finding: str
) -> None:
    notes.execute(f"SELECT autoembed.alter_model('{MODEL}', {cause})")
    row = sick(notes)[f"model {MODEL}"]
    assert finding in row.finding
    assert "autoembed.alter_model()" in row.advice

    notes.execute(f"SELECT autoembed.alter_model('{MODEL}', {cure.replace('{base_url}', api.base_url)})")

    assert sick(notes) == {}


@pytest.mark.parametrize(
    "definition", ["provider = 'nonsense'", "base_url = 'ftp://x'", "base_url = 'http://elsewhere.example/v1'"]
)
def test_a_model_that_cannot_work_is_found_and_hides_no_other_check(notes: Connection, definition: str) -> None:
    """As from a dump of a version that knew it."""
    healthy = doctor(notes).keys()
    notes.execute(f"UPDATE autoembed.model SET {definition} WHERE name = '{MODEL}'")

    assert sick(notes).keys() == {f"model {MODEL}"}
    assert doctor(notes).keys() == healthy


@pytest.mark.parametrize("fault", ["wrong_dimensions", "nan", "not_json"])
def test_a_model_that_answers_nonsense_is_found(notes: Connection, api: FakeApi, fault: str) -> None:
    api.behave(faults=[{fault: True, "times": "forever"}])
    assert sick(notes).keys() == {f"model {MODEL}"}

    api.behave()

    assert sick(notes) == {}


def test_a_model_that_rests_is_found_and_the_advice_wakes_it(notes: Connection, api: FakeApi) -> None:
    api.behave(faults=[{"status": 503, "retry_after": 60}])
    add(notes, 1, 1)
    notes.execute("SELECT autoembed.process()")
    row = sick(notes)[f"model {MODEL}"]
    assert "rests until" in row.finding

    notes.execute(statements(row.advice)[0].encode())
    process(notes)

    assert sick(notes) == {}


def test_dimensions_that_do_not_fit_are_found_and_the_advice_mends_them(notes: Connection) -> None:
    notes.execute("ALTER TABLE notes ALTER COLUMN embedding TYPE halfvec(7)")
    row = sick(notes)["table public.notes.embedding"]
    assert "7 dimensions" in row.finding

    notes.execute(statements(row.advice)[0].encode())
    process(notes)

    assert sick(notes) == {}


def test_a_paused_table_is_found_and_the_advice_resumes_it(notes: Connection) -> None:
    notes.execute("SELECT autoembed.pause('notes')")
    notes.execute(statements(sick(notes)["table public.notes.embedding"].advice)[0].encode())

    assert sick(notes) == {}


def test_failed_rows_are_found_and_the_advice_tries_them_again(notes: Connection, api: FakeApi) -> None:
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    add(notes, 1, 1)
    add(notes, 2, 2, "poison")
    process(notes)
    row = sick(notes)["failed rows of public.notes.embedding"]
    assert row.finding.startswith("1, the last: ")
    api.behave()

    notes.execute(statements(row.advice)[0].encode())
    process(notes)

    assert sick(notes) == {}


LARGE_TABLES = {
    "halfvec": "CREATE TABLE large (id int PRIMARY KEY, content text, embedding halfvec(1536))",
    "vector": "CREATE TABLE large (id int PRIMARY KEY, content text, embedding vector(1536))",
    "vector of many dimensions": "CREATE TABLE large (id int PRIMARY KEY, content text, embedding vector(2500))",
    "vector without dimensions": "CREATE TABLE large (id int PRIMARY KEY, content text, embedding vector)",
    "partitioned": """
        CREATE TABLE large (id int PRIMARY KEY, content text, embedding halfvec(1536)) PARTITION BY RANGE (id);
        CREATE TABLE large_1 PARTITION OF large FOR VALUES FROM (0) TO (1000000)""",
    "in another schema": """
        CREATE SCHEMA "Of course";
        CREATE TABLE "Of course".large (id int PRIMARY KEY, content text, "The Vector" halfvec(1536))""",
}


def test_of_several_failures_the_last_is_told(notes: Connection) -> None:
    notes.execute(
        "INSERT INTO autoembed.failure (pipeline_id, key, error_class, reason, attempts, last_failed_at)"
        " SELECT id, '[1]', 'row', 'z', 1, now() - interval '1 hour' FROM autoembed.pipeline"
        " UNION ALL SELECT id, '[2]', 'row', 'a', 1, now() FROM autoembed.pipeline"
    )

    assert sick(notes)["failed rows of public.notes.embedding"].finding == "2, the last: a"


def test_failed_messages_are_found_and_the_advice_clears_them(notes: Connection) -> None:
    notes.execute("SELECT pgmq.send('embedding_jobs', '{\"nonsense\": 1}')")
    process(notes)
    row = sick(notes)["failed messages"]
    assert row.finding.startswith("1, the last: the message lacks")

    for statement in statements(row.advice):
        notes.execute(statement.encode())

    assert sick(notes) == {}


@pytest.mark.parametrize("kind", LARGE_TABLES)
def test_a_missing_index_is_found_and_the_advice_builds_it(notes: Connection, api: FakeApi, kind: str) -> None:
    table, column = ('"Of course".large', "The Vector") if kind == "in another schema" else ("large", "embedding")
    dimensions = 2500 if "many" in kind else 1536
    api.behave(models={"large": dimensions})
    notes.execute(
        "SELECT autoembed.create_model('large', 'openai', %s, base_url => %s, api_key => 'env:OPENAI_API_KEY')",
        [dimensions, api.base_url],
    )
    notes.execute(LARGE_TABLES[kind].encode())
    notes.execute(f"INSERT INTO {table} (id) SELECT generate_series(1, 10001)".encode())
    notes.execute("ANALYZE")
    notes.execute(
        "SELECT autoembed.enable(%s::regclass, %s, content_columns => '{content}', model => 'large',"
        " enqueue_existing => false)",
        [table, column],
    )
    [[name, row]] = [(name, row) for name, row in sick(notes).items() if name.startswith("index of")]
    assert row.finding == "none"

    for statement in row.advice.split(";"):
        notes.execute(statement.encode())

    assert doctor(notes)[name].ok
    expression = re.findall(r"-- Used by ORDER BY (.*) <=>", row.advice) or [f'"{column}"']
    query = (
        f"EXPLAIN SELECT id FROM {table} ORDER BY {expression[0]} <=> autoembed.embed('a question', 'large') LIMIT 5"
    )
    notes.execute("SET enable_seqscan = off")
    assert "Index Scan using" in str(notes.execute(query.encode()).fetchall())


def test_an_index_on_every_partition_is_an_index(notes: Connection) -> None:
    notes.execute(LARGE_TABLES["partitioned"].encode())
    notes.execute("CREATE TABLE large_2 PARTITION OF large FOR VALUES FROM (1000000) TO (2000000)")
    notes.execute("INSERT INTO large SELECT 990000 + n FROM generate_series(1, 20000) AS n")
    notes.execute("ANALYZE")
    notes.execute("SELECT autoembed.enable('large', content_columns => '{content}', enqueue_existing => false)")
    index = "CREATE INDEX ON {} USING hnsw (embedding halfvec_cosine_ops)"
    notes.execute(index.format("large_1").encode())
    row = sick(notes)["index of public.large.embedding"]
    assert "large_2" in row.advice and "large_1" not in row.advice

    notes.execute(index.format("large_2").encode())

    row = doctor(notes)["index of public.large.embedding"]
    assert (row.ok, row.finding) == (True, "public.large_1_embedding_idx, public.large_2_embedding_idx")


def test_vectors_too_long_for_an_index_get_an_advice_that_says_so(notes: Connection) -> None:
    notes.execute("SELECT autoembed.create_model('giant', 'openai', 5000, api_key => 'env:OPENAI_API_KEY')")
    notes.execute("CREATE TABLE large (id int PRIMARY KEY, content text, embedding halfvec(5000))")
    notes.execute("INSERT INTO large (id) SELECT generate_series(1, 10001)")
    notes.execute("ANALYZE")
    notes.execute(
        "SELECT autoembed.enable('large', content_columns => '{content}', model => 'giant', enqueue_existing => false)"
    )

    assert "dimensions => 1024" in doctor(notes)["index of public.large.embedding"].advice


@pytest.mark.parametrize("change", ["DROP TABLE notes", "DROP TABLE notes CASCADE; CREATE TABLE notes (id int)"])
def test_the_doctor_survives_a_table_that_is_gone(notes: Connection, change: str) -> None:
    add(notes, 1, 3)
    notes.execute(change.encode())

    assert all(row.advice for row in sick(notes).values())
    assert notes.execute("TABLE autoembed.status").fetchall() == []

    notes.execute("SELECT autoembed.process()")
    assert sick(notes) == {}


def test_an_old_queue_is_found(notes: Connection) -> None:
    add(notes, 1, 3)
    assert doctor(notes)["queue"].ok
    notes.execute("UPDATE pgmq.q_embedding_jobs SET enqueued_at = clock_timestamp() - interval '1 hour'")
    row = sick(notes)["queue"]
    assert row.finding == "1 messages, the oldest has waited 01:00:00"
    assert "autoembed.status" in row.advice and "SELECT autoembed.schedule(2)" in row.advice

    process(notes)

    assert sick(notes) == {}


# preview -----------------------------------------------------------------------------------------


def preview(db: Connection, key: str, table: str = "notes") -> Any:
    return one(db, "SELECT * FROM autoembed.preview(%s::regclass, %s)", table, key)


def test_preview_says_how_each_row_stands(notes: Connection, api: FakeApi) -> None:
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    add(notes, 1, 2)
    add(notes, 3, 3, "poison")
    notes.execute("INSERT INTO notes VALUES (4, ' '), (5, NULL)")
    process(notes)
    notes.execute("ALTER TABLE notes DISABLE TRIGGER USER")
    add(notes, 6, 6)
    notes.execute("UPDATE notes SET content = 'other' WHERE id = 2")
    notes.execute("ALTER TABLE notes ENABLE TRIGGER USER")
    add(notes, 7, 7)
    before = api.counters()["requests"]

    states = {key: preview(notes, str(key)) for key in range(1, 8)}

    assert {key: row.state for key, row in states.items()} == {
        1: "fresh",
        2: "stale",
        3: "failed",
        4: "not wanted",
        5: "not wanted",
        6: "missing",
        7: "waiting",
    }
    assert [states[key].content for key in (1, 2, 5)] == ["note1", "other", ""]
    assert (states[1].tokens > 0, states[1].truncated, states[5].tokens) == (True, False, 0)
    assert api.counters()["requests"] == before
    notes.execute("UPDATE notes SET content = 'third' WHERE id = 2")
    assert preview(notes, "2").state == "waiting"
    process(notes)
    assert preview(notes, "[2]").state == "fresh"


def test_preview_says_whether_a_text_is_cut(notes: Connection) -> None:
    notes.execute("INSERT INTO notes VALUES (1, repeat(%s, 1000))", [PROSE])
    row = preview(notes, "1")
    assert row.truncated and row.tokens > 8191

    process(notes)

    assert preview(notes, "1").state == "fresh"
    assert one(notes, "SELECT truncated FROM autoembed.embedded").truncated


@pytest.mark.parametrize(
    ("key_type", "value", "key"),
    [
        ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("text", "it's", "it's"),
        ("text", "[draft]", '["[draft]"]'),
        ("text", "7", "7"),
        ("numeric", "1.50", "1.50"),
        ("bigint", "9007199254740993", "9007199254740993"),
        ("timestamptz", "2026-01-01 00:00:00+00", "2026-01-01 00:00:00+00"),
    ],
)
def test_preview_finds_a_row_by_a_key_of_any_type(
    db: Connection, api: FakeApi, key_type: str, value: str, key: str
) -> None:
    db.execute("SET TimeZone = 'UTC'")
    db.execute(f"CREATE TABLE notes (id {key_type} PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{content}')")
    db.execute(f"INSERT INTO notes VALUES (%s::{key_type}, 'a text')", [value])
    assert preview(db, key).state == "waiting"

    process(db)

    assert preview(db, key).state == "fresh"


def test_preview_shows_what_row_level_security_lets_the_owner_see(
    notes: Connection, role: Role, connect: Connect
) -> None:
    owner = role("owner")
    notes.execute("SELECT autoembed.grant_usage(%s)", [owner])
    notes.execute("INSERT INTO notes VALUES (1, 'a secret'), (2, 'a note')")
    notes.execute(f"ALTER TABLE notes OWNER TO {owner}")
    notes.execute("ALTER TABLE notes ENABLE ROW LEVEL SECURITY; ALTER TABLE notes FORCE ROW LEVEL SECURITY")
    notes.execute("CREATE POLICY no_secrets ON notes USING (content <> 'a secret')")
    session = connect(user=owner)

    assert session.execute("SELECT * FROM autoembed.preview('notes', '1')").fetchall() == []
    assert preview(session, "2").content == "a note"
    # A superuser runs the owner's code with the owner's rights.
    assert notes.execute("SELECT * FROM autoembed.preview('notes', '1')").fetchall() == []


def test_preview_takes_a_composite_key_as_an_array(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE notes (site text, path text, n int, content text, PRIMARY KEY (site, path, n))")
    db.execute("SELECT autoembed.enable('notes', content_template => '# {path}\\n\\n{content}')")
    db.execute("""INSERT INTO notes VALUES ('a', 'it''s "x"', 1, 'one'), ('a', 'it''s "x"', 2, 'two')""")
    process(db)

    row = preview(db, '["a", "it\'s \\"x\\"", 2]')

    assert (row.content, row.state) == ('# it\'s "x"\n\ntwo', "fresh")
    assert db.execute("""SELECT * FROM autoembed.preview('notes', '["a", "b", 2]')""").fetchall() == []
    for wrong in ("a", '["a"]', '["a", "b", null]', '["a", "b", "c"]', '{"site": "a"}', "[1, 2"):
        with pytest.raises(psycopg.Error) as caught:
            preview(db, wrong)
        assert caught.value.sqlstate == "22023", wrong
        assert caught.value.diag.message_hint == "Its key is site, path, n, given as a JSON array."


@pytest.mark.parametrize(
    ("key_type", "key"),
    [("int", "a"), ("int", "99999999999"), ("int", "[draft]"), ("int", '["a"]'), ("uuid", "7"), ("text", "[1, 2]")],
)
def test_a_value_that_is_no_key_is_a_clean_error(db: Connection, api: FakeApi, key_type: str, key: str) -> None:
    db.execute(f"CREATE TABLE notes (id {key_type} PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{content}')")

    with pytest.raises(psycopg.Error) as caught:
        preview(db, key)

    assert caught.value.sqlstate == "22023"
    assert (caught.value.diag.message_primary, caught.value.diag.message_hint) == (
        f'"{key}" is not a valid key for table public.notes',
        "Its key is id.",
    )


def test_preview_reads_a_text_and_a_key_as_lanes_do(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE notes (id timestamptz PRIMARY KEY, at timestamptz)")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{at}')")
    db.execute("INSERT INTO notes VALUES ('2026-01-01 00:00:00+00', '2026-01-02 00:00:00+00')")
    process(db)
    db.execute("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'")

    assert preview(db, "2026-01-01 00:00:00+00")[::3] == ("2026-01-02 00:00:00+00", "fresh")


@pytest.mark.parametrize(("columns", "key"), [("id", "[150000]"), ("site, id", '["a", 150000]')])
def test_preview_of_a_row_of_a_large_table_reads_a_few_pages(
    db: Connection, api: FakeApi, columns: str, key: str
) -> None:
    db.execute(f"CREATE TABLE notes (site text DEFAULT 'a', id int, content text, PRIMARY KEY ({columns}))")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{content}')")
    with db.transaction():
        db.execute("SET LOCAL session_replication_role = replica")
        db.execute("INSERT INTO notes (id, content) SELECT n, repeat('x', 100) FROM generate_series(1, 200000) AS n")
    db.execute("ANALYZE notes")
    preview(db, key)

    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM autoembed.preview('notes', %s)"
    [[[explained]]] = psycopg.ClientCursor(db).execute(explain, [key]).fetchall()

    assert explained["Plan"]["Actual Rows"] == 1
    # Most of them of the catalog.
    pages = one(db, "SELECT pg_relation_size('notes') / 8192 AS n").n
    assert explained["Plan"]["Shared Hit Blocks"] + explained["Plan"]["Shared Read Blocks"] < 1000 < pages / 3


# wait_until_fresh --------------------------------------------------------------------------------


def test_wait_until_fresh_is_true_once_all_is_embedded_and_false_in_time(
    notes: Connection, api: FakeApi, connect: Connect
) -> None:
    api.behave(hold=True)
    fresh = "SELECT autoembed.wait_until_fresh('notes', %s) AS fresh"
    assert one(notes, fresh, 0).fresh
    with running_lanes(notes, connect):
        add(notes, 1, 3)
        api.wait_for(held=1)
        assert not one(notes, fresh, 0.3).fresh
        api.release()
        assert one(notes, fresh, 20).fresh
        assert one(notes, "SELECT count(*) AS n FROM notes WHERE embedding IS NULL").n == 0


def test_wait_until_fresh_waits_for_a_backfill_too(notes: Connection, connect: Connect) -> None:
    add(notes, 1, 30)
    notes.execute("TRUNCATE pgmq.q_embedding_jobs")
    notes.execute("SELECT autoembed.resync('notes')")
    assert not one(notes, "SELECT autoembed.wait_until_fresh('notes', 0.1) AS fresh").fresh
    with running_lanes(notes, connect):
        assert one(notes, "SELECT autoembed.wait_until_fresh('notes', 20) AS fresh").fresh
        assert one(notes, "SELECT count(*) AS n FROM notes WHERE embedding IS NULL").n == 0


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_wait_until_fresh_says_at_once_that_it_cannot_see_through_a_fixed_snapshot(
    notes: Connection, level: str
) -> None:
    """It waited for its whole time, and said that what was done was not."""
    notes.execute(f"BEGIN ISOLATION LEVEL {level}")
    with pytest.raises(psycopg.errors.InvalidTransactionState, match=f"what lanes do in a {level} transaction"):
        notes.execute("SELECT autoembed.wait_until_fresh('notes', 600)")
    notes.execute("ROLLBACK")


OWN_CHANGES = {
    "a row": ["INSERT INTO notes VALUES (1, 'own')"],
    "a row in a part": ["SAVEPOINT part", "INSERT INTO notes VALUES (1, 'own')", "RELEASE part"],
    "a scan": ["SELECT autoembed.resync('notes')"],
}


@pytest.mark.parametrize("change", OWN_CHANGES)
def test_wait_until_fresh_does_not_wait_for_its_own_transaction(notes: Connection, api: FakeApi, change: str) -> None:
    """It waited for its whole time for what no lane can see."""
    fresh = "SELECT autoembed.wait_until_fresh('notes', 600) AS fresh"
    with notes.transaction(force_rollback=True):
        for statement in OWN_CHANGES[change]:
            notes.execute(statement)
        with pytest.raises(psycopg.errors.InvalidTransactionState, match="its own transaction"), notes.transaction():
            notes.execute(fresh)
        # What a pass in the same transaction has embedded is done.
        notes.execute("SELECT autoembed.process()")
        assert one(notes, fresh).fresh
    with notes.transaction():
        notes.execute("CREATE TABLE unrelated ()")
        assert one(notes, fresh).fresh


def test_wait_until_fresh_tells_rows_that_were_given_up_from_rows_that_are_done(
    notes: Connection, api: FakeApi, connect: Connect
) -> None:
    """It said that a table of which a row had failed was fresh."""
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    notes.execute("INSERT INTO notes VALUES (1, 'good'), (2, 'poison')")
    fresh = "SELECT autoembed.wait_until_fresh('notes', 20) AS fresh"
    with running_lanes(notes, connect), warnings_of(notes) as heard:
        assert not one(notes, fresh).fresh
        assert len(heard) == 1 and "but 1 of its rows or scans failed" in heard[0]
        notes.execute("UPDATE notes SET content = 'better' WHERE id = 2")
        assert one(notes, fresh).fresh
    assert len(heard) == 1


# estimate and usage ------------------------------------------------------------------------------

PROSE = "The index finds rows without reading the whole table, and vacuum removes what nobody needs. "
WAYS = {
    "columns": "content_columns => '{title,content}'",
    "template": "content_template => '# {title}\\n\\n{content}'",
    "function": "content_function => 'its_text'",
    "condition": "content_columns => '{title,content}', condition => 'id % 3 = 0'",
}


@pytest.fixture
def articles(db: Connection, api: FakeApi) -> Connection:
    """A table with 250 texts of prose, each of its own, and rows that have none; not enabled."""
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, title text, content text)")
    db.execute("CREATE FUNCTION its_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.title || n.content'")
    db.execute(
        "INSERT INTO notes SELECT n, 'Note ' || n, repeat(%s, 1 + n %% 5) FROM generate_series(1, 250) AS n", [PROSE]
    )
    db.execute("INSERT INTO notes SELECT n, NULL, NULL FROM generate_series(251, 270) AS n")
    db.execute(f"UPDATE autoembed.model SET price_per_million_tokens = 20, builtin = false WHERE name = '{MODEL}'")
    return db


@pytest.mark.parametrize("way", WAYS)
def test_an_estimate_is_what_is_then_sent_and_itself_sends_nothing(
    articles: Connection, api: FakeApi, way: str
) -> None:
    before = one(articles, f"SELECT * FROM autoembed.estimate('notes', {WAYS[way]})")
    assert api.counters()["requests"] == 0
    assert articles.execute("TABLE autoembed.usage").fetchall() == []
    articles.execute(f"SELECT autoembed.enable('notes', {WAYS[way]})".encode())
    assert one(articles, "SELECT * FROM autoembed.estimate('notes')") == before

    process(articles)

    sent = one(articles, "SELECT * FROM autoembed.usage")
    assert (before.rows, before.requests) == (sent.inputs, sent.requests)
    assert (sent.inputs, sent.requests) == (api.counters()["inputs"], api.counters()["requests"])
    assert 0.8 * sent.tokens <= before.tokens <= 1.6 * sent.tokens
    assert float(before.cost) == pytest.approx(before.tokens * 20 / 1e6, abs=1e-4)
    assert float(sent.cost) == pytest.approx(sent.tokens * 20 / 1e6, abs=1e-6)
    assert before.duration is None
    after = one(articles, "SELECT * FROM autoembed.estimate('notes')")
    assert timedelta(0) < after.duration < timedelta(minutes=2)


def test_texts_that_are_cut_are_estimated_as_cut(articles: Connection) -> None:
    """What is beyond the model's limit is not sent and not paid for."""
    articles.execute("TRUNCATE notes")
    articles.execute("INSERT INTO notes SELECT n, n, repeat(%s, 2000) FROM generate_series(1, 3) AS n", [PROSE])
    articles.execute("SELECT autoembed.enable('notes', content_columns => '{title,content}')")
    before = one(articles, "SELECT * FROM autoembed.estimate('notes')")

    process(articles)

    sent = one(articles, "SELECT * FROM autoembed.usage")
    assert before.requests == sent.requests
    assert 0.8 * sent.tokens <= before.tokens <= 1.6 * sent.tokens


def test_equal_texts_are_estimated_once(articles: Connection) -> None:
    articles.execute("UPDATE notes SET title = 'same', content = 'text' WHERE id <= 200")
    articles.execute("SELECT autoembed.enable('notes', content_columns => '{title,content}')")
    before = one(articles, "SELECT * FROM autoembed.estimate('notes')")

    process(articles)

    sent = one(articles, "SELECT * FROM autoembed.usage")
    assert (before.rows, sent.inputs, before.requests) == (250, 51, sent.requests)
    assert 0.8 * sent.tokens <= before.tokens <= 1.6 * sent.tokens


def test_a_large_table_is_sampled_and_its_estimate_is_near(articles: Connection) -> None:
    articles.execute(
        "INSERT INTO notes SELECT n, 'Note ' || n, CASE WHEN n %% 4 > 0 THEN repeat(%s, 1 + n %% 2) END"
        " FROM generate_series(1001, 61000) AS n",
        [PROSE],
    )
    # ANALYZE counts rows twice that the session has not reported yet.
    articles.execute("SELECT pg_stat_force_next_flush()")
    articles.execute("ANALYZE notes")
    estimated = one(
        articles,
        "SELECT * FROM autoembed.estimate('notes', content_columns => '{title,content}', condition => 'id > 1000')",
    )
    # What is sent, had each text been looked at: in requests as packed of the next thousand rows.
    exact = one(
        articles,
        "SELECT sum(e.tokens)::bigint AS tokens, sum(e.requests)::bigint AS requests FROM ("
        " SELECT array_agg(concat_ws(E'\\n\\n', title, content) ORDER BY id) AS texts FROM notes WHERE id > 1000"
        " GROUP BY id / 1000) AS t, LATERAL autoembed._estimate_texts(t.texts, NULL) AS e",
    )
    some = one(
        articles, "SELECT * FROM autoembed.estimate('notes', content_columns => '{content}', condition => 'id > 1000')"
    )

    assert 0.8 * 60000 <= estimated.rows <= 1.2 * 60000
    assert 0.8 * exact.tokens <= estimated.tokens <= 1.2 * exact.tokens
    assert 0.8 * exact.requests <= estimated.requests <= 1.2 * exact.requests
    # A quarter of the rows has no content.
    assert 0.8 * 45000 <= some.rows <= 1.2 * 45000


def test_usage_counts_each_table_and_embed_by_itself(articles: Connection, api: FakeApi) -> None:
    articles.execute("SELECT autoembed.enable('notes', content_columns => '{title,content}')")
    process(articles)
    articles.execute("SELECT autoembed.embed('a question') AS one, autoembed.embed('another') AS two")

    rows = articles.execute("SELECT * FROM autoembed.usage ORDER BY table_name NULLS FIRST").fetchall()

    assert [(r.model, r.table_name, r.embedding_column, r.requests, r.inputs) for r in rows] == [
        (MODEL, None, None, 2, 2),
        (MODEL, "notes", "embedding", 3, 250),
    ]
    assert sum(row.tokens for row in rows) == api.counters()["tokens"]
    assert {row.day for row in rows} == {one(articles, "SELECT (now() AT TIME ZONE 'UTC')::date AS day").day}
    articles.execute("UPDATE autoembed.usage_entry SET at = at - interval '11 minutes'")
    articles.execute("SELECT autoembed.process()")
    assert one(articles, "SELECT count(*) AS n FROM autoembed.usage_entry").n == 0
    total = "SELECT sum(requests) AS requests, sum(inputs) AS inputs, sum(tokens) AS tokens FROM autoembed.usage"
    assert one(articles, total) == (5, 252, sum(row.tokens for row in rows))


def test_a_table_set_up_as_in_the_guide_has_a_status_too(db: Connection, api: FakeApi) -> None:
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(GUIDE_TRIGGERS)
    db.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")

    row = one(db, "SELECT * FROM autoembed.status")

    assert (row.table_name, row.state, row.waiting) == ("documents", "embedding", 1)
    assert waiting(db) == 1
