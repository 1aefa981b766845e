"""Packs texts into requests, as few as the model's limits allow."""

from __future__ import annotations

import math
import string
import unicodedata
from collections.abc import Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")

ZERO_WIDTH_JOINER = "\u200d"
SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"
# The tokens that models put around a text.
MARKS = 2
# Characters that are kept together; more accents on one letter than that are somebody's joke.
MAX_JOINED = 16


# What a character costs, in tokens, by the first byte of its UTF-8. No text has more tokens than bytes, but in the
# alphabets that vocabularies know well it has far fewer.
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
    # What else has two bytes; signs, kana, the usual Han characters, Hangul.
    b"3": (2, [*range(0xC6, 0xCE), *range(0xD2, 0xD7), *range(0xDC, 0xE0)]),
    b"4": (2, [*range(0xE2, 0xEA), *range(0xEB, 0xEE)]),
    # India, Thailand, Laos; Georgia, Ethiopia, Burma, Cambodia, full-width letters, emoji.
    b"5": (2.25, [0xE0]),
    b"6": (3, [0xE1, 0xEA, 0xEE, 0xEF, *range(0xF0, 0xF8)]),
}
# Of punctuation and all that is not above.
_OTHER = b"."
_CONTINUATIONS = bytes(range(0x80, 0xC0))
# The same for what follows what: letters are all one.
_LETTERS = b"vcU"


def _kinds() -> bytes:
    table = bytearray(_OTHER * 256)
    for kind, (_, characters) in _COSTS.items():
        for character in characters:
            table[character] = kind[0]
    return bytes(table)


_KINDS = _kinds()
_WORDS = bytes(ord("a") if kind in _LETTERS else kind if kind in b"d " else ord(".") for kind in range(256))


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has: rather more than fewer.

    Held against OpenAI's vocabularies, in tests/data/token_counts.json: about 1.4 times the truth for English prose;
    in any language, code or data at least 0.8 of it, and all of it from some hundred characters on; for characters at
    random at least 0.6. Made of counts that C does, as it is asked of every text: about 20 ns a character.
    """
    encoded = text.encode("utf-8", "replace")
    kinds = encoded.translate(_KINDS, _CONTINUATIONS)
    words = kinds.translate(_WORDS)
    tokens = sum(cost * kinds.count(kind) for kind, (cost, _) in _COSTS.items() if cost) + kinds.count(_OTHER)
    # A word is a token, and more where it is long or hard to say.
    tokens += words.startswith(b"a") + sum(map(words.count, (b".a", b" a", b"aaaaa"))) + 2 * words.count(b"da")
    tokens += kinds.count(b"ccc") + kinds.count(b"vvv")
    # A space is part of the word behind it, not of a number; many in a row are few tokens.
    tokens += words.count(b" d") + 0.25 * words.count(b"  ")
    return math.ceil(min(tokens, len(encoded))) + MARKS


def most_tokens(text: str) -> int:
    """What estimate_tokens() gives at most, and a fiftieth of its work: no text has more tokens than bytes."""
    return len(text.encode("utf-8", "replace")) + MARKS


def truncate(text: str, max_tokens: int, prefix: str = "") -> str:
    """The longest beginning of a text that has at most max_tokens behind a prefix.

    No letter is cut from its accents, and something is left of every text.
    """
    max_tokens = max(0, max_tokens - _before(prefix))
    if len(text) <= max_tokens and most_tokens(text) <= max_tokens:
        return text
    # Looked for from the front: nobody reads to the end of a text that is far too long.
    low, high = 1, 1 + 4 * max_tokens
    while high < len(text) and estimate_tokens(text[:high]) <= max_tokens:
        low, high = high, 2 * high
    if high >= len(text):
        if estimate_tokens(text) <= max_tokens:
            return text
        high = len(text)
    while high - low > 1:
        middle = (low + high) // 2
        if estimate_tokens(text[:middle]) <= max_tokens:
            low = middle
        else:
            high = middle
    for cut in range(min(low, len(text) - 1), max(0, low - MAX_JOINED), -1):
        if not _joined(text[cut - 1], text[cut]):
            return text[:cut]
    return text[:low]


def _joined(before: str, after: str) -> bool:
    """Whether two characters are drawn as one: an accent, an emoji's colour, emoji with a joiner between them."""
    return ZERO_WIDTH_JOINER in (before, after) or after in SKIN_TONES or unicodedata.category(after).startswith("M")


def _before(prefix: str) -> int:
    return estimate_tokens(prefix) if prefix else 0


def pack(texts: Sequence[str], max_inputs: int, max_tokens: int, prefix: str = "") -> list[list[str]]:
    """The texts in order, in lists of at most max_inputs texts and max_tokens estimated tokens, a prefix before each.

    A text that has more tokens by itself gets a list of its own.
    """
    requests: list[list[str]] = []
    tokens_left = 0
    before = _before(prefix)
    longest = max(map(most_tokens, texts), default=0)
    # Where as many of the longest would fit, nobody needs to know better.
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
    """What failed as a whole, split, to find the one that is to blame."""
    middle = len(items) // 2
    return items[:middle], items[middle:]
