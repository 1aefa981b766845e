"""A text that a server refuses for its length: it is cut, and the length that is taken is remembered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from autoembed import batching
from autoembed.answers import shorter_limit, trouble_of_answer
from autoembed.cutting import limit_of
from autoembed.errors import ProviderTrouble, Refused, Trouble
from autoembed.outbox import PROBE
from autoembed.providers import sizes_of
from unit.fakes import PIPELINE, FakeDatabase, FakeProvider, Vector, key_of, vectors_of
from unit.lane import Lane

# The servers' words, and the tokens to cut a text of 1,000 to.
REFUSALS = [
    (413, '{"error":"Input validation error: `inputs` must have less than 512 tokens. Given: 1003"}', 512),
    (413, "<html><body><h1>413 Request Entity Too Large</h1></body></html>", 500),
    (400, '{"message":"This model\'s maximum context length is 256 tokens. However, you requested 903 tokens"}', 256),
    (400, '{"error":{"message":"You passed 903 input tokens. The model\'s context length is only 384 tokens"}}', 384),
    (500, '{"error":{"message":"input (962 tokens) is too large to process. increase the physical batch size'
          ' (current batch size: 512)"}}', 512),
    (500, '{"error":{"message":"input is too large to process. increase the physical batch size"}}', 500),
    (400, '{"error":"the input length exceeds the context length"}', 500),
    (422, '{"detail":"Input text exceeds maximum tokens limit of 600"}', 600),
    # The estimate says that the text has fewer than that.
    (400, '{"message":"maximum context length is 1000 tokens. However, you requested 1100 tokens"}', 750),
    (400, '{"error":{"message":"this is not a text that we take"}}', None),
    (422, '{"detail":[{"loc":["body","input",0],"msg":"value is not a valid string"}]}', None),
    (500, "Internal Server Error", None),
    (429, '{"error":{"message":"Request too large on tokens per min (TPM): Limit 500, Requested 1000"}}', None),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "limit"), REFUSALS)
def test_the_words_of_a_refusal_tell_how_much_to_cut(status: int, body: str, limit: int | None) -> None:
    assert shorter_limit(trouble_of_answer(status, {}, body.encode()), 1000) == limit


def test_a_request_of_more_tokens_than_a_minute_has_is_not_cut() -> None:
    words = "Request too large on tokens per min (TPM): Limit 500, Requested 1000."
    assert shorter_limit(Refused(f"the provider answered 429: {words}"), 1000) is None


def test_a_short_text_is_not_cut_further() -> None:
    assert shorter_limit(Refused("the provider answered 413: too large"), 60) is None


LONG = "word " * 1000


def takes(lane: Lane, most: int, trouble: Callable[[], Trouble]) -> None:
    """Has the provider take texts of so many tokens and no more from now on."""

    def answer(texts: list[str]) -> Vector:
        if any(batching.estimate_tokens(text) > most for text in texts):
            raise trouble()
        return vectors_of(texts)

    lane.provider.answer = answer


def refused() -> Trouble:
    return Refused("the provider answered 400: maximum context length is 200 tokens")


def failed() -> Trouble:
    trouble = ProviderTrouble("the provider answered 500: input is too large to process")
    trouble.may_be_a_texts = True
    return trouble


def run_until_empty(lane: Lane, database: FakeDatabase) -> None:
    for _ in range(10):
        if not database.queue:
            return
        lane.run()
    raise AssertionError(database.queue)


@pytest.mark.parametrize("trouble", [refused, failed])
def test_a_text_that_is_too_long_is_cut_and_the_limit_is_kept(
    lane: Lane, database: FakeDatabase, provider: FakeProvider, trouble: Callable[[], Trouble]
) -> None:
    takes(lane, 200, trouble)
    for row_id in range(20):
        database.put(row_id, LONG + str(row_id) if row_id in (3, 4, 11) else f"text {row_id}")

    run_until_empty(lane, database)

    assert database.failures == {}
    assert all(database.vectors[key_of(row_id)] is not None for row_id in range(20))
    [taken] = database.tokens_taken
    assert 32 <= taken <= 200
    assert database.logged == [
        f'autoembed cuts texts for model "small" at about {taken} tokens: its provider has refused a longer one'
    ]
    assert database.rests == []

    # Later texts are cut before they are sent.
    before = len(provider.requests)
    database.put(30, LONG + "later")
    lane.run()
    assert len(provider.requests) == before + 1
    assert database.vectors[key_of(30)] is not None


def test_rows_that_are_not_too_long_are_not_held_up(lane: Lane, database: FakeDatabase) -> None:
    takes(lane, 200, refused)
    database.put(0, LONG)
    for row_id in range(1, 50):
        database.put(row_id, f"text {row_id}")

    lane.run()

    assert all(database.is_fresh(row_id) for row_id in range(1, 50))


def test_a_row_that_must_not_be_cut_fails_with_the_reason(lane: Lane, database: FakeDatabase) -> None:
    database.defined[1] = replace(PIPELINE, truncate=False)
    takes(lane, 200, refused)
    database.put(0, LONG)
    database.put(1, "short")

    lane.run()

    assert database.failures["[0]"].reason == str(refused())
    assert database.tokens_taken == []
    assert database.is_fresh(1)


def test_a_limit_that_was_learnt_cuts_no_text_that_must_stay_whole() -> None:
    model = replace(PIPELINE.model, learnt={"tokens_per_input": 100})

    assert sizes_of(model).tokens_per_input == 100
    assert limit_of(replace(PIPELINE, model=model, truncate=True)) == 100
    assert limit_of(replace(PIPELINE, model=model, truncate=False)) is None


def test_a_text_that_is_refused_at_any_length_costs_few_requests_and_cuts_no_other(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    """The words speak of length, and the length is not the reason."""

    def answer(texts: list[str]) -> Vector:
        if any("word" in text for text in texts):
            raise Refused("the provider answered 400: exceeds the limit of good taste")
        return vectors_of(texts)

    provider.answer = answer
    for row_id in range(3):
        database.put(row_id, LONG + str(row_id))
    database.put(3, "fine")

    run_until_empty(lane, database)

    assert sorted(database.failures) == ["[0]", "[1]", "[2]"]
    assert database.tokens_taken == []
    assert database.is_fresh(3)
    # The refusal, the probe, the halves, and one series of ever shorter beginnings.
    assert len(provider.requests) <= 20
    assert provider.requests.count([PROBE]) == 1


def test_a_provider_that_fails_during_the_trial_loses_no_row(
    lane: Lane, database: FakeDatabase, provider: FakeProvider
) -> None:
    def answer(texts: list[str]) -> Vector:
        if len(provider.requests) > 3:
            raise ProviderTrouble("no answer")
        if any(len(text) > 1000 for text in texts):
            raise refused()
        return vectors_of(texts)

    provider.answer = answer
    sent = [database.put(row_id, LONG + str(row_id)) for row_id in range(2)]

    lane.run()

    assert {message.id for message in database.waiting()} == set(sent)
    assert database.failures == {}
    assert len(database.rests) == 1
