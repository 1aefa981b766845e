"""The findings and advice of doctor(); a server that is well has a quiet log."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from extension.status.steps import MODEL, Connect, add, one, process, statements, status
from fake_api import FakeApi
from harness import Connection, Server, run_server
from lanes import running_lanes
from waiting import wait_until


@pytest.fixture(scope="module")
def scheduled() -> Iterator[Server]:
    """A server as the image is run: with pg_cron, one lane, and the default level of the log."""
    with ExitStack() as stack:
        yield run_server(stack, AUTOEMBED_LANES="1")


@pytest.fixture
def cron(scheduled: Server) -> Iterator[Connection]:
    """A session in the database with pg_cron, the extension made again, with its lanes."""
    with scheduled.connect() as db:
        db.execute("DROP TABLE IF EXISTS notes; DROP EXTENSION IF EXISTS autoembed CASCADE")
        db.execute("CREATE EXTENSION autoembed CASCADE")
        db.execute("SELECT autoembed.schedule()")
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (2,))
        yield db
        db.execute("DROP EXTENSION IF EXISTS autoembed CASCADE")


def doctor(db: Connection) -> dict[str, Any]:
    return {row.subject: row for row in db.execute("SELECT * FROM autoembed.doctor()")}


def sick(db: Connection) -> dict[str, Any]:
    """The findings that belong to the database: pg_cron lives elsewhere in most tests."""
    return {name: row for name, row in doctor(db).items() if not row.ok and name not in ("extension pg_cron", "lanes")}


def test_all_is_well_on_a_healthy_server_and_its_log_stays_quiet(cron: Connection, scheduled: Server) -> None:
    api = scheduled.fake_api("healthy")
    cron.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
    cron.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
    began = len(log_of(scheduled))
    cron.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    add(cron, 1, 50)
    cron.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}', create_index => true)")
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
        "backfill lanes",
        f"model {MODEL}",
        "table public.notes.embedding",
        "triggers of public.notes.embedding",
        "rights of public.notes.embedding",
        "index of public.notes.embedding",
        "failed rows of public.notes.embedding",
        "queue",
    }
    assert checks["index of public.notes.embedding"].finding == "public.notes_embedding_idx"
    assert checks["lanes"].finding == "1 running, 1 scheduled"
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
        cron.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}')")
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


def test_lanes_that_pg_cron_has_yet_to_start_are_not_said_to_be_missing(cron: Connection) -> None:
    lanes = "SELECT ok, finding, advice FROM autoembed._lane_checks(starts_within => %s) WHERE subject = 'lanes'"
    with cron.transaction(force_rollback=True):
        cron.execute("UPDATE autoembed.lane SET stop = true")

        [late] = cron.execute(lanes, ["0"]).fetchall()
        [early] = cron.execute(lanes, ["1 day"]).fetchall()

    assert (late.ok, late.finding) == (False, "0 running, 1 scheduled")
    assert (early.ok, early.finding) == (True, "0 running, 1 scheduled, pg_cron has just started")
    assert early.advice is None


def test_missing_lanes_are_found_and_the_advice_starts_them(cron: Connection) -> None:
    cron.execute("SELECT autoembed.unschedule()")
    row = wait_until(lambda: next((r for r in [doctor(cron)["lanes"]] if r.finding.startswith("0 running")), None))
    assert (row.ok, row.finding) == (False, "0 running, 0 scheduled")
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
            there.execute("SELECT cron.unschedule(jobid) FROM cron.job WHERE database = %s", [notes.info.dbname])
            notes.execute("UPDATE autoembed.lane SET stop = true")
            wait_until(lambda: one(notes, "SELECT count(*) = 0 AS gone FROM autoembed.progress").gone)


def test_an_older_version_is_found(notes: Connection) -> None:
    version = one(notes, "SELECT extversion AS v FROM pg_extension WHERE extname = 'vector'").v
    notes.execute("UPDATE pg_extension SET extversion = '0.7.0' WHERE extname = 'vector'")

    row = sick(notes)["extension vector"]

    assert row.finding == f"version 0.7.0, {version} is available"
    assert row.advice == "ALTER EXTENSION vector UPDATE;"


@pytest.mark.parametrize(
    ("version", "faults"),
    [
        ("0.8.1", ["CVE-2026-3172", "VACUUM can corrupt", "can fail"]),
        ("0.8.2", ["VACUUM can corrupt", "can fail"]),
        ("0.8.3", ["can fail"]),
        ("0.8.4", []),
        ("0.8.10", []),
        ("1.0", []),
    ],
)
def test_the_faults_of_an_older_pgvector_are_named(notes: Connection, version: str, faults: list[str]) -> None:
    notes.execute(
        "CREATE OR REPLACE FUNCTION autoembed._vector_version() RETURNS text LANGUAGE sql STABLE"
        f" SET search_path = pg_catalog, pg_temp AS $$SELECT '{version}'$$"
    )

    row = doctor(notes)["extension vector"]

    known = ["CVE-2026-3172", "VACUUM can corrupt", "can fail"]
    assert [fault for fault in known if fault in row.finding] == faults
    assert row.ok is not bool(faults)
    assert ("Install pgvector 0.8.4 or later" in (row.advice or "")) is bool(faults)


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
    notes.execute("SELECT autoembed.enable('copies', 'embedding', content_columns => '{content}', replicated => true)")
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
    notes.execute("SELECT autoembed.enable('parts', 'embedding', content_columns => '{content}')")
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
    """Puts it there like a dump of a version that knew it."""
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


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "api_key"), (403, "give it the right"), (404, "base_url"), (429, "Nothing"), (503, "outages")],
)
def test_the_advice_for_a_model_fits_what_its_provider_answers(
    notes: Connection, api: FakeApi, status: int, words: str
) -> None:
    api.behave(faults=[{"status": status, "times": "forever"}])
    assert words in sick(notes)[f"model {MODEL}"].advice


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
    notes.execute(
        "SELECT autoembed.enable('large', 'embedding', content_columns => '{content}', enqueue_existing => false)"
    )
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
        "SELECT autoembed.enable('large', 'embedding', content_columns => '{content}', model => 'giant',"
        " enqueue_existing => false)"
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
