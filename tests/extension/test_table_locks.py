"""A change of how a table is embedded stops nobody else who uses the table, whatever holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection
from waiting import wait_until

Connect = Callable[..., Connection]

READS = "SELECT count(*) FROM notes"
READS_VECTORS = "SELECT count(*) FROM notes_embeddings"
WRITES = "UPDATE notes SET body = body WHERE id = 1"
ATTACHED = "SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')"
BESIDE = "SELECT autoembed.enable('notes', content_columns => '{body}')"
# As a dump of the table alone brings one.
STRAY = """
    CREATE TABLE other (LIKE notes INCLUDING ALL);
    SELECT autoembed.enable('other', 'embedding', content_columns => '{body}');
    SET event_triggers = off;
    DO $$ BEGIN EXECUTE format('CREATE TRIGGER autoembed_%1$s_insert AFTER INSERT ON notes FOR EACH ROW
        EXECUTE FUNCTION autoembed._capture_%1$s()', (SELECT id FROM autoembed.pipeline)); END $$;
    RESET event_triggers;
"""


class Change(NamedTuple):
    """A call, what holds the table meanwhile, what others go on with, what comes before, and the table it waits for."""

    call: str
    holds: str = READS
    goes_on: str = READS
    before: str = ATTACHED
    table: str = "notes"


CHANGES = {
    "enable in a new column": Change("enable('notes', 'vector', content_columns => '{body}')", before=""),
    "enable beside the rows": Change("enable('notes', content_columns => '{body}')", WRITES, WRITES, ""),
    "enable with adopt": Change(
        "enable('notes', 'embedding', content_columns => '{body}', adopt => true)", WRITES, WRITES, ""
    ),
    "enable with adopt in a new column": Change(
        "enable('notes', 'vector', content_columns => '{body}', adopt => true)", before=""
    ),
    "enable with embeddings that a table left": Change(
        "enable('notes', content_columns => '{body}')",
        READS_VECTORS,
        READS_VECTORS,
        f"{BESIDE}; SELECT autoembed.disable('notes')",
        "notes_embeddings",
    ),
    "enable where a dump brought triggers": Change("enable('notes', content_columns => '{body}')", before=STRAY),
    "alter_pipeline": Change("alter_pipeline('notes', 'embedding', on_change => 'clear')"),
    "alter_pipeline to beside": Change("alter_pipeline('notes', 'embedding', storage => 'beside')"),
    "alter_pipeline to another model": Change(
        "alter_pipeline('notes', model => 'other')", READS_VECTORS, READS_VECTORS, BESIDE, "notes_embeddings"
    ),
    "resync of a disabled trigger": Change(
        "resync('notes')", WRITES, WRITES, f"{ATTACHED}; ALTER TABLE notes DISABLE TRIGGER USER"
    ),
    "disable": Change("disable('notes')"),
    "disable with drop": Change("disable('notes', drop => true)"),
    "disable where a dump brought triggers": Change("disable('notes')", before=STRAY),
}


class Call:
    """A statement in a session of its own, in a thread; error is what ended it, if anything did."""

    def __init__(self, session: Connection, statement: str) -> None:
        self.error: psycopg.Error | None = None
        self.pid = session.info.backend_pid
        self._session, self._statement = session, statement
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._session.execute(self._statement.encode())
        except psycopg.Error as error:
            self.error = error


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, embedding halfvec(1536))")
    db.execute("INSERT INTO notes SELECT n, 'text ' || n FROM generate_series(1, 10) AS n")
    db.execute("SELECT autoembed.create_model('other', 'fake', 8)")
    return db


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_stops_nobody_behind_a_long_transaction(notes: Connection, connect: Connect, case: str) -> None:
    change, holds, goes_on, before, table = CHANGES[case]
    notes.execute(before.encode())
    # Each statement of the neighbour has a fraction of the time that the change waits.
    holder, neighbour = connect(), connect(options="-c statement_timeout=2s")
    holder.execute("BEGIN")
    holder.execute(holds.replace("id = 1", "id = 2"))

    call = Call(connect(), f"SELECT autoembed.{change}")
    looks: list[int] = []

    def has_ended_meanwhile() -> bool:
        looks.append(neighbour.execute(goes_on).rowcount)
        return not call.thread.is_alive()

    wait_until(has_ended_meanwhile, 60)

    assert len(looks) > 1
    assert isinstance(call.error, psycopg.errors.LockNotAvailable), call.error
    assert call.error.diag.message_primary == f"table public.{table} is in use by another transaction"
    assert f"process {holder.info.backend_pid}" in (call.error.diag.message_detail or "")
    assert f"pg_terminate_backend({holder.info.backend_pid})" in (call.error.diag.message_hint or "")

    holder.rollback()
    notes.execute(f"SELECT autoembed.{change}".encode())


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_waits_for_a_transaction_that_ends_soon(notes: Connection, connect: Connect, case: str) -> None:
    change, holds, _, before, _ = CHANGES[case]
    notes.execute(before.encode())
    holder = connect()
    holder.execute("BEGIN")
    holder.execute(holds)
    call = Call(connect(), f"SELECT autoembed.{change}")
    waits = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event IN ('relation', 'PgSleep')"
    wait_until(lambda: notes.execute(waits, [call.pid]).fetchall())

    holder.rollback()

    call.thread.join(20)
    assert not call.thread.is_alive()
    assert call.error is None


def test_vectors_beside_the_rows_are_attached_while_others_read(notes: Connection, connect: Connect) -> None:
    reader = connect()
    reader.execute("BEGIN")
    reader.execute(READS)
    with connect(options="-c statement_timeout=5s") as owner:
        owner.execute("SELECT autoembed.enable('notes', content_columns => '{body}')")
        owner.execute("SELECT autoembed.resync('notes')")
        owner.execute("SELECT autoembed.alter_pipeline('notes', content_template => 'a {body}')")
        owner.execute("SELECT autoembed.pause('notes'), autoembed.resume('notes')")
    reader.rollback()


@pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
@pytest.mark.parametrize(
    "statement",
    [
        "ALTER TABLE ONLY notes ADD PRIMARY KEY (id)",
        "ALTER TABLE ONLY notes ALTER body SET DEFAULT 'new'",
        "CREATE INDEX ON ONLY notes (body)",
        "ALTER TABLE even SET (fillfactor = 70)",
    ],
)
def test_a_partition_that_another_session_holds_stops_no_change_of_the_others(
    db: Connection, connect: Connect, column: str, statement: str
) -> None:
    """A parallel restore loads one partition, and gives the table its key at the same time: it was a deadlock."""
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute(
        "CREATE TABLE notes (id int NOT NULL, body text, CONSTRAINT key PRIMARY KEY (id)) PARTITION BY HASH (id)"
    )
    db.execute("CREATE TABLE even PARTITION OF notes FOR VALUES WITH (MODULUS 2, REMAINDER 0)")
    db.execute("CREATE TABLE odd PARTITION OF notes FOR VALUES WITH (MODULUS 2, REMAINDER 1)")
    db.execute(f"SELECT autoembed.enable('notes', {column}, content_columns => '{{body}}', model => 'test')".encode())
    if "PRIMARY KEY" in statement:
        db.execute("ALTER TABLE notes DROP CONSTRAINT key")
    other = connect()

    with other.transaction():
        other.execute("LOCK TABLE odd IN ACCESS EXCLUSIVE MODE")
        db.execute("SET lock_timeout = '1s'")
        db.execute(statement.encode())


# Tables that say little of themselves: never analysed, perhaps with an index or a policy to be read.
SEEN = {
    "in the row": ATTACHED,
    "beside": BESIDE,
    "with a binary index": f"""
        {BESIDE};
        CREATE INDEX ON notes_embeddings USING hnsw ((binary_quantize(embedding)::bit(1536)) bit_hamming_ops);
    """,
    "with policies": f"""
        {BESIDE};
        ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
        ALTER TABLE notes FORCE ROW LEVEL SECURITY;
        CREATE POLICY own ON notes USING (body = current_user OR id > 0);
    """,
    "with partitions": """
        DROP TABLE notes;
        CREATE TABLE notes (id int PRIMARY KEY, body text, embedding halfvec(1536)) PARTITION BY HASH (id);
        CREATE TABLE all_notes PARTITION OF notes FOR VALUES WITH (MODULUS 1, REMAINDER 0);
        SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}');
    """,
}


@pytest.mark.parametrize("case", SEEN)
def test_what_there_is_to_see_is_seen_while_others_hold_the_table(
    notes: Connection, connect: Connect, case: str
) -> None:
    notes.execute("TRUNCATE notes")
    notes.execute(SEEN[case].encode())
    tables = notes.execute(
        "SELECT string_agg(oid::regclass::text, ', ') FROM pg_class WHERE relname ~ 'notes' AND relkind IN ('r', 'p')"
    ).fetchall()[0][0]
    holder = connect()

    with holder.transaction(), connect(options="-c lock_timeout=1s") as seer:
        holder.execute(f"LOCK TABLE {tables} IN ACCESS EXCLUSIVE MODE".encode())

        for view in ("status", "progress", "failed", "usage", "search_stats", "doctor()"):
            seer.execute(f"SELECT * FROM autoembed.{view}".encode())
        [row] = seer.execute("SELECT estimated_rows FROM autoembed.status").fetchall()

    assert row.estimated_rows == 0


MANY = 12_000


@pytest.mark.parametrize("drop", ["false", "true"])
def test_the_end_of_a_large_table_waits_for_no_lane_and_leaves_nothing(
    notes: Connection, connect: Connect, drop: str
) -> None:
    notes.execute("SELECT autoembed.enable('notes', content_columns => '{body}', text_config => 'english')")
    notes.execute("SELECT autoembed.process()")
    notes.execute(
        "INSERT INTO autoembed.embedded (pipeline_id, key, digest, truncated)"
        " SELECT p.id, format('[%%s]', 100 + n), '', false FROM autoembed.pipeline AS p, generate_series(1, %s) AS n",
        [MANY],
    )
    notes.execute(
        "INSERT INTO autoembed.failure (pipeline_id, key, error_class, reason, attempts)"
        " SELECT p.id, '[1]', 'row', 'no', 5 FROM autoembed.pipeline AS p"
    )
    notes.execute("UPDATE notes SET body = 'changed'")
    # A lane that is in the midst of a transaction.
    lane = connect()
    lane.execute("BEGIN")
    lane.execute("SELECT FROM autoembed.embedded WHERE key IN ('[1]', '[101]') FOR UPDATE")
    lane.execute("SELECT FROM autoembed.failure FOR UPDATE")
    lane.execute("SELECT FROM autoembed.text_document FOR UPDATE")
    lane.execute("SELECT FROM pgmq.q_embedding_jobs FOR UPDATE")

    with connect(options="-c statement_timeout=4s") as owner:
        owner.execute(f"SELECT autoembed.disable('notes', drop => {drop})".encode())

        assert owner.execute("SELECT FROM autoembed.pipeline").rowcount == 0
        assert owner.execute("SELECT FROM autoembed.failed").rowcount == 0
        assert owner.execute("SELECT FROM pg_trigger WHERE tgrelid = 'notes'::regclass").rowcount == 0
        # The table can be attached again at once.
        owner.execute("SELECT autoembed.enable('notes', content_columns => '{body}')")
        owner.execute("SELECT autoembed.disable('notes')")
    lane.rollback()

    def left() -> list[str]:
        notes.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
        notes.execute("SELECT autoembed.process()")
        tables = ("embedded", "failure", "text_document", "text_segment", "text_posting", "paid_chunk", "backfill")
        found = [name for name in tables if notes.execute(f"SELECT FROM autoembed.{name} LIMIT 1".encode()).rowcount]
        return found + ["queue"] * notes.execute("SELECT FROM pgmq.q_embedding_jobs").rowcount

    wait_until(lambda: not left(), 30)
