"""The way out of each request: texts that are refused, or that fail, and trouble of a provider."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest

from autoembed import outbox, worker
from autoembed.errors import CameLate, FellOver, PassEnded, ProviderTrouble, Refused, Trouble
from autoembed.jobs import MAX_ATTEMPTS
from autoembed.outbox import PROBE, Outbox
from unit.fakes import (
    MODEL,
    PIPELINE,
    Failure,
    FakeDatabase,
    FakeProvider,
    Rest,
    Vector,
    key_of,
    vectors_of,
)
from unit.lane import Lane, bodies
from waiting import wait_until

BUSY = ProviderTrouble("busy", retry_after_seconds=7)

# Each test runs with each of these. A pass that has to wait for what does not come goes back at once.
LIMITS: dict[str, dict[str, Any]] = {
    "without limits": {},
    "with learnt limits": {"learnt": {"requests_per_minute": 10_000, "requests_at_once": 100}},
    "with slots": {"max_requests_in_flight": 8},
}


@pytest.fixture(params=list(LIMITS.values()), ids=list(LIMITS))
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    lane = Lane(monkeypatch)
    lane.database.limits = request.param
    monkeypatch.setattr(outbox, "PATIENCE_SECONDS", 0.0)
    with all_slots_used(lane.database, monkeypatch):
        yield lane


@contextmanager
def all_slots_used(database: FakeDatabase, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails where a slot is held that no request needs, during a pass or after it."""
    made: list[Outbox] = []

    def make(*arguments: Any) -> Outbox:
        made.append(Outbox(*arguments))
        return made[-1]

    monkeypatch.setattr(worker, "Outbox", make)

    def look(statement: str) -> None:
        if statement == "check_interrupts":
            assert database.slots_held == {slot for one in made for slot in one.slots}

    database.watch = look
    yield
    assert database.slots_held == set()


def wait_no_longer_than(seconds: float, database: FakeDatabase) -> Callable[[], bool]:
    """Has the pass end that waits for so long. Returns whether one did."""
    end = time.monotonic() + seconds
    ended: list[bool] = []

    def look() -> None:
        if time.monotonic() > end:
            ended.append(True)
            raise PassEnded("it waits for what does not come")

    database.interrupts["check_interrupts"] = look
    return lambda: bool(ended)


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


def twenty_in_time(texts: list[str]) -> Vector:
    """The answer of a server that takes too long for more than twenty texts."""
    # It is busy with the request that came too late, and the probe waits behind it.
    if len(texts) > 20 or texts == [PROBE]:
        late = CameLate("no answer in time")
        late.may_be_a_texts = True
        raise late
    return vectors_of(texts)


def test_a_server_that_is_too_slow_for_a_full_request_is_sent_fewer_texts(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(100):
        database.put(row_id, f"text {row_id}")

    provider.answer = twenty_in_time
    lane.stop_when(lambda: not database.queue)

    lane.work(20)

    assert all(database.is_fresh(row_id) for row_id in range(100))
    assert [len(texts) for texts in provider.requests if texts != [PROBE]][:4] == [100, 50, 25, 12]


def test_calls_of_process_learn_one_after_the_other_how_many_texts_a_slow_server_takes(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    for row_id in range(100):
        database.put(row_id, f"text {row_id}")

    provider.answer = twenty_in_time
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
    monkeypatch.setattr(outbox, "RESTART_POLL_SECONDS", 0.0)
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
    monkeypatch.setattr(outbox, "RESTART_SECONDS", 0.0)
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
    monkeypatch.setattr(outbox, "RESTART_SECONDS", 0.1)
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


# --- limits that allow few requests -----------------------------------------------------------------


def refused() -> Trouble:
    return Refused("the provider answered 400: not these words")


def too_long() -> Trouble:
    return Refused("the provider answered 400: maximum context length is 200 tokens")


def late() -> Trouble:
    trouble = CameLate("no answer in time")
    trouble.may_be_a_texts = True
    return trouble


def fell() -> Trouble:
    trouble = FellOver("no answer")
    trouble.may_be_a_texts = True
    return trouble


# The requests that a pass may wait for, and the time that it looks for a text, both in those that the limits allow.
TIGHT = {"one a pass": (0.3, 5), "few a pass": (0.3, 12), "one after the other": (3, 30)}


@pytest.fixture(params=list(TIGHT.values()), ids=list(TIGHT))
def tight(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lane]:
    lane = Lane(monkeypatch)
    lane.database.limits = {"requests_per_minute": 2, "max_requests_in_flight": 1}
    lane.database.seconds_per_request = 0.04
    patience, search = request.param
    monkeypatch.setattr(outbox, "PATIENCE_SECONDS", patience * lane.database.seconds_per_request)
    monkeypatch.setattr(outbox, "SEARCH_SECONDS", search * lane.database.seconds_per_request)
    monkeypatch.setattr(outbox, "RESTART_POLL_SECONDS", 0.0)
    monkeypatch.setattr(worker, "SLICE_SECONDS", 0.005)
    with all_slots_used(lane.database, monkeypatch):
        yield lane


@pytest.mark.parametrize("trouble", [refused, too_long, answered, late, fell])
@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_text_at_fault_costs_few_requests_however_few_the_limits_allow(
    tight: Lane, trouble: Callable[[], Trouble], failures: int
) -> None:
    database = tight.database
    database.defined[1] = replace(PIPELINE, failures=failures)
    for row_id in range(16):
        database.put(row_id, "poison " * 1000 if row_id == 11 else f"text {row_id}")
    tight.stumble(trouble, "poison")
    end = time.monotonic() + 60

    while database.queue:
        assert time.monotonic() < end, database.queue
        tight.run()
        if database.resumed:
            database.defined[1] = PIPELINE

    assert all(database.is_fresh(row_id) for row_id in range(16) if row_id != 11)
    assert list(database.failures) == [key_of(11)]
    assert database.rests == []
    # Each text, probe and half several times at most.
    assert len(tight.provider.requests) <= 60


@pytest.mark.parametrize("trouble", [refused, answered, late])
def test_an_outage_rests_the_model_however_few_requests_the_limits_allow(
    tight: Lane, trouble: Callable[[], Trouble]
) -> None:
    for row_id in range(16):
        tight.database.put(row_id, f"text {row_id}")
    tight.stumble(trouble, "")

    for _ in range(100):
        tight.run()
        if tight.database.rests:
            break

    assert len(tight.database.rests) == 1
    assert len(tight.provider.requests) <= 4
    assert tight.database.failures == {}


# --- an SQL function -------------------------------------------------------------------------------


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


def test_an_sql_function_that_refuses_a_request_and_is_too_slow_for_the_next_holds_up_nothing(
    lane: Lane, database: FakeDatabase
) -> None:
    """The next one is there already when the first is refused, and goes back with the probe behind it."""
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    database.embedder_takes = 3
    database.bad_texts = ["poison"]
    for row_id in range(10):
        database.put(row_id, f"poison {row_id}" if row_id < 5 else f"text {row_id}")
    hung = wait_no_longer_than(5, database)

    report = lane.run(batch_size=5, max_requests=2)

    assert not hung()
    assert (report.completed, report.failed, database.rests) == (5, 5, [])
    assert report.requests == database.statements.count("call_embedder") <= 20


def test_requests_that_are_taken_back_leave_their_slots(lane: Lane, database: FakeDatabase) -> None:
    database.limits = {**database.limits, "max_requests_in_flight": 2}
    database.defined[1] = replace(PIPELINE, model=replace(MODEL, provider="function"))
    database.embedder_takes = 1
    for row_id in range(6):
        database.put(row_id, f"text {row_id}")

    assert lane.run(batch_size=3, max_requests=2).completed == 6


def test_a_mistake_of_ours_in_a_thread_rests_the_model_and_ends_no_lane(lane: Lane, database: FakeDatabase) -> None:
    sent = database.put(1, "text")
    lane.fail_with(ZeroDivisionError("sk-secret"))

    assert lane.run().retried == 1

    [rest] = database.rests
    assert "an unexpected ZeroDivisionError" in rest.reason
    assert "sk-secret" not in rest.reason
    assert [(message.id, message.read_count) for message in database.waiting()] == [(sent, 0)]
