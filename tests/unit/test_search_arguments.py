"""The arguments of a search: what it takes, and what it refuses with a reason."""

from __future__ import annotations

import math

import pytest

from autoembed.errors import Fault
from autoembed.search import MAX_ROWS, checked


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ((10, 0, None, 0.7), (10, 0, 0.7)),
        ((0, 0, "text", 0.0), (0, 0, 0.0)),
        ((1, 5, "vector", 1.0), (1, 5, 1.0)),
        ((MAX_ROWS, 0, "hybrid", 0.5), (MAX_ROWS, 0, 0.5)),
        # Ranks stay integers of PostgreSQL.
        ((MAX_ROWS, 7, None, 0.5), (MAX_ROWS - 7, 7, 0.5)),
        ((MAX_ROWS, MAX_ROWS, None, 0.5), (0, MAX_ROWS, 0.5)),
    ],
)
def test_what_a_search_takes(given: tuple[int, int, str | None, float], taken: tuple[int, int, float]) -> None:
    assert checked(*given) == taken


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ((None, 0, None, 0.7), "max_rows and skip_rows must be 0 or more, not NULL and 0"),
        ((10, None, None, 0.7), "max_rows and skip_rows must be 0 or more, not 10 and NULL"),
        ((-1, 0, None, 0.7), "max_rows and skip_rows must be 0 or more, not -1 and 0"),
        ((10, -1, None, 0.7), "max_rows and skip_rows must be 0 or more, not 10 and -1"),
        ((10, 0, "words", 0.7), "mode must be hybrid, vector or text, not words"),
        ((10, 0, "", 0.7), "mode must be hybrid, vector or text, not an empty text"),
        ((10, 0, None, None), "vector_weight must be from 0 to 1, not NULL"),
        ((10, 0, None, 1.5), "vector_weight must be from 0 to 1, not 1.5"),
        ((10, 0, None, -2.0), "vector_weight must be from 0 to 1, not -2"),
        ((10, 0, None, math.nan), "vector_weight must be from 0 to 1, not nan"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(
    given: tuple[int | None, int | None, str | None, float | None], problem: str
) -> None:
    with pytest.raises(Fault) as refusal:
        checked(*given)

    assert refusal.value.fields() == {"problem": problem, "hint": refusal.value.hint, "errcode": "22023"}
    assert refusal.value.hint.startswith("Leave ")
