"""A text that is kept as UTF-8 reads like the text."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from autoembed.batching import truncate
from autoembed.long_text import LongText

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("a é字😀 \n"), max_size=60)
POSITIONS = st.integers(-70, 70)


@given(text=TEXTS, window_bytes=st.integers(1, 20), start=POSITIONS | st.none(), end=POSITIONS | st.none())
def test_it_has_the_same_parts(text: str, window_bytes: int, start: int | None, end: int | None) -> None:
    long = LongText(text.encode(), window_bytes)

    assert (str(long), len(long), long.isspace()) == (text, len(text), not text.strip())
    assert long[start:end] == text[start:end]
    assert [long[at] for at in range(len(text))] == list(text)


@given(text=TEXTS, window_bytes=st.integers(1, 20), start=st.integers(0, 70), end=st.integers(0, 70))
def test_it_finds_the_same_characters(text: str, window_bytes: int, start: int, end: int) -> None:
    pattern = re.compile(r"\S")
    found = pattern.search(text, start, end)

    assert LongText(text.encode(), window_bytes).search(pattern, start, min(end, len(text))) == (
        found.start() if found else None
    )


@given(text=TEXTS, window_bytes=st.integers(1, 20), max_tokens=st.integers(0, 30))
def test_it_is_truncated_like_the_text(text: str, window_bytes: int, max_tokens: int) -> None:
    assert truncate(LongText(text.encode(), window_bytes), max_tokens) == truncate(text, max_tokens)


@given(text=TEXTS, window_bytes=st.integers(1, 20), characters=st.integers(0, 70))
def test_its_beginning_is_kept(text: str, window_bytes: int, characters: int) -> None:
    long = LongText(text.encode(), window_bytes)
    long.shorten(characters)

    assert str(long) == long[:] == text[: len(long)]
    assert min(characters, len(text)) <= len(long) < characters + window_bytes + 4


def test_it_equals_the_same_text_alone() -> None:
    assert LongText(b"one") == LongText(b"one", 1)
    assert LongText(b"one") != LongText(b"two")
    assert LongText(b"one") != "one"
