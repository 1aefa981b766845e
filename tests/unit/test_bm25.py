"""The text index: parts of texts, scores and merged segments."""

from __future__ import annotations

import math
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
    StoredPosting,
    TermPostings,
    counted,
    counts,
    joined,
    level_of,
    merged,
    merged_ids,
    most_dead,
    occurrences_of,
    packed,
    parts,
    plain_words,
    unpacked,
    with_segment,
)

Documents = dict[int, dict[str, int]]


def segment_of(documents: Documents) -> Segment:
    ids = sorted(documents)
    terms = sorted({term for words in documents.values() for term in words})
    postings = {}
    for term in terms:
        places = [place for place, number in enumerate(ids) if term in documents[number]]
        levels = [level_of(documents[ids[place]][term]) for place in places]
        postings[term] = Posting(np.array(places, np.int32), np.array(levels, np.uint8))
    lengths = [sum(documents[number].values()) for number in ids]
    return Segment(np.array(ids, np.int64), np.array(lengths, np.int32), postings)


def stored(segment: Segment) -> Segment:
    """The same once it was written and read."""
    count = len(segment.documents)
    return segment._replace(
        postings={term: unpacked(*packed(posting, count)) for term, posting in segment.postings.items()}
    )


def scores_of(segments: list[Segment], terms: dict[str, int], dead: np.ndarray) -> Scores:
    documents = joined(segments)
    starts = np.cumsum([0, *(len(segment.documents) for segment in segments)])[:-1]
    # One of each form for each term, as the text index gives them.
    found: dict[tuple[str, bool], list[tuple[int, Posting]]] = {}
    for start, segment in zip(starts.tolist(), map(stored, segments), strict=True):
        for term, posting in segment.postings.items():
            found.setdefault((term, posting.ordinals is None), []).append((start, posting))
    postings: dict[str, list[TermPostings]] = {}
    for (term, is_every), of_term in found.items():
        all_levels = [posting.levels for _, posting in of_term]
        ordinals = None if is_every else np.concatenate([posting.ordinals for _, posting in of_term])
        sizes = np.array([len(levels) for levels in all_levels], np.int32)
        postings.setdefault(term, []).append(
            TermPostings(np.array([start for start, _ in of_term]), sizes, ordinals, np.concatenate(all_levels))
        )
    return Scores(documents, postings, terms, dead)


def exact(texts: Documents, terms: dict[str, int]) -> list[tuple[int, float]]:
    """The documents that match, best first, and their scores, one document after the other."""
    lengths = {number: sum(words.values()) for number, words in texts.items()}
    mean = sum(lengths.values()) / len(texts)
    having = {term: sum(term in words for words in texts.values()) for term in terms}
    scores: dict[int, float] = {}
    for number, words in texts.items():
        for term in terms.keys() & words.keys():
            [found] = occurrences_of(np.array([level_of(words[term])], np.uint8)).tolist()
            idf = math.log(1 + (len(texts) - having[term] + 0.5) / (having[term] + 0.5))
            gain = terms[term] * idf * found * 2.2 / (found + 1.2 * (0.25 + 0.75 * lengths[number] / mean))
            scores[number] = scores.get(number, 0.0) + gain
    return sorted(scores.items(), key=lambda one: (-one[1], one[0]))


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
    assert [number for number, _ in scores_of(segments, {"a": 1}, numbers()).best(10)] == [2, 1, 3]
    [(_, common)], [(_, rare)] = (scores_of(segments, {word: 1}, numbers()).best(1) for word in "ab")
    assert rare > common
    assert [number for number, _ in scores_of(segments, {"a": 1}, numbers(2, 4)).best(10)] == [1, 3]
    # A dead text is as one that never was.
    without = [segment_of({1: {"a": 1, "b": 1}}), segments[1]]
    terms = {"a": 1, "c": 2}
    assert scores_of(segments, terms, numbers(2)).best(9) == scores_of(without, terms, numbers()).best(9)


def test_counted_texts_score_as_a_segment_does() -> None:
    texts = {1: {"a": 1, "b": 2}, 2: {"b": 1}, 3: {"a": 300}}
    terms = {"a": 1, "b": 2}
    postings: dict[str, list[TermPostings]] = {}
    documents = joined([])
    for more in (counted([(sum(words.values()), words) for words in texts.values()]), counted([])):
        documents = with_segment(documents, postings, more)

    found = Scores(documents, postings, terms, numbers()).best(9)

    expected = scores_of([segment_of(texts)], terms, numbers()).best(9)
    assert [(number + 4, score) for number, score in found] == expected
    assert merged_ids(numbers(2, 7), [9, 1, 2]).tolist() == [1, 2, 7, 9]
    assert merged_ids(numbers(), []).tolist() == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", (0, {})),
        ("0 ", (0, {})),
        ("1 'page':1", (1, {"page": 1})),
        ("5 'a':1,3,9 'page':2,4", (5, {"page": 2})),
        # Two parts of a long text.
        ("4 'page':1,2 'z':3 'page':1", (4, {"page": 3})),
        ("2 'pages':1 'homepage':2", (2, {})),
        # Quotes and backslashes are doubled. A word may look like another one in quotes.
        ("1 'it''s':1", (1, {"it's": 1})),
        ("1 'a\\\\b':1,2", (1, {"a\\b": 2})),
        ("1 'x ''page'':1,2,3':4", (1, {})),
        ("3 'http://h/a,b:c':2 'page':1A,3B", (3, {"page": 2})),
    ],
)
def test_the_words_of_a_text_are_counted_as_postgresql_writes_them(
    words: str, expected: tuple[int, dict[str, int]]
) -> None:
    assert counts(words, ["page", "it's", "a\\b"]) == expected


@pytest.mark.parametrize("occurrences", [1, 2, 127, 128, 129, 140, 1000, 65_536, 1_000_000])
def test_the_level_of_a_term_tells_how_often_it_occurs(occurrences: int) -> None:
    level = level_of(occurrences)
    [found] = occurrences_of(np.array([level], np.uint8))
    assert 0 < level < 256
    assert found == (occurrences if occurrences < 128 else pytest.approx(occurrences, rel=0.05))


@pytest.mark.parametrize(("having", "bytes_stored"), [(10, 30), (25, 75), (26, 100), (100, 100)])
def test_a_posting_takes_the_form_that_takes_less_room(having: int, bytes_stored: int) -> None:
    places, levels = np.arange(100 - having, 100), np.full(having, 3, np.uint8)
    written = packed(Posting(places, levels), 100)
    assert sum(map(len, written)) == bytes_stored
    read = unpacked(*written)
    found = np.flatnonzero(read.levels) if read.ordinals is None else read.ordinals
    assert found.tolist() == places.tolist()
    assert set(read.levels.tolist()) - {0} == {3}


def test_of_equal_scores_the_older_documents_come_first() -> None:
    scores = scores_of([segment_of({number: {"a": 1} for number in range(1, 8)})], {"a": 1}, numbers())
    assert [number for number, _ in scores.best(2)] == [1, 2]
    assert [number for number, _ in scores.best(9)] == list(range(1, 8))
    assert set(scores.of([3, 99])) == {3}


@pytest.mark.parametrize("count", [1, 3, 40, 5000])
def test_the_best_of_many_are_those_of_all_of_them(count: int) -> None:
    rng = random.Random(count)
    texts = {
        number: {"a": rng.randint(1, 9), "b": rng.randint(0, 1), "c": rng.randint(1, 99)} for number in range(4000)
    }
    odd, even = ({number: words for number, words in texts.items() if number % 2 == rest} for rest in (1, 0))
    # The ids ascend in each segment alone.
    scores = scores_of([segment_of(odd), segment_of(even)], {"a": 1, "b": 2}, numbers(*range(0, 4000, 7)))

    every = sorted(scores.of(range(4000)).items(), key=lambda one: (-one[1], one[0]))
    assert len(every) == 4000 - len(range(0, 4000, 7))
    assert scores.best(count) == every[:count]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("limits", ["as they are", "always look"])
def test_no_document_is_left_out_that_is_among_the_best(
    monkeypatch: pytest.MonkeyPatch, seed: int, limits: str
) -> None:
    """Words of every frequency, and dead documents with the best scores, beside an exact computation."""
    if limits == "always look":
        monkeypatch.setattr(bm25, "SHARE_OF_A_LOOK", 0.0)
        monkeypatch.setattr(bm25, "POSTINGS_PER_LOOKUP", 0)
    rng = random.Random(seed)
    share = {f"w{n}": 0.9 / (1 + n) ** rng.choice([0.5, 1, 2]) for n in range(9)}
    all_documents: list[Documents] = [{} for _ in range(rng.randint(1, 4))]
    for number in range(3000):
        words = {word: rng.choice([1, 1, 2, 5, 200]) for word, likely in share.items() if rng.random() < likely}
        rng.choice(all_documents)[number] = {**words, "filler": rng.randint(1, 60)}
    segments = [segment_of(documents) for documents in all_documents]
    terms = {word: rng.choice([1, 1, 2]) for word in rng.sample(list(share), rng.randint(1, 9))}
    texts = {number: words for documents in all_documents for number, words in documents.items()}
    dead = [number for number, _ in exact(texts, terms)[: rng.choice([0, 50])]]
    expected = exact({number: words for number, words in texts.items() if number not in dead}, terms)

    for count in (1, 10, 120, 2999):
        found = scores_of(segments, terms, numbers(*dead)).best(count)
        assert [score for _, score in found] == pytest.approx([score for _, score in expected[:count]], rel=1e-4)
        known = dict(expected)
        assert dict(found) == pytest.approx({number: known[number] for number, _ in found}, rel=1e-4)


def test_scores_do_not_depend_on_the_parts_that_are_scored_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    segments = [segment_of({number: {"a": 1 + number % 3, "b": number % 2} for number in range(50)})]
    whole = scores_of(segments, {"a": 1, "b": 2}, numbers(4)).best(50)

    monkeypatch.setattr(bm25, "PART_POSTINGS", 7)

    assert scores_of(segments, {"a": 1, "b": 2}, numbers(4)).best(50) == whole


def test_documents_behind_the_first_65536_are_found() -> None:
    many = segment_of({number: {} for number in range(70_000)})
    last = segment_of({70_000: {}, 70_001: {"rare": 1}, **{number: {} for number in range(70_002, 70_010)}})
    assert [number for number, _ in scores_of([many, last], {"rare": 1}, numbers()).best(10)] == [70_001]


@pytest.mark.parametrize("terms", [{}, {"nosuch": 1}])
@pytest.mark.parametrize("documents", [{}, {1: {}}, {1: {"a": 1}}])
def test_nothing_is_found_where_nothing_matches(documents: Documents, terms: dict[str, int]) -> None:
    assert scores_of([segment_of(documents)], terms, numbers(1)).best(10) == []
    assert scores_of([], terms, numbers()).best(10) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_merged_segment_scores_as_its_parts_did(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    all_documents: list[Documents] = [{} for _ in range(rng.randint(1, 5))]
    for number in range(rng.randint(0, 40)):
        words = {rng.choice("abcdef"): rng.randint(1, 4) for _ in range(rng.randint(0, 4))}
        rng.choice(all_documents)[number] = words
    dead = numbers(*rng.sample(range(60), rng.randint(0, 20)))
    segments = [segment_of(documents) for documents in all_documents]
    monkeypatch.setattr(bm25, "PART_MERGED", rng.choice([1, 20, 1000]))
    postings = [
        StoredPosting(number, term, *packed(posting, len(segment.documents)))
        for number, segment in enumerate(segments)
        for term, posting in segment.postings.items()
    ]
    new, new_postings = merged(dict(enumerate(segments)), postings, dead)

    assert new.documents.tolist() == sorted(
        number for documents in all_documents for number in documents if number not in dead
    )
    for posting in new_postings:
        ordinals, levels = new.postings[posting.term] = unpacked(posting.ordinals, posting.levels)
        places = np.flatnonzero(levels) if ordinals is None else ordinals
        assert places.tolist() == sorted(places.tolist())
    terms = {"a": 1, "b": 2, "f": 1}
    before = scores_of(segments, terms, dead).best(100)
    after = scores_of([new], terms, numbers()).best(100)
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
