"""The lane: its end, its idle time, and what it claims while requests are in flight."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count

import pytest

from autoembed import heap, worker
from autoembed.errors import ProviderTrouble, Refused
from autoembed.rows import Pace
from unit.fakes import (
    PIPELINE,
    Cancelled,
    FakeDatabase,
    FakeProvider,
    Vector,
    vectors_of,
)
from unit.lane import Lane, cancel
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


def test_a_lane_ends_when_its_time_is_up(lane: Lane) -> None:
    started = time.monotonic()

    lane.work(run_seconds=0.3)

    assert 0.3 <= time.monotonic() - started < 1.3


def test_a_lane_ends_by_itself_before_a_statement_timeout_ends_it(lane: Lane, database: FakeDatabase) -> None:
    database.statement_timeout = 0.6
    started = time.monotonic()

    lane.work(run_seconds=20)

    assert time.monotonic() - started < 0.6


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
    assert all("commit" in database.statements[index + 1 : index + 3] for index in claims)


def test_a_lane_frees_the_jobs_of_dead_lanes_now_and_then(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LOOK_AROUND_SECONDS", 0.3)

    lane.work(run_seconds=0.7)

    assert 2 <= database.statements.count("clean_up") <= 3


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
