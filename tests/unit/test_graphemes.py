"""Where a text may be cut without tearing a character."""

from __future__ import annotations

import pytest

from autoembed.graphemes import is_boundary

# Each is read as one character.
CLUSTERS = {
    "a letter": "a",
    "a line end of Windows": "\r\n",
    "a letter with its accent": "e\u0301",
    "a letter with two accents": "o\u0302\u0323",
    "a family": "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "a hand with its colour": "\U0001f44d\U0001f3fd",
    "a heart in its coloured form": "\u2764\ufe0f",
    "a key of a telephone": "1\ufe0f\u20e3",
    "a flag of two letters": "\U0001f1e9\U0001f1ea",
    "a flag of tags": "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",
    "a syllable of Hangul in its parts": "\u1112\u1161\u11ab",
    "a syllable of Hangul with its end": "\ud558\u11ab",
    "two consonants of Devanagari in one sign": "\u0915\u094d\u0937",
    "a vowel of Devanagari": "\u0928\u093f",
    "a vowel of Thai": "\u0e01\u0e33",
    "an Arabic letter with its vowel": "\u0628\u064e",
    "a half-width kana with its voice": "\uff76\uff9e",
    "a number sign of Arabic": "\u0600\u0661",
}


@pytest.mark.parametrize("cluster", CLUSTERS.values(), ids=CLUSTERS.keys())
def test_a_text_is_cut_around_a_character_and_not_within(cluster: str) -> None:
    text = f"x{cluster}y"

    boundaries = [at for at in range(len(text) + 1) if is_boundary(text, at)]

    assert boundaries == [0, 1, len(text) - 1, len(text)]


def test_flags_in_a_row_are_cut_between_two_letters() -> None:
    text = "\U0001f1e9\U0001f1ea" * 3

    assert [at for at in range(len(text) + 1) if is_boundary(text, at)] == [0, 2, 4, 6]


def test_letters_of_any_script_are_cut_apart() -> None:
    for text in ("ab", "äß", "漢字", "かな", "กข", "नम", "اب", "한글", "\U0001f600\U0001f601"):
        assert is_boundary(text, 1), text
