"""Rows: the texts that are read and sent, the vectors that are written, and the speed of writing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from autoembed import rows
from autoembed.errors import RowError
from autoembed.jobs import MAX_ATTEMPTS, Report
from autoembed.rows import Pace
from unit.fakes import (
    MODEL,
    PIPELINE,
    Failure,
    FakeDatabase,
    FakeProvider,
    identified,
    key_of,
    vector_of,
)
from unit.lane import Lane, bodies

# --- rows and texts ---------------------------------------------------------------------------------


def test_an_empty_queue_costs_one_look(lane: Lane, database: FakeDatabase) -> None:
    assert lane.run() == Report()
    assert database.statements == ["claim", "next_backfill"]


def test_each_row_gets_the_vector_of_its_text(lane: Lane, database: FakeDatabase, provider: FakeProvider) -> None:
    for row_id in range(25):
        database.put(row_id, f"text {row_id}")

    report = lane.run(batch_size=10, max_requests=3)

    assert report == Report(read=25, completed=25, requests=3)
    assert sorted(map(len, provider.requests)) == [5, 10, 10]
    assert all(database.is_fresh(row_id) for row_id in range(25))
    assert database.queue == {}


def test_a_pass_claims_no_more_than_its_requests_hold(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(25):
        database.put(row_id, f"text {row_id}")

    assert lane.run(batch_size=5, max_requests=2).read == 10
    assert len(database.waiting()) == 15


def test_a_message_of_the_guides_form_is_embedded(lane: Lane, database: FakeDatabase) -> None:
    database.texts["[7]"] = "text"
    database.vectors["[7]"] = None
    names = {"schema": "public", "table": "documents", "contentFunction": "f", "embeddingColumn": "embedding"}
    database.send({"id": 7, **names, "pipeline": None})

    assert lane.run().completed == 1
    assert database.is_fresh(7)
    assert "resolve" in database.statements


def test_equal_texts_are_sent_once(lane: Lane, database: FakeDatabase, provider: FakeProvider) -> None:
    for row_id in range(6):
        database.put(row_id, f"text {row_id % 2}")

    report = lane.run(batch_size=2, max_requests=3)

    assert provider.texts == ["text 0", "text 1"]
    assert report.completed == 6
    assert all(database.is_fresh(row_id) for row_id in range(6))


def test_messages_for_one_row_are_one_job(lane: Lane, database: FakeDatabase, provider: FakeProvider) -> None:
    for text in ("oldest", "older", "newest"):
        database.put(1, text)

    report = lane.run()

    assert provider.texts == ["newest"]
    assert report == Report(read=1, completed=1, requests=1)
    assert database.queue == {}


def test_a_row_twice_in_one_message_is_one_job(lane: Lane, database: FakeDatabase, provider: FakeProvider) -> None:
    database.put(1, "text")
    database.send({"pipeline": 1, "keys": [[1], [1]]})

    assert lane.run() == Report(read=1, completed=1, requests=1)
    assert database.queue == {}


def test_the_most_attempts_of_a_rows_messages_count(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "text")
    for attempts in (3, 1):
        database.send({"pipeline": 1, "keys": [[1]], "attempts": attempts})
    database.content_errors["[1]"] = RowError("no text")

    lane.run()

    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[1]], "attempts": 4}]


def test_an_unchanged_text_is_not_sent_again(lane: Lane, database: FakeDatabase, provider: FakeProvider) -> None:
    database.put(1, "text")
    lane.run()
    database.put(1, "text")

    assert lane.run() == Report(read=1, completed=1)
    assert provider.texts == ["text"]
    assert database.queue == {}


def test_an_unchanged_text_whose_vector_is_gone_is_sent_again(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "text")
    lane.run()
    database.vectors["[1]"] = None
    database.put(1, "text")

    lane.run()

    assert provider.texts == ["text", "text"]
    assert database.is_fresh(1)


@pytest.mark.parametrize("change", [{"model_id": "fake-large"}, {"dimensions": 4}])
def test_an_unchanged_text_is_sent_to_another_model(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, change: dict[str, Any]
) -> None:
    database.put(1, "text")
    lane.run()
    database.defined[1] = replace(PIPELINE, model=identified(replace(MODEL, **change)))
    database.put(1, "text")

    lane.run()

    assert provider.texts == ["text", "text"]


def test_a_row_that_says_again_what_its_vector_is_of_leaves_the_failed_list(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "good")
    lane.run()
    lane.refuse("bad")
    database.put(1, "bad")
    lane.run()
    assert list(database.failures) == ["[1]"]

    database.put(1, "good")
    lane.run()

    assert database.failures == {}


@pytest.mark.parametrize("blank", [None, "", "  \n\t", "\u00a0\u3000"])
def test_a_blank_text_has_no_vector_and_is_not_sent(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, blank: str | None
) -> None:
    database.put(1, "text")
    lane.run()
    database.put(1, blank)

    report = lane.run()

    assert report == Report(read=1, completed=1)
    assert database.vectors["[1]"] is None
    assert database.embedded == {}
    assert provider.texts == ["text"]
    assert database.queue == {}


def test_a_deleted_row_settles_and_is_not_sent(lane: Lane, database: FakeDatabase, provider: FakeProvider) -> None:
    database.put(1, "text")
    lane.run()
    database.put(1, "other")
    del database.texts["[1]"]

    assert lane.run() == Report(read=1, completed=1)
    assert provider.texts == ["text"]
    assert database.embedded == {}
    assert database.queue == {}


@pytest.mark.parametrize(("limit", "sent"), [(None, "x" * 15_356), (11, "x" * 17)])
def test_a_text_beyond_the_limit_is_cut_and_marked(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, limit: int | None, sent: str
) -> None:
    model = replace(MODEL, max_tokens_per_input=limit)
    database.defined[1] = replace(PIPELINE, model=model)
    text = "x" * 30_000
    database.put(1, text)
    database.put(2, "short")

    lane.run()

    assert sorted(provider.texts) == ["short", sent]
    assert database.embedded == {"[1]": (model.digest(text), True), "[2]": (model.digest("short"), False)}
    assert database.vectors["[1]"] == vector_of(sent).tolist()


def test_a_prefix_counts_towards_both_limits(lane: Lane, database: FakeDatabase, provider: FakeProvider) -> None:
    options = {"document_prefix": "search_document: "}
    model = replace(MODEL, max_tokens_per_input=15, max_tokens_per_request=30, options=options)
    database.defined[1] = replace(PIPELINE, model=model)
    for row_id in range(3):
        database.put(row_id, f"{row_id}" + "x" * 100)

    lane.run()

    assert [len(request) for request in provider.requests] == [2, 1]
    assert {len(text) for text in provider.texts} == {5}


def test_a_text_beyond_the_limit_fails_where_it_must_not_be_cut(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, max_tokens_per_input=11), truncate=False)
    database.put(1, "x" * 18)
    database.put(2, "x" * 17)

    report = lane.run()

    assert (report.completed, report.failed) == (1, 1)
    assert provider.texts == ["x" * 17]
    assert list(database.failures) == ["[1]"]
    assert "11 tokens" in database.failures["[1]"].reason
    assert database.queue == {}


def test_a_provider_that_truncates_by_itself_gets_the_whole_text(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    provider.MAX_TOKENS_PER_INPUT = None
    database.put(1, "x" * 30_000)

    lane.run()

    assert provider.texts == ["x" * 30_000]
    assert database.embedded["[1]"][1] is False


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [({"max_inputs_per_request": 2}, [2, 2, 1]), ({"max_tokens_per_request": 20}, [4, 1]), ({}, [5])],
)
def test_requests_keep_to_the_models_limits(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, limits: dict[str, Any], sizes: list[int]
) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, **limits))
    for row_id in range(5):
        database.put(row_id, f"no {row_id}")

    lane.run()

    assert [len(request) for request in provider.requests] == sizes


# --- a row in trouble -------------------------------------------------------------------------------


def test_a_failing_content_function_holds_up_its_own_row_only(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(50):
        database.put(row_id, f"text {row_id}")
    database.content_errors["[33]"] = RowError("division by zero")

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (49, 1, 0)
    assert all(database.is_fresh(row_id) for row_id in range(50) if row_id != 33)
    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[33]], "attempts": 1}]
    assert [(job["id"], job["error"]) for job in report.failed_jobs] == [(33, "division by zero")]


def test_a_failing_content_function_is_tried_max_attempts_times_ever_later(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "text")
    database.content_errors["[1]"] = RowError("division by zero")

    reports = [lane.run() for _ in range(MAX_ATTEMPTS)]

    assert list(database.delays.values()) == [1, 2, 4, 8]
    assert [report.failed for report in reports] == [0, 0, 0, 0, 1]
    assert database.failures == {"[1]": Failure("division by zero", MAX_ATTEMPTS, None)}
    assert database.queue == {}
    assert lane.provider.texts == []


def test_a_row_that_does_not_take_its_vector_fails_alone(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(20):
        database.put(row_id, f"text {row_id}")
    database.write_errors["[13]"] = RowError("expected 4 dimensions, not 3")

    report = lane.run()

    assert (report.completed, report.failed) == (19, 1)
    assert database.failures == {"[13]": Failure("expected 4 dimensions, not 3", 1, "text 13")}
    assert all(database.is_fresh(row_id) for row_id in range(20) if row_id != 13)
    assert len(provider.requests) == 1


@pytest.mark.parametrize(("where", "completed", "retried"), [("content_errors", 0, 3), ("write_errors", 2, 1)])
def test_a_lock_costs_no_attempt(lane: Lane, database: FakeDatabase, where: str, completed: int, retried: int) -> None:
    """While rows are read, only their whole table can be locked."""
    for row_id in range(3):
        database.put(row_id, f"text {row_id}")
    database.send({"pipeline": 1, "keys": [[1]], "attempts": 4})
    getattr(database, where)["[1]"] = RowError("in the way", locked=True)

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (completed, retried, 0)
    assert {"pipeline": 1, "keys": [[1]], "attempts": 4} in bodies(database.waiting())


def test_a_blank_row_that_does_not_take_its_null_fails_alone(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(4):
        database.put(row_id, "")
        database.vectors[key_of(row_id)] = [1.0, 2.0, 3.0]
    database.write_errors["[2]"] = RowError("violates not-null constraint")

    report = lane.run()

    assert (report.completed, report.failed) == (3, 1)
    assert list(database.failures) == ["[2]"]
    assert database.queue == {}


# --- what a write finds -----------------------------------------------------------------------------


def test_a_row_that_changes_in_flight_never_gets_the_old_vector(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "old")
    lane.change_in_flight(lambda: database.put(1, "new"))

    report = lane.run()

    assert database.vectors["[1]"] is None
    assert (report.completed, report.retried, report.failed) == (0, 1, 0)
    assert {"pipeline": 1, "keys": [[1]], "attempts": 1} in bodies(database.waiting())

    lane.run()

    assert database.is_fresh(1)
    assert database.queue == {}


def test_a_row_whose_text_is_different_each_time_ends_on_the_failed_list(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    """A content function that uses the time, for example, never gives the same text twice."""
    numbers = count()
    database.put(1, "text")
    database.interrupts["write"] = lambda: database.texts.update({"[1]": f"text {next(numbers)}"})

    reports = [lane.run() for _ in range(MAX_ATTEMPTS)]

    assert [(report.retried, report.failed) for report in reports] == [(1, 0)] * 4 + [(0, 1)]
    assert [failure.reason for failure in database.failures.values()] == [
        "its text was different each time it was read"
    ]
    assert set(database.delays.values()) == {rows.CHANGED_DELAY_SECONDS}
    assert len(provider.requests) == MAX_ATTEMPTS
    assert database.queue == {}


def test_a_row_that_another_lane_has_embedded_meanwhile_does_not_fail_at_its_last_attempt(
    lane: Lane, database: FakeDatabase
) -> None:
    database.put(1, "old")
    database.send({"pipeline": 1, "keys": [[1]], "attempts": MAX_ATTEMPTS - 1})

    def embed_new() -> None:
        database.texts["[1]"] = "new"
        database.vectors["[1]"] = vector_of("new").tolist()
        database.embedded["[1]"] = (MODEL.digest("new"), False)

    database.interrupts["write"] = embed_new

    report = lane.run()

    assert (report.completed, report.failed) == (1, 0)
    assert database.failures == {}
    assert database.queue == {}


def test_a_refused_text_that_is_different_each_time_ends_on_the_failed_list(lane: Lane, database: FakeDatabase) -> None:
    numbers = count()
    database.put(1, "poison")
    database.interrupts["rows"] = lambda: database.texts.update({"[1]": f"poison {next(numbers)}"})
    lane.refuse("poison")

    reports = [lane.run() for _ in range(MAX_ATTEMPTS)]

    assert [report.failed for report in reports] == [0, 0, 0, 0, 1]
    assert database.queue == {}


def test_a_row_that_turns_blank_in_flight_ends_with_null(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "old")
    lane.change_in_flight(lambda: database.put(1, None))

    lane.run()
    lane.run()

    assert database.is_fresh(1)
    assert database.queue == {}


def test_a_row_that_is_deleted_in_flight_settles(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "before")
    lane.run()
    database.put(1, "text")
    lane.change_in_flight(lambda: database.texts.pop("[1]"))

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (1, 0, 0)
    assert database.embedded == {}
    assert database.queue == {}


@pytest.mark.parametrize("text", ["text", ""])
def test_a_row_locked_for_a_moment_is_written_without_asking_again(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, text: str
) -> None:
    database.put(1, "before")
    lane.run()
    database.put(1, text)
    database.put(2, "other")
    database.locked["[1]"] = 3

    report = lane.run()

    assert (report.completed, report.retried) == (2, 0)
    assert database.vectors["[1]"] == (vector_of(text).tolist() if text else None)
    assert provider.texts.count(text) == bool(text)
    assert database.queue == {}


def test_a_row_locked_for_longer_goes_back_without_an_attempt_and_the_others_go_on(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "LOCK_PATIENCE_SECONDS", 0.2)
    for row_id in range(5):
        database.put(row_id, f"text {row_id}")
    database.locked["[3]"] = math.inf

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (4, 1, 0)
    assert all(database.is_fresh(row_id) for row_id in (0, 1, 2, 4))
    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[3]], "attempts": 0}]
    assert [job["error"] for job in report.failed_jobs] == ["the row or its table is locked by another transaction"]
    assert set(database.delays.values()) == {rows.LOCKED_DELAY_SECONDS}


def test_a_row_that_changes_while_it_is_locked_never_gets_the_old_vector(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "old")
    database.locked["[1]"] = 2
    database.interrupts["check_interrupts"] = lambda: database.texts.update({"[1]": "new"})

    report = lane.run()

    assert report.retried == 1
    assert database.vectors["[1]"] is None


# --- pace -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("writes", "most"),
    [
        ([], 400),
        ([(1, 0.05)], 300),
        ([(100, 0.02)], 1000),
        ([(100, 0.44)], 200),
        ([(100, 9.0)], 200),
        ([(1, 0.002)] * 200, 1000),
        ([(1, 0.007)] * 200, 200),
        ([*[(100, 0.44)] * 6, *[(1, 0.002)] * 6], 200),
        ([*[(100, 0.44)] * 6, *[(100, 0.02)] * 6], 1000),
    ],
)
def test_a_lane_holds_what_it_writes_in_a_second_two_requests_at_least(
    writes: list[tuple[int, float]], most: int
) -> None:
    pace = Pace(100, 1000, indexed=True)
    for count_of_rows, seconds in writes:
        pace.wrote(count_of_rows, seconds)

    assert pace.max_rows() == most


@pytest.mark.parametrize(("indexed", "most"), [(True, 400), (False, 1000)])
def test_a_lane_begins_carefully_where_an_index_makes_writing_slow(indexed: bool, most: int) -> None:
    assert Pace(100, 1000, indexed=indexed).max_rows() == most
