"""Packing and truncating: nothing lost, order kept, limits held."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from autoembed.batching import estimate_tokens, halves, pack, truncate

TEXTS = st.text() | st.text("ab1 \n") | st.text("世界漢字") | st.text("🦊👩‍👩‍👧é")


# --- estimate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 1),
        ("ab", 1),
        ("Postgres keeps rows.", 7),
        ("a" * 300, 101),
        ("世界", 5),
        ("🦊", 3),
        ("Grüße", 6),
        ("👩\u200d👩", 7),
    ],
)
def test_a_text_has_a_token_for_three_ascii_characters_and_two_for_any_other(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


@given(TEXTS, TEXTS)
def test_a_longer_text_has_no_fewer_tokens(text: str, more: str) -> None:
    assert estimate_tokens(text) <= estimate_tokens(text + more)


@given(TEXTS, TEXTS)
def test_an_estimate_of_a_whole_is_at_most_that_of_its_parts(text: str, more: str) -> None:
    assert estimate_tokens(text + more) <= estimate_tokens(text) + estimate_tokens(more)


# --- truncate ----------------------------------------------------------------------------------------


@given(TEXTS, st.integers(1, 40))
@example("世界" * 100, 10)
@example("🦊" * 100, 10)
@example("a世" * 100, 11)
def test_truncating_gives_the_longest_beginning_within_the_limit(text: str, max_tokens: int) -> None:
    cut = truncate(text, max_tokens)

    assert text.startswith(cut)
    assert estimate_tokens(cut) <= max_tokens
    assert cut == text or estimate_tokens(text[: len(cut) + 1]) > max_tokens


def test_a_text_within_the_limit_is_the_very_same() -> None:
    text = "within the limit"

    assert truncate(text, 100) is text


@given(st.text(min_size=1), st.integers(3, 40))
def test_truncating_leaves_something(text: str, max_tokens: int) -> None:
    assert truncate(text, max_tokens)


def test_truncating_never_halves_a_character() -> None:
    cut = truncate("🦊" * 1000, 101)

    assert cut == "🦊" * 50
    assert cut.encode().decode() == cut


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
        (["a", "b", "c"], 100, 2, [["a", "b"], ["c"]]),
        (["a", "long " * 100, "b"], 100, 10, [["a"], ["long " * 100], ["b"]]),
        (["long " * 100, "b", "c"], 100, 10, [["long " * 100], ["b", "c"]]),
        (["世界", "世界"], 100, 9, [["世界"], ["世界"]]),
        (["世界", "世界"], 100, 10, [["世界", "世界"]]),
        (["", ""], 100, 10, [["", ""]]),
    ],
)
def test_texts_are_packed(texts: list[str], max_inputs: int, max_tokens: int, requests: list[list[str]]) -> None:
    assert pack(texts, max_inputs, max_tokens) == requests


# --- halves ------------------------------------------------------------------------------------------


@given(st.lists(st.integers(), min_size=2))
def test_halves_are_the_whole_and_differ_by_at_most_one(items: list[int]) -> None:
    first, second = halves(items)

    assert first + second == items
    assert first
    assert len(second) - len(first) in (0, 1)
