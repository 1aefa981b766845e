"""A model that embeds in the lane's own process is slow: a new change does not wait behind what a lane has claimed."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from harness import Connection
from lanes import running_lanes
from waiting import wait_until

# 20 texts a second.
SLOW = """
CREATE FUNCTION public.slow(texts text[]) RETURNS vector[] LANGUAGE plpgsql AS $$
BEGIN
    PERFORM pg_sleep(0.05 * cardinality(texts));
    RETURN array_fill('[1,2,3]'::vector, ARRAY[cardinality(texts)]);
END $$
"""


def has_vector(db: Connection, table: str, key: int) -> bool:
    return db.execute(f"SELECT embedding IS NOT NULL FROM {table} WHERE id = {key}").fetchone() == (True,)


@pytest.fixture
def pages(db: Connection) -> Connection:
    """Two empty tables: one of a slow model, one of a quick one."""
    db.execute(SLOW)
    db.execute("SELECT autoembed.create_model('slow', 'function', 3, 'public.slow')")
    db.execute("SELECT autoembed.create_model('quick', 'fake', 3)")
    for table, model in (("pages", "slow"), ("others", "quick")):
        db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text)")
        content = "content_columns => '{body}', embedding_column => 'embedding'"
        db.execute(f"SELECT autoembed.enable('{table}', {content}, model => '{model}')")
    return db


@pytest.mark.parametrize("scanned", [False, True])
def test_a_new_change_does_not_wait_behind_a_claim_of_a_slow_model(
    pages: Connection, connect: Callable[..., Connection], scanned: bool
) -> None:
    """A lane claimed 2,000 rows, in requests of 100, whatever time they took."""
    if scanned:
        pages.execute("ALTER TABLE pages DISABLE TRIGGER USER")
    pages.execute("INSERT INTO pages SELECT n, 'page ' || n FROM generate_series(1, 1000) AS n")
    if scanned:
        pages.execute("SELECT autoembed.resync('pages')")
    begun = "SELECT count(*) > 20 FROM pages WHERE embedding IS NOT NULL"
    with running_lanes(pages, connect):
        wait_until(lambda: pages.execute(begun).fetchone() == (True,), 60)
        for key, table in ((5000, "pages"), (1, "others")):
            pages.execute(f"INSERT INTO {table} VALUES ({key}, 'new')")
            began_at = time.monotonic()
            wait_until(partial(has_vector, pages, table, key), 30)
            # All of the claimed rows take 50 s, and those of a second two.
            assert time.monotonic() - began_at < 10
