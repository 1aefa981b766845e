"""A pass over claimed jobs: refusals, trouble of a provider, commits and cancels."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest

from autoembed import rows, worker
from autoembed.errors import CameLate, FellOver, PassEnded, ProviderTrouble, Refused, RowError
from autoembed.jobs import MAX_ATTEMPTS
from autoembed.model import Embedded, Request
from autoembed.worker import PROBE
from unit.fakes import (
    MODEL,
    PIPELINE,
    Cancelled,
    Failure,
    FakeDatabase,
    FakeProvider,
    Rest,
    StatementError,
    Vector,
    key_of,
    vectors_of,
)
from unit.lane import Lane, bodies, cancel
from waiting import soon, wait_until

BUSY = ProviderTrouble("busy", retry_after_seconds=7)


# --- a text that is refused -------------------------------------------------------------------------


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
    assert bodies(database.waiting()) == [{"pipeline": 1, "keys": [[1]], "attempts": 1}]


def test_a_text_that_is_refused_when_its_row_is_gone_fails_nobody(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "poison")
    lane.refuse("poison")
    database.interrupts["check_interrupts"] = lambda: database.texts.clear()

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


# --- a text that fails in another way than by a refusal ---------------------------------------------


def answered(words: str = "the provider answered 500: no", **more: Any) -> ProviderTrouble:
    """Trouble of an answer that came."""
    trouble = ProviderTrouble(words, **more)
    trouble.may_be_a_texts = True
    return trouble


@pytest.mark.parametrize("guilty", [0, 21, 63])
@pytest.mark.parametrize("permanent", [False, True])
def test_a_text_that_fails_alone_spends_its_attempts_and_few_requests(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, guilty: int, permanent: bool
) -> None:
    for row_id in range(64):
        database.put(row_id, "poison" if row_id == guilty else f"text {row_id}")
    lane.stumble(lambda: answered(permanent=permanent), "poison")

    report = lane.run(batch_size=64)

    # The one that failed and its probe; two for each of 6 halvings, and a probe for the half that failed.
    assert report.requests == len(provider.requests) <= 2 + 3 * math.log2(64)
    assert (report.completed, report.failed, report.retried) == (63, 0, 1)
    assert all(database.is_fresh(row_id) for row_id in range(64) if row_id != guilty)
    [again] = database.waiting()
    assert (again.body["attempts"], database.delays[again.id]) == (1, 1.0)

    provider.requests.clear()
    while database.queue:
        lane.run()

    # Itself and a probe for each attempt.
    assert provider.requests == [["poison"], [PROBE]] * (MAX_ATTEMPTS - 1)
    assert database.failures[key_of(guilty)].attempts == MAX_ATTEMPTS
    assert database.failures[key_of(guilty)].reason == "the provider answered 500: no"
    assert database.rests == []


def test_several_texts_that_fail_leave_the_others_alone(lane: Lane, database: FakeDatabase) -> None:
    guilty = {3, 4, 17, 40}
    for row_id in range(50):
        database.put(row_id, f"poison {row_id}" if row_id in guilty else f"text {row_id}")
    lane.stumble(answered, "poison")
    lane.limit_inputs(10)

    report = lane.run(max_requests=4)

    assert (report.completed, report.failed, report.retried) == (46, 0, 4)
    assert database.rests == []


def test_a_provider_that_answers_nothing_well_rests_after_a_probe(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(20)]
    lane.stumble(answered, "")
    lane.limit_inputs(2)

    report = lane.run()

    assert provider.requests[1:] == [[PROBE]]
    assert [rest.reason for rest in database.rests] == ["the provider answered 500: no"]
    assert (report.completed, report.failed, report.retried) == (0, 0, 20)
    *others, suspects = database.waiting()
    assert [(message.id, message.read_count) for message in others] == [(number, 0) for number in sent[2:]]
    assert suspects.body == {"pipeline": 1, "keys": [[0], [1]], "attempts": 0, "suspect": True}


def test_an_outage_blames_no_text_however_long_it_is(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(100):
        database.put(row_id, f"text {row_id}")
    lane.limit_inputs(10)
    lane.stumble(answered, "")
    for failures in range(50):
        database.defined[1] = replace(database.defined[1], failures=failures)
        lane.run()

    # Those of the first request share a message.
    assert [message.body.get("attempts", 0) for message in database.waiting()] == [0] * (100 - 10 + 1)

    lane.stumble(answered, "poison")
    lane.run()

    assert all(database.is_fresh(row_id) for row_id in range(100))


@pytest.mark.parametrize(("failures", "probes"), [(0, []), (1, [[PROBE]])])
def test_a_wait_that_the_provider_asks_for_comes_before_a_probe(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, failures: int, probes: list[list[str]]
) -> None:
    database.put(1, "poison")
    database.defined[1] = replace(PIPELINE, failures=failures)
    lane.stumble(lambda: answered(retry_after_seconds=7), "poison")

    lane.run()

    assert provider.requests == [["poison"], *probes]
    assert len(database.rests) == 1 - len(probes)


def test_after_the_wait_the_text_at_fault_is_looked_for_without_further_waits(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(64):
        database.put(row_id, "poison" if row_id == 21 else f"text {row_id}")
    database.defined[1] = replace(PIPELINE, failures=1)
    lane.stumble(lambda: answered(retry_after_seconds=7), "poison")

    report = lane.run()

    assert (report.completed, report.failed, report.retried) == (63, 0, 1)
    assert database.rests == []


def test_a_server_that_is_too_slow_for_a_full_request_is_sent_fewer_texts(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(100):
        database.put(row_id, f"text {row_id}")

    def answer(texts: list[str]) -> Vector:
        # The server is busy with the request that came too late, and the probe waits behind it.
        if len(texts) > 20 or texts == [PROBE]:
            late = CameLate("no answer in time")
            late.may_be_a_texts = True
            raise late
        return vectors_of(texts)

    provider.answer = answer
    lane.stop_when(lambda: not database.queue)

    lane.work(20)

    assert all(database.is_fresh(row_id) for row_id in range(100))
    assert [len(texts) for texts in provider.requests if texts != [PROBE]][:4] == [100, 50, 25, 12]


def test_calls_of_process_learn_one_after_the_other_how_many_texts_a_slow_server_takes(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(100):
        database.put(row_id, f"text {row_id}")

    def answer(texts: list[str]) -> Vector:
        if len(texts) > 20 or texts == [PROBE]:
            late = CameLate("no answer in time")
            late.may_be_a_texts = True
            raise late
        return vectors_of(texts)

    provider.answer = answer
    for _ in range(4):
        lane.run()

    assert [len(texts) for texts in provider.requests if texts != [PROBE]][:4] == [100, 50, 25, 12]
    assert all(database.is_fresh(row_id) for row_id in range(100))


@dataclass
class Falling:
    """A server that has fallen so often, and refuses so many connections after each fall."""

    refuses: int = 3
    falls: int = 0


@pytest.fixture
def falling(provider: FakeProvider, monkeypatch: pytest.MonkeyPatch) -> Falling:
    """Has the server fall over "poison", with all that is in flight."""
    monkeypatch.setattr(worker, "RESTART_POLL_SECONDS", 0.0)
    server = Falling()
    falls, refused = [threading.Event()], [0]

    def answer(texts: list[str]) -> Vector:
        if refused[0] > 0:
            refused[0] -= 1
            raise FellOver("no connection")
        fall = falls[-1]
        if "poison" in texts:
            falls.append(threading.Event())
            server.falls += 1
            refused[0] = server.refuses
            fall.set()
        elif texts != [PROBE]:
            # An answer takes a while.
            fall.wait(0.01)
        if fall.is_set():
            trouble = FellOver("no answer")
            trouble.may_be_a_texts = True
            raise trouble
        return vectors_of(texts)

    provider.answer = answer
    return server


def test_a_text_that_its_server_falls_over_spends_its_attempts_and_no_other_text_does(
    lane: Lane, database: FakeDatabase, falling: Falling
) -> None:
    for row_id in range(60):
        database.put(row_id, "poison" if row_id == 17 else f"text {row_id}")
    lane.limit_inputs(20)

    report = lane.run(max_requests=4)

    assert (report.completed, report.failed, report.retried) == (59, 0, 1)
    assert [again.body["attempts"] for again in database.waiting()] == [1]
    assert database.rests == []
    while database.queue:
        lane.run()
    assert [failure.attempts for failure in database.failures.values()] == [MAX_ATTEMPTS]
    assert database.rests == []


@pytest.mark.parametrize("poison", [0, 17, 99])
def test_a_text_that_fells_a_server_for_longer_than_a_pass_waits_is_found_in_few_falls(
    lane: Lane,
    database: FakeDatabase,
    falling: Falling,
    monkeypatch: pytest.MonkeyPatch,
    poison: int,
) -> None:
    monkeypatch.setattr(worker, "RESTART_SECONDS", 0.0)
    falling.refuses = 25
    for row_id in range(100):
        database.put(row_id, "poison" if row_id == poison else f"text {row_id}")
    innocent = set(range(100)) - {poison}

    passes = 0
    while database.queue:
        passes += 1
        assert passes < 1000
        database.rests.clear()
        lane.run()
        failures = database.defined[1].failures + 1 if database.rests else 0
        database.defined[1] = replace(PIPELINE, failures=failures)

    assert all(database.is_fresh(row_id) for row_id in innocent)
    assert [(key, failure.attempts) for key, failure in database.failures.items()] == [(key_of(poison), MAX_ATTEMPTS)]
    # The requests with others, the halves, and the attempts of the text alone.
    assert falling.falls <= 3 + 7 + MAX_ATTEMPTS


def test_a_server_that_does_not_start_again_rests_and_no_text_is_blamed(
    lane: Lane, database: FakeDatabase, falling: Falling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "RESTART_SECONDS", 0.1)
    falling.refuses = 1_000_000_000
    for row_id in range(5):
        database.put(row_id, "poison" if row_id == 3 else f"text {row_id}")

    report = lane.run()

    assert (report.completed, report.failed, report.retried) == (0, 0, 5)
    assert all(message.body.get("attempts", 0) == 0 for message in database.waiting())
    assert [rest.reason for rest in database.rests] == ["no connection"]


def test_trouble_before_a_text_is_sent_is_no_texts_fault(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "poison")
    lane.stumble(lambda: ProviderTrouble("no connection"), "poison")

    lane.run()

    assert provider.requests == [["poison"]]
    assert [rest.reason for rest in database.rests] == ["no connection"]


# --- a provider in trouble --------------------------------------------------------------------------


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
        wait_until(lambda: database.rests and database.statements[-1] == "check_interrupts")
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


def test_trouble_of_one_model_does_not_hold_up_another(lane: Lane, database: FakeDatabase) -> None:
    def answer(texts: list[str]) -> Vector:
        raise BUSY

    lane.add_model("dead").answer = answer
    lane.limit_inputs(1)
    for row_id in range(3):
        database.put(row_id + 10, f"text {row_id}", pipeline_id=2)
        database.put(row_id, f"text {row_id}")

    report = lane.run()

    assert (report.completed, report.retried) == (3, 3)
    assert all(database.is_fresh(row_id) for row_id in range(3))
    assert {rest.model for rest in database.rests} == {"dead"}


# --- commits ----------------------------------------------------------------------------------------


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

    work_of = [statement for statement in before if statement != "check_interrupts"]
    assert work_of[0] == "claim"
    assert work_of[-1] == "commit"


def test_the_claim_is_committed_before_anything_is_read(lane: Lane, database: FakeDatabase) -> None:
    """The try of a row that crashes the server while it is read counts."""
    database.put(1, "text")

    lane.run()

    assert database.statements[:2] == ["claim", "commit"]
    assert "rows" in database.statements[2:]


@pytest.mark.parametrize("order", [1, -1])
def test_an_answer_for_several_pipelines_is_committed_after_each(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch, order: int
) -> None:
    """The row locks of one owner do not wait for the code of another, and quick owners come first."""
    monkeypatch.setattr(rows.Owners, "slowness", lambda _, pipeline: order * pipeline.id)
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    for row_id in range(4):
        database.put(row_id, f"text {row_id}", pipeline_id=1 + row_id % 2)

    lane.run()

    start = database.statements.index("write")
    work_of = [statement for statement in database.statements[start:] if statement != "settle"]
    assert work_of[:6] == ["write", "record_embedded", "commit", "lock_lanes", "write", "record_embedded"]
    assert database.written_keys == [["[0]", "[2]"], ["[1]", "[3]"]][::order]
    assert all(database.is_fresh(row_id) for row_id in range(4))


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


@pytest.mark.parametrize(
    ("provider_name", "own", "seconds"),
    [
        ("fake", None, 60),
        ("fake", 5, 5),
        ("fake", 600, 600),
        ("function", None, 60),
        ("function", 8, 8),
        ("function", 600, 600),
    ],
)
def test_a_request_may_take_as_long_as_its_model_says(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, provider_name: str, own: float | None, seconds: float
) -> None:
    model = replace(MODEL, provider=provider_name, timeout_seconds=own)
    database.defined[1] = replace(PIPELINE, model=model)
    database.put(1, "text")

    lane.run(timeout_seconds=60)

    assert [*provider.timeouts, *database.embedder_timeouts] == [seconds]


def test_the_backends_thread_ends_requests_whose_time_is_up(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    database.put(1, "text")

    def answer(texts: list[str]) -> Vector:
        wait_until(lambda: lane.network.looks_at_deadlines > 1)
        return vectors_of(texts)

    provider.answer = answer

    assert lane.run().completed == 1


# --- one owner's code and the others' rows ----------------------------------------------------------


def test_a_cancel_in_an_owners_code_ends_the_pass_with_a_report(lane: Lane, database: FakeDatabase) -> None:
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    sent = [database.put(1, "odd"), database.put(2, "text", pipeline_id=2)]
    database.content_errors["[1]"] = RowError("canceling statement due to user request", cancels=True)

    report = lane.run()

    assert (report.completed, report.retried, report.failed) == (0, 1, 0)
    assert database.rested_pipelines == [(10, [], "canceling statement due to user request")]
    assert [(message.id, message.read_count, message.body) for message in database.waiting()] == [
        (sent[1], 0, {"pipeline": 2, "keys": [[2]]}),
        (sent[1] + 1, 0, {"pipeline": 1, "keys": [[1]], "attempts": 1}),
    ]
    assert database.statements[-1] == "commit"


def test_a_cancel_while_vectors_are_written_keeps_what_was_written(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows.Owners, "slowness", lambda _, pipeline: pipeline.id)
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    database.put(1, "text")
    database.put(2, "odd", pipeline_id=2)
    database.write_errors["[2]"] = RowError("canceling statement due to user request", cancels=True)
    database.tries_find = False

    report = lane.run()

    assert (report.completed, report.retried) == (1, 1)
    assert database.is_fresh(1)
    assert bodies(database.waiting()) == [{"pipeline": 2, "keys": [[2]], "attempts": 1}]


@pytest.mark.parametrize("where", ["content_errors", "write_errors"])
def test_an_error_that_nobody_expected_rests_its_pipeline_and_the_others_go_on(
    lane: Lane, database: FakeDatabase, where: str
) -> None:
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    for row_id in range(4):
        database.put(row_id, f"text {row_id}", pipeline_id=1 + row_id % 2)
    getattr(database, where)["[1]"] = StatementError("a surprise")

    report = lane.run()

    assert (report.completed, report.retried) == (2, 2)
    assert database.rested_pipelines == [(20, [2], "a surprise")]
    assert bodies(database.waiting()) == [{"pipeline": 2, "keys": [[1], [3]], "attempts": 1}]


@pytest.mark.parametrize("where", ["content_errors", "write_errors"])
def test_a_want_of_memory_ends_the_pass_and_blames_nobody(lane: Lane, database: FakeDatabase, where: str) -> None:
    sent = database.put(1, "text")
    getattr(database, where)["[1]"] = StatementError("out of memory", nobodys=True)

    with pytest.raises(StatementError, match="out of memory"):
        lane.run()

    assert database.rested_pipelines == []
    assert [(message.id, message.read_count) for message in database.waiting()] == [(sent, 0)]


def test_the_texts_of_one_owner_do_not_wait_for_the_code_of_the_next(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    database.put(1, "first")
    database.put(2, "second", pipeline_id=2)

    def wait_for_the_first() -> None:
        if database.read_keys:
            wait_until(lambda: provider.requests)

    database.interrupts["rows"] = wait_for_the_first

    assert lane.run().completed == 2
    assert provider.requests == [["first"], ["second"]]


def test_owners_are_read_in_the_order_of_their_quickness(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows.Owners, "quickest_first", lambda _, work: list(reversed(work)))
    database.defined[2] = replace(PIPELINE, id=2, owner=20)
    database.put(1, "first")
    database.put(2, "second", pipeline_id=2)

    lane.run()

    assert database.read_keys == [["[2]"], ["[1]"]]


def test_vectors_that_an_owners_time_does_not_suffice_for_are_written_before_the_pass_ends(
    lane: Lane, database: FakeDatabase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FIRST_STATEMENT_ROWS", "MAX_STATEMENT_ROWS"):
        monkeypatch.setattr(rows, name, 10)
    lane.change_in_flight(lambda: monkeypatch.setattr(rows, "OWNER_SHARE_SECONDS", 0.0))
    for row_id in range(35):
        database.put(row_id, f"text {row_id}")

    report = lane.run()

    assert (report.completed, report.retried) == (35, 0)
    assert len(database.written_keys[0]) == 10
    assert sum(map(len, database.written_keys)) == 35
    assert database.queue == {}


# --- interrupts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "max_requests"), [(1, 1), (8, 2), (20, 10)])
def test_a_cancel_in_flight_gives_all_jobs_back_and_leaves_no_thread(
    lane: Lane, database: FakeDatabase, rows: int, max_requests: int
) -> None:
    before = set(threading.enumerate())
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(rows)]
    lane.hang()
    database.interrupts["check_interrupts"] = cancel
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
        lane = Lane(monkeypatch)
        database, remaining = lane.database, iter(range(number))
        for row_id, text in enumerate(["good", "poison", "changed", "", "odd", "deleted", "locked"]):
            database.put(row_id, text)
        database.content_errors[key_of(4)] = RowError("division by zero")
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

        database.watch = note
        monkeypatch.setattr(rows, "LOCK_PATIENCE_SECONDS", 0.0)
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
    lane.hang()
    database.interrupts["check_interrupts"] = cancel

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
    database.interrupts["check_interrupts"] = lambda: cancel() if database.is_fresh(1) else None

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


def test_a_request_that_takes_an_sql_function_too_long_is_followed_by_smaller_ones(
    lane: Lane, database: FakeDatabase
) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    database.embedder_takes = 2
    for row_id in range(8):
        database.put(row_id, f"text {row_id}")

    report = lane.run(batch_size=4, max_requests=2)

    assert (report.completed, report.retried, database.rests) == (8, 0, [])
    # Two requests of four texts had been packed. The first is cancelled, and its texts travel one by one.
    assert report.requests <= 9


def test_an_sql_function_that_takes_too_long_for_one_text_has_its_model_rest(
    lane: Lane, database: FakeDatabase
) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    database.embedder_takes = 0
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(8)]

    report = lane.run()

    assert (report.completed, report.failed, report.requests, len(database.rests)) == (0, 0, 2, 1)
    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent]


def test_a_cancel_in_an_sql_function_gives_all_jobs_back(lane: Lane, database: FakeDatabase) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(4)]
    database.interrupts["call_embedder"] = cancel

    with pytest.raises(Cancelled):
        lane.run(batch_size=1, max_requests=4)

    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent]
    assert (database.failures, database.rests) == ({}, [])


def test_a_cancel_that_an_sql_function_may_have_raised_ends_the_pass_with_a_report(
    lane: Lane, database: FakeDatabase
) -> None:
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    sent = [database.put(row_id, f"text {row_id}") for row_id in range(4)]

    def end() -> None:
        if database.statements.count("call_embedder") == 2:
            raise PassEnded("canceling statement due to user request")

    database.interrupts["call_embedder"] = end

    report = lane.run(batch_size=1, max_requests=4)

    assert (report.completed, report.failed) == (1, 0)
    assert [(message.id, message.read_count) for message in database.waiting()] == [(number, 0) for number in sent[1:]]
    assert database.statements[-1] == "commit"


def test_a_cancel_while_a_row_is_locked_gives_its_job_back(lane: Lane, database: FakeDatabase) -> None:
    sent = database.put(1, "text")
    database.locked["[1]"] = math.inf
    database.interrupts["check_interrupts"] = lambda: cancel() if database.statements.count("write") > 1 else None

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
