"""A long text, kept as UTF-8: Python gives four bytes to each character of a text in which one is an emoji."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left, bisect_right

# The bytes that are decoded at once.
WINDOW_BYTES = 1 << 16


class LongText:
    """A text of which a window is decoded at a time. Positions are those of its characters."""

    def __init__(self, encoded: bytes | bytearray, window_bytes: int = WINDOW_BYTES) -> None:
        self._encoded = encoded
        # Where windows start: their bytes, and their characters. Both end with the end of the text.
        self._bytes, self._characters = array("Q", [0]), array("Q", [0])
        start = 0
        while start < len(encoded):
            end = min(len(encoded), start + window_bytes)
            while end < len(encoded) and encoded[end] & 0xC0 == 0x80:
                end += 1
            self._characters.append(self._characters[-1] + len(encoded[start:end].decode()))
            self._bytes.append(end)
            start = end
        self._kept = (0, 0, "")

    def __len__(self) -> int:
        return self._characters[-1]

    def shorten(self, characters: int) -> None:
        """Forgets all windows behind that of the last of so many characters."""
        last = bisect_left(self._characters, characters)
        del self._bytes[last + 1 :], self._characters[last + 1 :]
        self._encoded = self._encoded[: self._bytes[-1]]
        self._kept = (0, 0, "")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LongText) and self._encoded == other._encoded

    __hash__ = None  # type: ignore[assignment]

    def __str__(self) -> str:
        return self._encoded.decode()

    def __getitem__(self, key: int | slice) -> str:
        if isinstance(key, int):
            start, _, window = self._window(key)
            return window[key - start]
        first, last, _ = key.indices(len(self))
        parts: list[str] = []
        while first < last:
            start, end, window = self._window(first)
            parts.append(window[first - start : last - start])
            first = end
        return "".join(parts)

    def isspace(self) -> bool:
        return self.search(_VISIBLE, 0, len(self)) is None

    def search(self, pattern: re.Pattern[str], first: int, last: int) -> int | None:
        """The first position from `first` and before `last` of a character that a pattern of one character matches."""
        while first < last:
            start, end, window = self._window(first)
            if found := pattern.search(window, first - start, last - start):
                return start + found.start()
            first = end
        return None

    def _window(self, position: int) -> tuple[int, int, str]:
        """The window with a position: where it starts and ends, and its text."""
        # Another thread may read the text, too.
        kept = self._kept
        if not kept[0] <= position < kept[1]:
            number = bisect_right(self._characters, position) - 1
            window = self._encoded[self._bytes[number] : self._bytes[number + 1]].decode()
            kept = self._kept = self._characters[number], self._characters[number + 1], window
        return kept


_VISIBLE = re.compile(r"\S")

# Most texts are short.
Text = str | LongText
