"""Embedding columns and lanes, as operators and owners see them: status, progress, and waiting for both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from extension.status.steps import MODEL, Connect, Role, add, one, process, statements, status
from fake_api import FakeApi
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection, is_settled, waiting, warnings_of
from lanes import running_lanes
from waiting import wait_until


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
    # A session reports its inserts when it likes, and what it reports after ANALYZE is added to that.
    notes.execute("SELECT pg_stat_force_next_flush()")
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
    api.behave(faults=[{"status": fault, "retry_after": 60, "times": "forever"}])
    add(notes, 1, 2)
    notes.execute("SELECT autoembed.process()")

    row = status(notes)
    assert row.state == "resting"
    assert row.reason.startswith(f'model "{MODEL}" rests: ') and str(fault) in row.reason
    assert (row.waiting, row.in_flight) == (2, 0)
    assert (row.hint is None) if hint is None else (hint in row.hint)

    api.behave()
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
    read = [node for node in nodes(plan) if node.get("Relation Name") == "embedded" and node["Actual Loops"] > 0]
    assert len(read) == 1, read
    assert plan["Shared Hit Blocks"] + plan["Shared Read Blocks"] < pages + 500
    assert status(notes).embedded == 200_000


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
    with warnings_of(notes) as heard:
        assert not one(notes, "SELECT autoembed.wait_until_fresh('notes', 0.1) AS fresh").fresh
    assert "rows of table public.notes still wait after 0.1 seconds" in heard[0]
    [why] = re.findall(r"SELECT .*::text", heard[0])
    assert one(notes, why).state == "backfilling"
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
        # A row that a pass in the same transaction has embedded is done.
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


def test_a_table_set_up_as_in_the_guide_has_a_status_too(db: Connection, api: FakeApi) -> None:
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(GUIDE_TRIGGERS)
    db.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")

    row = one(db, "SELECT * FROM autoembed.status")

    assert (row.table_name, row.state, row.waiting) == ("documents", "embedding", 1)
    assert waiting(db) == 1
