"""Long texts: what a lane that ends leaves to the next one, and whose time their reading takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from fake_api import FakeApi
from harness import Connection, waiting
from lanes import Lane, running_lanes
from waiting import wait_until

PIECES = 700
SPLIT = "CREATE FUNCTION split(t text) RETURNS SETOF text LANGUAGE sql AS $$ SELECT string_to_table(t, '---') $$"


@pytest.fixture
def books(db: Connection, api: FakeApi) -> Connection:
    """An attached table with one row, whose text has many chunks."""
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text)")
    db.execute(SPLIT)
    db.execute("SELECT autoembed.enable('books', content_columns => '{body}', chunking => 'split')")
    pieces = f"SELECT string_agg('piece ' || n, '---' ORDER BY n) FROM generate_series(1, {PIECES}) AS n"
    db.execute(f"INSERT INTO books VALUES (1, ({pieces}))")
    return db


def paid(db: Connection) -> int:
    return len(db.execute("SELECT FROM autoembed.paid_chunk").fetchall())


def test_a_lane_that_is_killed_loses_no_vector_of_a_long_text(
    books: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    api.behave(hold=f"piece {PIECES}")
    lane = Lane(connect(), "batch_size => 50, max_requests => 2")
    api.wait_for(held=1)
    wait_until(lambda: paid(books) >= PIECES - 100)
    kept = paid(books)
    books.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
    lane.join()
    api.behave()

    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)

    assert books.execute("SELECT count(*) FROM books_embeddings").fetchone() == (PIECES,)
    assert list(Counter(api.texts()).values()).count(1) >= kept
    assert paid(books) == 0


def test_a_long_text_that_takes_longer_than_a_lane_ends(
    books: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    api.behave(delay_seconds=0.3)
    lane = connect()

    def passes() -> bool:
        lane.execute("CALL autoembed.work(1, batch_size => 50, max_requests => 1)")
        return waiting(books) == 0

    wait_until(passes, seconds=120)

    assert books.execute("SELECT count(*) FROM books_embeddings").fetchone() == (PIECES,)


@pytest.mark.parametrize(
    "change",
    ["DELETE FROM books", "TRUNCATE books", "UPDATE books SET body = 'short'", "SELECT autoembed.disable('books')"],
)
def test_vectors_that_nobody_waits_for_are_not_kept(
    books: Connection, api: FakeApi, connect: Callable[..., Connection], change: str
) -> None:
    api.behave(hold=f"piece {PIECES}")
    lane = Lane(connect(), "batch_size => 50, max_requests => 2")
    api.wait_for(held=1)
    wait_until(lambda: paid(books) > 0)
    books.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
    lane.join()
    api.behave()

    books.execute(change)
    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)

    assert paid(books) == 0


HURRY = """
    DO LANGUAGE plpython3u $$
        plpy.execute("SELECT autoembed._load_python()")
        from autoembed import database
        database.OWNER_SECONDS = 0.02
    $$
"""
LONG = "INSERT INTO books SELECT 1, string_agg(md5(n::text), ' ') FROM generate_series(1, 300000) AS n"


@pytest.mark.parametrize(("content", "fails"), [("content_columns => '{body}'", False), ("condition", True)])
def test_a_long_text_has_the_time_that_it_takes_unless_code_of_the_owner_runs(
    db: Connection, api: FakeApi, content: str, fails: bool
) -> None:
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text)")
    if content == "condition":
        content = "content_columns => '{body}', condition => 'length(body) > 0'"
    db.execute(f"SELECT autoembed.enable('books', {content}, chunking => 'none')")
    db.execute(LONG)
    db.execute(HURRY)

    while waiting(db):
        db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        db.execute("SELECT autoembed.process()")

    reasons = [row.reason for row in db.execute("SELECT reason FROM autoembed.failed").fetchall()]
    assert reasons == (["the code of the table's owner ran too long, and was cancelled"] if fails else [])
    assert db.execute("SELECT count(*) FROM books_embeddings").fetchone() == (0 if fails else 1,)
