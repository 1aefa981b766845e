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
    "TRUNCATE": "TRUNCATE odd; SELECT autoembed.resync('notes')",
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
