"""The scores in a provider's answer, as numbers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from autoembed.errors import ProviderTrouble


def scores_in(results: Any, count: int, field: str) -> list[float]:
    """The scores of so many passages, in their order, from objects with an index and a score in this field.

    Raises KeyError or TypeError for objects in another form, and ProviderTrouble if a passage has no score or several,
    or one that is no number.
    """
    found = [(result["index"], result[field]) for result in results]
    if len(found) != count:
        raise ProviderTrouble(f"the provider answered with {len(found)} scores for {count} passages")
    scores = {index: score for index, score in found if type(index) is int}
    if scores.keys() != set(range(count)):
        raise ProviderTrouble(f"the provider's answer does not number its scores from 0 to {count - 1}, each once")
    return finite([scores[index] for index in range(count)])


def finite(scores: Sequence[Any]) -> list[float]:
    """The scores as numbers. Raises ProviderTrouble if one is not finite, or none at all."""
    # No comparison with NaN is true.
    if not all(type(score) in (int, float) and abs(score) <= sys.float_info.max for score in scores):
        raise ProviderTrouble("the answer has a score that is not a finite number")
    return [float(score) for score in scores]
