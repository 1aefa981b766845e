"""Long texts: what a lane that ends leaves to the next one, and whose time their reading takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from fake_api import FakeApi
from harness import Connection, waiting
from lanes import Lane, running_lanes, stop_lanes
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
        from autoembed.database import lanes
        lanes.OWNER_SECONDS = 0.02
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


def test_the_vector_of_a_long_text_is_written_into_its_row_without_a_look_at_the_text(
    db: Connection, api: FakeApi
) -> None:
    """The write runs the owner's triggers, so it has no more time than these."""
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('books', 'embedding', content_columns => '{body}')")
    db.execute(LONG.replace("300000", "1900000"))
    db.execute(HURRY.replace("0.02", "0.15"))

    while waiting(db):
        db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        db.execute("SELECT autoembed.process()")

    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []
    assert db.execute("SELECT embedding IS NOT NULL FROM books").fetchone() == (True,)


SMALL_PARTS = """
    DO LANGUAGE plpython3u $$
        plpy.execute("SELECT autoembed._load_python()")
        from autoembed import rows
        rows.FIRST_STATEMENT_ROWS = rows.MAX_STATEMENT_CHUNKS = 20
    $$
"""


def digests(db: Connection) -> list[bytes]:
    return [row.digest for row in db.execute("SELECT digest FROM books_embeddings ORDER BY chunk_number")]


def test_what_a_row_had_stays_until_the_last_part_of_a_long_text_is_written(
    books: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)
    before = digests(books)
    books.execute("UPDATE books SET body = replace(body, 'piece', 'part')")
    session = connect()
    session.execute(SMALL_PARTS)
    lane = Lane(session)

    def begun() -> list[bytes] | None:
        there = digests(books)
        return there if PIECES < len(there) < 2 * PIECES else None

    between = wait_until(begun)
    books.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
    lane.join()

    assert between[:PIECES] == before
    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)
    after = digests(books)
    assert len(after) == PIECES
    # The parts that were there by then are the first ones of the new text.
    assert after[: len(between) - PIECES] == between[PIECES:]
    assert max(Counter(api.texts()).values()) == 1
    assert paid(books) == 0
    assert books.execute("SELECT count(*) FROM books_chunks WHERE chunk LIKE 'part %'").fetchone() == (PIECES,)


def test_an_edit_of_a_long_text_writes_few_chunks_and_the_offsets_of_the_others(
    books: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)
    before = digests(books)
    sent = len(api.texts())

    books.execute("UPDATE books SET body = 'a new ' || body")
    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)

    assert digests(books)[1:] == before[1:]
    assert len(api.texts()) == sent + 1
    assert books.execute("SELECT count(*) FROM books_chunks WHERE chunk IS NULL").fetchone() == (0,)


def test_chunks_that_move_keep_their_vectors_and_are_not_sent(
    books: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    vectors = "SELECT digest, embedding::text AS vector FROM books_embeddings ORDER BY chunk_number"
    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)
    before = books.execute(vectors).fetchall()
    sent = len(api.texts())

    books.execute("UPDATE books SET body = 'new---' || body")
    with running_lanes(books, connect):
        wait_until(lambda: waiting(books) == 0)

    assert books.execute(vectors).fetchall()[1:] == before
    assert api.texts()[sent:] == ["new"]
    assert paid(books) == 0


def megabytes(db: Connection, pid: int) -> int:
    """The memory of a backend that is its own. Pages of shared memory that nobody else has touched do not count."""
    query = (
        "SELECT substring(pg_read_file('/proc/' || %s || '/smaps_rollup') FROM 'Anonymous: +(\\d+)')::int / 1024 AS mb"
    )
    [row] = db.execute(query, [pid]).fetchall()
    return int(row.mb)


def test_the_memory_of_a_lane_is_bounded_by_the_text_and_not_by_its_vectors(
    db: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    db.execute("SELECT autoembed.create_model('fake', 'fake', 3072)")
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('books', content_columns => '{body}', model => 'fake', chunk_size => 64)")
    db.execute("INSERT INTO books VALUES (1, 'short')")
    with running_lanes(db, connect) as [lane]:
        wait_until(lambda: waiting(db) == 0)
        before = megabytes(db, lane.pid)
        db.execute("UPDATE books SET body = (SELECT string_agg(md5(n::text), ' ') FROM generate_series(1, 12000) AS n)")
        used: list[int] = []

        def is_done() -> bool:
            used.append(megabytes(db, lane.pid) - before)
            return waiting(db) == 0

        wait_until(is_done, seconds=120)

    # The vectors of all chunks.
    [row] = db.execute("SELECT count(*) * 4 * 3072 >> 20 AS megabytes FROM books_embeddings").fetchall()
    assert row.megabytes > 80
    assert max(used) < row.megabytes / 2


def test_one_emoji_does_not_multiply_the_memory_of_a_long_text(
    db: Connection, connect: Callable[..., Connection]
) -> None:
    db.execute("SELECT autoembed.create_model('fake', 'fake', 8)")
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('books', content_columns => '{body}', model => 'fake')")
    db.execute("INSERT INTO books VALUES (1, 'short')")
    text = "'😀 字' || string_agg('The sentence with the number ' || n || '.', ' ' ORDER BY n)"
    with running_lanes(db, connect) as [lane]:
        wait_until(lambda: waiting(db) == 0)
        before = megabytes(db, lane.pid)
        db.execute(f"UPDATE books SET body = (SELECT {text} FROM generate_series(1, 450000) AS n)")
        used: list[int] = []

        def is_done() -> bool:
            used.append(megabytes(db, lane.pid) - before)
            return waiting(db) == 0

        wait_until(is_done, seconds=120)

    [row] = db.execute("SELECT octet_length(body) >> 20 AS megabytes FROM books").fetchall()
    assert row.megabytes >= 15
    assert max(used) < 5 * row.megabytes
    [ends] = db.execute("SELECT min(chunk_start) AS first, max(chunk_end) AS last FROM books_embeddings").fetchall()
    assert db.execute("SELECT 0, length(body) FROM books").fetchone() == (ends.first, ends.last)


@pytest.mark.parametrize("column", ["", "'embedding', "], ids=["beside", "in the row"])
@pytest.mark.parametrize(
    "content", ["content_columns => '{title,body}'", "content_template => E'# {title}\\n\\n{body}'"]
)
def test_a_long_text_that_is_not_cut_is_held_few_times(
    db: Connection, api: FakeApi, connect: Callable[..., Connection], column: str, content: str
) -> None:
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE books (id int PRIMARY KEY, title text, body text)")
    chunking = "" if column else ", chunking => 'none'"
    db.execute(f"SELECT autoembed.enable('books', {column}{content}{chunking})")
    db.execute("INSERT INTO books VALUES (1, 'a title', 'short')")
    with running_lanes(db, connect) as [lane]:
        wait_until(lambda: waiting(db) == 0)
        before = megabytes(db, lane.pid)
        db.execute(
            "UPDATE books SET body = (SELECT string_agg(md5(n::text), ' ') FROM generate_series(1, 900000) AS n)"
        )
        used: list[int] = []

        def is_done() -> bool:
            used.append(megabytes(db, lane.pid) - before)
            return waiting(db) == 0

        wait_until(is_done, seconds=120)

    [row] = db.execute("SELECT octet_length(body) >> 20 AS megabytes FROM books").fetchall()
    assert row.megabytes >= 28
    assert max(used) < 4 * row.megabytes


@pytest.mark.parametrize("options", ["embedding_column => 'embedding'", "chunking => 'none'"])
def test_a_long_text_without_a_space_takes_little_memory_and_time_of_the_local_model(
    db: Connection, connect: Callable[..., Connection], options: str
) -> None:
    db.execute("CREATE TABLE books (id int PRIMARY KEY, body text, embedding halfvec(384))")
    enable = f"SELECT autoembed.enable('books', content_columns => '{{body}}', model => 'all-MiniLM-L6-v2', {options})"
    db.execute(enable)
    db.execute("INSERT INTO books VALUES (1, 'short')")
    with running_lanes(db, connect) as [lane]:
        wait_until(lambda: waiting(db) == 0)
        before = megabytes(db, lane.pid)
        db.execute("UPDATE books SET body = repeat('x', 12 << 20)")
        used: list[int] = []

        def is_done() -> bool:
            used.append(megabytes(db, lane.pid) - before)
            return waiting(db) == 0

        wait_until(is_done, seconds=120)

    assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
    # The tokenizer takes up to 60 MB. The whole text would take it ten times as much.
    assert max(used) < 180


def test_a_short_text_of_another_owner_waits_for_few_chunks_of_a_long_one(
    books: Connection, api: FakeApi, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    books.execute(f"CREATE TABLE notes (id int PRIMARY KEY, body text); ALTER TABLE notes OWNER TO {role('poet')}")
    books.execute("SELECT autoembed.enable('notes', content_columns => '{body}')")
    books.execute("INSERT INTO books SELECT 2, replace(body, 'piece', 'part') FROM books")
    api.behave(delay_seconds=0.1)
    lane = Lane(connect(), "batch_size => 20, max_requests => 1")
    wait_until(lambda: len(api.texts()) > 40)

    books.execute("INSERT INTO notes VALUES (1, 'a note')")
    wait_until(lambda: "a note" in api.texts())

    assert len(api.texts()) < PIECES
    api.behave()
    wait_until(lambda: waiting(books) == 0, seconds=60)
    assert max(Counter(api.texts()).values()) == 1
    assert books.execute("SELECT count(*) FROM books_embeddings").fetchone() == (2 * PIECES,)
    stop_lanes(books)
    lane.join()
