"""How good answers are, by judgments."""

from __future__ import annotations

import math

import numpy as np
import pytest

from autoembed.quality import Quality, quality_of, summary


@pytest.mark.parametrize(
    ("found", "grades", "expected"),
    [
        ([1, 0, 0], [1], Quality(1, 1, 1)),
        ([0, 1, 0], [1], Quality(1 / math.log2(3), 1 / 2, 1)),
        ([0, 0, 0], [1], Quality(0, 0, 0)),
        ([], [1], Quality(0, 0, 0)),
        ([1, 1, 0], [1, 1, 1, 1], Quality((1 + 1 / math.log2(3)) / (1.5 + 1 / math.log2(3)), 1, 0.5)),
        # The better row should be first.
        ([1, 3], [3, 1], Quality((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)), 1, 1)),
        # An answer beyond the limit does not count.
        ([0, 0, 0, 1], [1], Quality(0, 0, 0)),
    ],
)
def test_the_quality_of_an_answer(found: list[float], grades: list[float], expected: Quality) -> None:
    assert quality_of(found, grades, 3) == pytest.approx(expected)


def test_the_interval_is_that_of_the_mean_and_always_the_same() -> None:
    values = np.random.default_rng(3).random((400, 3))
    answers = [Quality(*row) for row in values.tolist()]

    mean, low, high = summary(answers)

    assert mean == pytest.approx(Quality(*values.mean(axis=0)))
    half = 1.96 * values.std(axis=0) / 20
    assert np.subtract(mean, low) == pytest.approx(half, rel=0.1)
    assert np.subtract(high, mean) == pytest.approx(half, rel=0.1)
    assert summary(answers) == (mean, low, high)
    assert summary([Quality(1, 0.5, 0)]) == (Quality(1, 0.5, 0),) * 3
