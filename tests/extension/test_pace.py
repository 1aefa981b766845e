"""Limits of a model, its own and those that its provider tells, and its budget: for all sessions together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection, is_settled, stored, waiting
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]

MODEL = "text-embedding-3-small"
# A lane may take this besides: its first request, which goes alone, and its own work.
YOUNG_LANE_SECONDS = 0.5


def alter(db: Connection, **limits: Any) -> None:
    arguments = ", ".join(f"{name} => %({name})s" for name in limits)
    db.execute(f"SELECT autoembed.alter_model('{MODEL}', {arguments})", limits)


def fill(db: Connection, rows: int, content: str = "text ") -> None:
    db.execute(
        "INSERT INTO documents (title, content) SELECT 't', %s || n FROM generate_series(1, %s) AS n", [content, rows]
    )


def rest(db: Connection) -> Any:
    return db.execute("TABLE autoembed.model_rest").fetchone()


def answered(api: FakeApi) -> list[dict[str, Any]]:
    return [request for request in api.log() if request["status"] == 200]


def seconds_of(requests: list[dict[str, Any]]) -> float:
    """From the first of these to the last."""
    return float(max(r["started_at"] for r in requests) - min(r["started_at"] for r in requests))


@pytest.fixture
def plain(documents: Connection) -> Connection:
    """The guide's table without its index, which would be the limit here."""
    documents.execute("DROP INDEX documents_embedding_idx")
    return documents


def assert_untouched(db: Connection) -> None:
    """No waiting row was counted as tried, and none was given up."""
    assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
    counts = "SELECT DISTINCT read_ct, coalesce(message ->> 'attempts', '0') FROM pgmq.q_embedding_jobs"
    assert db.execute(counts).fetchall() in ([], [(0, "0")])


# --- requests a minute ---------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
def test_a_limit_that_is_only_learnt_is_kept_to_and_used_up(
    plain: Connection, api: FakeApi, connect: Connect, lanes: int
) -> None:
    """Without the limiter, every pass sends all its requests at once, and most are refused."""
    api.behave(rate_limit={"requests_per_minute": 600, "burst_requests": 5})
    fill(plain, 1000)

    with running_lanes(plain, connect, lanes, "batch_size => 20"):
        wait_until(lambda: is_settled(plain), 60)

    requests = answered(api)
    least_seconds = (len(requests) - 5) * 60 / 600
    assert len(requests) >= 50
    # Few are refused, and more where the machine has much else to do. Without the limiter, seven times as many are
    # refused as answered.
    assert api.counters()["rate_limited"] < len(requests)
    assert seconds_of(requests) <= 1.5 * least_seconds + YOUNG_LANE_SECONDS


def test_lanes_share_a_limit_of_the_models_own_where_the_provider_tells_none(
    plain: Connection, api: FakeApi, connect: Connect
) -> None:
    """If each lane kept to the limit by itself, twice as many requests would go."""
    alter(plain, requests_per_minute=600)
    fill(plain, 300)

    with running_lanes(plain, connect, 2, "batch_size => 10"):
        wait_until(lambda: is_settled(plain), 60)

    requests = answered(api)
    least_seconds = (len(requests) - 1) * 60 / 600
    # A lane may be a slice of its waiting late, and the next one is on time then.
    assert 0.95 * least_seconds <= seconds_of(requests) <= 1.5 * least_seconds + YOUNG_LANE_SECONDS


def test_a_refusal_that_names_a_wait_rests_the_model_for_that_time_and_spends_no_attempt(
    documents: Connection, api: FakeApi
) -> None:
    """If retry-after-ms is not read, it is a second; if lanes that are paced are kept apart besides, it is longer."""
    alter(documents, requests_per_minute=6000)
    api.behave(faults=[{"status": 429, "headers": {"Retry-After": "9", "retry-after-ms": "8500"}}])
    fill(documents, 3)

    [[began_at]] = documents.execute("SELECT clock_timestamp()").fetchall()
    documents.execute("SELECT autoembed.process()")
    [[ended_at]] = documents.execute("SELECT clock_timestamp()").fetchall()

    assert began_at <= rest(documents).until - timedelta(seconds=8.5) <= ended_at
    assert waiting(documents) == 3
    assert_untouched(documents)


@pytest.mark.parametrize("call", ["autoembed.process(batch_size => 1)", "autoembed.embed('a question')"])
def test_a_callers_open_transaction_keeps_no_lane_waiting(
    documents: Connection, api: FakeApi, connect: Connect, call: str
) -> None:
    """If the caller took its turn as lanes do, they would wait for its commit."""
    alter(documents, requests_per_minute=6000, max_requests_in_flight=1)
    fill(documents, 3)
    caller = connect()
    with caller.transaction():
        caller.execute(f"SELECT {call}")
        with running_lanes(documents, connect):
            fill(documents, 20, "more ")
            done = "SELECT count(*) FROM documents WHERE content LIKE 'more %' AND embedding IS NOT NULL"
            wait_until(lambda: documents.execute(done).fetchone() == (20,))


def test_a_pass_takes_no_permit_that_is_too_far_away(documents: Connection, api: FakeApi) -> None:
    """If it took one, each pass would put the next request of all others off by half a minute."""
    alter(documents, requests_per_minute=2)
    fill(documents, 3)

    for _ in range(2):
        documents.execute("SELECT autoembed.process(batch_size => 1)")

    assert len(api.log()) == 1
    assert documents.execute("SELECT count(*) FROM autoembed.permit").fetchone() == (1,)
    assert waiting(documents) == 2
    assert_untouched(documents)
    [[seconds]] = documents.execute("SELECT extract(epoch FROM max(requests_until) - max(at)) FROM autoembed.permit")
    assert seconds < 1


# --- requests in flight --------------------------------------------------------------------------------


def test_no_more_requests_are_in_flight_than_allowed_for_lanes_and_callers_together(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    alter(documents, max_requests_in_flight=2)
    api.behave(delay_seconds=0.02)
    fill(documents, 120)

    with running_lanes(documents, connect, 2, "batch_size => 3"):
        for number in range(5):
            documents.execute("SELECT autoembed.embed(%s)", [f"question {number}"])
        wait_until(lambda: is_settled(documents))

    assert api.counters()["max_in_flight"] == 2


def test_callers_share_the_slots_before_any_lane_has_had_one(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """If the first lane made the slots, callers before it, and beside its first request, would keep to no limit."""
    alter(documents, max_requests_in_flight=1)
    api.behave(hold=True)
    call = "SELECT autoembed.embed('a question')"
    with ThreadPoolExecutor() as pool, connect() as other:
        held = pool.submit(connect().execute, call)
        api.wait_for(held=1)
        other.execute("SET statement_timeout = '2s'")
        with pytest.raises(psycopg.errors.QueryCanceled):
            other.execute(call)
        assert api.counters()["requests"] == 1
        api.release()
        held.result(20)


@pytest.mark.parametrize("end", ["SELECT pg_terminate_backend(%s)", "SELECT pg_cancel_backend(%s)"])
def test_a_session_that_is_ended_frees_its_slots(
    documents: Connection, api: FakeApi, connect: Connect, end: str
) -> None:
    """If a slot is not freed as a request ends by force, it is taken for as long as the session lives, or for ever."""
    alter(documents, max_requests_in_flight=1)
    api.behave(hold=True)
    fill(documents, 1)
    with running_lanes(documents, connect) as [lane]:
        api.wait_for(held=1)
        documents.execute(end, [lane.pid])
        lane.join()
    api.release()

    assert documents.execute("SELECT autoembed.embed('a question') IS NOT NULL").fetchone() == (True,)
    assert documents.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone() == (0,)


# --- tokens a minute -----------------------------------------------------------------------------------


def test_a_request_with_more_tokens_than_a_minute_has_is_split(documents: Connection, api: FakeApi) -> None:
    """OpenAI answers 429 without a time: taken for a rate limit, it is tried for ever."""
    api.behave(rate_limit={"tokens_per_minute": 60_000, "burst_tokens": 200})
    fill(documents, 100)

    for _ in range(20):
        documents.execute("SELECT autoembed.resume_model(%s)", [MODEL])
        documents.execute("SELECT autoembed.process()")

    assert all(stored(documents).values())
    assert max(request["inputs"] for request in answered(api)) < 100
    assert documents.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)


def test_a_text_with_more_tokens_than_a_minute_has_fails_with_the_providers_words(
    documents: Connection, api: FakeApi
) -> None:
    api.behave(rate_limit={"tokens_per_minute": 100})
    fill(documents, 1, "word " * 200)

    documents.execute("SELECT autoembed.process()")

    [failure] = documents.execute("SELECT reason FROM autoembed.failed").fetchall()
    assert "Request too large on tokens per min" in failure.reason
    assert waiting(documents) == 0


def test_tokens_a_minute_space_requests(documents: Connection, api: FakeApi) -> None:
    """100 texts of about 6 tokens each, by estimate, are more than a second's."""
    alter(documents, tokens_per_minute=18_000)
    fill(documents, 100)

    documents.execute("SELECT autoembed.process(batch_size => 10)")

    assert len(answered(api)) == 10
    assert seconds_of(api.log()) > 1


# --- embed() -------------------------------------------------------------------------------------------


def test_embed_waits_for_its_turn_and_says_when_that_is_far_away(db: Connection, api: FakeApi) -> None:
    alter(db, requests_per_minute=240)
    for number in range(3):
        db.execute("SELECT autoembed.embed(%s)", [f"question {number}"])
    # Half a second apart when they leave. The first may come late.
    assert seconds_of(api.log()) > 0.25

    alter(db, requests_per_minute=1)
    with pytest.raises(psycopg.errors.ExternalRoutineException, match=r"its limits allow no request for \d\d s"):
        for number in range(3, 5):
            db.execute("SELECT autoembed.embed(%s)", [f"question {number}"])


def test_embed_works_in_a_read_only_transaction(db: Connection, api: FakeApi) -> None:
    """The count of requests is a write; where nothing may be written, it must not refuse the search."""
    alter(db, requests_per_minute=6000, max_requests_in_flight=1, daily_token_budget=1000)
    with db.transaction():
        db.execute("SET TRANSACTION READ ONLY")
        assert db.execute("SELECT autoembed.embed('a question') IS NOT NULL").fetchone() == (True,)


# --- budget --------------------------------------------------------------------------------------------

BUDGETS = [
    ({"daily_token_budget": 30}, {"daily_token_budget": 1000}, "its budget of 30 tokens a day is used up"),
    (
        {"price_per_million_tokens": 1_000_000, "daily_cost_budget": 30},
        {"daily_cost_budget": 1000},
        "its budget of 30 a day is used up",
    ),
]


@pytest.mark.parametrize(("budget", "more", "reason"), BUDGETS)
def test_a_model_whose_budget_is_used_up_rests_until_tomorrow_or_a_larger_budget(
    documents: Connection, api: FakeApi, connect: Connect, budget: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    """The sum is taken before each request: what overshoots is at most what was in flight."""
    alter(documents, **budget)
    fill(documents, 60)
    with running_lanes(documents, connect, 2, "batch_size => 1, max_requests => 2"):
        wait_until(lambda: rest(documents))
        left = "SELECT waiting FROM autoembed.status WHERE in_flight = 0"
        wait_until(lambda: documents.execute(left).fetchone() == (60 - len(answered(api)),))
        found = rest(documents)
        # Three tokens each, two lanes with two requests.
        assert 30 <= api.counters()["tokens"] < 30 + 4 * 3
        assert (found.needs_attention, found.reason) == (False, f"{reason}; the next day begins at 00:00 UTC")
        tomorrow = "SELECT date_trunc('day', clock_timestamp(), 'UTC') + interval '1 day'"
        assert abs(found.until - documents.execute(tomorrow).fetchall()[0][0]).total_seconds() < 1
        state = documents.execute("SELECT state, reason FROM autoembed.status").fetchone()
        assert state == ("resting", f'model "{MODEL}" rests: {found.reason}')
        assert_untouched(documents)
        with pytest.raises(psycopg.errors.ExternalRoutineException, match=f"gave no embedding: {reason}"):
            documents.execute("SELECT autoembed.embed('a question')")

        alter(documents, **more)
        wait_until(lambda: is_settled(documents))

    assert all(stored(documents).values())


def test_a_new_day_has_a_new_budget(documents: Connection, api: FakeApi) -> None:
    alter(documents, daily_token_budget=2)
    fill(documents, 1)
    documents.execute("SELECT autoembed.process()")
    fill(documents, 1, "more ")
    documents.execute("SELECT autoembed.process()")
    assert (waiting(documents), rest(documents).failures) == (1, 1)

    documents.execute("UPDATE autoembed.usage_entry SET at = at - interval '1 day'")
    documents.execute("UPDATE autoembed.model_rest SET until = clock_timestamp()")
    documents.execute("SELECT autoembed.process()")

    assert (waiting(documents), rest(documents)) == (0, None)


@pytest.mark.parametrize(
    "call",
    [
        "create_model('m', 'openai', 3, base_url => 'http://127.0.0.1/v1', daily_cost_budget => 5)",
        "alter_model('all-MiniLM-L6-v2', daily_cost_budget => 5)",
    ],
)
def test_a_budget_in_money_needs_a_price(db: Connection, call: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="daily_cost_budget needs a price"):
        db.execute(f"SELECT autoembed.{call}")


def test_a_changed_model_forgets_the_limits_that_it_learnt(db: Connection, api: FakeApi) -> None:
    api.behave(rate_limit={"requests_per_minute": 600, "burst_requests": 5, "tokens_per_minute": 90_000})
    db.execute("SELECT autoembed.embed('a question')")
    limits = "SELECT name, value FROM autoembed.model_limit WHERE name <> 'tokens_at_once' ORDER BY name"
    told = [("requests_at_once", 4), ("requests_per_minute", 600), ("tokens_per_minute", 90_000)]
    assert db.execute(limits).fetchall() == told

    alter(db, max_inputs_per_request=7)

    assert db.execute(limits).fetchall() == []


def test_permits_are_forgotten_after_some_minutes(db: Connection, api: FakeApi) -> None:
    alter(db, requests_per_minute=6000)
    db.execute("SELECT autoembed.embed('a question')")
    db.execute(
        "UPDATE autoembed.permit SET at = at - interval '11 minutes', requests_until = at - interval '11 minutes'"
    )
    db.execute("SELECT autoembed.embed('another one')")

    db.execute("SELECT autoembed.process()")

    assert db.execute("SELECT count(*) FROM autoembed.permit").fetchone() == (1,)


def test_what_two_sessions_learn_at_a_time_is_kept_of_both(db: Connection, api: FakeApi, connect: Connect) -> None:
    """If each note copies the newest one that it sees, the later one takes back what the other has learnt."""
    learn = "SELECT autoembed._learn('text-embedding-3-small', %s)"
    one, other = connect(), connect()
    one.autocommit = other.autocommit = False
    one.execute(learn, ['{"inputs_per_request": 7}'])
    other.execute(learn, ['{"tokens_per_input": 900}'])
    one.commit()
    other.commit()

    learnt = "SELECT autoembed._learnt('text-embedding-3-small') AS limits"
    assert db.execute(learnt).fetchone() == ({"inputs_per_request": 7, "tokens_per_input": 900},)
    assert db.execute(learn, ['{"tokens_per_input": 901}']).fetchone() == (False,)
    assert db.execute(learn, ['{"tokens_per_input": 800, "inputs_per_request": null}']).fetchone() == (True,)
    assert db.execute(learnt).fetchone() == ({"inputs_per_request": None, "tokens_per_input": 800},)


def test_limits_that_have_changed_are_forgotten_though_nobody_takes_permits(db: Connection, api: FakeApi) -> None:
    for inputs in range(100):
        db.execute(
            "SELECT autoembed._learn('text-embedding-3-small', jsonb_build_object('inputs_per_request', %s))", [inputs]
        )

    db.execute("SELECT autoembed.process()")

    assert db.execute("SELECT name, value FROM autoembed.model_limit").fetchall() == [("inputs_per_request", 99)]
