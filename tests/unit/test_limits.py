"""How fast a model may be asked: what answers tell, what is learnt of it, and what a request takes."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed import outbox
from autoembed.answers import retry_after_seconds, trouble_of_answer
from autoembed.errors import OverBudget, ProviderTrouble, Refused, rest_seconds
from autoembed.limits import (
    HEADROOM,
    NOTHING_KNOWN,
    SAVED_SECONDS,
    Allowance,
    Charge,
    Limiter,
    Limits,
    Permit,
    charge_for,
    learn,
    limits_in,
    stricter,
)
from autoembed.model import Embedded, Model
from autoembed.providers import sizes_of
from unit.fakes import MODEL, PIPELINE, Vector, vectors_of
from unit.lane import Lane
from waiting import wait_until


def define(lane: Lane, **limits: object) -> Model:
    model = dataclasses.replace(MODEL, **limits)  # type: ignore[arg-type]
    lane.database.defined[1] = dataclasses.replace(PIPELINE, model=model)
    return model


# --- what an answer tells ------------------------------------------------------------------------------


def headers(limit: str, left: str, reset: str, unit: str = "requests") -> dict[str, str]:
    values = {"limit": limit, "remaining": left, "reset": reset}
    return {f"x-ratelimit-{name}-{unit}": value for name, value in values.items() if value}


@pytest.mark.parametrize(
    ("told", "limits"),
    [
        ({}, NOTHING_KNOWN),
        (headers("60", "59", "1s"), Limits(Allowance(60, 59))),
        (headers("60", "59", "1s", "tokens"), Limits(tokens=Allowance(60, 59))),
        (headers("3000", "0", "59.9s"), Limits(Allowance(3000, 0))),
        (headers("60", "0", "1m0s"), Limits(Allowance(60, 0))),
        (headers("60", "", ""), Limits(Allowance(60, None))),
        # A limit of 200 a day: 7m12s for each.
        (headers("200", "199", "7m12s"), NOTHING_KNOWN),
        (headers("10000", "9999", "1h2m"), NOTHING_KNOWN),
        # Azure tells no limit, and this is no number.
        (headers("", "7", ""), NOTHING_KNOWN),
        (headers("many", "7", "1s"), NOTHING_KNOWN),
        (headers("0", "0", "1s"), NOTHING_KNOWN),
        (headers("-5", "7", "1s"), NOTHING_KNOWN),
        (headers("60", "x", "120ms"), Limits(Allowance(60, None))),
        # Nobody's number, and nobody's duration.
        (headers("1" * 10, "7", "1s"), NOTHING_KNOWN),
        (headers("60", "7", "1" * 99 + "s"), NOTHING_KNOWN),
        (headers("60", "7", "0s" * 51), NOTHING_KNOWN),
        (headers("60", "7", "0s" * 50), Limits(Allowance(60, 7))),
    ],
)
def test_headers_are_read_as_openai_writes_them(told: Mapping[str, str], limits: Limits) -> None:
    assert limits_in(told) == limits


@pytest.mark.parametrize(
    ("told", "requests", "tokens"),
    [
        # Names without a unit are of a minute, however soon the limit is whole again: a burst may be smaller than it.
        (headers("600", "4", "100ms"), Allowance(600, 4), Allowance()),
        (headers("600", "590", "1s"), Allowance(600, 590), Allowance()),
        (headers("60", "60", "0s"), Allowance(60, 60), Allowance()),
        # Mistral.
        (
            {
                "x-ratelimit-limit-req-minute": "50",
                "x-ratelimit-remaining-req-minute": "49",
                "x-ratelimit-limit-tokens-minute": "50000",
                "x-ratelimit-remaining-tokens-minute": "47300",
            },
            Allowance(50, 49),
            Allowance(50_000, 47_300),
        ),
        (
            {"x-ratelimit-limit-req-second": "6", "x-ratelimit-remaining-req-second": "5"},
            Allowance(360, 5),
            Allowance(),
        ),
        # Both units: the lower counts.
        ({"x-ratelimit-limit-second": "5", "x-ratelimit-limit-minute": "100"}, Allowance(100), Allowance()),
        # A model that is not in the plan: the 429 says so.
        ({"x-ratelimit-limit-req-minute": "0"}, Allowance(), Allowance()),
        # Together.
        (
            {
                "x-ratelimit-limit": "10",
                "x-ratelimit-remaining": "9",
                "x-tokenlimit-limit": "3000",
                "x-tokenlimit-remaining": "2000",
            },
            Allowance(600, 9),
            Allowance(180_000, 2000),
        ),
        # Nobody knows the unit.
        ({"x-ratelimit-limit": "10", "x-ratelimit-remaining": "9"}, Allowance(), Allowance()),
        # The draft of the IETF, in its newer and its older form; a policy of an hour.
        ({"ratelimit-policy": '"burst";q=5;w=1,"steady";q=200;w=60'}, Allowance(200), Allowance()),
        ({"ratelimit-policy": "10;w=1, 5000;w=3600"}, Allowance(600), Allowance()),
        ({"ratelimit-policy": "100"}, Allowance(), Allowance()),
    ],
)
def test_limits_of_a_second_and_in_other_names_are_read(
    told: Mapping[str, str], requests: Allowance, tokens: Allowance
) -> None:
    assert limits_in(told) == Limits(requests, tokens)


# Numbers near the bounds of their columns, in many spellings, and other words.
NUMBERS = (
    st.one_of(st.integers(), st.integers(0, 10**12), st.floats()).map(str)
    | st.text(alphabet="0123456789", max_size=12)
    | st.text()
)
NAMES = [
    f"x-ratelimit-{what}-{name}{unit}"
    for what in ("limit", "remaining")
    for name in ("req-", "requests-", "tokens-", "")
    for unit in ("second", "minute")
]
GATEWAYS = ["x-ratelimit-limit", "x-ratelimit-remaining", "x-tokenlimit-limit", "x-tokenlimit-remaining"]
POLICIES = NUMBERS | st.builds("{};w={}".format, NUMBERS, NUMBERS) | st.builds("q={};w={}".format, NUMBERS, NUMBERS)


def hold(told: Limits) -> bool:
    """Whether the columns of autoembed.model_limit hold these limits."""
    return all(
        (one.per_minute is None or 0 < one.per_minute < 2**31) and (one.at_once is None or 0 <= one.at_once < 2**31)
        for one in told
    )


@given(st.dictionaries(st.sampled_from([*NAMES, *GATEWAYS]), NUMBERS), POLICIES)
def test_no_header_of_another_name_breaks_the_reading(told: dict[str, str], policy: str) -> None:
    assert hold(limits_in({**told, "ratelimit-policy": policy}))


@pytest.mark.parametrize(
    "told",
    [
        {"x-ratelimit-limit-requests-second": "100000000"},
        {"x-ratelimit-limit-tokens-second": "35791395"},
        {"x-tokenlimit-limit": "999999999"},
        {"ratelimit-policy": "999999999;w=1"},
    ],
)
def test_a_limit_that_no_column_holds_is_none(told: dict[str, str]) -> None:
    """If it is stored all the same, the error ends each pass after a request that is paid for."""
    assert limits_in(told) == NOTHING_KNOWN


def test_a_long_header_costs_no_time() -> None:
    began_at = time.monotonic()

    assert limits_in(headers("60", "7", "1" * 1_000_000)) == NOTHING_KNOWN
    assert retry_after_seconds({"retry-after": "1" * 1_000_000, "retry-after-ms": "1" * 1_000_000}) is None
    assert limits_in({"ratelimit-policy": "1;" * 500_000}) == NOTHING_KNOWN

    assert time.monotonic() - began_at < 0.5


@given(st.lists(NUMBERS, min_size=3, max_size=3))
def test_no_header_breaks_the_reading(values: list[str]) -> None:
    assert hold(limits_in(headers(*values)))


@pytest.mark.parametrize(
    ("known", "told", "after"),
    [
        (None, Allowance(), Allowance()),
        (Allowance(60, 9), Allowance(), Allowance(60, 9)),
        (Allowance(), Allowance(60, 4), Allowance(60, 4)),
        # The most that was left is what counts.
        (Allowance(60, 9), Allowance(60, 3), Allowance(60, 9)),
        (Allowance(60, 9), Allowance(60, 20), Allowance(60, 20)),
        (Allowance(60, 100), Allowance(60, 105), Allowance(60, 100)),
        (Allowance(60, 9), Allowance(600, 3), Allowance(600, 3)),
        (Allowance(60, 9), Allowance(6, 3), Allowance(6, 3)),
    ],
)
def test_what_is_learnt_is_the_newest_limit_and_the_most_that_was_left(
    known: Allowance | None, told: Allowance, after: Allowance
) -> None:
    before = None if known is None else Limits(known, known)

    assert learn(before, Limits(told, told)) == Limits(after, after)


def test_an_error_without_limits_teaches_nothing() -> None:
    limiter = Limiter(dataclasses.replace(MODEL, learnt=None))

    assert not limiter.learn_from(Refused("no"), 0)
    assert not limiter.learn_from(KeyError("a mistake"), 0)
    assert limiter.learnt is None
    assert limiter.learn_from(Embedded(vectors_of(["a"])), 0)
    assert limiter.learnt == NOTHING_KNOWN
    assert not limiter.learn_from(Embedded(vectors_of(["a"])), 0)


def test_an_error_with_limits_teaches_them() -> None:
    limiter = Limiter(dataclasses.replace(MODEL, learnt=None))
    refusal = Refused("no")
    refusal.headers = headers("60", "59", "1s")

    assert limiter.learn_from(refusal, 0)
    assert limiter.learnt == Limits(Allowance(60, 59))


# --- what follows of it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per_minute", "known", "result"),
    [
        (None, Allowance(), Allowance()),
        (None, Allowance(60, 5), Allowance(60, 5)),
        (60, Allowance(), Allowance(60)),
        (30, Allowance(60, 5), Allowance(30)),
        (90, Allowance(60, 5), Allowance(60, 5)),
    ],
)
def test_the_stricter_of_two_limits_counts(per_minute: int | None, known: Allowance, result: Allowance) -> None:
    assert stricter(per_minute, known) == result


@pytest.mark.parametrize(
    ("allowance", "amount", "left", "age", "result"),
    [
        (Allowance(), 1, 5, 1, None),
        # One at once, five more where so many were left; as few as an answer says, and what came since.
        (Allowance(60), 1, None, 0, (1, 1)),
        (Allowance(60, 5), 1, None, 0, (1, 5)),
        (Allowance(60, 5), 1, 2, 0, (1, 2)),
        (Allowance(60, 5), 1, 0, 0, (1, 0)),
        (Allowance(60, 5), 1, 9, 9, (1, 5)),
        (Allowance(60), 30, None, 0, (30, 30)),
        (Allowance(60, 90), 30, None, 0, (30, 90)),
    ],
)
def test_a_request_takes_its_part_of_a_minute(
    allowance: Allowance, amount: int, left: int | None, age: float, result: tuple[float, float] | None
) -> None:
    found = charge_for(amount, allowance, left, age)

    assert found == (None if result is None else pytest.approx([seconds * HEADROOM for seconds in result]))


def test_what_came_since_an_answer_may_be_used() -> None:
    assert charge_for(1, Allowance(60, 5), 0, 0.5) == pytest.approx((HEADROOM, 0.5))


def test_a_fast_limit_is_not_lost_between_two_looks() -> None:
    assert charge_for(1, Allowance(60_000)) == pytest.approx((0.001 * HEADROOM, SAVED_SECONDS))


def test_tokens_that_were_estimated_and_not_used_are_given_back_once() -> None:
    limiter = Limiter(dataclasses.replace(MODEL, tokens_per_minute=60))
    limiter.correct_estimate(estimated=100, tokens=70)
    limiter.correct_estimate(estimated=100, tokens=None)
    limiter.correct_estimate(estimated=100, tokens=120)

    taken = []
    for _ in range(3):
        # One that is refused takes nothing.
        limiter.charge(20, 0)
        _, tokens = limiter.charge(20, 0)
        limiter.charged(20)
        taken.append(tokens and tokens.seconds)

    assert taken == pytest.approx([0, 10 * HEADROOM, 20 * HEADROOM])


@pytest.mark.parametrize(
    ("limits", "needs", "paces"),
    [
        ({}, False, False),
        ({"learnt": None}, False, False),
        ({"learnt": {"requests_at_once": 5}}, False, False),
        ({"learnt": {"tokens_per_minute": 5}}, True, True),
        ({"requests_per_minute": 5}, True, True),
        ({"max_requests_in_flight": 5}, True, False),
        ({"daily_token_budget": 0}, True, False),
        ({"daily_cost_budget": 0}, True, False),
    ],
)
def test_only_a_model_with_limits_needs_permits(limits: dict[str, object], needs: bool, paces: bool) -> None:
    limiter = Limiter(dataclasses.replace(MODEL, **limits))  # type: ignore[arg-type]

    assert (limiter.needs_permits, limiter.paces) == (needs, paces)


@pytest.mark.parametrize(
    ("own", "per_minute", "learnt", "most"),
    [
        (None, None, None, 300_000),
        (200, None, None, 200),
        (None, 100, None, 100),
        (None, 100, 50, 50),
        (20, 100, 50, 20),
    ],
)
def test_a_request_has_at_most_a_minutes_tokens(
    own: int | None, per_minute: int | None, learnt: int | None, most: int
) -> None:
    model = dataclasses.replace(MODEL, max_tokens_per_request=own, tokens_per_minute=per_minute)

    assert sizes_of(model, Limits(tokens=Allowance(learnt))).tokens_per_request == most


# --- refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "seconds"), [("120", 0.12), ("0", 0), ("", 7), ("soon", 7), ("-5", 7), ("9" * 5000, 7), ("²", 7)]
)
def test_milliseconds_go_before_seconds(value: str, seconds: float) -> None:
    assert retry_after_seconds({"retry-after": "7", "retry-after-ms": value}) == seconds


def test_a_request_that_is_too_large_for_a_minute_is_refused_like_a_bad_one() -> None:
    body = b'{"error": {"message": "Request too large for m on tokens per min (TPM): Limit 9, Requested 10."}}'

    assert isinstance(trouble_of_answer(429, {}, body), Refused)
    assert isinstance(trouble_of_answer(429, {}, b"Rate limit reached"), ProviderTrouble)


def test_a_spent_budget_rests_the_model_for_the_whole_day() -> None:
    assert rest_seconds(OverBudget("spent", retry_after_seconds=80_000), 3, 0.7) == 80_000


# --- in a pass -----------------------------------------------------------------------------------------


def put(lane: Lane, rows: int) -> None:
    for row_id in range(rows):
        lane.database.put(row_id, f"text {row_id}")


def test_a_model_without_limits_costs_no_statement(lane: Lane) -> None:
    put(lane, 6)
    lane.run(batch_size=2, max_requests=3)

    assert {"take_permit", "free_slots", "learn_limits"}.isdisjoint(lane.database.statements)


def test_a_model_with_limits_costs_one_statement_a_request(lane: Lane) -> None:
    define(lane, requests_per_minute=600, max_requests_in_flight=3)
    lane.database.permits = [Permit(0.0, slot) for slot in (1, 2, 3)]
    put(lane, 6)

    report = lane.run(batch_size=2, max_requests=3)

    assert report.requests == 3
    assert [lane.database.statements.count(name) for name in ("take_permit", "free_slots")] == [3, 0]
    assert sorted(lane.database.slots_freed) == [1, 2, 3]


def test_the_first_request_goes_alone_and_its_limits_hold_for_the_others(lane: Lane) -> None:
    define(lane, learnt=None)
    lane.provider.headers = {**headers("600", "4", "100ms"), **headers("40", "30", "1s", "tokens")}
    second = threading.Event()
    alone: list[bool] = []

    def answer(texts: list[str]) -> Vector:
        if len(lane.provider.requests) > 1:
            second.set()
        else:
            alone.append(not second.wait(0.3))
        return vectors_of(texts)

    lane.provider.answer = answer
    put(lane, 30)

    assert lane.run(batch_size=15, max_requests=4).completed == 30

    assert alone == [True]
    assert lane.database.limits_learnt == [Limits(Allowance(600, 4), Allowance(40, 30))]
    # The second was too large for a minute's tokens, by estimate.
    assert len(lane.provider.requests) > 2
    assert lane.database.charges[0][0] == pytest.approx(Charge(0.1 * HEADROOM, 0.4 * HEADROOM), abs=0.3)


def test_a_request_waits_for_its_moment(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    define(lane, requests_per_minute=60)
    lane.database.permits = [Permit(0.0), Permit(time.monotonic() + 0.4)]
    put(lane, 2)
    began_at = time.monotonic()

    lane.run(batch_size=1, max_requests=2)

    assert time.monotonic() - began_at >= 0.4


def test_a_request_waits_for_a_slot(lane: Lane) -> None:
    define(lane, max_requests_in_flight=2)
    lane.database.permits = [Permit(), Permit(0.0, 2)]
    put(lane, 1)

    assert lane.run().completed == 1
    assert lane.database.statements.count("take_permit") == 2
    assert lane.database.slots_freed == [2]


def test_a_lane_asks_for_no_more_slots_than_a_model_has(lane: Lane) -> None:
    define(lane, max_requests_in_flight=2)
    put(lane, 3)
    asked: list[int] = []

    def answer(texts: list[str]) -> Vector:
        if len(lane.provider.requests) <= 2:
            wait_until(lambda: len(lane.provider.requests) == 2)
            looks = lane.network.looks_at_deadlines
            wait_until(lambda: asked or lane.network.looks_at_deadlines > looks + 3)
            asked.append(lane.database.statements.count("take_permit"))
        return vectors_of(texts)

    lane.provider.answer = answer

    assert lane.run(batch_size=1, max_requests=3).completed == 3
    assert asked[0] == 2


@pytest.mark.parametrize("error", [ProviderTrouble("down"), KeyError("ours"), KeyboardInterrupt()])
def test_a_failed_request_frees_its_slot(lane: Lane, error: BaseException) -> None:
    define(lane, max_requests_in_flight=2)
    lane.database.permits = [Permit(0.0, 2)]
    lane.fail_with(error)
    put(lane, 1)

    if isinstance(error, KeyboardInterrupt):
        with pytest.raises(KeyboardInterrupt):
            lane.run()
    else:
        lane.run()

    assert lane.database.slots_freed == [2]


def test_a_spent_budget_puts_back_what_waits_and_keeps_what_was_sent(lane: Lane) -> None:
    define(lane, daily_token_budget=9)
    lane.database.permits = [Permit(0.0), Permit(spent="its budget is used up", rest_seconds=1000)]
    put(lane, 3)

    report = lane.run(batch_size=1, max_requests=3)

    assert (report.completed, report.retried, report.requests) == (1, 2, 1)
    assert [(found.seconds, found.needs_attention, found.reason) for found in lane.database.rests] == [
        (1000, False, "its budget is used up")
    ]
    assert [message.read_count for message in lane.database.waiting()] == [0, 0]


def test_what_would_wait_too_long_goes_back_untouched_at_once(lane: Lane) -> None:
    define(lane, requests_per_minute=2)
    lane.database.seconds_per_request = 30
    put(lane, 3)
    began_at = time.monotonic()

    report = lane.run(batch_size=1, max_requests=3)

    assert (report.completed, report.retried, report.requests) == (1, 2, 1)
    assert time.monotonic() - began_at < 5
    assert lane.database.rests == []
    assert [message.read_count for message in lane.database.waiting()] == [0, 0]


def test_each_request_has_the_whole_patience(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that has lasted for longer goes on."""
    define(lane, requests_per_minute=1)
    monkeypatch.setattr(outbox, "PATIENCE_SECONDS", 0.3)
    lane.database.seconds_per_request = 0.2
    put(lane, 4)

    assert lane.run(batch_size=1, max_requests=4).completed == 4


def test_what_finds_no_free_slot_goes_back_untouched(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PATIENCE_SECONDS", 0.2)
    lane.database.limits = {"max_requests_in_flight": 1}
    lane.database.slots_held = {1}
    put(lane, 3)

    report = lane.run(batch_size=1, max_requests=3)

    assert (report.completed, report.retried, report.requests) == (0, 3, 0)
    assert lane.database.statements.count("take_permit") > 2
    assert [message.read_count for message in lane.database.waiting()] == [0, 0, 0]


def test_a_lane_claims_nothing_for_a_model_whose_limits_allow_nothing(lane: Lane) -> None:
    define(lane, requests_per_minute=1)
    lane.database.seconds_per_request = 60
    put(lane, 3)
    lane.stop_when(lambda: lane.database.statements.count("claim") > 5)

    lane.work(20, batch_size=1)

    assert len(lane.provider.requests) == 1
    assert lane.database.statements.count("take_permit") == 2
    assert lane.database.busy[-1] == ["small"]
