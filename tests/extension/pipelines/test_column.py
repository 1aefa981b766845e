"""The column of the vectors: its type and dimensions, its index, and several on one table."""

from __future__ import annotations

import psycopg
import pytest

from extension.pipelines.documents import COLUMNS, assert_fresh, attach, embed, enable, send_all, vectors
from fake_api import FakeApi
from harness import Connection, warnings_of


def test_a_missing_column_is_added_with_the_dimensions_of_the_model(db: Connection) -> None:
    enable(db, f"{COLUMNS}, model => 'small'", column="v")

    kind = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'documents'::regclass"
    assert db.execute(f"{kind} AND attname = 'v'").fetchone() == ("halfvec(256)",)
    embed(db)
    assert_fresh(db, column="v", model="text-embedding-3-large")


@pytest.mark.parametrize("kind", ["vector(1536)", "halfvec(1536)", "vector", "halfvec"])
def test_vector_and_halfvec_columns_both_work(db: Connection, kind: str) -> None:
    db.execute(f"ALTER TABLE documents ADD embedding {kind}")
    attach(db)

    assert_fresh(db)


def test_dimensions_that_do_not_fit_are_said_at_once_and_jobs_wait(db: Connection, api: FakeApi) -> None:
    db.execute("ALTER TABLE documents ADD embedding halfvec(1000)")
    with warnings_of(db) as warnings:
        enable(db)
    assert warnings[0].startswith(
        'column "embedding" of table app.documents has 1000 dimensions, model "text-embedding-3-small" has 1536'
    )
    assert "ALTER TABLE app.documents ALTER COLUMN embedding TYPE halfvec(1536) USING NULL" in warnings[0]
    assert db.execute("SELECT read, failed FROM autoembed.process()").fetchone() == (0, 0)

    db.execute("ALTER TABLE app.documents ALTER COLUMN embedding TYPE halfvec(1536) USING NULL")
    embed(db)
    assert_fresh(db)


def test_more_dimensions_than_an_index_takes_are_said_with_the_way_out(db: Connection) -> None:
    with warnings_of(db) as warnings:
        enable(db, f"{COLUMNS}, model => 'huge'")
    assert warnings == []
    with warnings_of(db) as warnings:
        enable(db, f"{COLUMNS}, model => 'giant'", column="more")
    [warning] = warnings
    assert "4096 dimensions cannot have an HNSW index, which takes up to 4000" in warning
    assert "dimensions => " in warning


def test_an_index_that_cannot_be_built_is_refused_with_the_way_out(db: Connection) -> None:
    unfit = psycopg.errors.ObjectNotInPrerequisiteState
    with pytest.raises(unfit, match="4096 dimensions cannot have an HNSW index"), db.transaction():
        enable(db, f"{COLUMNS}, model => 'giant', create_index => true")
    db.execute("ALTER TABLE documents ADD embedding vector")
    with pytest.raises(unfit, match='"embedding" of table .* has no dimensions') as error, db.transaction():
        enable(db, f"{COLUMNS}, create_index => true")

    db.execute(str(error.value.diag.message_hint).encode())
    enable(db, f"{COLUMNS}, create_index => true")

    assert db.execute("SELECT create_index FROM autoembed.backfill").fetchall() == [(True,)]


def test_several_pipelines_live_on_one_table(db: Connection, api: FakeApi) -> None:
    enable(db, "content_columns => '{title}'")
    enable(db, "content_columns => '{content}', model => 'small', on_change => 'clear'", column="small")
    enable(db, "content_function => 'text_of'", column="third")
    embed(db)
    assert len(api.texts()) == 9

    db.execute("UPDATE documents SET content = 'new' WHERE id = 1")
    assert vectors(db) == {1: True, 2: True, 3: True}
    assert vectors(db, "small") == {1: False, 2: True, 3: True}
    assert send_all(db, api) == ["new", "one: new"]
    assert_fresh(db, "title")
    assert_fresh(db, "content", column="small", model="text-embedding-3-large")
    assert_fresh(db, "title || ': ' || content", column="third")

    db.execute("SELECT autoembed.disable('documents', 'small')")
    db.execute("UPDATE documents SET content = 'newer', title = 'newer' WHERE id = 1")
    assert send_all(db, api) == ["newer", "newer: newer"]
    with pytest.raises(psycopg.errors.AmbiguousColumn, match="several embeddings"), db.transaction():
        db.execute("SELECT autoembed.reembed('documents')")
