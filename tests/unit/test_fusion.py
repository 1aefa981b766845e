"""How a search makes one list of the nearest rows and of those with the words."""

from __future__ import annotations

import math

import pytest

from autoembed.search import Near, fused, nearest_chunks, tried_next


def near(*distances: float) -> list[Near]:
    return [Near(f"[{number}]", distance, 1) for number, distance in enumerate(distances, 1)]


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([], []),
        ([("[1]", 0.2, 3), ("[2]", 0.1, 1)], [("[2]", 0.1, 1), ("[1]", 0.2, 3)]),
        # The nearest chunk of a row counts, whatever the order.
        ([("[1]", 0.3, 1), ("[1]", 0.1, 2), ("[2]", 0.2, 1), ("[1]", 0.2, 3)], [("[1]", 0.1, 2), ("[2]", 0.2, 1)]),
        # Rows that are as near stay in the order of the query, of which a later page reads more.
        ([("[2]", 0.1, None), ("[10]", 0.1, None)], [("[2]", 0.1, None), ("[10]", 0.1, None)]),
        ([("[1]", math.nan, 1), ("[2]", 0.9, 1), ("[3]", 1.1, 1)], [("[2]", 0.9, 1), ("[1]", 1.0, 1), ("[3]", 1.1, 1)]),
    ],
)
def test_a_row_is_as_near_as_its_nearest_chunk(
    found: list[tuple[str, float, int | None]], expected: list[tuple[str, float, int | None]]
) -> None:
    assert [tuple(row) for row in nearest_chunks(found)] == expected


@pytest.mark.parametrize(
    ("rows", "others", "text_scores", "weight", "expected"),
    [
        ([], {}, {}, 0.7, []),
        # The meaning alone, and the words alone.
        (near(0.0, 1.0), {}, {"[2]": 5.0}, 1.0, ["[1]", "[2]"]),
        (near(0.0, 1.0), {}, {"[2]": 5.0}, 0.0, ["[2]", "[1]"]),
        # Both: the best by words goes up, as far as its weight takes it.
        (near(0.0, 0.4, 1.0), {}, {"[2]": 5.0}, 0.7, ["[2]", "[1]", "[3]"]),
        # A row without an embedding is found by its words, and comes after one that is as good and has one.
        (near(0.0, 1.0), {"[9]": None}, {"[9]": 5.0}, 0.3, ["[9]", "[1]", "[2]"]),
        (near(0.0), {"[9]": None}, {}, 0.5, ["[1]", "[9]"]),
        (near(0.5), {"[9]": Near("[9]", 0.1, 2)}, {"[9]": 1.0}, 0.7, ["[9]", "[1]"]),
        # All scores are equal.
        (near(0.5, 0.5), {}, {"[1]": 2.0, "[2]": 2.0}, 0.7, ["[1]", "[2]"]),
    ],
)
def test_both_scores_of_the_candidates_count_by_their_weights(
    rows: list[Near], others: dict[str, Near | None], text_scores: dict[str, float], weight: float, expected: list[str]
) -> None:
    assert [hit.key for hit in fused(rows, others, text_scores, weight)] == expected


def test_the_scores_are_spread_and_those_that_are_shown_are_not() -> None:
    hits = fused(near(0.2, 0.4, 0.6), {"[9]": None}, {"[1]": 1.0, "[9]": 3.0}, 0.7)

    assert [hit.key for hit in hits] == ["[1]", "[2]", "[9]", "[3]"]
    assert [hit.number for hit in hits] == [1, 1, 0, 1]
    assert [hit.score for hit in hits] == pytest.approx([0.7 + 0.3 / 3, 0.35, 0.3, 0.0])
    assert [hit.similarity for hit in hits] == pytest.approx([0.8, 0.6, None, 0.4])
    assert [hit.text_score for hit in hits] == [1.0, 0.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("tried", "found", "wanted", "expected"),
    [
        # Half of them are wanted: twice as many should do, and half of that again.
        (120, 60, 100, 301),
        (120, 99, 100, 182),
        # Few are, or none.
        (120, 1, 100, 960),
        (120, 0, 100, 960),
        (1, 0, 1, 2),
    ],
)
def test_as_many_candidates_are_tried_as_should_do(tried: int, found: int, wanted: int, expected: int) -> None:
    assert tried_next(tried, found, wanted) == expected


def test_rows_that_are_equally_good_have_the_best_score() -> None:
    assert [hit.score for hit in fused(near(0.5), {}, {"[1]": 2.0}, 0.7)] == [pytest.approx(1.0)]
    assert [hit.score for hit in fused(near(0.5, 0.5), {}, {}, 0.7)] == [0.7, 0.7]
    assert [hit.score for hit in fused(near(1.5), {}, {}, 0.7)] == [0.0]
