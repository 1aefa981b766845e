"""Somebody else writes the embedding column: an ORM that saves whole rows, an upsert, a person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, waiting
from lanes import running_lanes
from waiting import wait_until

COLUMNS = "SELECT autoembed.enable('notes', 'embedding', content_columns => '{{body}}'{more})"
# The ways in which a table is attached.
ATTACHED = {
    "columns": COLUMNS.format(more=""),
    "cleared": COLUMNS.format(more=", on_change => 'clear'"),
    "condition": COLUMNS.format(more=", condition => 'id > 0'"),
    "function": "SELECT autoembed.enable('notes', 'embedding', content_function => 'note_text')",
    "by hand": (
        "CREATE TRIGGER embed AFTER INSERT OR UPDATE ON notes FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding')"
    ),
}
OTHER = "(SELECT embedding FROM notes WHERE id = 3)"
UPSERT = (
    "INSERT INTO notes VALUES (1, 'one', 0, {vector}) ON CONFLICT (id) DO UPDATE"
    " SET body = excluded.body, embedding = excluded.embedding"
)
# The ways in which somebody else writes the vector of the row 1, whose text is left or becomes "new".
WRITES = {
    "NULL": "UPDATE notes SET embedding = NULL WHERE id = 1",
    "another": f"UPDATE notes SET embedding = {OTHER} WHERE id = 1",
    "whole row with NULL": "UPDATE notes SET body = 'one', views = 1, embedding = NULL WHERE id = 1",
    "whole row with another": f"UPDATE notes SET body = 'one', views = 1, embedding = {OTHER} WHERE id = 1",
    "old vector with a new text": "UPDATE notes SET body = 'new', embedding = (SELECT embedding FROM old) WHERE id = 1",
    "upsert with NULL": UPSERT.format(vector="NULL"),
    "upsert with another": UPSERT.format(vector=OTHER),
}


def process(db: Connection) -> Any:
    return db.execute("SELECT * FROM autoembed.process()").fetchone()


def is_right(db: Connection, key: int = 1) -> bool:
    row = db.execute("SELECT body, embedding::vector::real[] AS v FROM notes WHERE id = %s", [key]).fetchone()
    assert row is not None
    return row.v is not None and np.allclose(row.v, embedding_of(row.body), atol=1e-3)


def state_of(db: Connection, key: int = 1) -> str:
    row = db.execute("SELECT state FROM autoembed.preview('notes', %s)", [str(key)]).fetchone()
    assert row is not None
    return str(row.state)


def inputs(db: Connection) -> int:
    row = db.execute("SELECT coalesce(sum(inputs), 0) FROM autoembed.usage").fetchone()
    assert row is not None
    return int(row[0])


def make_notes(db: Connection) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, views int DEFAULT 0, embedding halfvec(1536))")
    db.execute("CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT n.body'")


def fill(db: Connection) -> None:
    db.execute("INSERT INTO notes VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    process(db)
    assert is_right(db)


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    """A table of three rows, attached and embedded."""
    make_notes(db)
    db.execute(ATTACHED["columns"])
    fill(db)
    return db


@pytest.mark.parametrize("written", WRITES)
@pytest.mark.parametrize("attached", ATTACHED)
def test_a_vector_that_is_not_of_the_text_is_replaced_and_never_called_fresh(
    db: Connection, api: FakeApi, attached: str, written: str
) -> None:
    """If a trigger compares keys and texts alone, the row stays without a vector, or with that of another text."""
    make_notes(db)
    db.execute(ATTACHED[attached])
    fill(db)
    db.execute("CREATE TABLE old AS SELECT embedding FROM notes WHERE id = 1")

    db.execute(WRITES[written])

    assert state_of(db) == "waiting"
    assert db.execute("SELECT autoembed.wait_until_fresh('notes', 0)").fetchone() == (False,)
    process(db)
    assert is_right(db)
    assert waiting(db) == 0
    assert state_of(db) == "fresh"


@pytest.mark.parametrize("written", ["NULL", "another"])
def test_resync_finds_vectors_that_no_trigger_saw(notes: Connection, written: str) -> None:
    """If the digest of the text is believed alone, a wrong vector stays."""
    notes.execute("ALTER TABLE notes DISABLE TRIGGER USER")
    notes.execute(WRITES[written])
    assert state_of(notes) == {"NULL": "missing", "another": "stale"}[written]
    before = inputs(notes)

    notes.execute("SELECT autoembed.resync('notes')")
    process(notes)

    assert is_right(notes)
    assert state_of(notes) == "fresh"
    assert inputs(notes) == before + 1


@pytest.mark.parametrize(
    "harmless",
    [
        "UPDATE notes SET embedding = embedding, views = 1",
        "UPDATE notes SET views = views + 1",
        "UPDATE notes SET body = body",
        f"BEGIN; {WRITES['another']}; UPDATE notes SET embedding = NULL WHERE id = 1; ROLLBACK",
    ],
)
def test_a_write_that_leaves_the_vector_queues_nothing(notes: Connection, harmless: str) -> None:
    notes.execute(harmless)

    assert waiting(notes) == 0


def test_a_vector_that_is_put_back_costs_no_request(notes: Connection) -> None:
    """If the queued row is not compared with what was written, its text is sent again."""
    notes.execute("CREATE TABLE old AS SELECT embedding FROM notes WHERE id = 1")
    before = inputs(notes)
    notes.execute(WRITES["another"])
    notes.execute("UPDATE notes SET embedding = (SELECT embedding FROM old) WHERE id = 1")

    process(notes)

    assert (inputs(notes), waiting(notes), state_of(notes)) == (before, 0, "fresh")


def test_a_trigger_of_the_owner_may_change_what_is_written(notes: Connection) -> None:
    """If the digest is of the vector that was sent, such a row is never fresh, and is sent again by each resync()."""
    notes.execute(
        "CREATE FUNCTION turn() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN NEW.embedding := (NEW.embedding::vector * array_fill(-1, ARRAY[1536])::vector)::halfvec;"
        " RETURN NEW; END $$"
    )
    notes.execute("CREATE TRIGGER turn BEFORE UPDATE OF embedding ON notes FOR EACH ROW EXECUTE FUNCTION turn()")
    notes.execute("UPDATE notes SET body = 'new' WHERE id = 1")
    process(notes)
    before = inputs(notes)

    notes.execute("SELECT autoembed.resync('notes')")
    process(notes)

    assert (inputs(notes), waiting(notes), state_of(notes)) == (before, 0, "fresh")


def test_a_vector_that_is_replaced_after_each_write_costs_ever_fewer_requests(notes: Connection) -> None:
    """If every change of a vector is answered by a request, a trigger and a lane go round for ever."""
    notes.execute(
        "CREATE FUNCTION undo() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN UPDATE notes SET embedding = NULL WHERE id = NEW.id; RETURN NULL; END $$"
    )
    notes.execute(
        "CREATE TRIGGER undo AFTER UPDATE OF embedding ON notes FOR EACH ROW"
        " WHEN (NEW.embedding IS NOT NULL AND pg_trigger_depth() = 0) EXECUTE FUNCTION undo()"
    )
    before = inputs(notes)

    notes.execute(WRITES["NULL"])
    for _ in range(20):
        notes.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        process(notes)

    assert 5 <= inputs(notes) - before <= 8
    assert state_of(notes) == "waiting"
    # A new text is not held up.
    notes.execute("DROP TRIGGER undo ON notes")
    notes.execute("UPDATE notes SET body = 'new' WHERE id = 1")
    notes.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
    process(notes)
    assert is_right(notes)


# The tables whose text a trigger changes each time that a vector is written, by the table of the vector.
ECHOES = {"itself": {"notes": "notes"}, "by way of another table": {"notes": "twins", "twins": "notes"}}


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("echo", ECHOES)
def test_a_text_that_each_write_of_its_vector_changes_costs_ever_fewer_requests(
    db: Connection, api: FakeApi, attached: str, echo: str
) -> None:
    make_notes(db)
    db.execute(ATTACHED[attached])
    fill(db)
    if "twins" in ECHOES[echo]:
        db.execute("CREATE TABLE twins (LIKE notes INCLUDING ALL)")
        db.execute("SELECT autoembed.enable('twins', 'embedding', content_columns => '{body}')")
        db.execute("INSERT INTO twins SELECT id, body FROM notes")
        process(db)
    for table, changed in ECHOES[echo].items():
        db.execute(
            f"CREATE FUNCTION echo_{table}() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN UPDATE {changed} SET body = body || '.' WHERE id = NEW.id; RETURN NULL; END $$;"
            f" CREATE TRIGGER echo AFTER UPDATE OF embedding ON {table} FOR EACH ROW"
            f" WHEN (NEW.embedding IS NOT NULL AND OLD.embedding IS DISTINCT FROM NEW.embedding)"
            f" EXECUTE FUNCTION echo_{table}()"
        )
    before = inputs(db)

    db.execute("UPDATE notes SET body = 'new' WHERE id = 1")
    for _ in range(30):
        db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        process(db)

    assert 5 <= inputs(db) - before <= 8 * len(ECHOES[echo])
    assert waiting(db) == 1
    for table in ECHOES[echo]:
        db.execute(f"DROP TRIGGER echo ON {table}")
    # Other rows are not held up.
    db.execute("UPDATE notes SET body = 'other' WHERE id = 2")
    process(db)
    assert is_right(db, 2)
    db.execute("UPDATE autoembed.embedded SET embedded_at = now() - interval '20 minutes'")
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
    process(db)
    assert is_right(db)
    assert waiting(db) == 0


@pytest.mark.parametrize("attached", ["columns", "by hand"])
def test_another_type_of_the_column_makes_no_vector_stale(db: Connection, api: FakeApi, attached: str) -> None:
    """If digests of the old type are compared with vectors of the new one, every text is sent again."""
    make_notes(db)
    db.execute(ATTACHED[attached])
    fill(db)
    before = inputs(db)

    db.execute("ALTER TABLE notes ALTER COLUMN embedding TYPE vector(1536)")
    db.execute("SELECT autoembed.resync('notes')")
    process(db)

    assert (inputs(db), waiting(db), state_of(db)) == (before, 0, "fresh")
    db.execute(WRITES["another"])
    process(db)
    assert is_right(db)


@pytest.mark.parametrize("written", ["NULL", "another"])
def test_rows_of_an_older_version_are_trusted_until_their_vector_is_replaced(notes: Connection, written: str) -> None:
    """If unknown digests are distrusted, an update sends every text again. If trusted always, a wrong vector stays."""
    notes.execute("UPDATE autoembed.embedded SET vector_digest = NULL, embedded_at = NULL")
    before = inputs(notes)
    notes.execute("SELECT autoembed.resync('notes')")
    process(notes)
    assert (inputs(notes), state_of(notes)) == (before, "fresh")

    notes.execute("UPDATE autoembed.embedded SET vector_digest = NULL, embedded_at = NULL")
    notes.execute(WRITES[written])
    process(notes)

    assert is_right(notes)
    assert inputs(notes) == before + 1


def test_a_partition_is_watched_like_its_table(db: Connection, api: FakeApi) -> None:
    db.execute(
        "CREATE TABLE notes (id int PRIMARY KEY, body text, views int DEFAULT 0, embedding halfvec(1536))"
        " PARTITION BY RANGE (id)"
    )
    db.execute("CREATE TABLE low PARTITION OF notes FOR VALUES FROM (0) TO (2)")
    db.execute("CREATE TABLE high PARTITION OF notes FOR VALUES FROM (2) TO (9)")
    db.execute(ATTACHED["columns"])
    fill(db)

    db.execute("UPDATE low SET embedding = (SELECT embedding FROM high WHERE id = 3)")
    process(db)

    assert is_right(db)
    assert waiting(db) == 0


def test_a_lane_replaces_what_is_written_while_it_runs(notes: Connection, connect: Callable[..., Connection]) -> None:
    with running_lanes(notes, connect):
        for key, written in enumerate(["NULL", "embedding", "NULL"], start=1):
            notes.execute(f"UPDATE notes SET embedding = {written}, views = 9 WHERE id = {key}")
        wait_until(lambda: all(is_right(notes, key) for key in (1, 2, 3)))
    assert waiting(notes) == 0


@pytest.mark.parametrize("again", ["reembed", "enable"])
def test_a_write_that_changes_nothing_may_be_left_out(notes: Connection, api: FakeApi, again: str) -> None:
    """If a row that is left out has refused its vector, each text is sent five times, and its row fails."""
    notes.execute(
        "CREATE TRIGGER z BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION suppress_redundant_updates_trigger()"
    )
    before = inputs(notes)
    if again == "reembed":
        notes.execute("SELECT autoembed.reembed('notes')")
    else:
        notes.execute("SELECT autoembed.disable('notes')")
        notes.execute(ATTACHED["columns"])

    process(notes)

    assert (inputs(notes), waiting(notes), state_of(notes)) == (before + 3, 0, "fresh")
    assert notes.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
