"""The effort to embed texts that are cut: as many chunks and tokens as there will be."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from autoembed import forecast
from autoembed.chunks import STRUCTURE, TOKENS, chunks_of
from autoembed.forecast import chunk_effort


def count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) + 2 for text in texts]


def documents(number: int) -> list[tuple[str, str]]:
    rng = random.Random(1)
    return [
        ("", "\n\n".join(f"# {n}\n\n" + "some words of text. " * rng.randint(1, 20) for _ in range(rng.randint(1, 30))))
        for n in range(number)
    ]


@pytest.mark.parametrize("chunking", [STRUCTURE, TOKENS])
@pytest.mark.parametrize("overlap", [0, 10])
def test_few_texts_are_cut_as_they_will_be(chunking: str, overlap: int) -> None:
    texts = documents(20)
    chunks = [chunk for _, text in texts for chunk in chunks_of(text, count_words, 50, chunking, overlap)]

    assert chunk_effort(texts, count_words, 50, chunking, overlap) == (sum(c.tokens for c in chunks), len(chunks))


def test_many_texts_are_like_those_of_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = documents(300)
    steps: list[None] = []

    def note() -> None:
        steps.append(None)

    tokens, chunks = chunk_effort(texts, count_words, 50, STRUCTURE, 0, note)
    all_steps = len(steps)
    monkeypatch.setattr(forecast, "SAMPLED_CHARACTERS", 100_000)
    sampled_tokens, sampled_chunks = chunk_effort(texts, count_words, 50, STRUCTURE, 0, note)

    assert 0.9 * tokens < sampled_tokens < 1.1 * tokens
    assert 0.9 * chunks < sampled_chunks < 1.1 * chunks
    assert len(steps) < 1.5 * all_steps


def test_a_prefix_is_counted_with_each_chunk_and_leaves_less_room() -> None:
    texts = [("of three words\n\n", text) for _, text in documents(5)]

    with_prefix, without = (
        chunk_effort(some, count_words, 50, STRUCTURE, 0) for some in (texts, [("", text) for _, text in texts])
    )

    assert with_prefix[1] >= without[1]
    assert with_prefix[0] > without[0] + 3 * with_prefix[1]


@pytest.mark.parametrize("texts", [[], [("", "")], [("prefix", " ")]])
def test_nothing_takes_no_chunks(texts: list[tuple[str, str]]) -> None:
    assert chunk_effort(texts, count_words, 50, STRUCTURE, 0)[1] <= 1
