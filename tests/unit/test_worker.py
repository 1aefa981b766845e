"""The path of a job, with the database, the network and the provider in memory."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import Any

import pytest

from autoembed import heap, worker
from autoembed.errors import ProviderTrouble, Refused, RowError
from autoembed.jobs import Report
from autoembed.model import Embedded, Request
from autoembed.providers import PROVIDERS
from autoembed.records import Message
from autoembed.worker import MAX_ATTEMPTS, PROBE, Options
from unit.fakes import (
    MODEL,
    PIPELINE,
    Cancelled,
    Failure,
    FakeDatabase,
    FakeNetwork,
    FakeProvider,
    Rest,
    Vector,
    key_of,
    vector_of,
    vectors_of,
)
from waiting import soon, wait_until

BUSY = ProviderTrouble("busy", retry_after_seconds=7)


class Lane:
    """What a pass is given, and the pass."""

    def __init__(self) -> None:
        self.database = FakeDatabase()
        self.network = FakeNetwork()
        self.provider = FakeProvider()

    def run(self, batch_size: int = 100, max_requests: int = 1, timeout_seconds: float = 60) -> Report:
        options = Options(batch_size, max_requests, timeout_seconds)
        return worker.run_pass(self.database, self.network, options)

    def work(self, run_seconds: float, max_requests: int = 1) -> None:
        options = Options(100, max_requests, 60)
        worker.work(self.database, self.network, options, run_seconds)

    def limit_inputs(self, most: int) -> None:
        """From now on a request holds so many texts, and a claim may take several requests' worth."""
        self.database.defined[1] = replace(PIPELINE, model=replace(MODEL, max_inputs_per_request=most))

    def refuse(self, *guilty: str) -> None:
        """From now on the provider refuses requests that contain one of these parts of texts."""

        def answer(texts: list[str]) -> Vector:
            if any(part in text for part in guilty for text in texts):
                raise Refused("the provider answered 400: not these words")
            return vectors_of(texts)

        self.provider.answer = answer

    def fail_with(self, error: BaseException) -> None:
        def answer(texts: list[str]) -> Vector:
            raise error

        self.provider.answer = answer

    def meanwhile(self, change: Callable[[], object]) -> None:
        """Has something happen while the next request is in flight."""

        def answer(texts: list[str]) -> Vector:
            self.provider.answer = vectors_of
            change()
            return vectors_of(texts)

        self.provider.answer = answer


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Lane:
    lane = Lane()
    monkeypatch.setitem(PROVIDERS, "fake", lane.provider)
    return lane


@pytest.fixture
def database(lane: Lane) -> FakeDatabase:
    return lane.database


@pytest.fixture
def provider(lane: Lane) -> FakeProvider:
    return lane.provider


def bodies(messages: list[Message]) -> list[Any]:
    return [message.body for message in messages]


# --- rows and texts ----------------------------------------------------------------------------------


def test_an_empty_queue_costs_one_look(lane: Lane, database: FakeDatabase) -> None:
    assert lane.run() == Report()
    assert database.statements == ["claim", "commit", "next_backfill", "commit"]


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
    database.content_errors["[1]"] = RowError("no text", passes=False)

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
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, **change))
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


# --- a text that is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("guilty", [0, 21, 63])
def test_one_guilty_text_costs_two_requests_for_each_halving(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, guilty: int
) -> None:
    for row_id in range(64):
        database.put(row_id, "poison" if row_id == guilty else f"text {row_id}")
    lane.refuse("poison")

    report = lane.run(batch_size=64)

    # The refused one, the probe, and two for each of 6 halvings.
    assert report.requests == len(provider.requests) == 2 + 2 * math.log2(64)
    assert (report.completed, report.failed, report.retried) == (63, 1, 0)
    assert list(database.failures) == [key_of(guilty)]
    assert all(database.is_fresh(row_id) for row_id in range(64) if row_id != guilty)
    assert database.rests == []
    assert database.queue == {}


def test_a_provider_that_has_accepted_something_needs_no_probe(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(8):
        database.put(row_id, "poison" if row_id == 7 else f"text {row_id}")
    lane.refuse("poison")
    lane.limit_inputs(4)

    lane.run()

    assert PROBE not in provider.texts
    assert [len(request) for request in provider.requests] == [4, 4, 2, 2, 1, 1]


def test_requests_refused_side_by_side_share_one_probe(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(8):
        database.put(row_id, f"text {row_id}" if row_id % 2 else f"poison {row_id}")

    def answer(texts: list[str]) -> Vector:
        if texts == [PROBE]:
            # The claim, and the four that were refused.
            wait_until(lambda: database.statements.count("commit") >= 5)
        elif any("poison" in text for text in texts):
            raise Refused("the provider answered 400")
        return vectors_of(texts)

    provider.answer = answer
    lane.limit_inputs(2)

    report = lane.run(max_requests=8)

    assert provider.requests.count([PROBE]) == 1
    assert (report.completed, report.failed) == (4, 4)


def test_every_guilty_text_is_found(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(40):
        database.put(row_id, f"poison {row_id}" if row_id % 7 == 0 else f"text {row_id}")
    lane.refuse("poison")

    report = lane.run(batch_size=20, max_requests=2)

    assert sorted(database.failures) == sorted(key_of(row_id) for row_id in range(0, 40, 7))
    assert (report.completed, report.failed) == (34, 6)
    assert database.queue == {}


@pytest.mark.parametrize("neighbours", [0, 1, 5])
def test_a_refused_row_fails_with_the_providers_words_and_its_text(
    lane: Lane, database: FakeDatabase, neighbours: int
) -> None:
    database.put(0, "poison")
    for row_id in range(1, neighbours + 1):
        database.put(row_id, f"text {row_id}")
    lane.refuse("poison")

    report = lane.run()

    assert database.failures["[0]"] == Failure("the provider answered 400: not these words", 1, "poison")
    assert [(job["id"], job["error"]) for job in report.failed_jobs] == [
        (0, "the provider answered 400: not these words")
    ]


def test_all_rows_of_a_guilty_text_fail(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(3):
        database.put(row_id, "poison")
    lane.refuse("poison")

    assert lane.run().failed == 3
    assert len(database.failures) == 3


@pytest.mark.parametrize("now", ["another", "poison too", None, ""])
def test_a_text_that_is_refused_when_its_row_says_another_fails_nobody(
    lane: Lane, database: FakeDatabase, now: str | None
) -> None:
    """Another lane has the new text, and may be done with it."""
    database.put(1, "poison")

    def answer(texts: list[str]) -> Vector:
        database.texts["[1]"] = now
        if "poison" in texts:
            raise Refused("the provider answered 400: not these words")
        return vectors_of(texts)

    lane.provider.answer = answer

    report = lane.run()

    assert (report.failed, report.retried) == (0, 1)
    assert database.failures == {}
    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[1]], "attempts": 0}]


def test_a_text_that_is_refused_when_its_row_is_gone_fails_nobody(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "poison")
    lane.refuse("poison")
    database.interrupts["breathe"] = lambda: database.texts.clear()

    report = lane.run()

    assert (report.failed, report.completed) == (0, 1)
    assert database.failures == {}
    assert database.queue == {}


def test_a_failed_row_that_changes_is_embedded_and_leaves_the_failed_list(lane: Lane, database: FakeDatabase) -> None:
    lane.refuse("poison")
    database.put(1, "poison")
    lane.run()
    database.put(1, "text")
    lane.run()

    assert database.is_fresh(1)
    assert database.failures == {}


def test_a_row_that_says_what_the_probe_says_is_counted_once(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, PROBE)
    database.put(2, "poison")
    lane.refuse("poison")

    report = lane.run()

    assert (report.completed, report.failed) == (1, 1)
    assert database.is_fresh(1)


# --- a provider in trouble ---------------------------------------------------------------------------


def test_a_provider_that_refuses_everything_rests_and_no_row_fails(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(8)]
    lane.refuse("")
    lane.limit_inputs(4)

    report = lane.run()

    assert provider.requests[-1] == [PROBE]
    assert report.requests == len(provider.requests) <= 3
    [rest] = database.rests
    assert rest.needs_attention
    assert rest.reason == "every request is refused: the provider answered 400: not these words"
    assert database.failures == {}
    assert (report.completed, report.failed, report.retried) == (0, 0, 8)
    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent]


def test_a_busy_provider_rests_as_it_asked_and_its_jobs_keep_their_attempts(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(20)]
    lane.fail_with(BUSY)
    lane.limit_inputs(2)

    report = lane.run()

    assert all(7 <= rest.seconds <= 8 for rest in database.rests)
    assert {replace(rest, seconds=7) for rest in database.rests} == {Rest("small", 7, False, "busy")}
    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent]
    assert (report.read, report.retried, report.failed) == (20, 20, 0)
    assert report.requests == len(provider.requests)


def test_no_request_begins_once_the_provider_is_known_to_be_busy(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(20):
        database.put(row_id, f"text {row_id}")
    first = threading.Barrier(2)

    def answer(texts: list[str]) -> Vector:
        if len(provider.requests) <= 2:
            first.wait(5)
            raise BUSY
        wait_until(lambda: database.rests and database.statements[-1] == "breathe")
        raise BUSY

    provider.answer = answer
    lane.limit_inputs(2)

    report = lane.run(max_requests=2)

    # Two side by side, and what two threads took up before it was known.
    assert report.requests == len(provider.requests) <= 4


@pytest.mark.parametrize("first_accepted", [False, True])
def test_a_refusal_that_comes_after_the_provider_is_put_to_rest_sends_nothing_more(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, first_accepted: bool
) -> None:
    if first_accepted:
        database.put(0, "accepted")
        database.put(1, "accepted too")
    for row_id in (2, 3):
        database.put(row_id, f"busy {row_id}")
    for row_id in (4, 5):
        database.put(row_id, f"refused {row_id}")

    def answer(texts: list[str]) -> Vector:
        if texts[0].startswith("accepted"):
            return vectors_of(texts)
        if texts[0].startswith("busy"):
            wait_until(lambda: any(request[0].startswith("refused") for request in provider.requests))
            if first_accepted:
                wait_until(lambda: database.is_fresh(0))
            raise BUSY
        if texts[0].startswith("refused"):
            wait_until(lambda: database.rests)
            raise Refused("the provider answered 400")
        raise BUSY

    provider.answer = answer

    report = lane.run(batch_size=2, max_requests=3)

    assert len(provider.requests) == (3 if first_accepted else 2)
    assert report.retried == 4
    assert len(database.waiting()) == 4
    assert database.failures == {}


def test_what_was_answered_before_the_trouble_is_written(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(4):
        database.put(row_id, f"text {row_id}")
    answers = count()

    def answer(texts: list[str]) -> Vector:
        if next(answers):
            raise BUSY
        return vectors_of(texts)

    lane.provider.answer = answer
    lane.limit_inputs(2)

    report = lane.run()

    assert (report.completed, report.retried) == (2, 2)
    assert sorted(database.is_fresh(row_id) for row_id in range(4)) == [False, False, True, True]
    assert len(database.waiting()) == 2


def test_trouble_that_somebody_must_mend_needs_attention(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "text")
    lane.fail_with(ProviderTrouble("a wrong key", permanent=True))

    report = lane.run()

    assert database.rests == [Rest("small", 10, True, "a wrong key")]
    assert [job["error"] for job in report.failed_jobs] == ["a wrong key"]
    assert len(database.waiting()) == 1


def test_a_provider_that_is_back_is_resumed_once(lane: Lane, database: FakeDatabase) -> None:
    database.defined[1] = replace(PIPELINE, failures=3)
    for row_id in range(6):
        database.put(row_id, f"text {row_id}")

    lane.run(batch_size=2, max_requests=3)

    assert database.resumed == ["small"]


def test_a_provider_that_was_well_is_not_resumed(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "text")

    lane.run()

    assert database.resumed == []


def test_trouble_of_one_model_does_not_hold_up_another(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = FakeProvider()
    monkeypatch.setitem(PROVIDERS, "dead", dead)

    def answer(texts: list[str]) -> Vector:
        raise BUSY

    dead.answer = answer
    lane.limit_inputs(1)
    database.defined[2] = replace(PIPELINE, id=2, model=replace(MODEL, name="dead", provider="dead"))
    for row_id in range(3):
        database.texts[key_of(row_id + 10)] = f"text {row_id}"
        database.vectors[key_of(row_id + 10)] = None
        database.send({"pipeline": 2, "keys": [[row_id + 10]]})
    for row_id in range(3):
        database.put(row_id, f"text {row_id}")

    report = lane.run()

    assert (report.completed, report.retried) == (3, 3)
    assert all(database.is_fresh(row_id) for row_id in range(3))
    assert {rest.model for rest in database.rests} == {"dead"}


# --- a row in trouble --------------------------------------------------------------------------------


def test_a_failing_content_function_holds_up_its_own_row_only(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(50):
        database.put(row_id, f"text {row_id}")
    database.content_errors["[33]"] = RowError("division by zero", passes=False)

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (49, 1, 0)
    assert all(database.is_fresh(row_id) for row_id in range(50) if row_id != 33)
    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[33]], "attempts": 1}]
    assert [(job["id"], job["error"]) for job in report.failed_jobs] == [(33, "division by zero")]


def test_a_failing_content_function_is_tried_max_attempts_times_ever_later(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "text")
    database.content_errors["[1]"] = RowError("division by zero", passes=False)

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
    database.write_errors["[13]"] = RowError("expected 4 dimensions, not 3", passes=False)

    report = lane.run()

    assert (report.completed, report.failed) == (19, 1)
    assert database.failures == {"[13]": Failure("expected 4 dimensions, not 3", 1, "text 13")}
    assert all(database.is_fresh(row_id) for row_id in range(20) if row_id != 13)
    assert len(provider.requests) == 1


@pytest.mark.parametrize("where", ["content_errors", "write_errors"])
def test_a_conflict_costs_a_row_no_attempt(lane: Lane, database: FakeDatabase, where: str) -> None:
    for row_id in range(3):
        database.put(row_id, f"text {row_id}")
    database.send({"pipeline": 1, "keys": [[1]], "attempts": 4})
    getattr(database, where)["[1]"] = RowError("deadlock detected", passes=True)

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (2, 1, 0)
    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[1]], "attempts": 4}]


def test_a_blank_row_that_does_not_take_its_null_fails_alone(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(4):
        database.put(row_id, "")
        database.vectors[key_of(row_id)] = [1.0, 2.0, 3.0]
    database.write_errors["[2]"] = RowError("violates not-null constraint", passes=False)

    report = lane.run()

    assert (report.completed, report.failed) == (3, 1)
    assert list(database.failures) == ["[2]"]
    assert database.queue == {}


# --- what a write finds ------------------------------------------------------------------------------


def test_a_row_that_changes_in_flight_never_gets_the_old_vector(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "old")
    lane.meanwhile(lambda: database.put(1, "new"))

    report = lane.run()

    assert database.vectors["[1]"] is None
    assert (report.completed, report.retried, report.failed) == (0, 1, 0)
    assert {"pipeline": 1, "keys": [[1]], "attempts": 0} in bodies(database.waiting())

    lane.run()

    assert database.is_fresh(1)
    assert database.queue == {}


def test_a_row_that_turns_blank_in_flight_ends_with_null(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "old")
    lane.meanwhile(lambda: database.put(1, None))

    lane.run()
    lane.run()

    assert database.is_fresh(1)
    assert database.queue == {}


def test_a_row_that_is_deleted_in_flight_settles(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "before")
    lane.run()
    database.put(1, "text")
    lane.meanwhile(lambda: database.texts.pop("[1]"))

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
    monkeypatch.setattr(worker, "LOCK_PATIENCE_SECONDS", 0.2)
    for row_id in range(5):
        database.put(row_id, f"text {row_id}")
    database.locked["[3]"] = math.inf

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (4, 1, 0)
    assert all(database.is_fresh(row_id) for row_id in (0, 1, 2, 4))
    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[3]], "attempts": 0}]
    assert [job["error"] for job in report.failed_jobs] == ["the row or its table is locked by another transaction"]
    assert set(database.delays.values()) == {worker.LOCKED_DELAY_SECONDS}


def test_a_row_that_changes_while_it_is_locked_never_gets_the_old_vector(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "old")
    database.locked["[1]"] = 2
    database.interrupts["breathe"] = lambda: database.texts.update({"[1]": "new"})

    report = lane.run()

    assert report.retried == 1
    assert database.vectors["[1]"] is None


# --- messages ----------------------------------------------------------------------------------------


def test_a_message_of_many_rows_stays_until_the_last_is_dealt_with(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(4):
        database.texts[key_of(row_id)] = f"text {row_id}"
        database.vectors[key_of(row_id)] = None
    message_id = database.send({"pipeline": 1, "keys": [[row_id] for row_id in range(4)]})
    seen = []

    def answer(texts: list[str]) -> Vector:
        if "text 2" in texts:
            wait_until(lambda: database.is_fresh(0) and database.statements[-1] == "breathe")
            seen.append(message_id in database.queue)
        return vectors_of(texts)

    provider.answer = answer

    report = lane.run(batch_size=2, max_requests=2)

    assert seen == [True]
    assert report.completed == 4
    assert database.queue == {}


def test_a_message_half_done_settles_and_the_other_half_is_queued_again(lane: Lane, database: FakeDatabase) -> None:
    for row_id, text in enumerate(["good", "gone", "", "poison", "broken"]):
        database.texts[key_of(row_id)] = text
        database.vectors[key_of(row_id)] = None
    del database.texts["[1]"]
    database.content_errors["[4]"] = RowError("no text", passes=False)
    database.send({"pipeline": 1, "keys": [[row_id] for row_id in range(5)], "attempts": 2})
    lane.refuse("poison")

    report = lane.run()

    assert (report.read, report.completed, report.failed, report.retried) == (5, 3, 1, 1)
    assert [message.body for message in database.queue.values()] == [{"pipeline": 1, "keys": [[4]], "attempts": 3}]


def test_a_message_that_lanes_died_of_is_failed_without_being_tried(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "deadly")
    for _ in range(MAX_ATTEMPTS):
        database.claim(1, 60, [])
        database.claimed.clear()

    report = lane.run()

    assert database.failures == {"[1]": Failure("5 lanes ended while they worked on it", 5, None)}
    assert report.failed == 1
    assert "rows" not in database.statements
    assert lane.provider.requests == []
    assert database.queue == {}


def test_a_message_whose_lane_died_once_is_tried_and_others_wait(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.random", lambda: 0.6)
    database.put(1, "perhaps deadly")
    database.claim(1, 60, [])
    database.claimed.clear()
    database.put(2, "other")

    assert lane.run().completed == 1

    assert database.is_fresh(1)
    assert [message.read_count for message in database.waiting()] == [0]


@pytest.mark.parametrize(
    "body",
    [
        None,
        5,
        "text",
        [],
        {},
        {"id": None, "table": "documents"},
        {"id": 1, "table": 'x"; DROP TABLE documents'},
        {"id": {"a": 1}, "table": "documents"},
        {"pipeline": 0, "keys": [[1]]},
        {"pipeline": "1", "keys": [[1]]},
        {"pipeline": 1, "keys": "all"},
        {"pipeline": 1, "keys": [[None]]},
        {"pipeline": 1, "keys": [[]]},
        {"pipeline": 1, "keys": [[1]], "attempts": "x"},
    ],
)
def test_a_broken_message_fails_once_and_holds_up_no_other(lane: Lane, database: FakeDatabase, body: Any) -> None:
    message_id = database.send(body)
    database.put(7, "text")

    report = lane.run()

    assert [failed[0] for failed in database.failed_messages] == [body]
    assert (report.read, report.failed, report.completed) == (2, 1, 1)
    [failed_job] = report.failed_jobs
    assert (failed_job["jobId"], failed_job["error"]) == (message_id, database.failed_messages[0][1])
    assert database.is_fresh(7)
    assert database.queue == {}


def test_a_message_without_rows_does_not_stay_for_ever(lane: Lane, database: FakeDatabase) -> None:
    database.send({"pipeline": 1, "keys": []})

    lane.run()

    assert database.queue == {}


def test_jobs_of_a_pipeline_that_was_dropped_settle(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "text")
    database.defined.clear()

    assert lane.run() == Report(read=1, completed=1)
    assert database.queue == {}


def test_jobs_of_a_blocked_pipeline_wait_and_say_why(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    """If they went back as a new message, each claim that meets a block would make one of many."""
    database.defined[1] = replace(PIPELINE, blocked="the column embedding does not exist")
    message_id = database.put(1, "text")

    report = lane.run()

    assert [job["error"] for job in report.failed_jobs] == ["the column embedding does not exist"]
    assert database.waiting() == [Message(message_id, 0, {"pipeline": 1, "keys": [[1]]})]
    assert provider.requests == []


def test_a_job_of_a_blocked_pipeline_that_names_its_table_alone_waits_under_its_pipeline(
    lane: Lane, database: FakeDatabase
) -> None:
    """If it went back as it was, it would be claimed again at once, and again."""
    database.defined[1] = replace(PIPELINE, blocked="the column embedding does not exist")
    names = {"schema": "public", "table": "documents", "contentFunction": "f", "embeddingColumn": "embedding"}
    database.send({"id": 1, **names})

    lane.run()

    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[1]], "attempts": 0}]


@pytest.mark.parametrize("where", ["content_errors", "write_errors"])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_wait_uncounted_when_what_their_table_needs_goes_under_their_lane(
    lane: Lane, database: FakeDatabase, where: str, rows: int
) -> None:
    for row_id in range(rows):
        database.put(row_id, f"text {row_id}")
        database.send({"pipeline": 1, "keys": [[row_id]], "attempts": 4})
        getattr(database, where)[key_of(row_id)] = RowError("function odd(integer) does not exist", passes=False)
    database.interrupts["rows"] = lambda: database.defined.update(
        {1: replace(PIPELINE, blocked="function odd is gone")}
    )

    report = lane.run()

    assert (report.failed, report.retried) == (0, rows)
    assert {job["error"] for job in report.failed_jobs} == {"function odd is gone"}
    assert database.failures == {}
    assert [(message.read_count, message.body.get("attempts", 4)) for message in database.waiting()] == [
        (0, 4)
    ] * 2 * rows


@pytest.mark.parametrize(("pipelines", "each"), [(1, 60), (2, 30), (5, 12), (7, 8), (60, 1)])
def test_pipelines_share_a_pass_however_long_their_messages_are(
    lane: Lane, database: FakeDatabase, pipelines: int, each: int
) -> None:
    for number in range(1, pipelines + 1):
        database.defined[number] = replace(PIPELINE, id=number)
        for row_id in range(100 * number, 100 * number + 100):
            database.texts[key_of(row_id)] = f"text {row_id}"
            database.vectors[key_of(row_id)] = None
        keys = [[row_id] for row_id in range(100 * number, 100 * number + 100)]
        database.send({"pipeline": number, "keys": keys, "attempts": 3})

    report = lane.run(batch_size=60)

    assert (report.read, report.completed) == (each * pipelines, each * pipelines)
    for message in database.waiting():
        assert (message.read_count, message.body["attempts"], len(message.body["keys"])) == (0, 3, 100 - each)
    assert len(database.waiting()) == pipelines


def test_messages_beyond_a_pipelines_share_go_back_as_they_were(lane: Lane, database: FakeDatabase) -> None:
    database.defined[2] = replace(PIPELINE, id=2)
    for row_id in range(6):
        database.put(row_id, f"text {row_id}")
    database.send({"pipeline": 2, "keys": [[1]]})
    before = list(database.queue.values())

    report = lane.run(batch_size=7)

    assert report.read == 4
    assert database.waiting() == before[3:6]


@pytest.mark.parametrize("died", [False, True])
def test_what_is_known_of_keys_that_rows_have_left_or_taken_is_forgotten_whoever_embeds_them(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, died: bool
) -> None:
    """A row that takes key and text of another has the vector of what it said before."""
    database.put(1, "text")
    lane.run()
    database.vectors["[1]"] = vector_of("other").tolist()
    message_id = database.send({"pipeline": 1, "keys": [[2], [1]], "moved": True})
    if died:
        database.claim(1, 60, [])
        database.claimed.discard(message_id)

    while database.waiting():
        lane.run(batch_size=1)

    assert database.is_fresh(1)
    assert provider.texts == ["text", "text"]


# --- commits -----------------------------------------------------------------------------------------


def test_the_claim_is_committed_before_the_first_request(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "text")
    before: list[str] = []

    def answer(texts: list[str]) -> Vector:
        before.extend(database.statements)
        return vectors_of(texts)

    provider.answer = answer

    lane.run()

    work_of = [statement for statement in before if statement != "breathe"]
    assert work_of[0] == "claim"
    assert work_of[-1] == "commit"


def test_only_the_claim_waits_for_the_disk(lane: Lane, database: FakeDatabase) -> None:
    """A row that crashes the server has its try counted; what is written a crash may undo."""
    for row_id in range(4):
        database.put(row_id, f"text {row_id}")
    lane.limit_inputs(2)

    lane.run()

    commits = [index for index, statement in enumerate(database.statements) if statement == "commit"]
    assert database.statements.index("claim") < commits[0]
    assert database.unsynced == commits[1:]


def test_a_write_waits_a_moment_for_requests_that_are_being_sent(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their threads need the interpreter, which a statement keeps to its end."""
    embed = provider.embed

    def slowly(request: Request, network: Any) -> Embedded:
        if request.texts == ["second"]:
            assert not soon(lambda: "write" in database.statements, 0.02)
            database.statements.append("sent")
            request.sent.set()
        return embed(request, network)

    monkeypatch.setattr(provider, "embed", slowly)
    monkeypatch.setattr(worker, "SLICE_SECONDS", 5)
    database.put(1, "first")
    database.put(2, "second")
    lane.limit_inputs(1)

    lane.run(max_requests=2)

    order = [statement for statement in database.statements if statement in ("write", "sent")]
    assert order == ["sent", "write", "write"]


def test_a_write_does_not_wait_for_a_request_that_cannot_be_sent(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    def answer(texts: list[str]) -> Vector:
        if texts == ["second"]:
            wait_until(lambda: "write" in database.statements)
        return vectors_of(texts)

    provider.answer = answer
    database.put(1, "first")
    database.put(2, "second")
    lane.limit_inputs(1)

    assert lane.run(max_requests=2).completed == 2


def test_each_answer_is_committed_before_the_next_is_waited_for(lane: Lane, database: FakeDatabase) -> None:
    for row_id in range(6):
        database.put(row_id, f"text {row_id}")
    lane.limit_inputs(2)

    lane.run()

    writes = [index for index, statement in enumerate(database.statements) if statement == "write"]
    assert len(writes) == 3
    for index in writes:
        following = database.statements[index:]
        assert following[: following.index("commit") + 1] == ["write", "record_embedded", "settle", "commit"]


def test_the_lease_is_extended_while_requests_are_under_way(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "LEASE_MARGIN_SECONDS", 0.1)
    first, second = database.put(1, "first"), database.put(2, "second")

    def answer(texts: list[str]) -> Vector:
        if texts == ["second"]:
            wait_until(lambda: [second] in database.extended)
        elif texts == ["first"]:
            wait_until(lambda: [first, second] in database.extended)
        return vectors_of(texts)

    provider.answer = answer

    lane.run(batch_size=1, max_requests=2)

    assert database.extended[0] == [first, second]
    extended = database.statements.index("extend")
    assert database.statements[extended + 1] == "commit"


def test_a_short_pass_extends_no_lease(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "text")

    lane.run()

    assert database.extended == []


# --- interrupts --------------------------------------------------------------------------------------


def cancel() -> None:
    raise Cancelled


def hang(lane: Lane) -> None:
    """From now on requests last until they are aborted."""

    def answer(texts: list[str]) -> Vector:
        lane.provider.aborted.wait(10)
        raise ProviderTrouble("aborted")

    lane.provider.answer = answer


@pytest.mark.parametrize(("rows", "max_requests"), [(1, 1), (8, 2), (20, 10)])
def test_a_cancel_in_flight_gives_all_jobs_back_and_leaves_no_thread(
    lane: Lane, database: FakeDatabase, rows: int, max_requests: int
) -> None:
    before = set(threading.enumerate())
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(rows)]
    hang(lane)
    database.interrupts["breathe"] = cancel
    started = time.monotonic()

    with pytest.raises(Cancelled):
        lane.run(batch_size=2, max_requests=max_requests)

    assert time.monotonic() - started < 1
    assert lane.network.aborts >= 1
    assert set(threading.enumerate()) <= before
    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent]
    assert (database.failures, database.rests) == ({}, [])


def test_a_cancel_at_any_statement_leaves_no_message_claimed_and_no_row_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A message that stays claimed comes back when its lease is over, minutes later; one settled too early, never."""
    cancelled_at: list[str] = []
    for number in count():
        lane = Lane()
        monkeypatch.setitem(PROVIDERS, "fake", lane.provider)
        database, remaining = lane.database, iter(range(number))
        for row_id, text in enumerate(["good", "poison", "changed", "", "odd", "deleted", "locked"]):
            database.put(row_id, text)
        database.content_errors[key_of(4)] = RowError("division by zero", passes=False)
        del database.texts[key_of(5)]
        database.locked[key_of(6)] = math.inf
        database.send({"pipeline": 1, "truncated": True})
        database.send({"pipeline": "none"})
        lane.refuse("poison")

        def note(statement: str, database: FakeDatabase = database, remaining: Iterator[int] = remaining) -> None:
            if statement == "write":
                database.texts[key_of(2)] = "changed since"
            if next(remaining, None) is None and not cancelled_at[-1]:
                cancelled_at[-1] = statement
                raise Cancelled
            database.statements.append(statement)

        monkeypatch.setattr(database, "_note", note)
        monkeypatch.setattr(worker, "LOCK_PATIENCE_SECONDS", 0.0)
        cancelled_at.append("")
        with contextlib.suppress(Cancelled):
            lane.run(batch_size=3, max_requests=3)

        assert database.claimed & database.queue.keys() == set(), cancelled_at[-1]
        queued = {key_of(message.body["id"]) for message in database.waiting() if "id" in message.body} | {
            json.dumps(key) for message in database.waiting() for key in message.body.get("keys", [])
        }
        written = {key for key, vector in database.vectors.items() if vector is not None}
        dealt_with = written | database.failures.keys() | queued
        assert {key_of(row_id) for row_id in (0, 1, 2, 4, 6)} <= dealt_with, cancelled_at[-1]
        if not cancelled_at[-1]:
            break
    assert {"claim", "rows", "write", "record_embedded", "fail", "settle", "requeue", "commit"} <= set(cancelled_at)


def test_a_cancel_ends_although_more_requests_wait_than_may_be_in_flight(lane: Lane, database: FakeDatabase) -> None:
    lane.limit_inputs(1)
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(8)]
    hang(lane)
    database.interrupts["breathe"] = cancel

    with pytest.raises(Cancelled):
        lane.run()

    assert [message.id for message in database.waiting()] == sent


def test_a_cancel_after_an_answer_keeps_what_was_written(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "first")
    second = database.put(2, "second")

    def answer(texts: list[str]) -> Vector:
        if texts == ["second"]:
            provider.aborted.wait(10)
            raise ProviderTrouble("aborted")
        return vectors_of(texts)

    provider.answer = answer
    database.interrupts["breathe"] = lambda: cancel() if database.is_fresh(1) else None

    with pytest.raises(Cancelled):
        lane.run(batch_size=1, max_requests=2)

    assert database.is_fresh(1)
    assert [(message.id, message.read_count) for message in database.queue.values()] == [(second, 0)]
    assert [message.id for message in database.waiting()] == [second]


@pytest.mark.parametrize("where", ["resolve", "pipelines", "rows", "write"])
def test_a_cancel_in_the_database_gives_all_jobs_back(lane: Lane, database: FakeDatabase, where: str) -> None:
    sent = [database.put(1, "text"), database.put(2, "other"), database.send({"id": 1, "table": "documents"})]
    database.interrupts[where] = cancel

    with pytest.raises(Cancelled):
        lane.run()

    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent]


def test_a_text_that_an_sql_function_refuses_fails_alone(lane: Lane, database: FakeDatabase) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    for row_id, text in enumerate(["one", "poison", "three", "four"]):
        database.put(row_id, text)
    database.bad_texts = ["poison"]

    report = lane.run()

    assert (report.completed, report.failed, report.requests) == (3, 1, 6)
    assert {key: failure.reason for key, failure in database.failures.items()} == {key_of(1): "not these words"}
    assert all(database.is_fresh(row_id) for row_id in (0, 2, 3))


def test_a_cancel_in_an_sql_function_gives_all_jobs_back(lane: Lane, database: FakeDatabase) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(4)]
    database.interrupts["call_embedder"] = cancel

    with pytest.raises(Cancelled):
        lane.run(batch_size=1, max_requests=4)

    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent]
    assert (database.failures, database.rests) == ({}, [])


def test_a_cancel_while_a_row_is_locked_gives_its_job_back(lane: Lane, database: FakeDatabase) -> None:
    sent = database.put(1, "text")
    database.locked["[1]"] = math.inf
    database.interrupts["breathe"] = lambda: cancel() if database.statements.count("write") > 1 else None

    with pytest.raises(Cancelled):
        lane.run()

    assert [message.id for message in database.waiting()] == [sent]


def test_a_mistake_of_ours_in_a_thread_rests_the_model_and_ends_no_lane(lane: Lane, database: FakeDatabase) -> None:
    sent = database.put(1, "text")
    lane.fail_with(ZeroDivisionError("sk-secret"))

    assert lane.run().retried == 1

    [rest] = database.rests
    assert "an unexpected ZeroDivisionError" in rest.reason
    assert "sk-secret" not in rest.reason
    assert [(message.id, message.read_count) for message in database.waiting()] == [(sent, 0)]


# --- the lane ----------------------------------------------------------------------------------------


def test_a_lane_embeds_what_comes_until_it_is_told_to_stop(lane: Lane, database: FakeDatabase) -> None:
    turns = count()

    def turn() -> None:
        assert database.in_lane
        match next(turns):
            case 2:
                database.put(1, "text")
            case 8:
                database.wanted = False

    database.interrupts["claim"] = turn

    lane.work(run_seconds=20)

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
    assert all(database.statements[index + 1] == "commit" for index in claims)


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


# --- claiming while requests are in flight -----------------------------------------------------------


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
    database.interrupts["breathe"] = lambda: setattr(database, "wanted", not database.is_fresh(1))

    lane.work(run_seconds=5, max_requests=2)

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
    database.interrupts["breathe"] = lambda: setattr(database, "wanted", not database.is_fresh(2))

    lane.work(run_seconds=5, max_requests=2)

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
    database.interrupts["breathe"] = lambda: setattr(database, "wanted", not database.is_fresh(1))

    lane.work(run_seconds=5, max_requests=2)

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
    database.interrupts["breathe"] = lambda: setattr(database, "wanted", database.queue != {})

    lane.work(run_seconds=5, max_requests=2)

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
            looks = database.statements.count("breathe")
            wait_until(lambda: database.statements.count("breathe") > looks + 4)
            waited.append(list(provider.requests))
        return vectors_of(texts)

    provider.answer = answer
    database.interrupts["breathe"] = lambda: setattr(database, "wanted", database.queue != {})

    lane.work(run_seconds=5, max_requests=4)

    assert waited == [[["text 1"]]]
    assert database.is_fresh(2)


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
    pace = worker.Pace(100, 1000, indexed=True)
    for rows, seconds in writes:
        pace.wrote(rows, seconds)

    assert pace.max_rows() == most


@pytest.mark.parametrize(("indexed", "most"), [(True, 400), (False, 1000)])
def test_a_lane_begins_carefully_where_an_index_makes_writing_slow(indexed: bool, most: int) -> None:
    assert worker.Pace(100, 1000, indexed=indexed).max_rows() == most


def test_a_lane_that_writes_slowly_leaves_the_rest_to_others(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if each write took half a second.
    monkeypatch.setattr(worker, "WRITE_SECONDS", -0.5)
    for row_id in range(2000):
        database.put(row_id, f"text {row_id}")
    held: list[int] = []

    def write() -> None:
        held.append(len(database.claimed & database.queue.keys()))
        database.wanted = len(held) < 20

    database.interrupts["write"] = write

    lane.work(run_seconds=20, max_requests=8)

    # Before the first write it is not known; and what has just been written is settled after the next claim.
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

    options = Options(100, 3, 60)
    claim = partial(worker._claim_queued, database, options)
    pace = worker.Pace(options.batch_size, options.max_rows, indexed=True)
    worker._work_on(database, lane.network, options, claim, pace)

    assert not database.is_fresh(9)
    assert len(database.rests) == 1
