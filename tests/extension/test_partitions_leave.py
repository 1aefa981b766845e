"""Rows that leave a table without a DELETE: nothing of them is left, and nothing of the others is sent again."""

from __future__ import annotations

import pytest

from extension.status.steps import one, process, status
from harness import Connection

ROWS = 20
LEAVE = {
    "DETACH": "ALTER TABLE notes DETACH PARTITION odd",
    "DETACH CONCURRENTLY": "ALTER TABLE notes DETACH PARTITION odd CONCURRENTLY",
    "DROP": "DROP TABLE odd",
    "DROP of a subtree": "ALTER TABLE notes DETACH PARTITION odd; DROP TABLE odd",
    "TRUNCATE": "TRUNCATE odd",
    "TRUNCATE and DROP": "BEGIN; TRUNCATE odd; DROP TABLE odd; COMMIT",
    "DELETE without triggers": (
        "SET session_replication_role = replica; DELETE FROM odd; RESET session_replication_role;"
        " SELECT autoembed.resync('notes')"
    ),
}


@pytest.fixture(params=["NULL", "'embedding'"], ids=["beside", "in the row"])
def notes(request: pytest.FixtureRequest, db: Connection) -> Connection:
    """A table of two partitions, whose rows are embedded and in a text index."""
    db.execute("SELECT autoembed.create_model('test', 'fake', 8); SELECT autoembed.set_default_model('test')")
    db.execute("CREATE TABLE notes (id int, side int, content text, PRIMARY KEY (id, side)) PARTITION BY LIST (side)")
    db.execute("CREATE TABLE even PARTITION OF notes FOR VALUES IN (0)")
    db.execute("CREATE TABLE odd PARTITION OF notes FOR VALUES IN (1)")
    db.execute(
        f"SELECT autoembed.enable('notes', {request.param}, content_columns => '{{content}}',"
        " text_config => 'english')".encode()
    )
    db.execute("INSERT INTO notes SELECT n, n % 2, 'word ' || n FROM generate_series(1, 20) AS n")
    process(db)
    assert (status(db).embedded, status(db).state) == (ROWS, "idle")
    return db


@pytest.mark.parametrize("way", LEAVE)
def test_nothing_is_left_of_rows_that_leave(notes: Connection, way: str) -> None:
    for statement in LEAVE[way].split("; "):
        notes.execute(statement.encode())
    process(notes)

    assert (status(notes).embedded, status(notes).state) == (ROWS / 2, "idle")
    assert one(notes, "SELECT count(*) AS n FROM autoembed.text_document WHERE is_live").n == ROWS / 2
    if status(notes).embeddings_table:
        assert one(notes, "SELECT count(*) AS n FROM notes_embeddings").n == ROWS / 2
    found = notes.execute("SELECT key FROM autoembed.search('notes', 'word', 30, mode => 'hybrid')").fetchall()
    assert len(found) == ROWS / 2
    assert one(notes, "SELECT inputs FROM autoembed.usage WHERE table_name IS NOT NULL").inputs == ROWS


def test_a_partition_that_is_back_at_once_is_not_sent_again(notes: Connection) -> None:
    with notes.transaction():
        notes.execute("ALTER TABLE notes DETACH PARTITION odd")
        notes.execute("ALTER TABLE notes ATTACH PARTITION odd FOR VALUES IN (1)")
    while status(notes).state != "idle":
        process(notes)

    assert (status(notes).embedded, status(notes).state) == (ROWS, "idle")
    assert one(notes, "SELECT inputs FROM autoembed.usage").inputs == ROWS


def test_more_records_than_a_lane_looks_at_in_one_step(notes: Connection) -> None:
    notes.execute(
        "INSERT INTO autoembed.embedded (pipeline_id, key, digest, truncated)"
        " SELECT p.id, format('[%s,1]', n), '', false FROM autoembed.pipeline AS p, generate_series(100, 25000) AS n"
    )
    notes.execute("SELECT autoembed.resync('notes')")
    process(notes)
    while status(notes).state != "idle":
        process(notes)

    assert status(notes).embedded == ROWS


LATER = {
    "created": "CREATE TABLE later PARTITION OF notes FOR VALUES IN (2)",
    "created in a schema": "CREATE SCHEMA later CREATE TABLE later PARTITION OF public.notes FOR VALUES IN (2)",
    "attached": (
        "CREATE TABLE later (id int, side int, content text, embedding halfvec(8), PRIMARY KEY (id, side));"
        " ALTER TABLE notes ATTACH PARTITION later FOR VALUES IN (2)"
    ),
    "in a subtree": (
        "CREATE TABLE more PARTITION OF notes FOR VALUES IN (2, 3) PARTITION BY LIST (side);"
        " CREATE TABLE later PARTITION OF more FOR VALUES IN (2)"
    ),
    "attached in a subtree": (
        "CREATE TABLE more (id int, side int, content text, embedding halfvec(8), PRIMARY KEY (id, side))"
        " PARTITION BY LIST (side); CREATE TABLE later PARTITION OF more FOR VALUES IN (2);"
        " ALTER TABLE notes ATTACH PARTITION more FOR VALUES IN (2, 3)"
    ),
}
LATER_LEAVES = {
    "TRUNCATE": "TRUNCATE {later}",
    "DETACH": "ALTER TABLE {parent} DETACH PARTITION {later}",
    "DROP": "DROP TABLE {later}",
}


@pytest.mark.parametrize("way", LATER_LEAVES)
@pytest.mark.parametrize("comes", LATER)
def test_a_partition_that_comes_later_is_followed_like_the_others(notes: Connection, comes: str, way: str) -> None:
    has_column = status(notes).embeddings_table is None
    statement = LATER[comes] if has_column else LATER[comes].replace(" embedding halfvec(8),", "")
    notes.execute(statement.encode())
    notes.execute("INSERT INTO notes SELECT n, 2, 'word ' || n FROM generate_series(101, 105) AS n")
    while status(notes).state != "idle":
        process(notes)
    assert status(notes).embedded == ROWS + 5

    later = "later.later" if "schema" in comes else "later"
    parent = "more" if "subtree" in comes else "notes"
    notes.execute(LATER_LEAVES[way].format(later=later, parent=parent).encode())
    while status(notes).state != "idle":
        process(notes)

    assert status(notes).embedded == ROWS
    if status(notes).embeddings_table:
        assert one(notes, "SELECT count(*) AS n FROM notes_embeddings").n == ROWS


def truncating_triggers(db: Connection) -> list[str]:
    rows = db.execute(
        "SELECT t.tgrelid::regclass::text AS name FROM pg_trigger AS t WHERE t.tgname = 'autoembed_truncate' ORDER BY 1"
    )
    return [row.name for row in rows]


def test_a_partition_that_has_left_keeps_no_trigger(notes: Connection) -> None:
    notes.execute("ALTER TABLE notes DETACH PARTITION odd")
    assert truncating_triggers(notes) == ["even"]

    notes.execute("SELECT autoembed.disable('notes')")
    assert truncating_triggers(notes) == []


def test_a_partition_that_is_truncated_loses_its_embeddings_at_once(notes: Connection) -> None:
    notes.execute("TRUNCATE odd")

    if status(notes).embeddings_table:
        assert one(notes, "SELECT count(*) AS n, min(side) AS side FROM notes_embeddings") == (ROWS / 2, 0)
    notes.execute("TRUNCATE notes")
    process(notes)
    assert (status(notes).embedded, status(notes).state) == (0, "idle")


def test_a_failed_row_of_a_partition_that_is_truncated_is_off_the_list(notes: Connection) -> None:
    notes.execute(
        "INSERT INTO autoembed.failure (pipeline_id, key, error_class, reason, attempts)"
        " SELECT p.id, '[101,1]', 'row', 'too long', 5 FROM autoembed.pipeline AS p"
    )
    notes.execute("TRUNCATE odd")
    process(notes)

    assert notes.execute("SELECT key FROM autoembed.failed").fetchall() == []


def test_a_lost_trigger_of_a_partition_is_named_and_made_again(notes: Connection) -> None:
    notes.execute("DROP TRIGGER autoembed_truncate ON odd")

    triggers = "SELECT ok, finding FROM autoembed.doctor() WHERE subject LIKE 'triggers of%'"
    assert one(notes, triggers) == (False, "no trigger for truncate on partition public.odd")
    notes.execute("SELECT autoembed.resync('notes')")
    assert one(notes, triggers).ok
