"""The guide's Usage part, step by step as it stands but for the schema's name, by pg_cron; then its Troubleshooting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest

from fake_api import FakeApi, embedding_of
from harness import (
    GUIDE_TABLE,
    GUIDE_TRIGGERS,
    Connection,
    Server,
    assert_fresh,
    insert,
    run_server,
    stored,
    waiting,
)
from waiting import wait_until


@pytest.fixture(scope="module")
def scheduled() -> Iterator[Server]:
    """A container as a user starts it: the init script has created the extension and started a lane."""
    with ExitStack() as stack:
        yield run_server(stack)


def vector_of(connection: Connection, where: str) -> list[float] | None:
    row = connection.execute(f"SELECT embedding::vector::real[] AS v FROM documents WHERE {where}").fetchone()
    assert row is not None
    vector: list[float] | None = row.v
    return vector


def follow_the_usage_part(db: Connection, dimensions: int) -> list[list[float]]:
    """Runs it; returns the three embeddings that its three waits end with."""
    db.execute(GUIDE_TABLE.format(dimensions=dimensions))
    db.execute(GUIDE_TRIGGERS)
    found = []

    db.execute(
        "insert into documents (title, content) values"
        " ('Understanding Vector Databases', 'Vector databases are specialized...')"
    )
    by_title = "title = 'Understanding Vector Databases'"
    assert vector_of(db, by_title) is None
    found.append(wait_until(lambda: vector_of(db, by_title), 10))

    db.execute(
        "update documents set content = 'Vector databases allow you to query...'"
        " where title = 'Understanding Vector Databases'"
    )
    assert vector_of(db, by_title) is None
    found.append(wait_until(lambda: vector_of(db, by_title), 10))

    db.execute(
        "update documents set title = 'Understanding Vector Databases with Supabase'"
        " where title = 'Understanding Vector Databases'"
    )
    by_title = "title = 'Understanding Vector Databases with Supabase'"
    assert vector_of(db, by_title) is None
    found.append(wait_until(lambda: vector_of(db, by_title), 10))
    return found


TEXTS = [
    "# Understanding Vector Databases\n\nVector databases are specialized...",
    "# Understanding Vector Databases\n\nVector databases allow you to query...",
    "# Understanding Vector Databases with Supabase\n\nVector databases allow you to query...",
]


@pytest.fixture
def postgres(scheduled: Server) -> Iterator[Connection]:
    """The database that POSTGRES_DB names, where pg_cron and a lane run."""
    with scheduled.connect() as connection:
        yield connection
        connection.execute("DROP TABLE IF EXISTS documents CASCADE")
        connection.execute("SELECT autoembed.set_default_model('all-MiniLM-L6-v2')")


def test_guide_runs_as_it_stands_with_an_openai_model(scheduled: Server, postgres: Connection) -> None:
    api = scheduled.fake_api("guide")
    postgres.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
    postgres.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")

    found = follow_the_usage_part(postgres, 1536)

    for vector, text in zip(found, TEXTS, strict=True):
        assert np.allclose(vector, embedding_of(text), atol=1e-3)
    assert api.texts() == TEXTS


def test_guide_runs_as_it_stands_with_the_local_model(postgres: Connection) -> None:
    found = follow_the_usage_part(postgres, 384)

    for vector, text in zip(found, TEXTS, strict=True):
        row = postgres.execute("SELECT autoembed.embed(%s)::real[] AS v", [text]).fetchone()
        assert row is not None
        assert np.allclose(vector, row.v, atol=1e-3)


GUIDE_KEYS = {"jobId", "id", "schema", "table", "contentFunction", "embeddingColumn", "error"}


def insert_and_process(documents: Connection) -> dict[str, str]:
    """A row whose embedding fails, as the one entry of failed_jobs."""
    documents.execute("INSERT INTO documents (title, content) VALUES ('A title', 'and a text')")
    row = documents.execute("SELECT * FROM autoembed.process()").fetchone()
    assert row is not None
    [failed] = row.failed_jobs
    assert set(failed) == GUIDE_KEYS
    assert (failed["id"], failed["schema"], failed["table"]) == (1, "public", "documents")
    assert (failed["contentFunction"], failed["embeddingColumn"]) == ("embedding_input", "embedding")
    return dict(failed)


def test_an_error_of_the_api_is_reported_with_the_apis_words(documents: Connection, api: FakeApi) -> None:
    api.behave(faults=[{"status": 500, "body": {"error": {"message": "the engine is on fire"}}}])

    failed = insert_and_process(documents)

    assert failed["error"] == "the provider answered 500: the engine is on fire"


def test_a_refused_connection_is_reported_and_the_job_kept(documents: Connection, api: FakeApi) -> None:
    port = api.listen()
    api.refuse(port)
    documents.execute(
        "SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)",
        [f"http://127.0.0.1:{port}/v1"],
    )

    failed = insert_and_process(documents)

    assert "no answer from 127.0.0.1" in failed["error"]
    assert "refused" in failed["error"]
    assert documents.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone() == (1,)


def test_a_request_over_its_time_is_reported_and_the_job_kept(documents: Connection, api: FakeApi) -> None:
    api.behave(hold=True)
    documents.execute("INSERT INTO documents (title, content) VALUES ('A title', 'and a text')")

    row = documents.execute("SELECT * FROM autoembed.process(timeout_milliseconds => 300)").fetchone()

    assert row is not None
    assert [failed["error"] for failed in row.failed_jobs] == ["127.0.0.1:8000 did not answer within 0.3 s"]
    assert documents.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone() == (1,)


def test_a_content_function_that_raises_is_reported_with_its_own_words(documents: Connection) -> None:
    documents.execute(
        "CREATE OR REPLACE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'no text today'; END $$"
    )

    failed = insert_and_process(documents)

    assert "no text today" in failed["error"]


def test_an_empty_queue_is_no_error(db: Connection) -> None:
    row = db.execute("SELECT * FROM autoembed.process()").fetchone()

    assert row is not None
    assert row._asdict() == {
        "read": 0,
        "completed": 0,
        "retried": 0,
        "failed": 0,
        "requests": 0,
        "failed_jobs": [],
    }


@pytest.mark.parametrize("columns", ["title, content", "about"])
def test_a_generated_column_may_be_the_content(db: Connection, api: FakeApi, columns: str) -> None:
    """It is virtual where the server has such columns: triggers see NULL in them."""
    virtual = "VIRTUAL" if db.info.server_version >= 180000 else "STORED"
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(f"ALTER TABLE documents ADD about text GENERATED ALWAYS AS (title || ': ' || content) {virtual}")
    db.execute(
        "CREATE OR REPLACE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE sql AS 'SELECT doc.about'"
    )
    db.execute(GUIDE_TRIGGERS.replace("title, content", columns))

    insert(db, "one", "two")
    db.execute("SELECT autoembed.process()")
    assert_fresh(db)
    db.execute("UPDATE documents SET content = 'three' WHERE id = 1 RETURNING embedding")
    assert waiting(db) == 1
    assert stored(db)[1] is None
    db.execute("SELECT autoembed.process()")

    assert_fresh(db)
