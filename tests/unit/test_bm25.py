"""The text index: parts of texts, scores and merged segments."""

from __future__ import annotations

import random

import numpy as np
import pytest

from autoembed import bm25
from autoembed.bm25 import (
    MAX_CHARACTERS,
    MAX_MERGED_POSTINGS,
    PART_CHARACTERS,
    Posting,
    Scores,
    Segment,
    counted,
    merged,
    merged_ids,
    most_dead,
    parts,
    plain_words,
)

Documents = dict[int, dict[str, int]]


def segment_of(documents: Documents) -> Segment:
    ids = sorted(documents)
    terms = sorted({term for words in documents.values() for term in words})
    postings = {}
    for term in terms:
        places = [place for place, number in enumerate(ids) if term in documents[number]]
        frequencies = [documents[ids[place]][term] for place in places]
        postings[term] = Posting(np.array(places, np.int32), np.array(frequencies, np.int32))
    lengths = [sum(documents[number].values()) for number in ids]
    return Segment(np.array(ids, np.int64), np.array(lengths, np.int32), postings)


def numbers(*values: int) -> np.ndarray:
    return np.array(sorted(values), np.int64)


@pytest.mark.parametrize(
    "text",
    ["", "a", "a b " * 100_000, "x" * 100_000, "ä€😀 " * 30_000, "a" * PART_CHARACTERS, "a " * (PART_CHARACTERS // 2)],
)
def test_the_parts_of_a_text_are_the_text_without_a_word_that_is_cut(text: str) -> None:
    found = list(parts(text))

    assert "".join(found) == text
    assert all(len(part) <= PART_CHARACTERS for part in found)
    if " " in text:
        assert all(part.endswith(" ") for part in found[:-1])


def test_a_very_long_text_is_indexed_in_part() -> None:
    assert sum(map(len, parts("a " * MAX_CHARACTERS))) == MAX_CHARACTERS


def test_rare_words_and_short_texts_count_more_and_dead_texts_not_at_all() -> None:
    segments = [segment_of({1: {"a": 1, "b": 1}, 2: {"a": 1}}), segment_of({3: {"a": 2, "c": 5}, 9: {"c": 1}})]
    assert [number for number, _ in Scores(segments, {"a": 1}, numbers()).best(10)] == [2, 1, 3]
    assert Scores(segments, {"b": 1}, numbers()).best(1)[0][1] > Scores(segments, {"a": 1}, numbers()).best(1)[0][1]
    assert [number for number, _ in Scores(segments, {"a": 1}, numbers(2, 4)).best(10)] == [1, 3]
    # A dead text is as one that never was.
    without = [segment_of({1: {"a": 1, "b": 1}}), segments[1]]
    terms = {"a": 1, "c": 2}
    assert Scores(segments, terms, numbers(2)).best(9) == Scores(without, terms, numbers()).best(9)


def test_counted_texts_score_as_a_segment_does() -> None:
    texts = {1: {"a": 1, "b": 2}, 2: {"b": 1}, 3: {"a": 3}}
    terms = {"a": 1, "b": 2}
    segment = counted([(sum(words.values()), words) for words in texts.values()])

    found = Scores([segment, counted([])], terms, numbers()).best(9)

    expected = Scores([segment_of(texts)], terms, numbers()).best(9)
    assert [(number + 4, score) for number, score in found] == expected
    assert merged_ids(numbers(2, 7), [9, 1, 2]).tolist() == [1, 2, 7, 9]
    assert merged_ids(numbers(), []).tolist() == []


def test_the_best_come_with_all_their_equals() -> None:
    scores = Scores([segment_of({number: {"a": 1} for number in range(1, 8)})], {"a": 1}, numbers())
    assert [number for number, _ in scores.best(2)] == list(range(1, 8))
    assert set(scores.of([3, 99])) == {3}


@pytest.mark.parametrize("count", [1, 3, 40, 5000])
def test_the_best_of_many_are_those_of_all_of_them(count: int) -> None:
    rng = random.Random(count)
    texts = {
        number: {"a": rng.randint(1, 9), "b": rng.randint(0, 1), "c": rng.randint(1, 99)} for number in range(4000)
    }
    odd, even = ({number: words for number, words in texts.items() if number % 2 == rest} for rest in (1, 0))
    # The ids ascend in each segment alone.
    scores = Scores([segment_of(odd), segment_of(even)], {"a": 1, "b": 2}, numbers(*range(0, 4000, 7)))

    every = sorted(scores.of(range(4000)).items(), key=lambda one: (-one[1], one[0]))
    assert len(every) == scores.count == 4000 - len(range(0, 4000, 7))
    best = scores.best(count)
    assert len(best) >= min(count, len(every))
    assert best == every[: len(best)]


def test_scores_do_not_depend_on_the_parts_that_are_scored_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [segment_of({number: {"a": 1 + number % 3, "b": number % 2} for number in range(50)})]
    whole = Scores(segments, {"a": 1, "b": 2}, numbers(4)).best(50)

    monkeypatch.setattr(bm25, "PART_POSTINGS", 7)

    assert Scores(segments, {"a": 1, "b": 2}, numbers(4)).best(50) == whole


@pytest.mark.parametrize("terms", [{}, {"nosuch": 1}])
@pytest.mark.parametrize("documents", [{}, {1: {}}, {1: {"a": 1}}])
def test_nothing_is_found_where_nothing_matches(documents: Documents, terms: dict[str, int]) -> None:
    assert Scores([segment_of(documents)], terms, numbers(1)).best(10) == []
    assert Scores([], terms, numbers()).best(10) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_merged_segment_scores_as_its_parts_did(seed: int) -> None:
    rng = random.Random(seed)
    all_documents: list[Documents] = [{} for _ in range(rng.randint(1, 5))]
    for number in range(rng.randint(0, 40)):
        words = {rng.choice("abcdef"): rng.randint(1, 4) for _ in range(rng.randint(0, 4))}
        rng.choice(all_documents)[number] = words
    dead = numbers(*rng.sample(range(60), rng.randint(0, 20)))
    segments = [segment_of(documents) for documents in all_documents]
    new = merged(segments, dead)
    postings = {
        term: Posting(ordinals, frequencies)
        for term, ordinals, frequencies in zip(new.terms, new.ordinals, new.frequencies, strict=True)
    }

    assert new.documents.tolist() == sorted(
        number for documents in all_documents for number in documents if number not in dead
    )
    terms = {"a": 1, "b": 2, "f": 1}
    before = Scores(segments, terms, dead).best(100)
    after = Scores([Segment(new.documents, new.lengths, postings)], terms, numbers()).best(100)
    assert [number for number, _ in after] == [number for number, _ in before]
    assert [score for _, score in after] == pytest.approx([score for _, score in before])


def test_the_segments_with_the_most_dead_texts_are_merged() -> None:
    segments = {n: segment_of({10 * n + i: {"a": 1} for i in range(4)}) for n in range(1, 4)}
    few = {1: 1, 2: 1, 3: 1}
    assert most_dead(segments, numbers(10, 20, 21), few) == [2, 1]
    assert most_dead(segments, numbers(), few) == []
    assert most_dead(segments, numbers(10, 20, 21), {**few, 1: MAX_MERGED_POSTINGS}) == [2]
    assert most_dead(segments, numbers(10, 20, 21), {**few, 2: MAX_MERGED_POSTINGS + 1}) == [2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("plain words", "plain words"),
        ("a_b-c<!--d", "a b c d"),
        ("Übung 3.14", "Übung 3 14"),
        ("x" * 1000, "x" * 100),
        ("<>", ""),
    ],
)
def test_plain_words_are_letters_and_digits(text: str, words: str) -> None:
    assert plain_words(text) == words


@pytest.mark.parametrize("start", ["<?", "<!--"])
def test_a_part_that_no_cancel_would_end_is_read_as_plain_words(start: str) -> None:
    few, many = f"a-b {start} " * 5, f"a-b {start} " * 5000
    assert list(parts(few)) == [few]
    assert set("".join(parts(many))) == set("ab ")
