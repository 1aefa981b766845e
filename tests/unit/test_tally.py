"""The figures of searches: their buckets, and the files that sessions share."""

from __future__ import annotations

import fcntl
import math
import random
from pathlib import Path

import pytest

from autoembed.tally import BUCKETS, FORM, Figures, Tally, bucket_of, quantile

PIPELINE = (3, 16400)
# By an index.
SEARCH = (False, True, False, False, False, False)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return str(tmp_path)


@pytest.mark.parametrize(
    ("milliseconds", "bucket"),
    [
        (0.0, 0),
        (-5.0, 0),
        (0.1, 0),
        (0.1000001, 1),
        (0.2, 4),
        (0.4, 8),
        (102.4, 40),
        (1e9, BUCKETS - 1),
        (math.inf, BUCKETS - 1),
        (math.nan, 0),
    ],
)
def test_a_time_is_in_the_bucket_whose_limit_it_does_not_exceed(milliseconds: float, bucket: int) -> None:
    assert bucket_of(milliseconds) == bucket


def test_no_search_has_no_quantile() -> None:
    assert quantile([0] * BUCKETS, 0.5) is None


@pytest.mark.parametrize("share", [0.5, 0.95])
def test_a_quantile_is_exact_to_a_tenth(share: float) -> None:
    dice = random.Random(7)
    times = sorted(dice.lognormvariate(2, 1) for _ in range(1001))
    buckets = [0] * BUCKETS
    for one in times:
        buckets[bucket_of(one)] += 1

    assert quantile(buckets, share) == pytest.approx(times[math.ceil(share * 1001) - 1], rel=0.1)


@pytest.mark.parametrize(
    ("facts", "counted"),
    [
        (SEARCH, {"by_index": 1}),
        ((True, False, False, False, False, False), {"exact": 1}),
        ((False, False, True, True, False, False), {"short": 1, "empty": 1}),
        ((False, True, False, False, True, True), {"by_index": 1, "from_cache": 1, "fell_back": 1}),
    ],
)
def test_a_search_counts_once_for_each_of_its_facts(
    folder: str, facts: tuple[bool, ...], counted: dict[str, int]
) -> None:
    tally = Tally(folder, 5)

    tally.add(PIPELINE, 5.0, facts)

    [figures] = tally.all().values()
    assert {name: number for name, number in figures.counts.items() if number} == {"calls": 1, **counted}
    assert sum(figures.buckets) == figures.buckets[bucket_of(5.0)] == 1
    assert vars(Figures.unpacked(figures.packed())) == vars(figures)


def test_sessions_add_up_and_what_is_not_written_yet_is_seen(folder: str) -> None:
    sessions = [Tally(folder, 5) for _ in range(3)]
    for session in sessions:
        for _ in range(10):
            session.add(PIPELINE, 5.0, SEARCH)

    # Each has written its first, and sees the others of its own.
    assert sessions[0].all()[PIPELINE].counts["calls"] == 12
    assert sessions[1].all()[PIPELINE].counts["calls"] == 21
    assert sessions[2].all()[PIPELINE].counts["calls"] == 30
    assert len(list(Path(folder).iterdir())) == 1


def test_a_session_that_writes_holds_up_no_other(folder: str) -> None:
    tally = Tally(folder, 5)
    tally.add(PIPELINE, 5.0, SEARCH)
    [path] = Path(folder).iterdir()
    with path.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        other = Tally(folder, 5)

        other.add(PIPELINE, 5.0, SEARCH)
        assert other.all()[PIPELINE].counts["calls"] == 1

    assert other.all()[PIPELINE].counts["calls"] == 2


@pytest.mark.parametrize("content", [b"", b"\xff" * 7, b"\0" * (FORM.size - 1)])
def test_a_file_that_was_cut_begins_again(folder: str, content: bytes) -> None:
    tally = Tally(folder, 5)
    tally.add(PIPELINE, 5.0, SEARCH)
    [path] = Path(folder).iterdir()
    path.write_bytes(content)

    assert tally.all() == {}
    other = Tally(folder, 5)
    other.add(PIPELINE, 5.0, SEARCH)
    assert other.all()[PIPELINE].counts["calls"] == 1


def test_without_a_folder_nothing_fails(tmp_path: Path) -> None:
    Tally(str(tmp_path / "none"), 5).add(PIPELINE, 5.0, SEARCH)


def test_databases_and_pipelines_are_apart(folder: str) -> None:
    other = (PIPELINE[0], 16500)
    for database, pipeline in ((5, PIPELINE), (5, other), (55, PIPELINE)):
        Tally(folder, database).add(pipeline, 5.0, SEARCH)
    Path(folder, "pgss_query_texts.stat").write_bytes(b"of another")
    tally = Tally(folder, 5)

    assert tally.all().keys() == {PIPELINE, other}
    tally.remove(PIPELINE)
    tally.remove((9, 9))
    assert tally.all().keys() == {other}
    assert Tally(folder, 55).all().keys() == {PIPELINE}
