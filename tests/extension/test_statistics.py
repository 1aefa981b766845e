"""PostgreSQL's statistics, and so autovacuum, see what a lane writes while the lane runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fake_api import FakeApi
from harness import Connection, insert, is_settled
from lanes import running_lanes
from waiting import wait_until

# Only lanes write these tables.
WRITTEN = """
SELECT relname, CASE relname WHEN 'documents' THEN n_tup_upd WHEN 'embedded' THEN n_tup_ins ELSE n_tup_del END
FROM pg_stat_user_tables
WHERE relname IN ('documents', 'embedded', 'q_embedding_jobs')
"""


def test_the_statistics_have_what_a_running_lane_has_written(
    documents: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    with running_lanes(documents, connect) as (lane,):
        insert(documents, *[f"text {number}" for number in range(20)])
        wait_until(lambda: is_settled(documents))

        # A write that was rolled back counts, too.
        wait_until(lambda: sum(count >= 20 for _, count in documents.execute(WRITTEN).fetchall()) == 3)
        assert not lane.has_ended(0)


@pytest.mark.parametrize("setting", ["pl", "all"])
def test_a_lane_whose_calls_are_counted_reports_at_its_end(
    documents: Connection, api: FakeApi, connect: Callable[..., Connection], setting: str
) -> None:
    documents.execute(f"ALTER DATABASE {documents.info.dbname} SET track_functions = '{setting}'".encode())
    with running_lanes(documents, connect) as (lane,):
        insert(documents, *[f"text {number}" for number in range(20)])
        wait_until(lambda: is_settled(documents))

    assert lane.error is None
    wait_until(lambda: dict(documents.execute(WRITTEN).fetchall())["embedded"] == 20)
    calls = documents.execute("SELECT calls FROM pg_stat_user_functions WHERE funcname = 'work'").fetchall()
    assert calls == [(1,)]
