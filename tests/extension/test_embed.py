"""embed(): the embedding of a search text inside SQL."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection


def fill(db: Connection, rows: int) -> None:
    db.execute(
        "INSERT INTO documents (title, content) SELECT 't', 'text ' || n FROM generate_series(1, %s) AS n", [rows]
    )
    db.execute("SELECT autoembed.process()")


def test_order_by_embed_uses_the_hnsw_index_and_ranks_by_it(documents: Connection, api: FakeApi) -> None:
    fill(documents, 50)
    query = (
        "SELECT content FROM documents ORDER BY embedding <=> autoembed.embed('# t' || E'\\n\\n' || 'text 7') LIMIT 1"
    )
    documents.execute("SET enable_seqscan = off")

    plan = "\n".join(row[0] for row in documents.execute(f"EXPLAIN {query}"))

    assert "Index Scan using documents_embedding_idx" in plan
    assert documents.execute(query).fetchall() == [("text 7",)]


def test_a_vector_column_compares_without_a_cast(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE notes (embedding vector(1536))")
    db.execute("INSERT INTO notes VALUES (autoembed.embed('a note'))")

    assert db.execute("SELECT embedding <=> autoembed.embed('a note') FROM notes").fetchone() == (0,)


def test_a_plan_without_an_index_asks_the_api_once(documents: Connection, api: FakeApi) -> None:
    fill(documents, 50)
    before = api.counters()["requests"]
    documents.execute("SET enable_indexscan = off")

    documents.execute("SELECT id FROM documents ORDER BY embedding <=> autoembed.embed('question')")

    assert api.counters()["requests"] - before == 1


PLANS = {
    "sequential scan": ("SELECT id FROM documents ORDER BY embedding <=> {call} LIMIT 5", 1),
    "filter": ("SELECT count(*) FROM documents WHERE embedding <=> {call} < 0.9 OR title = 'none'", 1),
    "several times": ("SELECT embedding <=> {call}, {call} FROM documents ORDER BY embedding <=> {call}", 1),
    "subquery": ("SELECT id FROM documents AS d WHERE id IN (SELECT id FROM documents"
                 " WHERE id >= d.id ORDER BY embedding <=> {call} LIMIT 2)", 1),
    "lateral": ("SELECT * FROM (VALUES ('a'), ('b'), ('c')) AS q(words), LATERAL ("
                "SELECT id FROM documents ORDER BY embedding <=> {of_words} LIMIT 2) AS f", 3),
    "searches in turns": ("SELECT (SELECT count(*) FROM generate_series(1, 150) AS q(words)"
                          " WHERE d.embedding <=> {of_words} < 0.9) FROM documents AS d", 150),
    "prepared": ("EXECUTE nearest ('a question')", 1),
    "parallel": ("SELECT count(*) FROM documents WHERE embedding <=> {call} < 2 AND length(content) > 0", 1),
}  # fmt: skip


@pytest.mark.parametrize("form", ["embed({})", "embed_query('documents', {})"], ids=["embed", "embed_query"])
@pytest.mark.parametrize("plan", PLANS)
def test_a_statement_asks_for_each_text_once_whatever_the_plan(
    documents: Connection, api: FakeApi, plan: str, form: str
) -> None:
    fill(documents, 30)
    call, of_words = ("autoembed." + form.format(text) for text in ("'a question'", "q.words::text"))
    documents.execute("SET enable_indexscan = off; SET plan_cache_mode = force_generic_plan")
    documents.execute(f"SET debug_parallel_query = {'on' if plan == 'parallel' else 'off'}")
    documents.execute(
        f"PREPARE nearest (text) AS SELECT id FROM documents ORDER BY embedding <=> autoembed.{form.format('$1')}"
    )
    before = api.counters()["requests"]
    statement, texts = PLANS[plan]

    documents.execute(statement.format(call=call, of_words=of_words).encode())

    assert api.counters()["requests"] - before == texts


def test_a_kept_vector_of_a_table_takes_about_as_long_as_one_of_a_model(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('fake', 'fake', 16)")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}', model => 'fake')")
    # The time of the session's own work: other processes take none of it.
    body = "'import time; return time.process_time()'"
    db.execute(f"CREATE FUNCTION worked() RETURNS float8 LANGUAGE plpython3u AS {body}")
    worked, calls = "SELECT worked() AS seconds", "SELECT count(autoembed.{}) FROM generate_series(1, 1000)"

    def seconds(call: str) -> float:
        before = db.execute(worked).fetchall()[0].seconds
        db.execute(calls.format(call).encode())
        return float(db.execute(worked).fetchall()[0].seconds - before)

    both = [(seconds("embed_query('pages', 'x')"), seconds("embed('x', 'fake')")) for _ in range(7)]

    # A look at all facts of the table takes a hundred times as long.
    assert min(query for query, _ in both) < 8 * min(embed for _, embed in both)


def test_embed_returns_the_models_vector(db: Connection, api: FakeApi) -> None:
    row = db.execute("SELECT autoembed.embed('a question')::real[] AS v").fetchone()

    assert row is not None
    assert np.allclose(row.v, embedding_of("a question"), atol=1e-6)


def test_embed_of_null_is_null(db: Connection, api: FakeApi) -> None:
    assert db.execute("SELECT autoembed.embed(NULL)").fetchone() == (None,)
    assert api.counters()["requests"] == 0


def test_the_model_can_be_named(db: Connection, api: FakeApi) -> None:
    row = db.execute("SELECT vector_dims(autoembed.embed('a question', 'all-MiniLM-L6-v2')) AS n").fetchone()

    assert row == (384,)
    assert api.counters()["requests"] == 0


@pytest.mark.parametrize(
    ("call", "error", "sqlstate"),
    [
        ("embed('x', 'no-such-model')", 'model "no-such-model" does not exist', "42704"),
        ("embed('  ')", "a blank text has no embedding", "22023"),
    ],
)
def test_a_wrong_call_is_one_clear_error(db: Connection, api: FakeApi, call: str, error: str, sqlstate: str) -> None:
    with pytest.raises(psycopg.Error, match=error) as caught:
        db.execute(f"SELECT autoembed.{call}")

    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.message_hint


def test_a_providers_error_is_the_sessions_error(db: Connection, api: FakeApi) -> None:
    api.behave(faults=[{"status": 401, "times": 1}])

    with pytest.raises(psycopg.errors.ExternalRoutineException, match="gave no embedding: the provider answered 401"):
        db.execute("SELECT autoembed.embed('a question')")

    assert db.execute("SELECT autoembed.embed('a question') IS NOT NULL").fetchone() == (True,)


@pytest.mark.parametrize(
    "call",
    [
        "embed('a question', 'slow')",
        "embed_query('notes', 'a question')",
        "search('notes', 'a question')",
        "search_rows(NULL::notes, 'a question')",
    ],
)
def test_a_timeout_is_told_in_postgresqls_words(db: Connection, call: str) -> None:
    db.execute("SELECT autoembed.create_model('slow', 'fake', 8, options => '{\"delay_seconds\": 60}')")
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}', model => 'slow')")
    db.execute("SET statement_timeout = '500ms'")

    with pytest.raises(psycopg.errors.QueryCanceled) as refusal:
        db.execute(f"SELECT autoembed.{call}".encode())

    diagnosis = refusal.value.diag
    assert diagnosis.message_primary == "canceling statement due to statement timeout"
    assert diagnosis.message_hint == "The model had not answered yet."
    assert "Traceback" not in str(diagnosis.context)


def test_a_role_needs_no_more_than_execute(
    db: Connection, api: FakeApi, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    reader = role("reader")
    with connect(user=reader) as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("SELECT autoembed.embed('a question')")
    db.execute(f"GRANT USAGE ON SCHEMA autoembed TO {reader}")
    db.execute(f"GRANT EXECUTE ON FUNCTION autoembed.embed TO {reader}")

    with connect(user=reader) as session:
        assert session.execute("SELECT autoembed.embed('a question') IS NOT NULL").fetchone() == (True,)
