"""The view status tells the truth about rows: each counts once, and no stale row counts as done."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest

from extension.status.steps import Connect, add, one, process, status
from fake_api import FakeApi
from harness import Connection
from lanes import running_lanes


@pytest.fixture
def fake(db: Connection) -> Connection:
    """A table of ten rows whose model, the default one, is a fake; and another model of the same dimensions."""
    db.execute("SELECT autoembed.create_model('one', 'fake', 8); SELECT autoembed.create_model('two', 'fake', 8)")
    db.execute("SELECT autoembed.set_default_model('one')")
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    add(db, 1, 10)
    db.execute("SELECT autoembed.enable('notes', content_columns => '{content}', embedding_column => 'embedding')")
    process(db)
    assert status(db).state == "idle"
    return db


@pytest.mark.parametrize("view", ["status", "progress", "failed", "usage"])
def test_a_view_can_be_asked_for_a_table_by_its_name(fake: Connection, view: str) -> None:
    fake.execute(f"SELECT * FROM autoembed.{view} WHERE table_name = 'notes'".encode())


def test_another_default_model_leaves_vectors_stale_and_says_so(fake: Connection) -> None:
    heard: list[str] = []
    fake.add_notice_handler(lambda note: heard.append(str(note.message_primary)))

    fake.execute("SELECT autoembed.set_default_model('two')")
    row = status(fake)

    assert heard == ["public.notes.embedding holds vectors of another model"]
    assert (row.state, row.embedded, row.stale, row.percent_done, row.time_left) == ("stale", 10, 10, 0, None)
    assert row.hint == "Embed the rows again: SELECT autoembed.resync('notes');"

    fake.execute("SELECT autoembed.resync('notes')")
    process(fake)
    row = status(fake)

    assert (row.state, row.reason, row.stale, row.percent_done) == ("idle", None, 0, 100)


def test_a_model_that_becomes_another_one_leaves_vectors_stale(fake: Connection) -> None:
    fake.execute("SELECT autoembed.alter_model('one', model_id => 'other')")
    fake.execute("UPDATE notes SET content = 'changed' WHERE id <= 4")
    process(fake)

    assert (status(fake).state, status(fake).stale) == ("stale", 6)


def test_a_change_that_makes_the_same_vectors_leaves_none_stale(fake: Connection) -> None:
    fake.execute("SELECT autoembed.alter_model('one', max_inputs_per_request => 5)")
    fake.execute("SELECT autoembed.set_default_model('one')")

    assert (status(fake).state, status(fake).stale) == ("idle", 0)


def test_a_row_that_waits_in_several_messages_counts_once(fake: Connection) -> None:
    for n in range(3):
        fake.execute(f"UPDATE notes SET content = 'changed {n}'".encode())

    assert one(fake, "SELECT sum(rows) AS messages FROM autoembed._job").messages == 30
    assert (status(fake).waiting, status(fake).percent_done) == (10, 0)


def test_a_row_that_has_its_vector_is_not_in_flight(fake: Connection) -> None:
    fake.execute(
        "UPDATE notes SET content = 'changed ' || id; UPDATE notes SET content = 'changed again' WHERE id = 10"
    )
    # This session stands for a lane that has claimed all of it, and has written four rows.
    fake.execute("UPDATE autoembed._job SET due_at = clock_timestamp() + interval '1 hour', last_read_at = now()")
    fake.execute(
        "INSERT INTO autoembed.lane (pid, backend_start, claimed_at, message_ids)"
        " SELECT a.pid, a.backend_start, now(), ARRAY(SELECT q.message_id FROM autoembed._job AS q)"
        " FROM pg_stat_get_activity(pg_backend_pid()) AS a"
    )
    fake.execute("UPDATE autoembed.embedded SET embedded_at = clock_timestamp() WHERE key IN ('[1]','[2]','[3]','[4]')")

    assert (status(fake).waiting, status(fake).in_flight, status(fake).percent_done) == (0, 6, 40)


def test_nothing_is_said_to_be_done_before_it_is(fake: Connection, connect: Connect) -> None:
    fake.execute("""SELECT autoembed.alter_model('one', options => '{"delay_seconds": 0.05}')""")
    look = """
        SELECT s.state, s.percent_done, s.time_left, (SELECT count(*) FROM autoembed._job AS j) AS messages
        FROM autoembed.status AS s
    """
    with running_lanes(fake, connect):
        for n in range(20):
            fake.execute("UPDATE notes SET content = 'fast ' || %s || id", [n])
            looks = [one(fake, look)]
            while looks[-1].messages:
                looks.append(one(fake, look))
            for row in looks[:-1]:
                assert row.time_left is None or row.time_left >= timedelta(seconds=1), row
                assert row.percent_done < 100, row
                assert row.state != "idle", row


def test_a_scan_that_finds_more_rows_than_were_estimated_is_not_done(fake: Connection) -> None:
    fake.execute("SELECT autoembed.pause('notes'); SELECT autoembed.resync('notes')")
    fake.execute("UPDATE autoembed.backfill SET rows_queued = 1000")

    assert status(fake).percent_done < 100
    assert status(fake).time_left != timedelta(0)


def test_a_scan_with_a_condition_claims_to_know_nothing(fake: Connection) -> None:
    fake.execute("SELECT autoembed.pause('notes'); SELECT autoembed.reembed('notes', condition => 'id <= 3')")

    assert (status(fake).percent_done, status(fake).time_left) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "name"), [("", "autoembed lane"), ("backfill => true", "autoembed backfill lane")]
)
def test_a_lane_has_a_name_for_those_who_watch_the_server(
    fake: Connection, connect: Connect, arguments: str, name: str
) -> None:
    with running_lanes(fake, connect, arguments=arguments) as [lane]:
        row = one(fake, "SELECT application_name FROM pg_stat_activity WHERE pid = %s", lane.pid)

    assert row.application_name == name


@pytest.mark.parametrize("change", ["ALTER TABLE pages DROP COLUMN body", "DROP TABLE pages_embeddings CASCADE"])
def test_a_stopped_table_is_never_fresh_and_says_so_at_once(db: Connection, api: FakeApi, change: str) -> None:
    """If only the queue is looked at, a table that queues nothing any more is fresh."""
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, note text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    db.execute("INSERT INTO pages VALUES (1, 'one')")
    db.execute("SELECT autoembed.process()")
    assert one(db, "SELECT autoembed.wait_until_fresh('pages', 0) AS fresh").fresh
    db.execute(change.encode())
    db.execute("INSERT INTO pages (id, note) VALUES (2, 'two')")

    said: list[tuple[str, str | None]] = []
    db.add_notice_handler(lambda note: said.append((str(note.message_primary), note.message_hint)))
    began_at = time.monotonic()
    assert not one(db, "SELECT autoembed.wait_until_fresh('pages', 600) AS fresh").fresh

    assert time.monotonic() - began_at < 60
    row = one(db, "SELECT * FROM autoembed.status")
    assert (row.state, row.percent_done, row.time_left) == ("stopped", None, None)
    [(message, hint)] = said
    assert row.reason in message and hint == row.hint


def test_status_and_wait_until_fresh_tell_the_same_after_a_change_of_the_model_and_back(
    notes: Connection, api: FakeApi
) -> None:
    """If vectors are stale until a lane has time for the end of a scan, all is fresh and stale at once."""
    notes.execute("SELECT autoembed.create_model('other', provider => 'fake', dimensions => 7)")
    add(notes, 1, 5)
    process(notes)
    notes.execute("SELECT autoembed.alter_pipeline('notes', model => 'other')")
    notes.execute("SELECT autoembed.alter_pipeline('notes', model => '')")
    # One pass scans the rows. The next one ends the scan.
    notes.execute("SELECT autoembed.process()")

    assert one(notes, "SELECT autoembed.wait_until_fresh('notes', 0) AS fresh").fresh
    assert one(notes, "SELECT count(*) AS scans FROM autoembed.backfill").scans == 1
    assert (status(notes).state, status(notes).stale) == ("idle", 0)
