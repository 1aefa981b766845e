"""A pass over claimed jobs: refusals, trouble of a provider, commits and cancels."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest

from autoembed import rows, worker
from autoembed.errors import PassEnded, ProviderTrouble, RowError
from autoembed.model import Embedded, Request
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
from waiting import soon, wait_until

BUSY = ProviderTrouble("busy", retry_after_seconds=7)


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
