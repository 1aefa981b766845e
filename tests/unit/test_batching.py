"""Packing and truncating: nothing lost, order kept, limits held."""

from __future__ import annotations

import json
import time
import timeit
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoembed.batching import estimate_tokens, halves, most_estimated, most_tokens, pack, truncate

TEXTS = st.text() | st.text("ab1 \n") | st.text("世界漢字") | st.text("🦊👩‍👩‍👧é")


# --- estimate ----------------------------------------------------------------------------------------

# Texts and what they truly have; made by tests/data/make_token_counts.py.
CASES = json.loads((Path(__file__).parents[1] / "data" / "token_counts.json").read_text())
# How much too low an estimate may be, by kind of text: docs/design.md says the same.
LEAST = {"prose": 1.0, "language": 0.8, "code": 1.0, "data": 1.0, "noise": 0.6}


def truth(case: dict[str, Any]) -> int:
    return max(int(case[name]) for name in ("cl100k_base", "o200k_base"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}: {ascii(case['text'][:20])}")
def test_an_estimate_is_not_below_the_truth_by_more_than_its_margin(case: dict[str, Any]) -> None:
    assert estimate_tokens(case["text"]) >= LEAST[case["kind"]] * truth(case)


@pytest.mark.parametrize(("kind", "least", "most"), [("prose", 1.0, 1.5), ("language", 1.0, 1.5), ("code", 1.0, 2.0)])
def test_an_estimate_of_what_people_write_is_not_far_above_the_truth(kind: str, least: float, most: float) -> None:
    cases = [case for case in CASES if case["kind"] == kind]

    ratio = sum(estimate_tokens(case["text"]) for case in cases) / sum(map(truth, cases))

    assert least < ratio < most


@given(TEXTS)
def test_no_text_is_said_to_have_more_tokens_than_bytes(text: str) -> None:
    assert estimate_tokens(text) <= len(text.encode("utf-8", "replace")) + 2


@given(TEXTS | st.text("abceAE12 .\n"))
def test_the_upper_bounds_are_above_the_estimate(text: str) -> None:
    assert estimate_tokens(text) <= most_estimated(text) <= most_tokens(text)


@given(TEXTS, TEXTS)
def test_a_longer_text_has_no_fewer_tokens(text: str, more: str) -> None:
    assert estimate_tokens(text) <= estimate_tokens(text + more)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 2),
        ("a", 3),
        ("Postgres keeps rows.", 10),
        ("12 345", 8),
        ("Grüße", 8),
        ("世界", 6),
        ("🦊", 5),
        ("\ud83e", 3),
    ],
)
def test_a_text_has_so_many_tokens(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


def test_an_estimate_takes_a_time_that_grows_as_the_text_does() -> None:
    def seconds(text: str) -> float:
        return min(timeit.repeat(lambda: estimate_tokens(text), number=1, repeat=5, timer=time.thread_time))

    text = "The database keeps each embedding beside its row. 世界 " * 2000

    assert seconds(text * 8) < 40 * seconds(text)


# --- truncate ----------------------------------------------------------------------------------------


@given(TEXTS, st.integers(1, 40))
@example("世界" * 100, 10)
@example("🦊" * 100, 10)
@example("a世" * 100, 11)
@example("1 " * 1000, 40)
@example("00\u094d\u0904", 7)
@example("0000000000000A\x80\r\n", 19)
def test_truncating_gives_the_longest_beginning_within_the_limit(text: str, max_tokens: int) -> None:
    cut = truncate(text, max_tokens)

    assert text.startswith(cut)
    assert len(cut) <= 1 or estimate_tokens(cut) <= max_tokens
    longer = [end for end in range(len(cut) + 1, len(text) + 1) if estimate_tokens(text[:end]) <= max_tokens]
    assert all(joins(text, end) for end in longer)


def joins(text: str, end: int) -> bool:
    """Whether a text that ended there would be cut between a character and what belongs to it."""
    # A virama joins two consonants.
    return end < len(text) and (
        unicodedata.category(text[end])[0] == "M"
        or unicodedata.combining(text[end - 1]) == 9
        or "\u200d" in text[end - 1 : end + 1]
        or text[end] in "🏻🏼🏽🏾🏿"
        or text[end - 1 : end + 1] == "\r\n"
    )


def test_a_text_within_the_limit_is_the_very_same() -> None:
    text = "within the limit"

    assert truncate(text, 100) is text
    assert truncate(text, 100, "passage: ") is text


@given(st.text(min_size=1), st.integers(1, 40))
def test_truncating_leaves_something(text: str, max_tokens: int) -> None:
    assert truncate(text, max_tokens)


@pytest.mark.parametrize(
    "character", ["🦊", "e\u0301", "👩\u200d👩\u200d👧", "👍🏽", "❤\ufe0f", "न\u093f", "q\u0307\u0323"]
)
@pytest.mark.parametrize("max_tokens", range(20, 60, 7))
def test_truncating_never_cuts_a_character_from_what_belongs_to_it(character: str, max_tokens: int) -> None:
    cut = truncate(character * 1000, max_tokens)

    assert cut == character * (len(cut) // len(character))
    assert cut


def test_accents_without_end_are_cut_all_the_same() -> None:
    cut = truncate("a" + "\u0301" * 10_000, 100)

    assert 40 <= len(cut) <= 100


def test_a_text_far_too_long_is_not_read_to_its_end() -> None:
    class Watched(str):
        def __getitem__(self, part: Any) -> str:
            assert isinstance(part, int) or part.stop < 10_000
            return super().__getitem__(part)

    assert len(truncate(Watched("a word or two " * 1_000_000), 100)) < 1000


def test_a_prefix_takes_its_part_of_the_limit() -> None:
    text, prefix = "a word " * 100, "search_document: "

    cut = truncate(text, 50, prefix)

    assert estimate_tokens(prefix + cut) <= 50
    assert len(cut) < len(truncate(text, 50))
    assert truncate(text, 3, prefix) == "a"


# --- pack --------------------------------------------------------------------------------------------


@given(st.lists(TEXTS), st.integers(1, 5), st.integers(1, 60))
def test_packing_keeps_every_text_in_order_and_every_limit(texts: list[str], max_inputs: int, max_tokens: int) -> None:
    requests = pack(texts, max_inputs, max_tokens)

    assert [text for request in requests for text in request] == texts
    for request in requests:
        assert 1 <= len(request) <= max_inputs
        assert len(request) == 1 or sum(map(estimate_tokens, request)) <= max_tokens


@given(st.lists(TEXTS), st.integers(1, 5), st.integers(1, 60))
def test_a_new_request_begins_only_where_the_next_text_does_not_fit(
    texts: list[str], max_inputs: int, max_tokens: int
) -> None:
    requests = pack(texts, max_inputs, max_tokens)

    for request, following in zip(requests, requests[1:], strict=False):
        with_next = [*request, following[0]]
        assert len(request) == max_inputs or sum(map(estimate_tokens, with_next)) > max_tokens


@pytest.mark.parametrize(
    ("texts", "max_inputs", "max_tokens", "requests"),
    [
        ([], 10, 10, []),
        (["a"], 1, 1, [["a"]]),
        (["a", "b", "c"], 2, 100, [["a", "b"], ["c"]]),
        (["a", "b", "c"], 100, 6, [["a", "b"], ["c"]]),
        (["a", "long " * 100, "b"], 100, 10, [["a"], ["long " * 100], ["b"]]),
        (["long " * 100, "b", "c"], 100, 10, [["long " * 100], ["b", "c"]]),
        (["世界", "世界"], 100, 11, [["世界"], ["世界"]]),
        (["世界", "世界"], 100, 12, [["世界", "世界"]]),
        (["", ""], 100, 10, [["", ""]]),
    ],
)
def test_texts_are_packed(texts: list[str], max_inputs: int, max_tokens: int, requests: list[list[str]]) -> None:
    assert pack(texts, max_inputs, max_tokens) == requests


def test_a_prefix_goes_before_each_text_that_is_packed() -> None:
    texts, prefix = ["a", "b", "c", "d"], "query: "
    tokens = estimate_tokens(prefix) + estimate_tokens("a")

    assert pack(texts, 100, 2 * tokens, prefix) == [["a", "b"], ["c", "d"]]
    assert pack(texts, 100, 2 * tokens) == [texts]


# --- halves ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(), min_size=2))
def test_halves_are_the_whole_and_differ_by_at_most_one(items: list[int]) -> None:
    first, second = halves(items)

    assert first + second == items
    assert first
    assert len(second) - len(first) in (0, 1)
