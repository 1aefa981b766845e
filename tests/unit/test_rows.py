"""Rows: the texts that are read and sent, the vectors that are written, and the speed of writing."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from autoembed import rows
from autoembed.errors import DISK_FULL, PassEnded, RowError
from autoembed.jobs import MAX_ATTEMPTS, Job, Ledger, Outcome, Report
from autoembed.records import ECHO, Known, Pipeline, Row, first_number
from autoembed.rows import Owners, Pace, Rows, Speeds, owners_of_few
from unit.fakes import (
    MODEL,
    PIPELINE,
    Failure,
    FakeDatabase,
    FakeProvider,
    StatementError,
    digest_of,
    identified,
    key_of,
    vector_of,
    vectors_of,
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


# --- owners -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statements", "rows_of_next"),
    [
        ([], 100),
        # One that failed, or ran too long, is followed by smaller ones.
        (["failed 100"], 25),
        (["failed 100", "failed 25"], 6),
        (["failed 100", "failed 25", "failed 6"], 1),
        (["failed 1"], 1),
        (["failed 7"], 1),
        # A full and quick one is followed by a larger one.
        ([(100, 0.1)], 200),
        ([(100, 0.249)], 200),
        ([(100, 0.25)], 100),
        # A slow one is followed by one that has as many rows as it would have had in time.
        ([(100, 2.0)], 50),
        ([(1, 2.0)], 1),
        ([(99, 0.001)], 100),
        ([(100, 0.1), (200, 0.1), (400, 0.1), (800, 0.1)], 1600),
        ([(100, 0.1), (200, 0.1), (400, 0.1), (800, 0.1), (1600, 0.1)], 2000),
        ([(2000, 0.1)], 2000),
        (["failed 100", (25, 0.01)], 50),
        (["failed 1", (1, 0.01), (2, 0.01), (4, 0.01)], 8),
    ],
)
def test_statements_have_as_many_rows_as_the_owners_code_bears(
    statements: list[str | tuple[int, float]], rows_of_next: int
) -> None:
    owners = Owners()
    for statement in statements:
        if isinstance(statement, str):
            owners.failed(PIPELINE, int(statement.removeprefix("failed ")))
        else:
            owners.took(PIPELINE, *statement)

    assert owners.statement_rows(PIPELINE) == rows_of_next
    assert owners.statement_rows(replace(PIPELINE, id=2)) == 100


@pytest.mark.parametrize(
    ("took", "order"),
    [
        ({}, [1, 2, 3]),
        ({1: [0.5]}, [2, 3, 1]),
        ({1: [0.5], 2: [0.1], 3: [0.9]}, [2, 1, 3]),
        # The newest statement counts most.
        ({1: [0.8, 0.0, 0.0], 2: [0.5], 3: []}, [3, 1, 2]),
        ({1: [0.4, 0.4], 2: [0.5]}, [3, 2, 1]),
    ],
)
def test_quick_owners_come_first(took: dict[int, list[float]], order: list[int]) -> None:
    owners = Owners()
    pipelines = {number: replace(PIPELINE, id=number, owner=10 * number) for number in (1, 2, 3)}
    for number, times in took.items():
        for seconds in times:
            # A row of another pipeline of the same owner.
            owners.spent(replace(pipelines[number], id=10 * number), seconds)

    work: list[tuple[Pipeline, list[Job]]] = [(pipeline, []) for pipeline in pipelines.values()]

    assert [pipeline.id for pipeline, _ in owners.quickest_first(work)] == order


@pytest.mark.parametrize(
    ("seconds", "others", "later", "rests"),
    [
        (0.5, True, 0.0, False),
        (0.6, True, 0.0, True),
        (0.6, True, 1.7, True),
        (0.6, True, 1.9, False),
        (4.0, True, 11.0, True),
        # There is nobody who would have to wait.
        (4.0, False, 0.0, False),
    ],
)
def test_an_owner_whose_statement_held_up_others_rests(
    monkeypatch: pytest.MonkeyPatch, seconds: float, others: bool, later: float, rests: bool
) -> None:
    clock = Clock()
    monkeypatch.setattr(rows, "time", clock)
    owners = Owners()
    owners.spent(PIPELINE, seconds)
    if others:
        owners.spent(replace(PIPELINE, id=2, owner=20), 0.01)

    clock.now += later

    assert owners.resting() == ({PIPELINE.owner} if rests else set())


def test_an_owner_has_less_time_beside_others() -> None:
    owners = Owners()
    owners.begin_claim()
    owners.spent(PIPELINE, 0.3)
    assert owners.has_time(PIPELINE)

    owners.spent(replace(PIPELINE, id=2, owner=20), 0.01)

    assert not owners.has_time(PIPELINE)


# --- reading and writing in parts -------------------------------------------------------------------


class Clock:
    """Stands in for the module time."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Desk:
    """The rows of a pass, and its ledger; no lane around them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = Clock()
        monkeypatch.setattr(rows, "time", self.clock)
        self.database = FakeDatabase()
        self.ledger = Ledger(self.database, [])
        self.owners = Owners()
        self.rows = Rows(self.database, self.ledger, self.owners)

    def put(self, *texts: str | None, attempts: int = 0, pipeline: Pipeline = PIPELINE) -> list[Job]:
        """Rows with these texts, whose messages are claimed."""
        jobs = []
        for row_id, text in enumerate(texts, len(self.database.texts)):
            message_id = self.database.put(row_id, text)
            job = Job(pipeline, key_of(row_id), attempts, [message_id])
            self.ledger.open(job)
            jobs.append(job)
        self.database.claim(len(jobs), 60, [], [], [])
        return jobs

    def read(self, jobs: list[Job], max_bytes: int = rows.READ_BYTES) -> list[Job]:
        return self.rows.read(PIPELINE, jobs, max_bytes)

    def write(self, jobs: list[Job], pipeline: Pipeline = PIPELINE) -> None:
        for job in jobs:
            job.row = Row(self.database.texts[job.key], None)
        self.rows.write(pipeline, jobs, vectors_of([str(job.content or "") for job in jobs]))

    def takes(self, seconds: float, statement: str) -> None:
        """Lets such statements take so long from now on."""

        def go_on() -> None:
            self.clock.now += seconds

        self.database.interrupts[statement] = go_on

    @property
    def sizes(self) -> list[int]:
        """The number of rows of each statement, that reads or that writes."""
        return list(map(len, self.database.read_keys or self.database.written_keys))


@pytest.fixture
def desk(monkeypatch: pytest.MonkeyPatch) -> Desk:
    return Desk(monkeypatch)


def outcomes_of(jobs: list[Job]) -> list[str]:
    """The outcome of each job."""

    def name(job: Job) -> str:
        if job.outcome is None or job.outcome.released:
            return "open" if job.outcome is None else "released"
        if job.outcome.again_in_seconds is None:
            return "done"
        return "counted" if job.outcome.attempts > job.attempts else "again"

    return [name(job) for job in jobs]


@pytest.mark.parametrize(
    ("sizes", "max_bytes", "read"),
    [
        ([40, 40, 40, 40], 1000, 4),
        ([40, 40, 40, 40], 160, 4),
        # The text that goes beyond is read still.
        ([40, 40, 40, 40], 120, 4),
        ([40, 40, 40, 40], 119, 3),
        ([40, 40, 40, 40], 0, 1),
        ([500, 1], 40, 1),
        ([40, 40], -1, 0),
        ([], 40, 0),
    ],
)
def test_a_lane_reads_as_many_bytes_as_it_may_hold_and_the_rest_goes_back(
    desk: Desk, sizes: list[int], max_bytes: int, read: int
) -> None:
    jobs = desk.put(*("x" * size for size in sizes))

    assert desk.read(jobs, max_bytes) == jobs[:read]

    assert [job.content for job in jobs[:read]] == ["x" * size for size in sizes[:read]]
    assert outcomes_of(jobs) == ["open"] * read + ["released"] * (len(jobs) - read)
    assert len(desk.database.read_keys) <= 1


def test_a_row_that_is_not_reached_is_not_taken_for_deleted(desk: Desk) -> None:
    jobs = desk.put("x" * 40, "x" * 40, "deleted")
    del desk.database.texts[jobs[2].key]

    desk.read(jobs, 10)
    assert outcomes_of(jobs) == ["open", "released", "released"]

    job = desk.put("deleted too")[0]
    del desk.database.texts[job.key]
    desk.read([job])
    assert outcomes_of([job]) == ["done"]


@pytest.mark.parametrize(("seconds", "statements"), [(0.0, 3), (0.3, 4), (0.6, 2), (1.1, 1)])
def test_the_code_of_one_owner_reads_for_its_time_and_the_rest_goes_back(
    desk: Desk, seconds: float, statements: int
) -> None:
    jobs = desk.put(*["text"] * 450)
    desk.takes(seconds, "rows")

    found = desk.read(jobs)

    assert desk.sizes == ([100, 200, 150] if seconds == 0 else [100] * statements)
    assert outcomes_of(jobs) == ["open"] * len(found) + ["released"] * (450 - len(found))


INDEXED = replace(PIPELINE, text_config="english")


@pytest.mark.parametrize(("seconds", "rows_written"), [(0.1, [1, 1, 1, 1, 1]), (0.6, [1, 1]), (1.1, [1])])
def test_the_text_index_takes_the_time_of_the_owner(desk: Desk, seconds: float, rows_written: list[int]) -> None:
    jobs = desk.put(*["x" * 200_000] * 5)
    desk.takes(seconds, "index_texts")

    desk.write(jobs, INDEXED)

    assert desk.sizes == rows_written
    assert outcomes_of(jobs).count("done") == len(rows_written)


@pytest.mark.parametrize(("seconds", "settled"), [(0.1, 5), (0.6, 2), (1.1, 1)])
def test_rows_that_are_indexed_again_take_the_time_of_the_owner(desk: Desk, seconds: float, settled: int) -> None:
    jobs = desk.put(*["x" * 200_000] * 5)
    desk.write(jobs)
    for job in jobs:
        job.outcome = None
        job.row = Row(job.content, digest_of(desk.database.vectors[job.key]))
        desk.database.embedded[job.key] = INDEXED.digest(job.content or ""), False
    desk.takes(seconds, "index_texts")

    assert desk.rows.to_embed(INDEXED, jobs) == []

    assert outcomes_of(jobs) == ["done"] * settled + ["released"] * (5 - settled)


def test_all_tables_of_an_owner_share_its_time(desk: Desk) -> None:
    second, other = replace(PIPELINE, id=2), replace(PIPELINE, id=3, owner=30)
    work = {pipeline.id: (pipeline, desk.put("text", pipeline=pipeline)) for pipeline in (PIPELINE, second, other)}
    desk.takes(1.1, "rows")

    for pipeline, jobs in work.values():
        desk.rows.read(pipeline, jobs)
        assert not desk.owners.has_time(pipeline)
    assert [outcomes_of(jobs) for _, jobs in work.values()] == [["open"], ["released"], ["open"]]

    desk.write(work[3][1], other)
    assert outcomes_of(work[3][1]) == ["open"]
    assert desk.rows.owners_behind() == {30}
    desk.owners.begin_claim()
    assert all(desk.owners.has_time(pipeline) for pipeline, _ in work.values())


@pytest.mark.parametrize("error", [None, RowError("ran too long", slow=True)])
@pytest.mark.parametrize(("seconds", "rests"), [(3.9, False), (12.0, True)])
def test_an_owner_rests_whose_code_could_not_be_cancelled(
    desk: Desk, error: RowError | None, seconds: float, rests: bool
) -> None:
    [job] = desk.put("text")
    if error is not None:
        desk.database.content_errors[job.key] = error
    desk.takes(seconds, "rows")

    desk.read([job])

    reason = "the code of the table's owner ran for 12 s, as PostgreSQL could not cancel it"
    assert desk.database.rested_pipelines == ([(10, [], reason)] if rests else [])


def test_of_an_owners_tables_those_that_take_long_come_last(desk: Desk) -> None:
    slow, quick = replace(PIPELINE, id=1), replace(PIPELINE, id=2)
    desk.owners.spent(slow, 0.8)
    desk.owners.spent(quick, 0.1)

    assert desk.owners.quickest_first([(slow, []), (quick, [])]) == [(quick, []), (slow, [])]


def test_a_row_whose_vector_waits_to_be_written_is_not_asked_for_again(desk: Desk) -> None:
    waiting, other = desk.put("one", "two")
    desk.database.locked[waiting.key] = 100
    desk.write([waiting])
    [again] = desk.put("one")
    again.key = waiting.key

    assert desk.rows.without_unwritten(PIPELINE, [again, other]) == [other]
    assert desk.rows.without_unwritten(replace(PIPELINE, id=2), [again]) == [again]
    assert outcomes_of([again, other]) == ["again", "open"]
    assert desk.rows.owners_behind() == set()


def test_rows_that_an_owners_code_fails_for_end_alone(desk: Desk) -> None:
    jobs = desk.put(*["text"] * 60)
    desk.database.content_errors[jobs[33].key] = RowError("division by zero")

    found = desk.read(jobs)

    assert len(found) == 59
    assert outcomes_of(jobs) == ["open"] * 33 + ["counted"] + ["open"] * 26
    assert [jobs[33].key] in desk.database.read_keys
    # The text of each other row is read once.
    others = [key for keys in desk.database.read_keys if jobs[33].key not in keys for key in keys]
    assert sorted(others) == sorted(job.key for job in found)


def test_a_row_that_takes_too_long_is_found_over_several_claims_and_counted(desk: Desk) -> None:
    slow = RowError("the code of the table's owner ran too long, and was cancelled", slow=True)
    jobs = desk.put("slow", *["text"] * 99)
    desk.database.content_errors[jobs[0].key] = slow
    desk.takes(1.1, "rows")

    for _ in range(4):
        assert jobs[0].outcome is None or jobs[0].outcome.released
        for job in jobs:
            job.outcome = None
        desk.owners.begin_claim()
        desk.read(jobs)

    assert desk.sizes == [100, 25, 6, 1]
    assert outcomes_of(jobs) == ["counted"] + ["released"] * 99


def test_a_row_that_was_to_blame_before_is_read_alone_and_last(desk: Desk) -> None:
    tried = desk.put("tried", "tried too", attempts=1)
    fresh = desk.put("fresh", "fresh too")

    found = desk.read([*tried, *fresh])

    assert found == [*fresh, *tried]
    assert desk.sizes == [2, 1, 1]


def test_a_table_that_is_locked_costs_its_rows_nothing(desk: Desk) -> None:
    jobs = desk.put("one", "two")
    desk.database.content_errors[jobs[1].key] = RowError("could not obtain lock", locked=True)

    assert desk.read(jobs) == []

    assert outcomes_of(jobs) == ["again", "again"]
    assert {job.outcome.again_in_seconds for job in jobs if job.outcome} == {rows.LOCKED_DELAY_SECONDS}
    assert desk.owners.statement_rows(PIPELINE) == 100


@pytest.mark.parametrize("where", ["content_errors", "write_errors", "settle_errors"])
def test_a_cancel_in_an_owners_code_counts_its_rows_rests_the_owner_and_ends_the_pass(desk: Desk, where: str) -> None:
    """The code may have raised it; or somebody does want the lane to end."""
    jobs = desk.put("one", "two")
    last = desk.put("last", attempts=MAX_ATTEMPTS - 1)[0]
    cancelled = RowError("canceling statement due to user request", cancels=True)
    getattr(desk.database, where).update({job.key: cancelled for job in [*jobs, last]})
    act = desk.read if where == "content_errors" else desk.write

    with pytest.raises(PassEnded, match="canceling statement"):
        act(jobs)
    with pytest.raises(PassEnded):
        act([last])

    assert outcomes_of(jobs) == ["counted", "counted"]
    assert desk.database.rested_pipelines == [(10, [], "canceling statement due to user request")] * 2
    assert list(desk.database.failures) == [last.key]


@pytest.mark.parametrize("where", ["content_errors", "write_errors", "settle_errors"])
@pytest.mark.parametrize(("runs_code", "outcome"), [(False, "released"), (True, "counted")])
def test_a_pipeline_waits_for_a_full_disk(desk: Desk, where: str, runs_code: bool, outcome: str) -> None:
    """An owner's code may have raised it: then its rows have an attempt less."""
    jobs = desk.put("one", "two")
    full = RowError("No space left on device", sqlstate=DISK_FULL)
    getattr(desk.database, where).update({job.key: full for job in jobs})
    desk.database.owners_code = runs_code

    (desk.read if where == "content_errors" else desk.write)(jobs)

    assert outcomes_of(jobs) == [outcome] * 2
    assert desk.database.rested_pipelines == [(10, [1], "No space left on device")]
    assert desk.database.failures == {}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (Row(None, None, (64 << 20) + 1), "the text has 64 MB, and a lane reads at most 64 MB"),
        (Row(None, b"", 900 << 20), "the text has 900 MB, and a lane reads at most 64 MB"),
        (Row(None, None, 64 << 20), None),
        (Row("text", None, 900 << 20), None),
    ],
)
def test_a_text_that_no_lane_reads_fails_and_keeps_its_vector(desk: Desk, row: Row, reason: str | None) -> None:
    [job] = desk.put("text")
    job.row = row

    chosen = desk.rows.to_embed(PIPELINE, [job])

    assert [text for _, text in chosen] == ([] if row.content is None else [row.content])
    assert [failure.reason for failure in desk.database.failures.values()] == ([] if reason is None else [reason])
    assert desk.database.written_keys == []


def test_what_an_owners_time_does_not_suffice_for_is_written_later(desk: Desk) -> None:
    jobs = desk.put(*(f"text {number}" for number in range(250)))
    desk.takes(0.6, "write")

    desk.write(jobs)
    assert desk.rows.some_are_unwritten
    assert outcomes_of(jobs) == ["done"] * 200 + ["open"] * 50

    desk.rows.write_some()
    assert not desk.rows.some_are_unwritten
    assert outcomes_of(jobs) == ["done"] * 250
    assert desk.sizes == [100, 100, 50]
    assert all(desk.database.is_fresh(number) for number in range(250))


def test_writing_on_lets_each_call_have_the_time_of_one_owner(desk: Desk) -> None:
    jobs = desk.put(*["text"] * 500)
    desk.takes(1.1, "write")

    desk.write(jobs)
    # Each statement has as many rows as the one before would have had in time.
    for left in (400, 310, 229, 156, 90, 31, 0):
        assert outcomes_of(jobs).count("open") == left
        assert desk.rows.some_are_unwritten == bool(left)
        desk.rows.write_some()


def test_writing_on_leaves_the_rows_of_other_owners_for_the_next_call(desk: Desk) -> None:
    other = replace(PIPELINE, id=2, owner=20)
    first, second = desk.put(*["text"] * 150), desk.put(*["text"] * 150, pipeline=other)
    desk.takes(1.1, "write")
    desk.write(first)
    desk.write(second, other)
    assert [outcomes_of(jobs).count("open") for jobs in (first, second)] == [50, 50]

    desk.rows.write_some()
    assert [outcomes_of(jobs).count("open") for jobs in (first, second)] == [0, 50]


def test_what_is_left_of_one_owner_is_not_written_in_the_time_of_another(desk: Desk) -> None:
    other = replace(PIPELINE, id=2, owner=20)
    first, second = desk.put(*["text"] * 250), desk.put("text", pipeline=other)
    desk.takes(0.6, "write")

    desk.write(first)
    desk.takes(0.0, "write")
    desk.write(second, other)

    assert outcomes_of(second) == ["done"]
    assert outcomes_of(first).count("open") == 50


def test_a_row_whose_write_takes_too_long_is_counted_and_does_not_fail_at_once(desk: Desk) -> None:
    jobs = desk.put("slow", *["text"] * 99)
    desk.database.write_errors[jobs[0].key] = RowError("ran too long", slow=True)
    desk.takes(1.1, "write")

    desk.write(jobs)
    while desk.rows.some_are_unwritten:
        desk.rows.write_some()

    assert desk.sizes[:2] == [100, 25]
    assert [jobs[0].key] in desk.database.written_keys
    assert outcomes_of(jobs) == ["counted"] + ["done"] * 99
    assert desk.database.failures == {}


def test_a_row_that_was_to_blame_before_is_written_alone(desk: Desk) -> None:
    fresh = desk.put("fresh", "fresh too")
    tried = desk.put("tried", "tried too", attempts=1)
    after = desk.put("after")

    desk.write([*fresh, *tried, *after])

    assert desk.sizes == [2, 1, 1, 1]
    assert outcomes_of([*fresh, *tried, *after]) == ["done"] * 5


def test_locked_rows_are_tried_again_together_and_the_others_are_written(desk: Desk) -> None:
    jobs = desk.put(*(f"text {number}" for number in range(6)))
    desk.database.locked.update({jobs[1].key: 2, jobs[4].key: 1})

    desk.write(jobs)
    assert outcomes_of(jobs) == ["done", "open", "done", "done", "open", "done"]

    desk.rows.write_some()
    assert desk.sizes == [6]
    for _ in range(2):
        desk.clock.now += rows.LOCK_POLL_SECONDS
        desk.rows.write_some()

    assert desk.sizes == [6, 2, 1]
    assert outcomes_of(jobs) == ["done"] * 6
    assert all(desk.database.is_fresh(number) for number in range(6))


@pytest.mark.parametrize("whole_table", [False, True])
def test_a_lock_is_waited_for_so_long_and_costs_no_attempt(desk: Desk, whole_table: bool) -> None:
    jobs = desk.put("one", "two")
    if whole_table:
        desk.database.write_errors[jobs[0].key] = RowError("could not obtain lock", locked=True)
    else:
        desk.database.locked.update({job.key: math.inf for job in jobs})
    began_at = desk.clock.now

    desk.write(jobs)
    while desk.rows.some_are_unwritten:
        desk.clock.now += rows.LOCK_POLL_SECONDS
        desk.rows.write_some()

    assert desk.clock.now - began_at == pytest.approx(rows.LOCK_PATIENCE_SECONDS, abs=2 * rows.LOCK_POLL_SECONDS)
    assert 15 < len(desk.sizes) < 25
    assert outcomes_of(jobs) == ["again", "again"]
    assert desk.owners.statement_rows(PIPELINE) == 100


def test_a_blank_row_that_is_locked_gets_its_null_later(desk: Desk) -> None:
    jobs = desk.put("", "")
    for job in jobs:
        desk.database.vectors[job.key] = [1.0, 2.0, 3.0]
        job.row = Row("", b"")
    desk.database.locked[jobs[1].key] = 1

    assert desk.rows.to_embed(PIPELINE, jobs) == []
    desk.clock.now += rows.LOCK_POLL_SECONDS
    desk.rows.write_some()

    assert desk.database.vectors == {job.key: None for job in jobs}
    assert outcomes_of(jobs) == ["done", "done"]


def test_a_row_that_a_trigger_leaves_out_of_a_write_is_counted(desk: Desk) -> None:
    jobs = desk.put("one", "two")
    last = desk.put("last", attempts=MAX_ATTEMPTS - 1)
    desk.database.skipped = {jobs[1].key, last[0].key}

    desk.write([*jobs, *last])

    reason = "a trigger or a policy of the table leaves the row out of the write"
    assert outcomes_of(jobs) == ["done", "counted"]
    assert desk.database.failures == {last[0].key: Failure(reason, MAX_ATTEMPTS, "last")}


@pytest.mark.parametrize(("settle", "statement"), [("record", "record_embedded"), ("forget", "forget")])
def test_a_row_that_cannot_be_settled_holds_up_no_other(desk: Desk, settle: str, statement: str) -> None:
    jobs = desk.put(*["text" if settle == "record" else None] * 9)
    desk.database.settle_errors[jobs[5].key] = RowError("no room in the index row")

    if settle == "record":
        desk.write(jobs)
    else:
        desk.rows.to_embed(PIPELINE, desk.read(jobs))

    assert outcomes_of(jobs) == ["done"] * 5 + ["counted"] + ["done"] * 3
    assert desk.database.statements.count(statement) == 7


@pytest.mark.parametrize("text", ["text", None])
def test_rows_that_cannot_be_settled_for_a_lock_cost_one_statement_and_no_attempt(desk: Desk, text: str | None) -> None:
    jobs = desk.put(*[text] * 9)
    desk.database.settle_errors[jobs[5].key] = RowError("could not obtain lock", locked=True)

    if text is not None:
        desk.write(jobs)
    else:
        desk.rows.to_embed(PIPELINE, desk.read(jobs))

    assert outcomes_of(jobs) == ["again"] * 9
    assert desk.database.statements.count("forget" if text is None else "record_embedded") == 1


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (RowError("function odd is gone"), "released"),
        (RowError("ran too long", slow=True), "counted"),
        (RowError("could not obtain lock", locked=True), "again"),
    ],
)
def test_a_lock_or_a_slow_row_is_not_what_a_pipeline_is_blocked_for(desk: Desk, error: RowError, outcome: str) -> None:
    [job] = desk.put("text")
    desk.database.content_errors[job.key] = error
    desk.database.defined[1] = replace(PIPELINE, blocked="function odd is gone")

    desk.read([job])

    assert outcomes_of([job]) == [outcome]


@pytest.mark.parametrize("now", [replace(PIPELINE, is_beside=True), replace(PIPELINE, was_rebuilt=True)])
def test_rows_whose_embeddings_have_moved_or_whose_functions_were_gone_go_back_uncounted(
    desk: Desk, now: Pipeline
) -> None:
    jobs = desk.put("one", "two")
    for job in jobs:
        desk.database.write_errors[job.key] = RowError("function _write_1(…) does not exist")
    desk.database.defined[1] = now

    desk.write(jobs)

    assert outcomes_of(jobs) == ["released", "released"]
    # What PostgreSQL refuses to plan is stopped. A function that was made again is no longer refused.
    assert ("plan_again" in desk.database.statements) == (not now.was_rebuilt)


def test_an_error_that_nobody_expected_rests_its_pipeline_and_its_rows_are_counted(desk: Desk) -> None:
    other = replace(PIPELINE, id=2, owner=20)
    jobs, others = desk.put("one", "two"), desk.put("three", pipeline=other)
    desk.database.write_errors[jobs[0].key] = StatementError("a surprise")

    desk.write(jobs)
    desk.write(others, other)

    assert outcomes_of([*jobs, *others]) == ["counted", "counted", "done"]
    assert desk.database.rested_pipelines == [(10, [1], "a surprise")]
    assert not desk.rows.some_are_unwritten


def test_an_error_that_nobody_expected_in_what_is_written_later_rests_its_pipeline(desk: Desk) -> None:
    jobs = desk.put(*["text"] * 150)
    desk.database.write_errors[jobs[120].key] = StatementError("a surprise")
    desk.takes(1.1, "write")

    desk.write(jobs)
    desk.rows.write_some()

    assert outcomes_of(jobs) == ["done"] * 100 + ["counted"] * 50
    assert desk.database.rested_pipelines == [(10, [1], "a surprise")]


def test_an_error_that_is_nobodys_ends_the_pass(desk: Desk) -> None:
    jobs = desk.put("one")
    desk.database.write_errors[jobs[0].key] = StatementError("out of memory", nobodys=True)

    with pytest.raises(StatementError, match="out of memory"):
        desk.write(jobs)

    assert outcomes_of(jobs) == ["open"]
    assert desk.database.rested_pipelines == []


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


# --- replaced vectors -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replaced", "age", "wait"),
    [
        (0, 0.0, 0.0),
        (4, 0.0, 0.0),
        (5, 0.0, 1.0),
        (5, 0.4, 0.6),
        (5, 1.0, 0.0),
        (8, 3.0, 5.0),
        (14, 0.0, 512.0),
        (15, 0.0, 600.0),
        (100, 0.0, 600.0),
        (100, 599.0, 1.0),
        (100, 7200.0, 0.0),
        (100, None, 600.0),
    ],
)
def test_a_vector_that_is_replaced_again_and_again_waits_longer_each_time(
    replaced: int, age: float | None, wait: float
) -> None:
    assert Known(b"text", b"vector", replaced, age).wait_seconds(b"text") == pytest.approx(wait)
    assert Known(b"text", b"vector", replaced, age).wait_seconds(b"another text") == 0.0
    # The write of the vector changes the text each time.
    assert Known(b"text", ECHO, replaced, age).wait_seconds(b"another text") == pytest.approx(wait)


@pytest.mark.parametrize(
    ("known", "row", "fresh"),
    [
        (Known(b"text", b"vector"), Row("text", b"vector"), True),
        (Known(b"text", None), Row("text", b"vector"), True),
        (Known(b"text", b"vector"), Row("text", b"another"), False),
        (Known(b"text", b""), Row("text", b"another"), False),
        (Known(b"text", b"vector"), Row("text", None), False),
        (Known(b"text", None), Row("text", None), False),
        (Known(b"old text", b"vector"), Row("text", b"vector"), False),
    ],
)
def test_a_row_is_fresh_if_its_text_and_its_vector_are_those_that_are_recorded(
    known: Known, row: Row, fresh: bool
) -> None:
    assert known.describes(row, b"text") is fresh


def test_a_row_that_waits_for_its_vector_spends_no_attempt_and_a_new_text_ends_the_wait(desk: Desk) -> None:
    jobs = desk.put("same", "new", attempts=1)
    digests = [MODEL.digest("same"), MODEL.digest("old")]
    for job, digest in zip(jobs, digests, strict=True):
        desk.database.embedded[job.key] = (digest, False)
        desk.database.replaced[job.key] = 7

    chosen = desk.rows.to_embed(PIPELINE, desk.read(jobs))

    assert [text for _, text in chosen] == ["new"]
    assert jobs[0].outcome == Outcome(4.0, 1)


@pytest.mark.parametrize(
    ("provider", "requests", "texts"),
    [
        ("openai", [(100, 30.0)], None),
        ("fake", [], None),
        ("local", [], 10),
        ("function", [], 10),
        ("function", [(10, 2.0)], 2),
        ("function", [(10, 0.1)], 50),
        ("local", [(10, 0.1)], 100),
        ("local", [(10, 2.0)], 5),
        ("local", [(10, 60.0)], 1),
        ("local", [(10, 0.1), (100, 1.0), (100, 5.0)], 60),
        ("local", [(10, 0.0)], 10_000),
    ],
)
def test_a_model_in_this_process_has_work_for_a_while(
    provider: str, requests: list[tuple[int, float]], texts: int | None
) -> None:
    speeds = Speeds()
    for count_of_texts, seconds in requests:
        speeds.embedded("model", count_of_texts, seconds)

    assert speeds.texts_ahead("model", provider) == texts


@pytest.mark.parametrize(
    ("texts", "seconds", "fewer"), [(100, 1.0, 50), (10, 1.0, 5), (2, 1.0, 1), (100, 30.0, 1), (3, 0.1, 1)]
)
def test_a_request_that_ran_too_long_is_followed_by_smaller_ones(texts: int, seconds: float, fewer: int) -> None:
    speeds = Speeds()
    speeds.embedded("model", 1000, 0.1)
    speeds.ran_too_long("model", texts, seconds)

    assert speeds.texts_ahead("model", "function") == fewer


def test_a_server_gets_more_texts_again_when_it_answers_quickly() -> None:
    speeds = Speeds()
    speeds.came_late("model", 100)
    speeds.came_late("model", 50)
    assert (speeds.most_texts("model", 100), speeds.most_texts("other", 100)) == (25, 100)

    for _ in range(1000):
        speeds.came_early("model")

    assert (speeds.most_texts("model", 100), speeds.is_late("model")) == (100, False)


def test_the_first_request_of_a_model_in_this_process_has_as_many_texts_as_it_may() -> None:
    assert [Speeds(most).texts_ahead("model", "local") for most in (1, 100)] == [1, 100]


# --- tries of a write -------------------------------------------------------------------------------


def tried(desk: Desk, jobs: list[Job]) -> list[str]:
    """The texts that may be sent."""
    return [text for _, text in desk.rows.writable(PIPELINE, desk.rows.to_embed(PIPELINE, desk.read(jobs)))]


def test_one_row_is_tried_before_the_first_text_and_none_once_rows_take_their_vectors(desk: Desk) -> None:
    first, second = desk.put("a", "b", "c"), desk.put("d", "e")

    assert tried(desk, first) == ["a", "b", "c"]
    assert tried(desk, second) == ["d", "e"]
    assert desk.database.tried_keys == [[first[0].key]]


def test_once_a_row_has_refused_its_vector_the_next_rows_are_tried(desk: Desk) -> None:
    jobs = desk.put("a")
    tried(desk, jobs)
    desk.database.write_errors[jobs[0].key] = RowError("no")
    desk.write(jobs)
    desk.database.tried_keys.clear()
    others = desk.put("c", "d")
    desk.database.write_errors |= {job.key: RowError("no") for job in others}

    assert tried(desk, others) == []
    assert desk.database.tried_keys == [[others[0].key], [others[1].key]]
    assert outcomes_of(others) == ["done"] * 2
    assert {failure.reason for failure in desk.database.failures.values()} == {"no"}


def test_a_row_that_was_to_blame_before_is_tried_and_a_conflict_is_counted(desk: Desk) -> None:
    tried(desk, desk.put("a"))
    [again] = desk.put("b", attempts=1)
    desk.database.write_errors[again.key] = RowError("deadlock", sqlstate="40P01")

    assert tried(desk, [again]) == []
    assert outcomes_of([again]) == ["counted"]


def test_tries_have_a_second_and_the_rows_that_are_left_go_back(desk: Desk) -> None:
    jobs = desk.put(*"abcde")
    desk.database.write_errors = {job.key: RowError("no") for job in jobs}
    desk.takes(0.6, "try_write")

    assert tried(desk, jobs) == []
    assert outcomes_of(jobs).count("released") == 4


def test_the_text_of_a_locked_row_is_not_sent(desk: Desk) -> None:
    jobs = desk.put("a", "b")
    for job in desk.read(jobs):
        job.row = Row(job.content, None, is_locked=job is jobs[0])

    chosen = desk.rows.to_embed(PIPELINE, jobs)

    assert [text for _, text in chosen] == ["b"]
    assert outcomes_of(jobs[:1]) == ["again"]


def test_texts_are_cut_for_the_time_of_one_owner_and_the_rest_goes_back(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = replace(PIPELINE, is_beside=True)
    jobs = desk.put("one", "two", "three", "four", pipeline=beside)
    for job in jobs:
        job.row = Row(desk.database.texts[job.key], None)

    def ranges(_: Pipeline, content: str, *__: object) -> list[tuple[int, int]]:
        desk.clock.now += 0.6
        return [(0, len(content))]

    monkeypatch.setattr(desk.rows, "_cutter", SimpleNamespace(ranges=ranges))

    assert [text for _, text in desk.rows.to_embed(beside, jobs)] == ["one", "two"]
    assert outcomes_of(jobs) == ["open", "open", "released", "released"]


# --- the numbers of chunks that are written in parts --------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        ("", "abcdef", 1),
        ("abcdef", "abcdefgh", 5),
        ("abcdef", "abcd", 11),
        ("abcdef", "uvwxyz", 11),
        ("abcdef", "xabcdef", 11),
        # A lane goes on with what it wrote, or with what was there.
        ("abcdefuvw", "uvwxyz", 11),
        ("aaaaaa", "aaaaaabcdef", 5),
        ("abcdefaa", "aaaaaa", 11),
    ],
)
def test_the_chunks_of_a_long_text_leave_those_before_them_in_place(old: str, new: str, first: int) -> None:
    digests = [digest.encode() for digest in old]
    row = Row("text", None, digests=digests, numbers=range(5, 5 + len(digests)))

    assert first_number(row, [digest.encode() for digest in new]) == first


@pytest.mark.parametrize(
    ("held", "few"),
    [
        ({}, set()),
        ({1: 5}, set()),
        ({1: 5, 2: 5}, set()),
        ({1: 25, 2: 75}, set()),
        ({1: 24, 2: 75}, {1}),
        ({1: 1, 2: 2, 3: 1000}, {1, 2}),
        ({1: 400, 2: 500, 3: 1}, {3}),
        ({**dict.fromkeys(range(200), 5), 200: 1000}, set()),
        ({**dict.fromkeys(range(200), 4), 200: 1000}, set(range(200))),
    ],
)
def test_an_owner_of_few_rows_holds_less_than_half_of_an_equal_share(held: dict[int, int], few: set[int]) -> None:
    assert owners_of_few(held) == few
