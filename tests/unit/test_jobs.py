"""Messages: what they are for, which are tried together, and when they can go."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoembed.jobs import Address, Job, Ledger, address_of, isolate
from autoembed.records import Message
from unit.fakes import PIPELINE, FakeDatabase

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


@given(JSON)
def test_any_message_has_an_address_or_is_broken(body: Any) -> None:
    try:
        assert isinstance(address_of(body), Address)
    except ValueError as error:
        assert str(error).startswith("the message")


# --- isolation ---------------------------------------------------------------------------------------


def messages(*read_counts: int) -> Any:
    return [Message(number, read_count, None) for number, read_count in enumerate(read_counts, 1)]


@pytest.mark.parametrize(
    ("read_counts", "fraction", "together"),
    [
        ([1] * 500, 0.9, list(range(1, 501))),
        ([1, 2, 1, 2], 0.4, [1, 3]),
        ([1, 2, 1, 2], 0.6, [2, 4]),
        ([2] * 500, 0.4, list(range(1, 101))),
        ([1, 3] + [3] * 20, 0.6, list(range(2, 12))),
        ([1, 3, 2, 3], 0.6, [3]),
        ([4, 3, 4], 0.4, [2]),
        ([9, 5, 5], 0.6, [2]),
    ],
)
def test_the_oftener_a_message_was_read_the_fewer_it_is_tried_with(
    read_counts: list[int], fraction: float, together: list[int]
) -> None:
    chosen, set_aside = isolate(messages(*read_counts), fraction)

    assert [message.id for message in chosen] == together
    assert sorted(message.id for message in chosen + set_aside) == list(range(1, len(read_counts) + 1))


# --- the ledger --------------------------------------------------------------------------------------


class Book:
    """A ledger with its database and jobs of claimed messages."""

    def __init__(self) -> None:
        self.database = FakeDatabase()
        self.ledger = Ledger(self.database, [])

    def claim(self, *keys: int, attempts: int = 0) -> tuple[int, list[Job]]:
        message_id = self.database.send({"pipeline": 1, "keys": [[key] for key in keys]})
        self.database.claim(1, 60, [])
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
    book.database.claim(2, 60, [])
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


def test_open_messages_are_those_with_a_row_left(book: Book) -> None:
    first, (job,) = book.claim(1)
    second, _ = book.claim(2)

    assert book.ledger.open_message_ids() == [first, second]
    book.ledger.done(job)
    book.ledger.flush()
    assert book.ledger.open_message_ids() == [second]
