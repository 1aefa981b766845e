"""Rows that cannot be written: locked ones, and those whose table refuses their vectors. Nothing is paid for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection, Server, waiting
from waiting import wait_until

Connect = Callable[..., Connection]

# A trigger's act before an UPDATE of the rows for which a condition holds, and the number of tries until a row fails.
REFUSALS = {
    "raises": ("RAISE 'not now';", 1, "not now"),
    "returns NULL": ("RETURN NULL;", 5, "leaves the row out of the write"),
    "raises a serialization failure": ("RAISE 'again' USING ERRCODE = 'serialization_failure';", 5, "again"),
    "raises a deadlock": ("RAISE 'dead' USING ERRCODE = 'deadlock_detected';", 5, "dead"),
    "raises no replica identity": (
        "RAISE 'cannot' USING ERRCODE = 'object_not_in_prerequisite_state';",
        1,
        "cannot",
    ),
}


def process(db: Connection) -> Any:
    """A pass over all that waits, due or not."""
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
    return db.execute("SELECT * FROM autoembed.process()").fetchone()


def drain(db: Connection) -> None:
    """Passes until nothing waits. A pass has a second for the code of an owner."""
    wait_until(lambda: process(db) and waiting(db) == 0, 60)


def refuse(db: Connection, statement: str, condition: str) -> None:
    db.execute(
        f"CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
        f" $$ BEGIN IF {condition} THEN {statement} END IF; RETURN NEW; END $$"
    )
    db.execute("CREATE TRIGGER refuse BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION refuse()")


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, embedding halfvec(1536))")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}', embedding_column => 'embedding')")
    return db


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_table_that_takes_no_vector_costs_no_request(notes: Connection, api: FakeApi, refusal: str) -> None:
    """If the vector is asked for before a write is tried, each row is paid for, once or five times."""
    statement, attempts, reason = REFUSALS[refusal]
    refuse(notes, statement, "true")
    notes.execute("INSERT INTO notes SELECT n, 'text ' || n FROM generate_series(1, 20) AS n")

    drain(notes)

    assert api.texts() == []
    failures = notes.execute("SELECT reason, attempts FROM autoembed.failed").fetchall()
    assert len(failures) == 20
    assert all(reason in failure.reason and failure.attempts == attempts for failure in failures)
    assert waiting(notes) == 0
    # The cause is mended.
    notes.execute("DROP TRIGGER refuse ON notes")
    notes.execute("SELECT autoembed.retry_failed('notes')")
    process(notes)
    assert notes.execute("SELECT count(*) FROM notes WHERE embedding IS NULL").fetchone() == (0,)


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_row_that_takes_no_vector_is_paid_for_once_at_most(notes: Connection, api: FakeApi, refusal: str) -> None:
    statement, attempts, reason = REFUSALS[refusal]
    refuse(notes, statement, "NEW.id = 7")
    notes.execute("INSERT INTO notes SELECT n, 'text ' || n FROM generate_series(1, 20) AS n")

    drain(notes)

    [failure] = notes.execute("SELECT key, reason FROM autoembed.failed").fetchall()
    assert failure.key == "[7]" and reason in failure.reason
    assert notes.execute("SELECT id FROM notes WHERE embedding IS NULL").fetchall() == [(7,)]
    assert max(Counter(api.texts()).values()) == 1


def test_a_deadlock_that_passes_costs_no_row(notes: Connection, api: FakeApi) -> None:
    """A first deadlock put the row on the failed list."""
    notes.execute("CREATE SEQUENCE tries")
    refuse(notes, "RAISE 'dead' USING ERRCODE = 'deadlock_detected';", "nextval('tries') < 3")
    notes.execute("INSERT INTO notes VALUES (1, 'one')")

    for _ in range(4):
        process(notes)

    assert notes.execute("SELECT embedding IS NULL FROM notes").fetchone() == (False,)
    assert notes.execute("SELECT FROM autoembed.failed").rowcount == 0


@pytest.mark.parametrize(
    ("publication", "ddl"),
    [
        ("FOR TABLE notes", "CREATE TABLE notes (id int NOT NULL UNIQUE, body text)"),
        ("FOR ALL TABLES", "CREATE TABLE notes (id int NOT NULL UNIQUE, body text)"),
        ("FOR TABLES IN SCHEMA public", "CREATE TABLE notes (id int NOT NULL UNIQUE, body text)"),
        (
            "FOR TABLE notes",
            "CREATE TABLE notes (id int NOT NULL UNIQUE, body text) PARTITION BY RANGE (id);"
            "CREATE TABLE part PARTITION OF notes DEFAULT",
        ),
    ],
)
def test_a_published_table_without_a_replica_identity_waits_and_says_why(
    db: Connection, api: FakeApi, publication: str, ddl: str
) -> None:
    """Its rows were paid for and refused each second, and nothing said so."""
    db.execute(ddl)
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}', embedding_column => 'embedding')")
    db.execute("INSERT INTO notes VALUES (1, 'one'), (2, 'two')")
    db.execute(f"CREATE PUBLICATION p {publication}")

    process(db)

    state = db.execute("SELECT state, reason, hint FROM autoembed.status").fetchone()
    assert state is not None
    assert (state.state, "without a replica identity" in state.reason) == ("stopped", True)
    assert api.texts() == []
    assert waiting(db) > 0
    for table in ("notes", *(["part"] if "part" in ddl else [])):
        db.execute(f"ALTER TABLE {table} REPLICA IDENTITY FULL")
    process(db)
    assert db.execute("SELECT count(*) FROM notes WHERE embedding IS NULL").fetchone() == (0,)


@pytest.mark.parametrize(
    ("publication", "ddl"),
    [
        ("FOR TABLE notes WITH (publish = 'insert')", "CREATE TABLE notes (id int NOT NULL UNIQUE, body text)"),
        ("FOR TABLE other", "CREATE TABLE notes (id int NOT NULL UNIQUE, body text)"),
        ("FOR ALL TABLES", "CREATE UNLOGGED TABLE notes (id int NOT NULL UNIQUE, body text)"),
        ("FOR ALL TABLES", "CREATE TABLE notes (id int PRIMARY KEY, body text, embedding halfvec(1536))"),
    ],
)
def test_a_table_that_can_be_updated_is_not_held_up_by_a_publication(
    db: Connection, api: FakeApi, publication: str, ddl: str
) -> None:
    db.execute("CREATE TABLE other (id int PRIMARY KEY)")
    db.execute(ddl)
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}', embedding_column => 'embedding')")
    db.execute("INSERT INTO notes VALUES (1, 'one')")
    db.execute(f"CREATE PUBLICATION p {publication}")

    process(db)

    assert db.execute("SELECT embedding IS NULL FROM notes").fetchone() == (False,)


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize(
    ("lock", "sent"),
    [
        ("SELECT FROM notes WHERE id = 1 FOR UPDATE", 1),
        ("SELECT FROM notes WHERE id = 1 FOR NO KEY UPDATE", 1),
        ("SELECT FROM notes WHERE id = 1 FOR SHARE", 1),
        ("UPDATE notes SET views = 1 WHERE id = 1", 1),
        ("DELETE FROM notes WHERE id = 1", 1),
        ("SELECT FROM notes WHERE id = 1 FOR KEY SHARE", 2),
    ],
)
def test_the_text_of_a_locked_row_is_not_sent_while_it_is_locked(
    db: Connection, api: FakeApi, connect: Connect, lock: str, sent: int, partitioned: bool
) -> None:
    """A row that was locked for an hour was paid for each second."""
    db.execute(
        "CREATE TABLE notes (id int PRIMARY KEY, body text, views int DEFAULT 0)"
        + " PARTITION BY RANGE (id)" * partitioned
    )
    if partitioned:
        db.execute("CREATE TABLE part PARTITION OF notes DEFAULT")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}', embedding_column => 'embedding')")
    db.execute("INSERT INTO notes VALUES (1, 'locked'), (2, 'free')")
    other = connect()
    other.execute("BEGIN")
    other.execute(lock.encode())

    for _ in range(3):
        process(db)

    assert len(api.texts()) == sent
    assert db.execute("SELECT FROM autoembed.failed").rowcount == 0
    other.execute("ROLLBACK")
    process(db)
    assert db.execute("SELECT count(*) FROM notes WHERE embedding IS NULL").fetchone() == (0,)
    assert sorted(api.texts()) == ["free", "locked"]


def test_a_table_that_takes_its_vectors_is_tried_once(notes: Connection, connect: Connect) -> None:
    """A try for each row, or each claim, would make every write twice as dear."""
    notes.execute("CREATE SEQUENCE writes")
    refuse(notes, "PERFORM nextval('writes');", "true")
    lane = connect()
    notes.execute("INSERT INTO notes SELECT n, 'text ' || n FROM generate_series(1, 500) AS n")
    lane.execute("CALL autoembed.work(run_seconds => 3)")

    assert notes.execute("SELECT count(*) FROM notes WHERE embedding IS NULL").fetchone() == (0,)
    assert notes.execute("SELECT last_value FROM writes").fetchone() == (501,)


# Rights to pgvector ----------------------------------------------------------------------------------

VECTOR_RIGHTS = [
    ("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC", "has no right to execute functions of pgvector: "),
    ("REVOKE USAGE ON SCHEMA public FROM PUBLIC", "has no right to use schema public, which has the types of pgvector"),
    ("REVOKE USAGE ON TYPE halfvec FROM PUBLIC", "has no right to use type public.halfvec"),
]


@pytest.fixture
def app(db: Connection, api: FakeApi, role: Callable[[str], str]) -> str:
    """A role that has a table in a schema of its own, and may attach it."""
    owner = role("app")
    db.execute(f"SELECT autoembed.grant_usage('{owner}')")
    db.execute(f"CREATE SCHEMA app AUTHORIZATION {owner}; CREATE TABLE app.notes (id int PRIMARY KEY, body text)")
    db.execute(f"INSERT INTO app.notes VALUES (1, 'one'), (2, 'two'); ALTER TABLE app.notes OWNER TO {owner}")
    return owner


@pytest.mark.parametrize("column", ["", "'embedding', "])
@pytest.mark.parametrize(("change", "problem"), VECTOR_RIGHTS)
def test_enable_asks_for_the_rights_to_pgvector_that_are_missing(
    db: Connection, app: str, connect: Callable[..., Connection], column: str, change: str, problem: str
) -> None:
    db.execute(change.encode())
    enable = f"SELECT autoembed.enable('app.notes', {column}content_columns => '{{body}}')".encode()

    with connect(user=app) as session:
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match=f"role {app} {problem}") as caught:
            session.execute(enable)
        assert "CREATE TABLE" not in str(caught.value.diag.context)
        assert "ALTER TABLE" not in str(caught.value.diag.context)
        db.execute(str(caught.value.diag.message_hint).encode())
        session.execute(enable)
    db.execute("SELECT autoembed.process()")
    assert db.execute("SELECT embedded FROM autoembed.status").fetchone() == (2,)


@pytest.mark.parametrize("column", ["", "'embedding', "])
def test_no_text_is_paid_for_while_its_owner_may_not_execute_the_functions_of_pgvector(
    db: Connection, api: FakeApi, app: str, column: str
) -> None:
    db.execute(f"SELECT autoembed.enable('app.notes', {column}content_columns => '{{body}}')".encode())
    db.execute("REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC")

    counts = db.execute("SELECT read, failed, requests FROM autoembed.process()").fetchone()

    assert counts == (0, 0, 0)
    [state] = db.execute("SELECT state, reason, hint FROM autoembed.status").fetchall()
    assert state.state == "stopped"
    assert state.reason.startswith(f"role {app} has no right to execute functions of pgvector: ")
    db.execute(state.hint.encode())
    db.execute("SELECT autoembed.process()")
    assert sorted(api.texts()) == ["one", "two"]
    assert db.execute("SELECT embedded, failed FROM autoembed.status").fetchone() == (2, 0)


def test_no_text_is_paid_for_while_its_owner_may_not_write_the_embeddings_table(
    db: Connection, api: FakeApi, app: str
) -> None:
    db.execute("SELECT autoembed.enable('app.notes', content_columns => '{body}')")
    db.execute(f"REVOKE INSERT, DELETE ON app.notes_embeddings FROM {app}")

    db.execute("SELECT autoembed.process()")

    [state] = db.execute("SELECT state, reason, hint FROM autoembed.status").fetchall()
    assert (state.state, api.texts()) == ("stopped", [])
    assert state.reason == f"role {app}, the owner of table app.notes_embeddings, has no right to INSERT, DELETE"
    db.execute(state.hint.encode())
    db.execute("SELECT autoembed.process()")
    assert db.execute("SELECT embedded, failed FROM autoembed.status").fetchone() == (2, 0)


@pytest.fixture
def small_disk(server: Server, dbname: str) -> Iterator[Callable[[str], None]]:
    """Runs commands where the tablespace small_disk is, on a disk of its own."""

    def run(command: str) -> None:
        code, said = server.container.get_wrapped_container().exec_run(["sh", "-c", f"cd /dev/shm; {command}"])
        assert code == 0, said

    run("mkdir small_disk && chown postgres small_disk")
    with server.connect() as session:
        session.execute("CREATE TABLESPACE small_disk LOCATION '/dev/shm/small_disk'")
        yield run
        server.drop_database(dbname)
        session.execute("DROP TABLESPACE small_disk")
    run("rm -rf small_disk filler")


def test_rows_wait_for_a_full_disk(db: Connection, api: FakeApi, small_disk: Callable[[str], None]) -> None:
    for name in ("notes", "others"):
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, body text)".encode())
        db.execute("SELECT autoembed.enable(%s, content_columns => '{body}')", [name])
    db.execute("ALTER TABLE notes_embeddings SET TABLESPACE small_disk")
    small_disk("dd if=/dev/zero of=filler bs=8k 2> /dev/null; test -s filler")
    db.execute("INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 20) AS n")
    db.execute("INSERT INTO others SELECT n, 'other ' || n FROM generate_series(1, 20) AS n")

    process(db)
    process(db)

    states = "SELECT table_name, state, embedded, failed FROM autoembed.status ORDER BY 1"
    assert db.execute(states).fetchall() == [("notes", "resting", 0, 0), ("others", "idle", 20, 0)]
    [reason] = db.execute("SELECT reason AS words FROM autoembed.status WHERE table_name = 'notes'").fetchall()
    assert reason.words.startswith("it rests after an error: ") and "No space left on device" in reason.words
    small_disk("rm filler")
    db.execute("UPDATE autoembed.pipeline_rest SET until = now()")
    drain(db)
    assert db.execute(states).fetchall() == [("notes", "idle", 20, 0), ("others", "idle", 20, 0)]


def test_an_event_trigger_that_refuses_ddl_fails_no_row(db: Connection, connect: Connect, api: FakeApi) -> None:
    for name, column in (("notes", "embedding"), ("others", None)):
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, body text)".encode())
        db.execute("SELECT autoembed.enable(%s, %s, content_columns => '{body}')", [name, column])
        db.execute(f"INSERT INTO {name} VALUES (1, 'one'), (2, 'two')".encode())
    db.execute("CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no DDL'; END $$")
    for event in ("start", "end"):
        db.execute(f"CREATE EVENT TRIGGER refuse ON ddl_command_{event} EXECUTE FUNCTION refuse()".encode())

        with connect() as lane:
            lane.execute("CALL autoembed.work(1)")

        states = "SELECT table_name, state, embedded, failed FROM autoembed.status ORDER BY 1"
        assert db.execute(states).fetchall() == [("notes", "idle", 2, 0), ("others", "idle", 2, 0)]
        db.execute("DROP EVENT TRIGGER refuse; UPDATE notes SET body = body || 2; UPDATE others SET body = body || 2")


@pytest.mark.parametrize("lock", ["SELECT FROM notes FOR UPDATE", "LOCK TABLE notes"])
def test_the_time_that_a_locked_row_has_waited_is_told(notes: Connection, connect: Connect, lock: str) -> None:
    notes.execute("INSERT INTO notes VALUES (1, 'one'), (2, 'two')")
    notes.execute("UPDATE pgmq.q_embedding_jobs SET enqueued_at = now() - interval '1 hour'")
    with connect() as other, other.transaction():
        other.execute(lock.encode())

        for _ in range(3):
            process(notes)

        waits = "SELECT waiting, oldest_waiting > '1 hour' AS long FROM autoembed.status"
        assert notes.execute(waits).fetchall() == [(2, True)]
        [queue] = notes.execute("SELECT ok, finding FROM autoembed.doctor() WHERE subject = 'queue'").fetchall()
        assert not queue.ok and "the oldest has waited 01:00:" in queue.finding
    drain(notes)
    assert notes.execute("SELECT count(embedding) FROM notes").fetchone() == (2,)
