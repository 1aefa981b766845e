"""The vectors of search texts that a session keeps."""

from __future__ import annotations

from autoembed.kept import KeptTexts


def test_what_was_used_least_lately_goes_first() -> None:
    kept = KeptTexts(10)
    for key in "abc":
        kept.keep((key,), "12")
    assert kept.get(("a",)) == "12"

    kept.keep(("d",), "12")

    assert [key for key in "abcd" if kept.get((key,)) is not None] == ["a", "c", "d"]


def test_a_value_that_is_replaced_counts_once() -> None:
    kept = KeptTexts(10)
    for length in (1, 5, 3):
        kept.keep(("a",), "1" * length)
    kept.keep(("b",), "12345")

    assert kept.get(("a",)) == "111"
    assert kept.get(("b",)) == "12345"


def test_one_value_is_kept_however_long() -> None:
    kept = KeptTexts(10)
    kept.keep(("a",), "1" * 100)
    assert kept.get(("a",)) == "1" * 100

    kept.keep(("b",), "1")

    assert kept.get(("a",)) is None
    assert kept.get(("b",)) == "1"
