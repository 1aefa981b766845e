"""Texts that a session keeps, as many as its memory may hold."""

from __future__ import annotations


class KeptTexts:
    """The values last used, up to a number of characters, their keys included. The newest is always kept."""

    def __init__(self, most_characters: int) -> None:
        self._most = most_characters
        self._characters = 0
        # The value used last is at the end.
        self._values: dict[tuple[str, ...], str] = {}

    def get(self, key: tuple[str, ...]) -> str | None:
        value = self._values.pop(key, None)
        if value is not None:
            self._values[key] = value
        return value

    def keep(self, key: tuple[str, ...], value: str) -> None:
        self._characters += _size(key, value) - _size(key, self._values.pop(key, None))
        self._values[key] = value
        while self._characters > self._most and len(self._values) > 1:
            oldest = next(iter(self._values))
            self._characters -= _size(oldest, self._values.pop(oldest))


def _size(key: tuple[str, ...], value: str | None) -> int:
    return 0 if value is None else sum(map(len, key)) + len(value)
