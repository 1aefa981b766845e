"""Packs texts into as few requests as the model's limits allow."""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from autoembed.graphemes import MAX_JOINED, is_boundary

if TYPE_CHECKING:
    from autoembed.long_text import Text

Item = TypeVar("Item")

# Tokens that models put around a text.
MARKS = 2


# The cost of a character in tokens, by the first byte of its UTF-8 form. A text has no more tokens than bytes, and far
# fewer in the alphabets that vocabularies know well.
_COSTS: dict[bytes, tuple[float, Iterable[int]]] = {
    b"v": (0, b"aeiou"),
    b"c": (0, b"bcdfghjklmnpqrstvwxyz"),
    b"U": (0.5, string.ascii_uppercase.encode()),
    b"d": (1, string.digits.encode()),
    b" ": (0, b" "),
    b"n": (0.5, b"\n\r\t"),
    # Greek, Cyrillic, Hebrew, Arabic; Latin with its accents.
    b"1": (1.25, [*range(0xCE, 0xD2), *range(0xD7, 0xDC)]),
    b"2": (1.5, range(0xC2, 0xC6)),
    # Other characters of two bytes; signs, kana, the usual Han characters, Hangul.
    b"3": (2, [*range(0xC6, 0xCE), *range(0xD2, 0xD7), *range(0xDC, 0xE0)]),
    b"4": (2, [*range(0xE2, 0xEA), *range(0xEB, 0xEE)]),
    # India, Thailand, Laos; Georgia, Ethiopia, Burma, Cambodia, full-width letters, emoji.
    b"5": (2.25, [0xE0]),
    b"6": (3, [0xE1, 0xEA, 0xEE, 0xEF, *range(0xF0, 0xF8)]),
}
# Punctuation, and all characters that are not above.
_OTHER = b"."
_CONTINUATIONS = bytes(range(0x80, 0xC0))
# Kinds of letters, which count as one kind where the order of characters matters.
_LETTERS = b"vcU"


def _kinds() -> bytes:
    table = bytearray(_OTHER * 256)
    for kind, (_, characters) in _COSTS.items():
        for character in characters:
            table[character] = kind[0]
    return bytes(table)


_KINDS = _kinds()
_LOWER_CASE = string.ascii_lowercase.encode()
_WORDS = bytes(ord("a") if kind in _LETTERS else kind if kind in b"d " else ord(".") for kind in range(256))


def estimate_tokens(text: str) -> int:
    """The estimated number of tokens of a text, more often too high than too low.

    Measured against OpenAI's vocabularies, in tests/data/token_counts.json: about 1.4 times the true number for English
    prose. In any language, code or data it is at least 0.8 times the true number, and from some hundred characters on
    at least that number; for random characters at least 0.6 times. The counting is done in C, because every text is
    estimated: about 20 ns a character.
    """
    encoded = text.encode("utf-8", "replace")
    kinds = encoded.translate(_KINDS, _CONTINUATIONS)
    words = kinds.translate(_WORDS)
    tokens = sum(cost * kinds.count(kind) for kind, (cost, _) in _COSTS.items() if cost) + kinds.count(_OTHER)
    # A word is one token, and more if it is long or hard to pronounce.
    tokens += words.startswith(b"a") + sum(map(words.count, (b".a", b" a", b"aaaaa"))) + 2 * words.count(b"da")
    tokens += kinds.count(b"ccc") + kinds.count(b"vvv")
    # A space is part of the word behind it, but not of a number. Many spaces in a row are few tokens.
    tokens += words.count(b" d") + 0.25 * words.count(b"  ")
    return math.ceil(min(tokens, len(encoded))) + MARKS


def most_tokens(text: str) -> int:
    """An upper bound of estimate_tokens() for a fiftieth of its work: no text has more tokens than bytes."""
    return len(text.encode("utf-8", "replace")) + MARKS


def most_estimated(text: str) -> int:
    """An upper bound of estimate_tokens() for a tenth of its work, which is low enough for short prose."""
    encoded = text.encode("utf-8", "replace")
    others = len(encoded.translate(None, _LOWER_CASE))
    spaces = encoded.count(b" ")
    # A lower-case letter is at most a fifth of "aaaaa" and a third of "ccc" or "vvv". A space begins a word. Another
    # byte counts by itself, and may begin two.
    tokens = 8 / 15 * (len(encoded) - others) + spaces + 3 * (others - spaces) + 1
    return math.ceil(min(tokens, len(encoded))) + MARKS


def truncate(text: Text, max_tokens: int, prefix: str = "") -> str:
    """The longest beginning of a text that has at most max_tokens behind a prefix.

    What is read as one character is not cut, and at least one character is left of every text.
    """
    max_tokens = max(0, max_tokens - _before(prefix))
    if len(text) <= max_tokens and most_tokens(str(text)) <= max_tokens:
        return str(text)
    # The search begins at the front, because a text may be far too long.
    low, high = 1, 1 + 4 * max_tokens
    while high < len(text) and estimate_tokens(text[:high]) <= max_tokens:
        low, high = high, 2 * high
    if high >= len(text):
        if estimate_tokens(str(text)) <= max_tokens:
            return str(text)
        high = len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if estimate_tokens(text[:middle]) <= max_tokens:
            low = middle
        else:
            high = middle
    for cut in range(min(low, len(text) - 1), max(0, low - MAX_JOINED), -1):
        if is_boundary(text, cut):
            return text[:cut]
    return text[:low]


def _before(prefix: str) -> int:
    return estimate_tokens(prefix) if prefix else 0


def pack(texts: Sequence[str], max_inputs: int, max_tokens: int, prefix: str = "") -> list[list[str]]:
    """The texts in order, in lists of at most max_inputs texts and max_tokens estimated tokens.

    A text that has more tokens by itself gets a list of its own. prefix: is counted with each text.
    """
    requests: list[list[str]] = []
    tokens_left = 0
    before = _before(prefix)
    longest = max(map(most_tokens, texts), default=0)
    # If that many of the longest texts would fit, the rough estimate is good enough.
    count = most_tokens if max_inputs * (before + longest) <= max_tokens else estimate_tokens
    for text in texts:
        tokens = before + count(text)
        if not requests or len(requests[-1]) == max_inputs or tokens > tokens_left:
            requests.append([])
            tokens_left = max_tokens
        requests[-1].append(text)
        tokens_left -= tokens
    return requests


def halves(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Splits a list that failed as a whole, to find the item to blame."""
    middle = len(items) // 2
    return items[:middle], items[middle:]
