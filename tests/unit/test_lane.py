"""The lane: its end, its idle time, and what it claims while requests are in flight."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import pytest

from autoembed import heap, outbox, worker
from autoembed.errors import ProviderTrouble, Refused, RowError
from autoembed.flight import Flight
from autoembed.jobs import Ledger, Report
from autoembed.limits import Permit
from autoembed.model import Request
from autoembed.outbox import Outbox
from autoembed.records import Backfill, Pipeline, Written
from autoembed.rows import Owners, Pace, Rows
from unit.fakes import (
    MODEL,
    PIPELINE,
    Cancelled,
    FakeDatabase,
    FakeProvider,
    StatementError,
    Vector,
    key_of,
    vectors_of,
)
from unit.lane import Lane, bodies, cancel
from waiting import wait_until

# --- the lane ---------------------------------------------------------------------------------------


def test_a_lane_embeds_what_comes_until_it_is_told_to_stop(lane: Lane, database: FakeDatabase) -> None:
    turns = count()

    def turn() -> None:
        assert database.in_lane
        if next(turns) == 2:
            database.put(1, "text")

    database.interrupts["claim"] = turn
    lane.stop_when(lambda: database.is_fresh(1))

    lane.work(run_seconds=20)

    assert next(turns) >= 3
    assert database.is_fresh(1)
    assert not database.in_lane
    assert database.statements[-1] == "commit"


class Clock:
    """A clock that goes on when somebody sleeps, and a little at each look."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(database: FakeDatabase, monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(database, "sleep", clock.sleep)
    return clock


def test_a_lane_ends_when_its_time_is_up(lane: Lane, clock: Clock) -> None:
    lane.work(run_seconds=30)

    assert 1030 <= clock.now < 1031


def test_a_lane_ends_by_itself_before_a_statement_timeout_ends_it(
    lane: Lane, database: FakeDatabase, clock: Clock
) -> None:
    database.statement_timeout = 60

    lane.work(run_seconds=2000)

    assert 1030 <= clock.now < 1060


def test_a_busy_lane_ends_when_its_time_is_up(lane: Lane, database: FakeDatabase) -> None:
    def more() -> None:
        database.put(1, f"text {time.monotonic()}")

    database.interrupts["claim"] = more

    lane.work(run_seconds=0.3)

    assert len(lane.provider.requests) > 1


def test_a_lane_that_is_cancelled_signs_off(lane: Lane, database: FakeDatabase) -> None:
    database.interrupts["claim"] = cancel

    with pytest.raises(Cancelled):
        lane.work(run_seconds=20)

    assert not database.in_lane
    assert database.statements[-1] == "commit"


def test_an_idle_lane_looks_at_the_queue_a_few_times_a_second_and_holds_no_transaction(
    lane: Lane, database: FakeDatabase
) -> None:
    lane.work(run_seconds=1.0)

    claims = [index for index, statement in enumerate(database.statements) if statement == "claim"]
    assert 5 <= len(claims) <= 11
    for index in claims:
        following = [statement for statement in database.statements[index + 1 :] if statement != "next_backfill"]
        assert following[0] == "commit"


def test_a_lane_frees_the_jobs_of_dead_lanes_now_and_then(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK_AROUND_SECONDS", 0.3)

    lane.work(run_seconds=0.7)

    assert 2 <= database.statements.count("clean_up") <= 3


@pytest.mark.parametrize(
    ("backfill", "due", "merges"), [(False, 0, 1), (False, 9, 1), (True, 0, 1), (True, 2, 3), (True, 9, 5)]
)
def test_a_lane_for_backfills_merges_several_times_in_each_look(
    lane: Lane, database: FakeDatabase, backfill: bool, due: int, merges: int
) -> None:
    database.merges = due
    looks = iter([False, True])
    lane.stop_when(lambda: next(looks))

    lane.work(run_seconds=20, backfill=backfill)

    statements = database.statements
    assert statements.count("merge_segments") == merges
    # No lock of a merge outlasts it.
    assert {after for before, after in pairwise(statements) if before == "merge_segments"} == {"commit"}


def test_a_lane_gives_memory_back_once_when_it_has_worked(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never, and it keeps what its fullest moment took; with each look, and an idle lane is never idle."""
    trimmed: list[bool] = []
    monkeypatch.setattr(heap, "trim", lambda: trimmed.append(database.is_fresh(1)))
    monkeypatch.setattr(worker, "LOOK_AROUND_SECONDS", 0.1)
    database.put(1, "a text")

    lane.work(run_seconds=0.7)

    assert trimmed == [True]


def test_a_lane_that_is_told_to_end_waits_a_moment_for_its_answers(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "text")

    def answer(texts: list[str]) -> Vector:
        looks = lane.network.looks_at_deadlines
        wait_until(lambda: lane.network.looks_at_deadlines > looks + 3)
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: provider.requests)

    lane.work(run_seconds=20)

    assert database.is_fresh(1)
    assert lane.network.aborts == 0


def test_a_lane_that_is_told_to_end_leaves_answers_that_do_not_come(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ENDING_SECONDS", 0.2)
    sent = database.put(1, "text")
    lane.hang()
    lane.stop_when(lambda: provider.requests)
    began_at = time.monotonic()

    lane.work(run_seconds=20)

    assert time.monotonic() - began_at >= 0.2
    # An answer that comes by itself leaves nothing to abort.
    assert lane.network.aborts >= 1
    assert not database.in_lane
    assert (database.failures, database.rests) == ({}, [])
    assert [(message.id, message.read_count) for message in database.waiting()] == [(sent, 0)]


def test_process_waits_for_its_answers_as_long_as_they_take(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "ENDING_SECONDS", 0.0)
    database.is_wanted = lambda: False
    database.put(1, "text")

    def answer(texts: list[str]) -> Vector:
        wait_until(lambda: lane.network.looks_at_deadlines > 3)
        return vectors_of(texts)

    provider.answer = answer

    assert lane.run().completed == 1


@pytest.mark.parametrize("keys", [[[7]], [[7], [8]]])
def test_a_message_that_breaks_each_pass_ends_on_the_failed_list(
    lane: Lane, database: FakeDatabase, keys: list[list[int]]
) -> None:
    """If its read does not stay counted, all messages that are claimed with it come back for ever."""
    for row_id in range(20):
        database.put(row_id, f"text {row_id}")
    database.send({"pipeline": 1, "keys": keys})
    database.content_errors[key_of(7)] = ZeroDivisionError("a mistake")
    lanes = 0

    while database.queue and lanes < 40:
        lanes += 1
        with contextlib.suppress(ZeroDivisionError):
            lane.work(run_seconds=0.05)

    assert database.queue == {}
    assert list(database.failures) == [key_of(7)]
    assert all(database.is_fresh(row_id) for row_id in range(20) if row_id != 7)


def test_a_message_that_breaks_each_pass_before_its_rows_are_known_ends_on_the_failed_list(
    lane: Lane, database: FakeDatabase
) -> None:
    database.put(1, "text")
    body = {"id": 1, "table": "documents"}
    database.send(body)

    def fail() -> None:
        raise StatementError("integer out of range")

    database.interrupts["resolve"] = fail
    for _ in range(20):
        with contextlib.suppress(StatementError):
            lane.work(run_seconds=0.05)

    assert database.queue == {}
    assert [failed[0] for failed in database.failed_messages] == [body]
    assert database.is_fresh(1)


def test_reads_that_end_for_a_passing_reason_are_not_counted(lane: Lane, database: FakeDatabase) -> None:
    sent = database.put(1, "text")
    database.content_errors[key_of(1)] = StatementError("out of memory", nobodys=True)

    with pytest.raises(StatementError):
        lane.work(run_seconds=0.05)

    assert [(message.id, message.read_count) for message in database.waiting()] == [(sent, 0)]


@pytest.mark.parametrize("where", ["content_errors", "write_errors"])
def test_a_cancel_in_an_owners_code_ends_the_lane_in_good_order(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, where: str
) -> None:
    hanging = lane.add_model("hanging", owner=20)
    sent = database.put(2, "text", pipeline_id=2)
    getattr(database, where)["[1]"] = RowError("canceling statement due to user request", cancels=True)

    def answer(texts: list[str]) -> Vector:
        database.put(1, "odd")
        hanging.aborted.wait(10)
        raise ProviderTrouble("aborted")

    hanging.answer = answer

    lane.work(run_seconds=20, max_requests=2)

    assert database.rested_pipelines == [(10, [], "canceling statement due to user request")]
    assert [(message.id, message.read_count) for message in database.waiting() if message.id == sent] == [(sent, 0)]
    assert {"pipeline": 1, "keys": [[1]], "attempts": 1} in bodies(database.waiting())
    assert database.claimed & database.queue.keys() == set()
    assert not database.in_lane
    assert database.statements[-1] == "commit"


# --- backfills --------------------------------------------------------------------------------------

SCAN = Backfill(1, 10, None, None, 0)


def fill(database: FakeDatabase, rows: int) -> None:
    """Rows that no message is for."""
    for row_id in range(rows):
        database.texts[key_of(row_id)] = f"text {row_id}"
        database.vectors[key_of(row_id)] = None


def test_where_nothing_is_due_a_table_is_scanned(lane: Lane, database: FakeDatabase) -> None:
    fill(database, 250)
    database.backfill = SCAN

    reports = [lane.run() for _ in range(3)]

    assert [report.completed for report in reports] == [100, 100, 50]
    assert database.backfill is None


@pytest.mark.parametrize(("without_rows", "completed"), [(0, 3), (20, 3), (1000, 0)])
def test_one_look_scans_tables_for_a_moment_until_one_has_rows(
    lane: Lane, database: FakeDatabase, clock: Clock, monkeypatch: pytest.MonkeyPatch, without_rows: int, completed: int
) -> None:
    fill(database, 3)
    scan = database.scan
    empty: Iterator[tuple[list[str], bool]] = iter([([], True)] * without_rows)
    monkeypatch.setattr(database, "next_backfill", lambda **_: SCAN)
    monkeypatch.setattr(database, "scan", lambda backfill, max_rows: next(empty, None) or scan(backfill, max_rows))
    began_at = clock.now

    assert lane.run().completed == completed
    assert clock.now - began_at < 1


def test_a_backfill_of_a_model_that_has_failed_is_tried_with_one_row(lane: Lane, database: FakeDatabase) -> None:
    fill(database, 3)
    database.backfill = replace(SCAN, failures=1)

    assert lane.run().completed == 1
    assert database.backfill is not None


@pytest.mark.parametrize(
    ("error", "rested", "failed"),
    [
        (RowError("no such operator"), [], ["no such operator"]),
        (RowError("could not obtain lock", locked=True), [], []),
        (RowError("ran too long", slow=True), [(10, [1], "ran too long")], []),
        (RowError("canceling statement", cancels=True), [(10, [1], "canceling statement")], []),
    ],
)
def test_a_scan_that_fails_ends_or_waits(
    lane: Lane, database: FakeDatabase, error: RowError, rested: list[Any], failed: list[str]
) -> None:
    fill(database, 3)
    database.backfill, database.scan_error = SCAN, error

    assert lane.run() == Report()

    assert database.rested_pipelines == rested
    assert database.failed_backfills == failed
    assert (database.backfill is None) == bool(failed)


@pytest.mark.parametrize("keys", [["[]"], ["1"], ["[null]"], ["nonsense"]])
def test_a_scan_that_returns_no_keys_ends(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch, keys: list[str]
) -> None:
    database.backfill = SCAN
    monkeypatch.setattr(database, "scan", lambda backfill, max_rows: (keys, True))

    lane.run()

    assert database.failed_backfills == ["the scan with its condition returned something that is not a key"]


# --- models that do not answer ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("in_flight", "seconds_ago", "is_busy"), [(0, 0.0, False), (0, 9.0, False), (2, 0.5, False), (2, 1.5, True)]
)
def test_a_model_is_busy_that_has_not_answered_for_a_while(
    database: FakeDatabase, in_flight: int, seconds_ago: float, is_busy: bool
) -> None:
    ledger = Ledger(database, [])
    requests = {Request(MODEL, ["text"], 60) for _ in range(in_flight)}
    heard_at = time.monotonic() - seconds_ago
    model = Outbox(MODEL, Rows(database, ledger, Owners()), ledger, 60, in_flight=requests, heard_at=heard_at)

    assert model.is_busy is is_busy


@pytest.mark.parametrize("provider_runs", [1, 3])
def test_a_model_that_does_not_answer_holds_up_no_other(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch, provider_runs: int
) -> None:
    monkeypatch.setattr(outbox, "BUSY_SECONDS", 0.1)
    silent = lane.add_model("silent")
    for row_id in range(10, 10 + provider_runs):
        database.put(row_id, f"silent {row_id}", pipeline_id=2)
    left: list[Any] = []

    def answer(texts: list[str]) -> Vector:
        if not left:
            wait_until(lambda: ["silent"] in database.busy)
            database.put(20, "later", pipeline_id=2)
            database.put(1, "text")
            wait_until(lambda: database.is_fresh(1))
            left.extend(bodies(database.waiting()))
        return vectors_of(texts)

    silent.answer = answer
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20)

    assert left == [{"pipeline": 2, "keys": [[20]]}]
    assert all(database.is_fresh(row_id) for row_id in (1, 10, 20))


@pytest.fixture
def outboxes(monkeypatch: pytest.MonkeyPatch) -> list[Outbox]:
    """All that are made."""
    made: list[Outbox] = []

    def make(*arguments: Any, **settings: Any) -> Outbox:
        made.append(Outbox(*arguments, **settings))
        return made[-1]

    monkeypatch.setattr(worker, "Outbox", make)
    return made


def test_a_model_is_heard_with_each_answer(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, outboxes: list[Outbox]
) -> None:
    lane.limit_inputs(1)
    database.put(1, "quick")
    database.put(2, "slow")
    answered_at: list[float] = []
    heard_at: list[float] = []

    def answer(texts: list[str]) -> Vector:
        if texts == ["slow"]:
            wait_until(lambda: database.is_fresh(1))
            heard_at.append(outboxes[0].heard_at)
        else:
            wait_until(lambda: ["slow"] in provider.requests)
            answered_at.append(time.monotonic())
        return vectors_of(texts)

    provider.answer = answer

    lane.run(max_requests=2)

    assert heard_at[0] > answered_at[0]


def test_a_model_is_waited_for_from_its_first_request_on(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, outboxes: list[Outbox]
) -> None:
    """The wait for a permit is not its silence."""
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, requests_per_minute=60))
    due_at = time.monotonic() + 0.3
    database.permits = [Permit(due_at)]
    database.put(1, "text")
    heard_at: list[float] = []

    def answer(texts: list[str]) -> Vector:
        heard_at.append(outboxes[0].heard_at)
        return vectors_of(texts)

    provider.answer = answer

    lane.run()

    assert heard_at[0] >= due_at


# --- claiming while requests are in flight ----------------------------------------------------------


def test_a_lane_claims_what_comes_while_a_request_is_in_flight(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "slow")

    def answer(texts: list[str]) -> Vector:
        if texts == ["slow"]:
            database.put(2, "quick")
            wait_until(lambda: database.is_fresh(2))
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.is_fresh(1))

    lane.work(run_seconds=20, max_requests=2)

    assert database.is_fresh(1)
    assert database.is_fresh(2)


def test_a_text_that_is_in_flight_already_is_not_sent_again(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "same")

    def answer(texts: list[str]) -> Vector:
        database.put(2, "same")
        wait_until(lambda: database.waiting() == [])
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.is_fresh(2))

    lane.work(run_seconds=20, max_requests=2)

    assert provider.requests == [["same"]]
    assert database.is_fresh(1)
    assert database.is_fresh(2)
    assert database.queue == {}


@pytest.mark.parametrize("text", ["same", "another"])
def test_a_row_that_is_queued_again_while_it_is_in_flight_ends_with_what_it_says(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, text: str
) -> None:
    database.put(1, "same")

    def answer(texts: list[str]) -> Vector:
        if texts == ["same"]:
            database.put(1, text)
            wait_until(lambda: database.waiting() == [])
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.is_fresh(1))

    lane.work(run_seconds=20, max_requests=2)

    assert database.is_fresh(1)
    assert provider.texts.count("same") == 1


@pytest.mark.parametrize("old_first", [False, True])
def test_a_refused_text_that_its_row_has_left_in_flight_puts_nothing_on_the_failed_list(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, old_first: bool
) -> None:
    """Two jobs of one row, and each may come to its end first."""
    database.put(1, "poison")
    answered: list[str] = []

    def answer(texts: list[str]) -> Vector:
        if texts == ["poison"]:
            database.put(1, "good")
            wait_until(lambda: ["good"] in provider.requests and (old_first or database.is_fresh(1)))
            answered.append("poison")
            raise Refused("the provider answered 400: not these words")
        if texts == ["good"] and old_first:
            wait_until(lambda: answered)
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=2)

    assert database.is_fresh(1)
    assert database.failures == {}


def test_a_provider_that_failed_is_tried_with_one_request(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.defined[1] = replace(PIPELINE, failures=1)
    database.put(1, "text 1")
    waited = []

    def answer(texts: list[str]) -> Vector:
        if texts == ["text 1"]:
            database.put(2, "text 2")
            looks = database.statements.count("check_interrupts")
            wait_until(lambda: database.statements.count("check_interrupts") > looks + 4)
            waited.append(list(provider.requests))
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=4)

    assert waited == [[["text 1"]]]
    assert database.is_fresh(2)


def test_a_lane_that_writes_slowly_leaves_the_rest_to_others(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SlowPace(Pace):
        """Takes each write for one of half a second."""

        def wrote(self, rows: int, seconds: float) -> None:
            super().wrote(rows, 0.5)

    monkeypatch.setattr(worker, "Pace", SlowPace)
    for row_id in range(2000):
        database.put(row_id, f"text {row_id}")
    held: list[int] = []
    database.interrupts["write"] = lambda: held.append(len(database.claimed & database.queue.keys()))
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=8)

    # Nothing is known before the first write. Rows that were just written are settled after the next claim.
    assert held[0] == 400
    assert max(held[9:]) <= 300
    assert all(database.is_fresh(row_id) for row_id in range(2000))


def test_a_lane_claims_no_more_once_a_provider_is_in_trouble(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(3):
        database.put(row_id, f"text {row_id}")
    lane.limit_inputs(1)

    def answer(texts: list[str]) -> Vector:
        if texts == ["text 0"]:
            raise ProviderTrouble("the provider answered 503")
        wait_until(lambda: database.rests)
        database.put(9, "later")
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.rests)

    lane.work(run_seconds=20, max_requests=3)

    assert not database.is_fresh(9)
    assert len(database.rests) == 1


def test_a_row_whose_vector_waits_is_not_sent_again_and_others_are(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "text")
    database.locked["[1]"] = 8
    tries = 0

    def queue_more() -> None:
        nonlocal tries
        tries += 1
        if tries == 1:
            database.put(1, "text")
            database.put(2, "other")

    database.interrupts["write"] = queue_more
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=4)

    assert sorted(text for texts in provider.requests for text in texts) == ["other", "text"]
    assert database.is_fresh(1)
    assert database.is_fresh(2)


def test_a_message_that_a_lane_died_of_ends_the_pass_that_meets_it(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    """Nothing else is to be in flight beside it."""
    database.put(1, "first")
    claims_after: list[int] = []

    def answer(texts: list[str]) -> Vector:
        if texts == ["first"]:
            number = database.put(2, "deadly")
            database.queue[number] = replace(database.queue[number], read_count=1)
            claims = database.statements.count("claim")
            wait_until(lambda: database.statements.count("claim") > claims and number not in database.claimed)
            claims = database.statements.count("claim")
            looks = lane.network.looks_at_deadlines
            wait_until(lambda: lane.network.looks_at_deadlines > looks + 4)
            claims_after.append(database.statements.count("claim") - claims)
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=4)

    assert claims_after == [0]
    assert provider.requests == [["first"], ["deadly"]]


def test_a_lane_holds_no_more_text_than_it_may(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "READ_BYTES", 50)
    monkeypatch.setattr(worker, "OWNER_READ_BYTES", 50)
    database.put(1, "x" * 51)
    seen: list[list[list[str]]] = []

    def answer(texts: list[str]) -> Vector:
        if texts == ["x" * 51]:
            database.put(2, "y")
            wait_until(lambda: "release" in database.statements)
            seen.append(list(provider.requests))
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=4)

    assert seen == [[["x" * 51]]]
    assert database.is_fresh(2)


def test_a_full_lane_sends_the_texts_of_other_owners_first(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "FULL_POLL_SECONDS", 0.0)
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    lane.limit_inputs(1)
    for row_id in range(200):
        database.put(row_id, f"text {row_id}")

    def answer(texts: list[str]) -> Vector:
        if texts == ["text 0"]:
            sent = database.put(1000, "another's", pipeline_id=2)
            wait_until(lambda: sent in database.claimed)
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=1)

    assert provider.requests[:3] == [["text 0"], ["another's"], ["text 1"]]
    assert all(database.is_fresh(row_id) for row_id in [*range(200), 1000])


def test_the_texts_of_an_owner_of_few_rows_are_sent_alone_and_written_first(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    for row_id in range(20):
        database.put(row_id, f"text {row_id}")
    database.put(1000, "another's", pipeline_id=2)
    flights: list[Flight[Any, Any]] = []

    def entered(flight: Flight[Any, Any]) -> Flight[Any, Any]:
        flights.append(flight)
        return enter(flight)

    enter = Flight.__enter__
    monkeypatch.setattr(Flight, "__enter__", entered)
    all_are_sent = threading.Event()
    written: list[int] = []

    def answer(texts: list[str]) -> Vector:
        all_are_sent.wait(20)
        return vectors_of(texts)

    def look() -> None:
        if sum(map(len, provider.requests)) == 21 and not all_are_sent.is_set():
            all_are_sent.set()
            [flight] = flights
            wait_until(lambda: flight.outcomes() == len(flight))

    def write(pipeline: Pipeline, *arguments: Any) -> dict[str, Written]:
        written.append(pipeline.id)
        return FakeDatabase.write(database, pipeline, *arguments)

    provider.answer = answer
    monkeypatch.setattr(database, "check_interrupts", look)
    monkeypatch.setattr(database, "write", write)

    lane.run(batch_size=10, max_requests=4)

    assert ["another's"] in provider.requests
    assert written[0] == 2
    assert all(database.is_fresh(row_id) for row_id in [*range(20), 1000])


def test_the_texts_of_all_owners_travel_together_where_limits_allow_few_requests(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    limited = replace(MODEL, requests_per_minute=60)
    database.defined[1] = replace(PIPELINE, model=limited)
    database.defined[2] = replace(PIPELINE, id=2, owner=20, model=limited)
    for row_id in range(20):
        database.put(row_id, f"text {row_id}")
    database.put(1000, "another's", pipeline_id=2)

    lane.run()

    assert [len(texts) for texts in provider.requests] == [21]


def test_the_texts_that_an_owner_fills_a_lane_with_leave_room_for_others(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "READ_BYTES", 50)
    monkeypatch.setattr(worker, "OWNER_READ_BYTES", 50)
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    database.put(1, "x" * 51)

    def answer(texts: list[str]) -> Vector:
        if texts == ["x" * 51]:
            database.put(2, "y", pipeline_id=2)
            wait_until(lambda: ["y"] in provider.requests)
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: database.queue == {})

    lane.work(run_seconds=20, max_requests=4)

    assert database.is_fresh(2)


@pytest.mark.parametrize(("own", "seconds"), [(None, 1.0), (8, 8)])
def test_an_sql_function_holds_up_its_lane_for_a_short_time(
    lane: Lane, database: FakeDatabase, own: float | None, seconds: float
) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function", timeout_seconds=own))
    database.put(1, "text")

    lane.work(run_seconds=0.3)

    assert database.embedder_timeouts == [seconds]
