"""An index with one bit for each dimension: search() takes candidates from it and compares their vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection

STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
DIMENSIONS = 128
# So many are compared through an index, and not one by one.
ROWS = 6000


@pytest.fixture
def pages(db: Connection, api: FakeApi, column: str) -> Connection:
    """A table with a binary index."""
    db.execute(
        "SELECT autoembed.create_model('short', 'openai', %s, model_id => 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [DIMENSIONS, api.base_url],
    )
    db.execute("SELECT autoembed.set_default_model('short')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, kind int)")
    db.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}', binary_index => true)")
    db.execute("ALTER TABLE pages DISABLE TRIGGER USER")
    vectors = np.random.default_rng(5).normal(size=(ROWS, DIMENSIONS)).astype(np.float32)
    if column == "NULL":
        db.execute(f"INSERT INTO pages SELECT n, 'text', n % 7 FROM generate_series(1, {ROWS}) AS n")
        with db.cursor().copy("COPY pages_embeddings FROM STDIN") as copy:
            for number, vector in enumerate(vectors, 1):
                copy.write_row((number, 1, 0, 4, b"", str(vector.tolist())))
    else:
        with db.cursor().copy("COPY pages (id, body, kind, embedding) FROM STDIN") as copy:
            for number, vector in enumerate(vectors, 1):
                copy.write_row((number, "text", number % 7, str(vector.tolist())))
    [(key,)] = db.execute("SELECT k.key FROM autoembed.pipeline AS p, autoembed._index_key(p) AS k").fetchall()
    assert "bit_hamming_ops" in key
    db.execute("SET max_parallel_maintenance_workers = 0")
    table = "pages_embeddings" if column == "NULL" else "pages"
    db.execute(f"CREATE INDEX bits ON {table} USING hnsw ({key}); ANALYZE")
    return db


def scans(db: Connection) -> int:
    [(count,)] = db.execute(
        "SELECT pg_stat_get_xact_numscans('bits'::regclass) + pg_stat_get_numscans('bits'::regclass)"
    ).fetchall()
    return int(count)


def similarities(db: Connection, column: str) -> dict[int, float]:
    """Those of all rows to the query."""
    table = "pages_embeddings" if column == "NULL" else "pages"
    rows: list[Any] = db.execute(f"SELECT id, embedding::real[] AS v FROM {table}").fetchall()
    vectors = np.array([row.v for row in rows])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return dict(zip([row.id for row in rows], vectors @ np.asarray(embedding_of("words", DIMENSIONS)), strict=True))


@STORAGES
def test_rows_are_found_through_the_index_and_ranked_by_their_vectors(pages: Connection, column: str) -> None:
    exact = similarities(pages, column)
    before = scans(pages)

    rows = pages.execute("SELECT (hit).id, similarity FROM autoembed.search(NULL::pages, 'words')").fetchall()

    assert scans(pages) > before
    assert [row.similarity for row in rows] == sorted((row.similarity for row in rows), reverse=True)
    assert all(abs(row.similarity - exact[row.id]) < 2e-3 for row in rows)
    nearest = sorted(exact, key=lambda key: -exact[key])[:10]
    assert len({row.id for row in rows} & set(nearest)) >= 7


@STORAGES
def test_a_condition_takes_no_row_away(pages: Connection, column: str) -> None:
    exact = similarities(pages, column)
    rows = pages.execute(
        "SELECT (hit).id, (hit).kind FROM autoembed.search(NULL::pages, 'words', 20, condition => 'kind = 3')"
    ).fetchall()

    assert [row.kind for row in rows] == [3] * 20
    # So few rows are compared one by one.
    assert [row.id for row in rows] == sorted((key for key in exact if key % 7 == 3), key=lambda key: -exact[key])[:20]


@STORAGES
def test_recall_is_measured_and_more_candidates_raise_it(pages: Connection, column: str) -> None:
    sql = "SELECT recall FROM autoembed.measure_recall('pages', sample_rows => 20)"
    pages.execute("UPDATE autoembed.pipeline SET ef_search = 20")
    few = pages.execute(sql).fetchone()
    pages.execute("UPDATE autoembed.pipeline SET ef_search = NULL")
    usual = pages.execute(sql).fetchone()

    tuned = pages.execute("SELECT ef_search, recall FROM autoembed.tune('pages', target => 0.9)").fetchone()

    assert few is not None and usual is not None and tuned is not None
    assert few.recall < usual.recall
    assert tuned.recall >= 0.9


@STORAGES
def test_the_match_function_ranks_by_vectors_too(pages: Connection, column: str) -> None:
    pages.execute("SELECT autoembed.create_match_function('pages')")
    exact = similarities(pages, column)

    rows = pages.execute(
        "SELECT id, similarity FROM match_pages(autoembed.embed_query('pages', 'words'), 10)"
    ).fetchall()

    assert len(rows) == 10
    assert all(abs(row.similarity - exact[row.id]) < 2e-3 for row in rows)
    assert [row.similarity for row in rows] == sorted((row.similarity for row in rows), reverse=True)
