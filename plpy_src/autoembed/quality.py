"""How good the answers of a search are, by judgments of which rows answer a query, and how well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# So many times the queries are drawn again for an interval, from this seed: the same judgments give the same interval.
RESAMPLES = 2000
SEED = 1


class Quality(NamedTuple):
    """The measures of one answer, or their means over several."""

    ndcg: float
    mrr: float
    recall: float


def quality_of(found: Sequence[float], grades: Sequence[float], most: int) -> Quality:
    """The quality of an answer: the grades of the rows that were found, best first, and those of all that answer.

    ndcg: the grades, each divided by the logarithm of its place, as a share of the best order. mrr: one divided by the
    place of the first row with a grade. recall: the share of the rows with a grade. All within the first most rows.
    """
    places = [place for place, grade in enumerate(found[:most], 1) if grade > 0]
    ndcg = _discounted(found[:most]) / _discounted(sorted(grades, reverse=True)[:most])
    return Quality(ndcg, 1 / places[0] if places else 0.0, len(places) / len(grades))


def _discounted(grades: Sequence[float]) -> float:
    return sum(grade / math.log2(place + 1) for place, grade in enumerate(grades, 1))


def summary(answers: Sequence[Quality]) -> tuple[Quality, Quality, Quality]:
    """The mean of answers, and the lower and the upper ends of its intervals of 95 %, by the bootstrap."""
    import numpy as np

    values = np.array(answers)
    drawn = np.random.default_rng(SEED).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975), axis=0)
    return Quality(*values.mean(axis=0).tolist()), Quality(*low.tolist()), Quality(*high.tolist())
