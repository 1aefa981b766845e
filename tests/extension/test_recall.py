"""measure_recall() and tune(): how many of the nearest rows search() finds, and how many candidates that takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection

STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
DIMENSIONS = 16
ROWS = 6000
QUERIES = [f"question {n}" for n in range(30)]


@pytest.fixture
def pages(db: Connection, api: FakeApi, column: str) -> Connection:
    """An index with too few links to lead to all that is near."""
    db.execute(
        "SELECT autoembed.create_model('short', 'openai', %s, model_id => 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [DIMENSIONS, api.base_url],
    )
    db.execute("SELECT autoembed.set_default_model('short')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}')")
    db.execute(f"CREATE TABLE given (id int PRIMARY KEY, embedding halfvec({DIMENSIONS}))")
    random = np.random.default_rng(7)
    vectors = random.normal(size=(ROWS, DIMENSIONS))
    with db.cursor().copy("COPY given FROM STDIN") as copy:
        for number, vector in enumerate(vectors.astype(np.float32), 1):
            copy.write_row((number, str(vector.tolist())))
    db.execute("ALTER TABLE pages DISABLE TRIGGER USER")
    if column == "NULL":
        db.execute("INSERT INTO pages SELECT id, 'text' FROM given")
        db.execute("INSERT INTO pages_embeddings SELECT id, 1, 0, 4, '', embedding FROM given")
    else:
        db.execute("INSERT INTO pages SELECT id, 'text', embedding FROM given")
    table = "pages_embeddings" if column == "NULL" else "pages"
    db.execute("SET max_parallel_maintenance_workers = 0")
    db.execute(f"CREATE INDEX ON {table} USING hnsw (embedding halfvec_cosine_ops) WITH (m = 4, ef_construction = 8)")
    db.execute("ANALYZE")
    return db


def shares(db: Connection) -> list[float]:
    """The share of the ten nearest rows that search() finds, of each query."""
    given = [(row.id, row.v) for row in db.execute("SELECT id, embedding::vector::real[] AS v FROM given")]
    vectors = np.array([v for _, v in given])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    found = []
    for query in QUERIES:
        similarities = vectors @ np.asarray(embedding_of(query, DIMENSIONS))
        nearest = {given[n][0] for n in np.argsort(-similarities)[:10]}
        rows = db.execute("SELECT (s.hit).id FROM autoembed.search(NULL::pages, %s) AS s", [query])
        found.append(len(nearest & {row.id for row in rows}) / 10)
    return found


@STORAGES
def test_recall_is_the_share_of_the_nearest_rows_that_search_finds(pages: Connection, column: str) -> None:
    pages.execute("UPDATE autoembed.pipeline SET ef_search = 10")
    expected = shares(pages)
    assert 0.2 < np.mean(expected) < 0.95

    row = pages.execute("SELECT * FROM autoembed.measure_recall('pages', %s)", [QUERIES]).fetchone()

    assert row is not None
    assert row.recall == pytest.approx(np.mean(expected), abs=0.02)
    assert row.worst == pytest.approx(min(expected), abs=0.1)
    assert row.measured == len(QUERIES)
    assert 0 < row.recall_low < row.recall < row.recall_high < 1
    # The mean of so many queries of that spread.
    assert row.recall_high - row.recall_low == pytest.approx(3.92 * np.std(expected) / len(QUERIES) ** 0.5, rel=0.35)


@STORAGES
def test_tune_has_search_find_what_was_asked_for_and_doctor_tells_what_it_measured(
    pages: Connection, column: str
) -> None:
    def check() -> Any:
        rows = pages.execute("SELECT * FROM autoembed.doctor() WHERE subject LIKE 'recall of %'").fetchall()
        return rows[0] if rows else None

    assert check() is None
    low = pages.execute("SELECT * FROM autoembed.tune('pages', target => 0.2, queries => %s)", [QUERIES]).fetchone()
    assert low is not None and low.recall >= 0.2
    first = np.mean(shares(pages))
    assert check().ok

    high = pages.execute("SELECT * FROM autoembed.tune('pages', target => 0.95, queries => %s)", [QUERIES]).fetchone()

    assert high is not None and high.ef_search > low.ef_search
    assert np.mean(shares(pages)) == pytest.approx(high.recall, abs=0.02)
    assert np.mean(shares(pages)) > first
    assert check().ok == (high.recall >= 0.95)
    assert "0.95" in check().finding
    pages.execute("UPDATE autoembed.pipeline SET recall = 0.9")
    assert not check().ok
    assert "tune(" in check().advice


@STORAGES
def test_no_row_is_missing_when_the_nearest_of_an_index_are_deleted(pages: Connection, column: str) -> None:
    """More rows than the index keeps candidates, and no VACUUM: it goes on behind them, and is enough."""
    pages.execute("UPDATE autoembed.pipeline SET ef_search = 40")
    [query, *_] = QUERIES
    pages.execute(
        "DELETE FROM pages AS p USING autoembed.search(NULL::pages, %s, max_rows => 60) AS s WHERE p.id = (s.hit).id",
        [query],
    )

    found = pages.execute("SELECT (s.hit).id FROM autoembed.search(NULL::pages, %s) AS s", [query]).fetchall()

    assert len(found) == 10
    assert pages.execute("SELECT exact FROM autoembed.search_stats").fetchone() == (0,)


@STORAGES
def test_rows_of_the_table_stand_for_queries_and_do_not_count_as_their_own_answers(
    pages: Connection, api: FakeApi, column: str
) -> None:
    pages.execute("UPDATE autoembed.pipeline SET ef_search = 10")
    sent = len(api.log())

    row = pages.execute("SELECT * FROM autoembed.measure_recall('pages', max_rows => 1)").fetchone()
    exact = pages.execute(
        "SELECT * FROM autoembed._exact_answers('pages', NULL, NULL, 5, 3) AS a"
        " WHERE 0.00001 < ALL (a.distances) AND cardinality(a.distances) = 3"
    ).fetchall()

    assert row is not None and row.measured == 100
    assert len(exact) == 5
    assert len(api.log()) == sent


@pytest.mark.parametrize("column", ["NULL"])
def test_a_caller_measures_what_it_sees_and_only_the_owner_tunes(
    pages: Connection, role: Callable[[str], str], column: str
) -> None:
    reader = role("reader")
    pages.execute(f"SELECT autoembed.grant_usage('{reader}')")
    pages.execute(f"SET ROLE {reader}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        pages.execute("SELECT autoembed.measure_recall('pages', '{question}')")
    pages.execute(f"RESET ROLE; GRANT SELECT ON pages TO {reader}; ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    pages.execute(f"CREATE POLICY few ON pages USING (id <= 3); SET ROLE {reader}")

    row = pages.execute("SELECT * FROM autoembed.measure_recall('pages')").fetchone()
    assert row is not None and (row.recall, row.worst, row.measured) == (1, 1, 3)
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="must be owner of table"):
        pages.execute("SELECT autoembed.tune('pages')")
    pages.execute("RESET ROLE")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("measure_recall('pages', max_rows => 0)", "max_rows and sample_rows must be 1 or more"),
        ("measure_recall('pages', sample_rows => NULL)", "max_rows and sample_rows must be 1 or more"),
        ("tune('pages', target => 1.01)", "target must be above 0 and at most 1, not 1.01"),
        ("tune('pages', target => NULL)", "target must be above 0 and at most 1, not NULL"),
    ],
)
def test_what_makes_no_sense_is_refused(db: Connection, call: str, message: str) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
        db.execute(f"SELECT * FROM autoembed.{call}")


def test_a_table_without_an_index_keeps_its_candidates(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('fake', 'fake', 3), autoembed.set_default_model('fake')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text); INSERT INTO pages VALUES (0, 'text')")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    db.execute("SELECT autoembed.process()")
    tune = "SELECT ef_search, recall, measured FROM autoembed.tune('pages')"
    assert db.execute(tune).fetchone() == (100, None, 0)
    db.execute("CREATE INDEX ON pages_embeddings USING hnsw (embedding halfvec_cosine_ops)")
    assert db.execute(tune).fetchone() == (100, None, 0)
    db.execute("DROP INDEX pages_embeddings_embedding_idx")
    db.execute("INSERT INTO pages SELECT n, 'text ' || n FROM generate_series(1, 9) AS n")
    db.execute("SELECT autoembed.process()")

    assert db.execute(tune).fetchone() == (100, 1, 10)
    assert db.execute("SELECT ef_search, recall_target FROM autoembed.pipeline").fetchone() == (None, None)


def test_an_empty_table_has_no_recall(db: Connection) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")

    row = db.execute("SELECT recall, measured FROM autoembed.measure_recall('pages')").fetchone()

    assert row == (None, 0)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="no embeddings to measure by"):
        db.execute("SELECT autoembed.tune('pages')")
