"""Texts that a session keeps, as many as its memory may hold."""

from __future__ import annotations

from collections import OrderedDict


class KeptTexts:
    """The values last used, up to a number of characters, their keys included. The newest is always kept."""

    def __init__(self, most_characters: int) -> None:
        self._most = most_characters
        self._characters = 0
        self._values: OrderedDict[tuple[str, ...], str] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> str | None:
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def keep(self, key: tuple[str, ...], value: str) -> None:
        self._characters += _size(key, value) - _size(key, self._values.pop(key, None))
        self._values[key] = value
        while self._characters > self._most and len(self._values) > 1:
            oldest, text = self._values.popitem(last=False)
            self._characters -= _size(oldest, text)


def _size(key: tuple[str, ...], value: str | None) -> int:
    return 0 if value is None else sum(map(len, key)) + len(value)
