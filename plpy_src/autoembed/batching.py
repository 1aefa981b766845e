"""Packs texts into requests, as few as the model's limits allow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def estimate_tokens(text: str) -> int:
    """About how many tokens a text has: more rather than fewer.

    Byte-pair vocabularies spend about 4 ASCII characters on a token of prose, fewer on code and numbers, and up to
    2 tokens on a character of other scripts.
    """
    ascii_characters = sum(character < "\x80" for character in text) if not text.isascii() else len(text)
    return 1 + ascii_characters // 3 + 2 * (len(text) - ascii_characters)


def truncate(text: str, max_tokens: int) -> str:
    """The longest beginning of a text that is estimated to have at most max_tokens."""
    if estimate_tokens(text) <= max_tokens:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if estimate_tokens(text[:middle]) <= max_tokens:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def pack(texts: Sequence[str], max_inputs: int, max_tokens: int) -> list[list[str]]:
    """The texts in order, in lists of at most max_inputs texts and max_tokens estimated tokens.

    A text that has more tokens by itself gets a list of its own.
    """
    requests: list[list[str]] = []
    tokens_left = 0
    for text in texts:
        tokens = estimate_tokens(text)
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
