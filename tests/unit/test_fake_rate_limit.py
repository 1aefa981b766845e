"""The fake API's rate limits: who is refused, until when, and how each provider says so."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
import requests

from fake_api import FakeApi, Server, rate_limit
from fake_api.behaviour import RateLimit
from fake_api.protocols.openai import duration as duration_text
from fake_api.rate_limit import RateLimiter
from unit.plain_clients import MODEL, OTHERS, ask, error

# --- buckets, by a clock of their own ----------------------------------------------------------------


class Clock:
    seconds = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(rate_limit, "monotonic", lambda: clock.seconds)
    yield clock


def admitted(limiter: RateLimiter, times: int, tokens: int = 1) -> list[bool]:
    return [limiter.admit({"requests": 1, "tokens": tokens}) is None for _ in range(times)]


def test_a_burst_is_let_in_at_once_and_then_as_many_as_the_rate(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(requests_per_minute=600, burst_requests=3))

    assert admitted(limiter, 4) == [True, True, True, False]
    clock.seconds += 0.1001
    assert admitted(limiter, 2) == [True, False]
    clock.seconds += 3600
    assert admitted(limiter, 4) == [True, True, True, False]


@pytest.mark.parametrize(
    ("limit", "burst"),
    [
        ({"requests_per_minute": 7}, 7),
        ({"requests_per_minute": 120, "burst_seconds": 2}, 4),
        ({"requests_per_minute": 1, "burst_seconds": 1}, 1),
        ({"requests_per_minute": 1, "burst_requests": 9}, 9),
    ],
)
def test_a_burst_is_a_minutes_worth_unless_told(clock: Clock, limit: dict[str, Any], burst: int) -> None:
    assert sum(admitted(RateLimiter(RateLimit(**limit)), 20)) == burst


def test_the_wait_told_is_neither_too_short_nor_too_long(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(tokens_per_minute=600, burst_tokens=100))
    assert admitted(limiter, 1, tokens=90) == [True]

    refusing = limiter.admit({"requests": 1, "tokens": 40})
    assert refusing is not None
    assert refusing.wait_seconds == pytest.approx(3)

    clock.seconds += 2.99
    assert admitted(limiter, 1, tokens=40) == [False]
    clock.seconds += 0.02
    assert admitted(limiter, 1, tokens=40) == [True]


def test_a_request_needs_both_allowances_and_a_refused_one_takes_neither(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(requests_per_minute=2, tokens_per_minute=60, burst_tokens=10))

    assert admitted(limiter, 2, tokens=8) == [True, False]
    assert [(allowance.unit, allowance.left) for allowance in limiter.look()] == [("requests", 1), ("tokens", 2)]


def test_what_is_more_than_a_burst_is_never_let_in(clock: Clock) -> None:
    limiter = RateLimiter(RateLimit(tokens_per_minute=100))

    refusing = limiter.admit({"requests": 1, "tokens": 101})

    assert refusing is not None
    assert refusing.wait_seconds == math.inf


@pytest.mark.parametrize("counts_refused", [False, True])
def test_who_knocks_too_soon_waits_anew_only_where_refused_requests_count(clock: Clock, counts_refused: bool) -> None:
    limiter = RateLimiter(RateLimit(requests_per_minute=60, burst_requests=1, counts_refused=counts_refused))
    assert admitted(limiter, 1) == [True]

    for _ in range(2):
        clock.seconds += 0.6
        let_in = admitted(limiter, 1)
    assert let_in == [not counts_refused]

    clock.seconds += 1.01
    assert admitted(limiter, 1) == [True]


# --- over HTTP ---------------------------------------------------------------------------------------

RETRY = {"Retry-After", "retry-after-ms"}


def told(answer: requests.Response) -> set[str]:
    return {name for name in answer.headers if name.lower().startswith(("x-", "retry-after"))}


def test_requests_above_the_rate_are_refused_until_the_time_told(session: requests.Session, api: FakeApi) -> None:
    api.behave(rate_limit={"requests_per_minute": 120, "burst_seconds": 1})  # two at once, then 2 a second

    first, second = ask(session, api, "a"), ask(session, api, "a")
    before = time.monotonic()
    third = ask(session, api, "a")
    wait_milliseconds = int(third.headers["retry-after-ms"])
    while ask(session, api, "a").status_code == 429:
        assert time.monotonic() < before + 10, "still refused"
    waited_milliseconds = (time.monotonic() - before) * 1000

    assert [answer.status_code for answer in (first, second, third)] == [200, 200, 429]
    assert error(third)["code"] == "rate_limit_exceeded"
    assert error(third)["type"] == "requests"
    assert third.headers["Retry-After"] == "1"
    assert 0 < wait_milliseconds <= 500
    assert waited_milliseconds >= wait_milliseconds - 1
    assert first.headers["x-ratelimit-limit-requests"] == "120"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.headers["x-ratelimit-reset-requests"].endswith("ms")


def test_tokens_above_the_rate_are_refused(session: requests.Session, api: FakeApi) -> None:
    api.behave(rate_limit={"requests_per_minute": 6000, "tokens_per_minute": 100})

    assert ask(session, api, "a" * 4 * 90).status_code == 200
    answer = ask(session, api, "a" * 4 * 20)

    assert (answer.status_code, error(answer)["type"]) == (429, "tokens")
    assert int(answer.headers["Retry-After"]) in range(4, 8)  # 10 tokens are missing, 1.67 come a second
    assert answer.headers["x-ratelimit-reset-tokens"].endswith("s")
    message = r"on tokens per min \(TPM\): Limit 100, Used (89|90), Requested 20\. Please try again in \d\.?\d*s\."
    assert re.search(message, error(answer)["message"])


def test_more_tokens_than_there_ever_are_is_refused_without_a_time(session: requests.Session, api: FakeApi) -> None:
    api.behave(rate_limit={"tokens_per_minute": 1_000_000})

    answer = ask(session, api, ["a" * 32_000] * 126)

    assert answer.status_code == 429
    expected = "Request too large on tokens per min (TPM): Limit 1000000, Requested 1008000."
    assert (error(answer)["message"], error(answer)["code"]) == (expected, "rate_limit_exceeded")
    assert "Retry-After" not in answer.headers
    assert answer.headers["x-ratelimit-limit-tokens"] == answer.headers["x-ratelimit-remaining-tokens"] == "1000000"


def test_every_answer_has_the_limits_and_none_without_one(session: requests.Session, api: FakeApi) -> None:
    api.behave(
        faults=[{"status": 500, "match": "fault"}, {"nan": True, "match": "nan"}],
        rate_limit={"requests_per_minute": 3, "tokens_per_minute": 100},
    )

    answers = [ask(session, api, texts) for texts in (["a"], ["fault"], ["nan"], [], ["a"])]

    assert [answer.status_code for answer in answers] == [200, 500, 200, 400, 429]
    remaining = [answer.headers["x-ratelimit-remaining-requests"] for answer in answers]
    assert remaining == ["2", "2", "1", "0", "0"]
    requests_limits = {f"x-ratelimit-{what}-requests" for what in ("limit", "remaining", "reset")}
    tokens_limits = {f"x-ratelimit-{what}-tokens" for what in ("limit", "remaining", "reset")}
    assert [told(answer) for answer in answers[:4]] == [requests_limits | tokens_limits] * 4
    assert told(answers[4]) == requests_limits | tokens_limits | RETRY
    assert re.fullmatch(r"5\d(\.\d+)?s|1m0s", answers[3].headers["x-ratelimit-reset-requests"])

    api.behave()
    assert told(ask(session, api, "a")) == set()


@pytest.mark.parametrize(
    ("seconds", "duration"),
    [
        (0, "0ms"),
        (0.0121, "13ms"),
        (0.02, "20ms"),
        (1, "1s"),
        (1.5, "1.5s"),
        (60, "1m0s"),
        (360, "6m0s"),
        (360.25, "6m0.25s"),
    ],
)
def test_durations_are_written_as_openai_does(seconds: float, duration: str) -> None:
    assert duration_text(seconds) == duration


def test_official_client_reads_the_limits_and_waits_until_it_is_let_in(api: FakeApi) -> None:
    api.behave(rate_limit={"requests_per_minute": 600, "burst_requests": 1})

    with openai.OpenAI(base_url=api.base_url, api_key="sk-right", max_retries=5, timeout=10) as client:
        started_at = time.monotonic()
        answers = [client.embeddings.with_raw_response.create(model=MODEL, input="a") for _ in range(4)]
        seconds = time.monotonic() - started_at

    assert answers[0].headers["x-ratelimit-limit-requests"] == "600"
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "0"
    assert [len(answer.parse().data) for answer in answers] == [1, 1, 1, 1]
    assert seconds >= 0.3
    assert api.counters()["rate_limited"] >= 3
    assert api.counters()["statuses"] == {"200": 4, "429": api.counters()["rate_limited"]}


def test_official_client_raises_its_own_error_above_the_limit(api: FakeApi) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})

    with openai.OpenAI(base_url=api.base_url, api_key="sk-right", max_retries=0) as client:
        client.embeddings.create(model=MODEL, input="a")
        with pytest.raises(openai.RateLimitError, match="Limit 1, Used 1, Requested 1. Please try again in ") as caught:
            client.embeddings.create(model=MODEL, input="a")

    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")


def test_a_rate_limit_is_the_tenants_own_and_outlasts_other_orders(
    session: requests.Session, server: Server, api: FakeApi
) -> None:
    api.behave(rate_limit={"requests_per_minute": 1})
    assert ask(session, api, "a").status_code == 200

    api.amend(keep_texts=False)
    assert ask(session, api, "a").status_code == 429
    assert ask(session, server.api("unlimited"), "a").status_code == 200

    api.amend(rate_limit=None)
    assert ask(session, api, "a").status_code == 200


# --- the other protocols -----------------------------------------------------------------------------

REMAINING = {"x-ratelimit-remaining-requests", "x-ratelimit-remaining-tokens"}
TRIAL = {"x-trial-endpoint-call-limit", "x-trial-endpoint-call-remaining"}


@pytest.mark.parametrize(
    ("name", "headers", "headers_above", "message"),
    [
        ("azure", REMAINING, REMAINING | RETRY, "have exceeded call rate limit"),
        ("cohere", TRIAL, set(), "You are using a Trial key, which is limited to 2 API calls / minute."),
        ("voyage", set(), set(), "You have exceeded your rate limit."),
        ("gemini", set(), set(), "You exceeded your current quota"),
        ("ollama", set(), {"Retry-After"}, "too many requests"),
    ],
)
def test_every_provider_tells_its_limits_in_its_own_way(
    api: FakeApi, name: str, headers: set[str], headers_above: set[str], message: str
) -> None:
    other = OTHERS[name]
    api.behave(rate_limit={"requests_per_minute": 2, "tokens_per_minute": 1000})

    answers = [other.ask(api, other.body(["a"])) for _ in range(3)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert [told(answer) for answer in answers] == [headers, headers, headers_above]
    assert message in other.message(answers[2].json())
    assert api.counters()["rate_limited"] == 1


def test_cohere_counts_down_the_calls_of_a_trial_key(api: FakeApi) -> None:
    cohere = OTHERS["cohere"]
    api.behave(rate_limit={"requests_per_minute": 20})

    answers = [cohere.ask(api, cohere.body(["a", "b"])) for _ in range(3)]

    assert [answer.headers["x-trial-endpoint-call-remaining"] for answer in answers] == ["19", "18", "17"]
    assert {answer.headers["x-trial-endpoint-call-limit"] for answer in answers} == {"20"}


def test_gemini_says_in_the_body_when_to_come_back_and_counts_every_text(api: FakeApi) -> None:
    gemini = OTHERS["gemini"]
    api.behave(rate_limit={"requests_per_minute": 100})

    answers = [gemini.ask(api, gemini.body(["a"] * count)) for count in (60, 40, 30)]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    quota, retry = answers[2].json()["error"]["details"]
    assert quota["violations"][0]["quotaValue"] == "100"
    assert retry["@type"] == "type.googleapis.com/google.rpc.RetryInfo"
    assert 10 < float(retry["retryDelay"].removesuffix("s")) <= 18


@pytest.mark.parametrize(("unit", "what"), [("requests", "call"), ("tokens", "token")])
def test_azure_says_which_limit_it_is(api: FakeApi, unit: str, what: str) -> None:
    azure = OTHERS["azure"]
    api.behave(rate_limit={f"{unit}_per_minute": 1})

    azure.ask(api, azure.body(["a"]))
    answer = azure.ask(api, azure.body(["a"]))

    assert f"exceeded {what} rate limit" in azure.message(answer.json())
    assert answer.json()["error"]["code"] == "429"
    assert 50 < int(answer.headers["Retry-After"]) <= 60
    assert azure.message(answer.json()).endswith(f"Please retry after {answer.headers['Retry-After']} seconds.")


@pytest.mark.parametrize("name", OTHERS)
def test_no_provider_says_when_more_than_there_ever_is_will_be_let_in(api: FakeApi, name: str) -> None:
    other = OTHERS[name]
    api.behave(rate_limit={"tokens_per_minute": 10})

    answer = other.ask(api, other.body(["a" * 44]))

    assert answer.status_code == 429
    assert answer.headers.get("Retry-After") == ("86400" if name == "azure" else None)
    assert "RetryInfo" not in answer.text
