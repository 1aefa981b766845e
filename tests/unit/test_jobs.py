"""Messages: the rows they are for, which are tried together, and when they can leave the queue."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed.errors import RowError
from autoembed.jobs import MAX_ATTEMPTS, Address, Job, Ledger, Report, address_of, are_keys, isolate
from autoembed.records import Message
from unit.fakes import (
    PIPELINE,
    Failure,
    FakeDatabase,
    FakeProvider,
    Vector,
    key_of,
    vector_of,
    vectors_of,
)
from unit.lane import Lane, bodies
from waiting import wait_until

NO_IDS: list[Any] = [True, False, 0, -1, 2**31, 99_999_999_999, 10**400, "1.0", [3], {}]
NO_ATTEMPTS: list[Any] = [True, -1, MAX_ATTEMPTS + 1, 99_999_999_999, "1.5"]
GUIDE = {"id": 7, "schema": "public", "table": "documents", "contentFunction": "f", "embeddingColumn": "embedding"}


# --- addresses ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "address"),
    [
        (GUIDE, Address(None, ["[7]"], 0)),
        ({**GUIDE, "pipeline": None}, Address(None, ["[7]"], 0)),
        ({**GUIDE, "pipeline": 3}, Address(3, ["[7]"], 0)),
        ({**GUIDE, "id": "a\"b 'c'"}, Address(None, ['["a\\"b \'c\'"]'], 0)),
        ({"pipeline": 3, "keys": [[1], [2]]}, Address(3, ["[1]", "[2]"], 0)),
        ({"pipeline": 3, "keys": [[1, "é"]], "attempts": 4}, Address(3, ['[1,"é"]'], 4)),
        ({"pipeline": 3, "keys": [[1]], "unknown": True}, Address(3, ["[1]"], 0)),
        ({"pipeline": 3, "keys": [["1.50"]]}, Address(3, ['["1.50"]'], 0)),
        ({"pipeline": 3, "keys": [[1]], "replaced": True}, Address(3, ["[1]"], 0, replaced=True)),
        ({**GUIDE, "pipeline": 3, "echo": True}, Address(3, ["[7]"], 0, echo=True)),
        ({"pipeline": 3, "truncated": True}, Address(3, [], 0, truncated=True)),
        ({"pipeline": 3, "recorded_after": ""}, Address(3, [], 0, recorded_after="")),
    ],
)
def test_a_message_is_for_its_rows(body: Any, address: Address) -> None:
    assert address_of(body) == address


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "the message is not an object"),
        (5, "the message is not an object"),
        ("text", "the message is not an object"),
        ([GUIDE], "the message is not an object"),
        ({}, "the message lacks id"),
        ({**GUIDE, "id": None}, "the message lacks id"),
        ({**GUIDE, "id": {"a": 1}}, "the message's keys are not rows' keys"),
        ({**GUIDE, "id": [1]}, "the message's keys are not rows' keys"),
        ({"pipeline": 3, "keys": "[1]"}, "the message's keys are not rows' keys"),
        ({"pipeline": 3, "keys": {"1": 1}}, "the message's keys are not rows' keys"),
        ({"pipeline": 3, "keys": [1]}, "the message's keys are not rows' keys"),
        ({"pipeline": 3, "keys": [[1], []]}, "the message's keys are not rows' keys"),
        ({"pipeline": 3, "keys": [[1], [None]]}, "the message's keys are not rows' keys"),
        ({"pipeline": 3, "keys": [[[1]]]}, "the message's keys are not rows' keys"),
        ({"pipeline": "3", "keys": [[1]]}, "the message's pipeline or attempts is not a number"),
        ({"pipeline": 3, "keys": [[1]], "attempts": "many"}, "the message's pipeline or attempts is not a number"),
        ({"pipeline": 3, "keys": [[1]], "attempts": None}, "the message's pipeline or attempts is not a number"),
        *[
            ({**rows, "pipeline": number}, "the message's pipeline or attempts is not a number, or out of its range")
            for number in NO_IDS
            for rows in ({"keys": [[1]]}, {"truncated": True}, {"recorded_after": ""})
        ],
        *[
            ({"pipeline": 3, "keys": [[1], [2]], "attempts": number}, "pipeline or attempts is not a number, or out of")
            for number in NO_ATTEMPTS
        ],
    ],
)
def test_a_broken_message_says_what_is_wrong(body: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        address_of(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.sampled_from(["id", "pipeline", "keys", "attempts"]) | st.text(), inner)
    ),
    max_leaves=8,
)
NUMBERS = st.sampled_from([3, 0, -1, 5, 2**31 - 1, 2**31, 10**400]) | st.integers() | JSON
MESSAGES = st.fixed_dictionaries(
    {"pipeline": NUMBERS},
    optional={
        "attempts": NUMBERS,
        "keys": st.lists(st.lists(NUMBERS | st.text(), max_size=2), max_size=2) | JSON,
        "id": JSON,
        "truncated": st.booleans(),
        "recorded_after": st.text() | JSON,
        "moved": JSON,
    },
)


@given(JSON | MESSAGES)
def test_any_message_has_an_address_that_the_database_takes_or_is_broken(body: Any) -> None:
    try:
        address = address_of(body)
    except ValueError as error:
        assert str(error).startswith("the message")
        return
    assert address.pipeline_id is None or (type(address.pipeline_id) is int and 0 < address.pipeline_id < 2**31)
    assert type(address.attempts) is int
    assert 0 <= address.attempts <= MAX_ATTEMPTS
    assert are_keys(address.keys)


# --- isolation ---------------------------------------------------------------------------------------


def messages(*read_counts: int) -> Any:
    return [Message(number, read_count, None) for number, read_count in enumerate(read_counts, 1)]


@pytest.mark.parametrize(
    ("read_counts", "fraction", "survived", "together"),
    [
        ([1] * 500, 0.9, 0, list(range(1, 501))),
        ([1, 2, 1, 2], 0.4, 0, [1, 3]),
        ([1, 2, 1, 2], 0.6, 0, [2, 4]),
        ([2] * 500, 0.4, 0, list(range(1, 101))),
        ([2] * 500, 0.4, 1, list(range(1, 201))),
        ([2] * 3000, 0.4, 90, list(range(1, 2001))),
        ([1, 3] + [3] * 20, 0.6, 0, list(range(2, 12))),
        ([3] * 500, 0.6, 90, list(range(1, 201))),
        ([1, 3, 2, 3], 0.6, 0, [3]),
        ([4, 3, 4], 0.4, 0, [2]),
        ([4] * 9, 0.4, 2, [1, 2, 3, 4]),
        ([4] * 90, 0.4, 90, list(range(1, 21))),
        ([9, 5, 5], 0.6, 90, [2]),
    ],
)
def test_the_oftener_a_message_was_read_the_fewer_it_is_tried_with(
    read_counts: list[int], fraction: float, survived: int, together: list[int]
) -> None:
    chosen, set_aside = isolate(messages(*read_counts), fraction, survived)

    assert [message.id for message in chosen] == together
    assert sorted(message.id for message in chosen + set_aside) == list(range(1, len(read_counts) + 1))


def run_lanes(deaths: dict[int, int], killers: set[int], restarts: set[int], seed: int) -> tuple[int, set[int]]:
    """The passes until messages with so many deaths are done, and those that fail.

    killers: messages that end each lane. restarts: passes in which the server is restarted for another reason.
    """
    chance = random.Random(seed)
    failed: set[int] = set()
    passes = survived = 0
    while deaths:
        passes += 1
        claimed = [Message(number, count + 1, None) for number, count in deaths.items()]
        chosen, _ = isolate(claimed, chance.random(), survived)
        numbers = {message.id for message in chosen}
        survived += any(message.read_count > 1 for message in chosen)
        if not numbers & killers and passes not in restarts:
            deaths = {number: count for number, count in deaths.items() if number not in numbers}
            continue
        survived = 0
        deaths = {number: count + (number in numbers) for number, count in deaths.items()}
        failed |= {number for number, count in deaths.items() if count == MAX_ATTEMPTS}
        deaths = {number: count for number, count in deaths.items() if count < MAX_ATTEMPTS}
    return passes, failed


@pytest.mark.parametrize(("count", "passes"), [(0, 1), (1, 5), (2, 14), (3, 104)])
def test_messages_whose_lanes_died_of_something_else_are_soon_done(count: int, passes: int) -> None:
    assert run_lanes(dict.fromkeys(range(2000), count), set(), set(), 1) == (passes, set())


@given(st.sets(st.integers(0, 1999), max_size=3), st.sets(st.integers(1, 60), max_size=8), st.integers(0, 2**32))
def test_only_a_message_that_kills_its_lanes_fails(killers: set[int], restarts: set[int], seed: int) -> None:
    passes, failed = run_lanes(dict.fromkeys(range(2000), 0), killers, restarts, seed)

    assert killers <= failed
    # A restart during the last try of a message cannot be told from a kill by it.
    assert len(failed - killers) <= len(restarts)
    assert passes < 150 + 25 * (len(killers) + len(restarts))


# --- the ledger --------------------------------------------------------------------------------------


class Book:
    """A ledger with its database and jobs of claimed messages."""

    def __init__(self) -> None:
        self.database = FakeDatabase()
        self.ledger = Ledger(self.database, [])

    def claim(self, *keys: int, attempts: int = 0) -> tuple[int, list[Job]]:
        message_id = self.database.send({"pipeline": 1, "keys": [[key] for key in keys]})
        self.database.claim(1, 60, [], [], [])
        jobs = [Job(PIPELINE, f"[{key}]", attempts, [message_id]) for key in keys]
        for job in jobs:
            self.ledger.open(job)
        return message_id, jobs

    @property
    def waiting(self) -> list[Any]:
        return [message.body for message in self.database.waiting()]


@pytest.fixture
def book() -> Book:
    return Book()


def test_a_message_goes_when_its_last_row_is_dealt_with(book: Book) -> None:
    message_id, (first, second) = book.claim(1, 2)

    book.ledger.done(first)
    book.ledger.flush()
    assert list(book.database.queue) == [message_id]

    book.ledger.done(second)
    book.ledger.flush()
    assert book.database.queue == {}


def test_only_the_rows_to_try_again_go_back(book: Book) -> None:
    _, (done, retried, counted, failed) = book.claim(1, 2, 3, 4, attempts=1)

    book.ledger.done(done)
    book.ledger.retry(retried, 5.0)
    book.ledger.retry(counted, 2.0, "no text", counts=True)
    book.ledger.fail(failed, "too long")
    book.ledger.flush()

    assert book.waiting == [
        {"pipeline": 1, "keys": [[2]], "attempts": 1},
        {"pipeline": 1, "keys": [[3]], "attempts": 2},
    ]
    assert list(book.database.delays.values()) == [5.0, 2.0]
    assert book.database.failures["[4]"].attempts == 2


def test_rows_that_go_back_alike_go_back_together_and_once(book: Book) -> None:
    _, first = book.claim(1, 2)
    _, second = book.claim(2, 3)

    for job in first + second:
        book.ledger.retry(job, 5.0)
    book.ledger.flush()

    assert book.waiting == [{"pipeline": 1, "keys": [[1], [2], [3]], "attempts": 0}]


def test_a_message_of_released_rows_only_is_released_as_it_was(book: Book) -> None:
    message_id, jobs = book.claim(1, 2)

    for job in jobs:
        book.ledger.release(job, "busy")
    book.ledger.flush()

    assert [(message.id, message.read_count) for message in book.database.waiting()] == [(message_id, 0)]


def test_released_rows_of_a_message_half_done_go_back_alone(book: Book) -> None:
    _, (done, released) = book.claim(1, 2, attempts=3)

    book.ledger.done(done)
    book.ledger.release(released, "busy")
    book.ledger.flush()

    assert book.waiting == [{"pipeline": 1, "keys": [[2]], "attempts": 3}]


def test_what_is_dealt_with_is_not_released(book: Book) -> None:
    _, (job,) = book.claim(1)

    book.ledger.done(job)
    book.ledger.release(job, "busy")
    book.ledger.release_open()
    book.ledger.flush()

    assert book.database.queue == {}
    assert (book.ledger.report.completed, book.ledger.report.retried) == (1, 0)


def test_a_row_of_two_messages_settles_both(book: Book) -> None:
    ids = [book.database.send({}) for _ in range(2)]
    book.database.claim(2, 60, [], [], [])
    job = Job(PIPELINE, "[1]", 0, ids)
    book.ledger.open(job)

    book.ledger.retry(job, 1.0)
    book.ledger.flush()

    assert book.waiting == [{"pipeline": 1, "keys": [[1]], "attempts": 0}]
    assert book.ledger.report.read == 1


@pytest.mark.parametrize(("key", "row_id"), [("[7]", 7), ('["a"]', "a"), ("[7,8]", [7, 8])])
def test_a_failed_job_is_reported_with_the_guides_keys(book: Book, key: str, row_id: Any) -> None:
    job = Job(PIPELINE, key, 0, [12])
    book.ledger.open(job)

    book.ledger.fail(job, "too long")

    assert book.ledger.report.failed_jobs == [
        {
            "jobId": 12,
            "id": row_id,
            "schema": "public",
            "table": "documents",
            "contentFunction": "embedding_input",
            "embeddingColumn": "embedding",
            "error": "too long",
        }
    ]


def test_a_row_whose_failure_cannot_be_noted_goes_back_and_its_pipeline_rests(book: Book) -> None:
    message_id, (job,) = book.claim(1)
    book.database.fail_error = RowError("no room in the index row")

    book.ledger.fail(job, "too long")
    book.ledger.flush()

    assert book.database.rested_pipelines == [(10, [1], "no room in the index row")]
    assert [(message.id, message.read_count) for message in book.database.waiting()] == [(message_id, 0)]
    assert (book.ledger.report.failed, book.ledger.report.retried) == (0, 1)
    assert [failed["error"] for failed in book.ledger.report.failed_jobs] == ["too long"]


def test_open_messages_are_those_with_a_row_left(book: Book) -> None:
    first, (job,) = book.claim(1)
    second, _ = book.claim(2)

    assert book.ledger.open_message_ids() == [first, second]
    book.ledger.done(job)
    book.ledger.flush()
    assert book.ledger.open_message_ids() == [second]


# --- messages in a pass -----------------------------------------------------------------------------


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
            wait_until(lambda: database.is_fresh(0) and database.statements[-1] == "check_interrupts")
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
    database.content_errors["[4]"] = RowError("no text")
    database.send({"pipeline": 1, "keys": [[row_id] for row_id in range(5)], "attempts": 2})
    lane.refuse("poison")

    report = lane.run()

    assert (report.read, report.completed, report.failed, report.retried) == (5, 3, 1, 1)
    assert [message.body for message in database.queue.values()] == [{"pipeline": 1, "keys": [[4]], "attempts": 3}]


def test_a_message_that_lanes_died_of_is_failed_without_being_tried(lane: Lane, database: FakeDatabase) -> None:
    database.put(1, "deadly")
    for _ in range(MAX_ATTEMPTS):
        database.claim(1, 60, [], [], [])
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
    database.claim(1, 60, [], [], [])
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
        getattr(database, where)[key_of(row_id)] = RowError("function odd(integer) does not exist")
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


@pytest.mark.parametrize("replaced", [False, True])
def test_a_vector_that_has_no_digest_is_trusted_unless_it_was_replaced(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, replaced: bool
) -> None:
    database.put(1, "text")
    lane.run()
    database.vectors["[1]"] = vector_of("other").tolist()
    database.vector_digests.clear()
    database.send({"pipeline": 1, "keys": [[1]], **({"replaced": True} if replaced else {})})

    lane.run()

    assert database.is_fresh(1) is replaced
    assert provider.texts == ["text"] * (1 + replaced)


@pytest.mark.parametrize("died", [False, True])
def test_what_is_known_of_keys_that_rows_have_left_or_taken_is_forgotten_whoever_embeds_them(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, died: bool
) -> None:
    """A row that takes key and text of another has the vector of what it said before."""
    database.put(1, "text")
    lane.run()
    database.vectors["[1]"] = vector_of("other").tolist()
    database.vector_digests.clear()
    message_id = database.send({"pipeline": 1, "keys": [[2], [1]], "moved": True})
    if died:
        database.claim(1, 60, [], [], [])
        database.claimed.discard(message_id)

    while database.waiting():
        lane.run(batch_size=1)

    assert database.is_fresh(1)
    assert provider.texts == ["text", "text"]


@pytest.mark.parametrize(
    "said", [{"keys": [[1]], "moved": True}, {"keys": [[1]], "replaced": True}, {"truncated": True}]
)
def test_a_pipeline_whose_digests_cannot_be_forgotten_rests_and_the_lane_goes_on(
    lane: Lane, database: FakeDatabase, said: dict[str, Any]
) -> None:
    database.settle_errors["[1]"] = RowError("canceling statement due to lock timeout", sqlstate="55P03", locked=True)
    body = {"pipeline": 1, **said}
    database.send(body)

    lane.run()

    assert database.rested_pipelines == [(PIPELINE.owner, [1], "canceling statement due to lock timeout")]
    assert body in bodies(database.waiting())
