"""Where a text may be cut without tearing what is read as one character."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from autoembed.long_text import Text

# The most code points that are kept together. More accents on one letter are not a real text.
MAX_JOINED = 32

ZERO_WIDTH_JOINER = "\u200d"
# Colours of emoji; the joiner and the non-joiner; voiced marks of half-width kana; the vowels am of Thai and Lao.
_EXTENDING = frozenset("\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff\u200c\u200d\uff9e\uff9f\u0e33\u0eb3")
# Signs that stand before the number, or the letter, that they belong to.
_PREPENDED = frozenset("\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd")
# Viramas that join two consonants of Devanagari, Bengali, Gujarati, Oriya, Telugu and Malayalam.
_LINKERS = frozenset("\u094d\u09cd\u0acd\u0b4d\u0c4d\u0d4d")


def is_boundary(text: Text, at: int, since: int = 0) -> bool:
    """Whether a text may be cut before the character at this position, by the main rules of Unicode's UAX 29.

    since: a boundary before it. The time that the letters of flags take grows with the distance.
    """
    if at <= 0 or at >= len(text):
        return True
    before, after = text[at - 1], text[at]
    if before < "\u0300" and after < "\u0300":
        return before != "\r" or after != "\n"
    if before == "\r" or before == "\n":
        return True
    if after in _EXTENDING or unicodedata.category(after)[0] == "M" or _is_tag(after):
        return False
    if before == ZERO_WIDTH_JOINER or before in _PREPENDED:
        return False
    if before in _LINKERS:
        return unicodedata.category(after) != "Lo"
    if _is_flag_letter(before) and _is_flag_letter(after):
        return _flag_letters_before(text, at, since) % 2 == 0
    return not _is_one_syllable(before, after)


def _is_tag(character: str) -> bool:
    """The letters of flags such as Scotland's."""
    return "\U000e0020" <= character <= "\U000e007f"


def _is_flag_letter(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"


def _flag_letters_before(text: Text, at: int, since: int) -> int:
    """Two letters are a flag, so their number tells whether one is open."""
    first = at
    while first > since and _is_flag_letter(text[first - 1]):
        first -= 1
    return at - first


def _is_one_syllable(before: str, after: str) -> bool:
    """Whether two characters are parts of one syllable of Hangul: leading consonant, vowel, trailing consonant."""
    first, second = _hangul(before), _hangul(after)
    return (first, second) in _SYLLABLES


_SYLLABLES = {("L", "L"), ("L", "V"), ("L", "LV"), ("L", "LVT"), ("V", "V"), ("V", "T"), ("LV", "V"), ("LV", "T")} | {
    ("LVT", "T"),
    ("T", "T"),
}


def _hangul(character: str) -> str:
    code = ord(character)
    if 0xAC00 <= code <= 0xD7A3:
        return "LVT" if (code - 0xAC00) % 28 else "LV"
    if 0x1100 <= code <= 0x115F or 0xA960 <= code <= 0xA97C:
        return "L"
    if 0x1160 <= code <= 0x11A7 or 0xD7B0 <= code <= 0xD7C6:
        return "V"
    if 0x11A8 <= code <= 0x11FF or 0xD7CB <= code <= 0xD7FB:
        return "T"
    return ""
