"""search_stats: what searches did, for those who may know, at nobody's cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from harness import Connection

Connect = Callable[..., Connection]
Role = Callable[[str], str]


@pytest.fixture
def pages(db: Connection) -> Connection:
    db.execute("SELECT autoembed.create_model('fast', 'fake', 8), autoembed.set_default_model('fast')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("INSERT INTO pages SELECT n, 'text ' || n FROM generate_series(1, 30) AS n")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}', text_config => 'simple')")
    db.execute("SELECT autoembed.process()")
    return db


def figures(db: Connection, table: str = "pages") -> dict[str, Any]:
    """The counts of a table that are not 0."""
    rows = db.execute(
        "SELECT s.calls, s.exact, s.by_index, s.short, s.nothing_found, s.cache_hits, s.rerank_fallbacks"
        " FROM autoembed.search_stats AS s WHERE s.table_name = %s",
        [table],
    ).fetchall()
    return {name: number for row in rows for name, number in row._asdict().items() if number}


def search(db: Connection, words: str = "text", more: str = "") -> int:
    return len(db.execute(f"SELECT FROM autoembed.search('pages', %s {more})", [words]).fetchall())


def test_each_search_counts_for_what_it_did(pages: Connection) -> None:
    pages.execute("CREATE FUNCTION public.broken(text, text[]) RETURNS real[] LANGUAGE sql AS 'SELECT NULL::real[]'")
    pages.execute("SELECT autoembed.create_rerank_model('broken', 'function', 'public.broken')")
    assert figures(pages) == {}

    search(pages, "one")
    assert figures(pages) == {"calls": 1, "exact": 1}
    search(pages, "one", ", mode => 'vector'")
    assert figures(pages) == {"calls": 2, "exact": 2, "cache_hits": 1}
    search(pages, "two", ", condition => 'id < 3'")
    assert figures(pages) == {"calls": 3, "exact": 3, "cache_hits": 1, "short": 1}
    search(pages, "none", ", mode => 'text'")
    assert figures(pages) == {"calls": 4, "exact": 3, "cache_hits": 1, "short": 2, "nothing_found": 1}
    search(pages, "five", ", rerank_model => 'broken'")
    assert figures(pages) == {
        "calls": 5,
        "exact": 4,
        "cache_hits": 1,
        "short": 2,
        "nothing_found": 1,
        "rerank_fallbacks": 1,
    }
    pages.execute("SELECT id FROM autoembed.search_rows(NULL::pages, 'six')")
    assert figures(pages)["calls"] == 6
    # These answer nothing.
    search(pages, " ")
    with pytest.raises(psycopg.Error):
        search(pages, "x", ", condition => 'nosuch'")
    assert figures(pages)["calls"] == 6


def test_an_index_is_told_from_the_comparison_of_all_rows(pages: Connection) -> None:
    pages.execute("ALTER TABLE pages DISABLE TRIGGER USER")
    pages.execute("INSERT INTO pages SELECT n, 'text' FROM generate_series(31, 6000) AS n")
    pages.execute(
        "INSERT INTO pages_embeddings SELECT n, 1, 0, 4, '', (SELECT embedding FROM pages_embeddings WHERE id = 1)"
        " FROM generate_series(31, 6000) AS n"
    )
    pages.execute("CREATE INDEX ON pages_embeddings USING hnsw (embedding halfvec_cosine_ops)")
    pages.execute("ANALYZE pages; ANALYZE pages_embeddings")

    search(pages, "one", ", mode => 'vector'")
    search(pages, "one", ", mode => 'vector', condition => 'id = 5'")

    counted = figures(pages)
    assert (counted["by_index"], counted["exact"]) == (1, 1)


def test_times_and_the_beginning_are_told(pages: Connection) -> None:
    pages.execute(
        "CREATE FUNCTION slow(id int) RETURNS boolean LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.3 / 30); RETURN true; END $$"
    )
    began_at = pages.execute("SELECT clock_timestamp() AS now").fetchall()[0].now
    for _ in range(3):
        search(pages, more=", mode => 'vector', condition => 'slow(id)'")

    [row] = pages.execute("SELECT * FROM autoembed.search_stats").fetchall()

    assert 250 < row.p50_ms <= row.p95_ms
    assert row.embedding_column == "embedding"
    assert began_at < row.since < pages.execute("SELECT clock_timestamp() AS now").fetchall()[0].now


def test_searches_count_where_nothing_can_be_written(pages: Connection, connect: Connect) -> None:
    session = connect()
    session.execute("SET default_transaction_read_only = on")
    search(session)
    assert figures(session) == {"calls": 1, "exact": 1}
    with pytest.raises(psycopg.errors.DivisionByZero), session.transaction():
        search(session)
        session.execute("SELECT 1 / 0")

    assert figures(session)["calls"] == 2
    # Another session sees what has been written.
    assert figures(pages)["calls"] == 2


def test_a_search_writes_no_row_for_its_count(pages: Connection) -> None:
    search(pages)
    with pages.transaction():
        search(pages)
        assert pages.execute("SELECT pg_current_xact_id_if_assigned() AS id").fetchall()[0].id is None


def test_only_owners_and_monitors_see_the_figures(pages: Connection, role: Role, connect: Connect) -> None:
    reader, owner, monitor = role("reader"), role("owner"), role("monitor")
    for one in (reader, owner):
        pages.execute(f"SELECT autoembed.grant_usage('{one}')")
    pages.execute(f"SELECT autoembed.grant_monitor('{monitor}')")
    pages.execute(f"GRANT SELECT ON pages TO {reader}; ALTER TABLE pages OWNER TO {owner}")
    pages.execute(f"ALTER TABLE pages_embeddings OWNER TO {owner}")
    reading = connect(user=reader)

    search(reading)

    assert figures(reading) == {}
    assert reading.execute("SELECT * FROM autoembed._search_stats()").fetchall() == []
    for one in (owner, monitor):
        assert figures(connect(user=one)) == {"calls": 1, "exact": 1}


def test_no_role_changes_the_figures_of_a_table_that_it_cannot_read(
    pages: Connection, role: Role, connect: Connect
) -> None:
    mallory = role("mallory")
    pages.execute(f"SELECT autoembed.grant_usage('{mallory}')")
    search(pages)
    before = pages.execute("TABLE autoembed.search_stats").fetchall()
    session = connect(user=mallory)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        search(session)

    for number in (-1, 0, 1, 2, 1000):
        note = session.execute("SELECT autoembed._note_search(%s::integer, 0, true)", [number])
        assert note.fetchall() == [(False,)]
    session.execute("SELECT autoembed.reset_search_stats()")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="must be owner of table public.pages"):
        session.execute("SELECT autoembed.reset_search_stats('pages')")
    session.execute("SELECT autoembed._reset_search_stats(NULL)")

    assert pages.execute("TABLE autoembed.search_stats").fetchall() == before


def test_a_search_counts_once(pages: Connection) -> None:
    page = "SELECT search FROM autoembed._search_page('pages', 'one', 10, 0, NULL, NULL, 'vector', 0.7, 0, false, NULL)"
    numbers = [number for _ in range(300) for (number,) in pages.execute(page).fetchall()]
    note = "SELECT autoembed._note_search(%s::integer, 10, false) AS is_counted"
    for nothing in ("NULL, 10, false", f"{numbers[-1]}, NULL, false", f"{numbers[-1]}, 10, NULL"):
        assert pages.execute(f"SELECT autoembed._note_search({nothing})").fetchall() == [(None,)]

    counted = [pages.execute(note, [number]).fetchall() for _ in range(2) for number in reversed(numbers)]

    # A session keeps few of those that it has not finished.
    assert counted.count([(True,)]) == figures(pages)["calls"] == 100


def test_a_reset_begins_again(pages: Connection) -> None:
    pages.execute("CREATE TABLE more (id int PRIMARY KEY, body text)")
    pages.execute("SELECT autoembed.enable('more', content_columns => '{body}')")
    search(pages)
    pages.execute("SELECT FROM autoembed.search('more', 'x')")

    pages.execute("SELECT autoembed.reset_search_stats('pages')")
    assert (figures(pages), figures(pages, "more")["calls"]) == ({}, 1)
    search(pages)
    assert figures(pages) == {"calls": 1, "exact": 1, "cache_hits": 1}
    pages.execute("SELECT autoembed.reset_search_stats()")
    assert pages.execute("TABLE autoembed.search_stats").fetchall() == []


def test_a_pipeline_that_is_gone_leaves_no_figures(pages: Connection) -> None:
    files = (
        "SELECT count(*) FROM pg_ls_dir('pg_stat_tmp') AS f WHERE f LIKE (SELECT 'autoembed.' || oid || '.%%'"
        " FROM pg_database WHERE datname = current_database())"
    )
    search(pages)
    figures(pages)
    assert pages.execute(files).fetchone() == (1,)
    pages.execute("SELECT autoembed.disable('pages')")

    assert pages.execute("TABLE autoembed.search_stats").fetchall() == []
    assert pages.execute(files).fetchone() == (0,)
