"""Models: create, change, drop, choose; and what is said when they are wrong."""

from __future__ import annotations

import json
import re
from typing import Any

import psycopg
import pytest

from fake_api import FakeApi
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection, insert, warnings_of


def models(db: Connection) -> list[tuple[Any, ...]]:
    return db.execute(
        "SELECT name, provider, model_id, dimensions, api_key FROM autoembed.model ORDER BY name"
    ).fetchall()


BUILTIN = [
    ("all-MiniLM-L6-v2", "local", "all-MiniLM-L6-v2", 384, None),
    ("text-embedding-3-small", "openai", "text-embedding-3-small", 1536, "env:OPENAI_API_KEY"),
]


def test_two_models_come_ready_and_the_local_one_is_the_default(db: Connection) -> None:
    assert models(db) == BUILTIN
    assert db.execute("SELECT vector_dims(autoembed.embed('no key needed'))").fetchone() == (384,)


def test_a_model_is_created_changed_and_dropped(db: Connection, api: FakeApi) -> None:
    db.execute(
        "SELECT autoembed.create_model('large', 'openai', 3072, model_id => 'text-embedding-3-large',"
        " base_url => %s, api_key => 'env:OPENAI_API_KEY')",
        [api.base_url],
    )
    assert db.execute("SELECT vector_dims(autoembed.embed('x', 'large'))").fetchone() == (3072,)

    db.execute("SELECT autoembed.alter_model('large', dimensions => 256)")
    assert db.execute("SELECT vector_dims(autoembed.embed('x', 'large'))").fetchone() == (256,)
    assert [request["dimensions"] for request in api.log()] == [3072, 256]

    db.execute("SELECT autoembed.drop_model('large')")
    assert models(db) == BUILTIN


@pytest.mark.parametrize("prefix", ["passage: ", "  # ", " ", "", "é 'quoted' \n"])
def test_a_model_whose_documents_have_a_prefix_embeds_a_table_once(db: Connection, api: FakeApi, prefix: str) -> None:
    """Lane and `_write_N` must name the model alike, or each answer is taken for that of a model before."""
    db.execute(
        "SELECT autoembed.create_model('e5', 'openai', 1536, 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY', options => jsonb_build_object('document_prefix', %s::text))",
        [api.base_url, prefix],
    )
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', 'embedding', content_columns => '{body}', model => 'e5')")
    db.execute("INSERT INTO pages VALUES (1, 'one')")

    row = db.execute("SELECT read, completed FROM autoembed.process()").fetchone()

    assert row == (1, 1)
    assert api.texts() == [f"{prefix}one"]
    assert db.execute("SELECT count(embedding) FROM pages").fetchone() == (1,)


def test_limits_of_a_model_hold_below_the_providers(documents: Connection, api: FakeApi) -> None:
    documents.execute("SELECT autoembed.alter_model('text-embedding-3-small', max_inputs_per_request => 4)")
    documents.execute("INSERT INTO documents (title, content) SELECT 't', 'c' || n FROM generate_series(1, 10) AS n")

    documents.execute("SELECT autoembed.process()")

    assert sorted(len(request["texts"]) for request in api.log()) == [2, 4, 4]


@pytest.mark.parametrize(
    ("call", "error", "sqlstate"),
    [
        ("create_model('m', 'no-such', 3)", 'provider "no-such", which is not known', "22023"),
        ("create_model('all-MiniLM-L6-v2', 'local', 384)", "already exists", "42710"),
        ("create_model('m', 'openai', 3)", "has no api_key", "22023"),
        ("create_model('m', 'openai', 3, base_url => 'ftp://x')", "not an http or https URL", "22023"),
        ("create_model('m', 'local', 3, api_key => 'env:X')", "takes no api_key", "22023"),
        ("create_model('m', 'fake', 3, model_id => '')", 'model "m" has a blank model_id', "22023"),
        ("create_model('m', 'fake', 3, model_id => ' ')", 'model "m" has a blank model_id', "22023"),
        ("create_model(' ', 'fake', 3)", 'model " " has a blank model_id', "22023"),
        ("create_model(NULL, 'fake', 3)", "needs a name and a provider", "22004"),
        ("create_model('m', NULL, 3)", "needs a name and a provider", "22004"),
        ("create_model('m', 'fake', 0)", "dimensions must be from 1 to 16000, not 0", "22023"),
        ("create_model('m', 'fake', 16001)", "dimensions must be from 1 to 16000, not 16001", "22023"),
        *(
            (f"{call}, {argument} => {value})", f"{argument} must be {rule}, not {value}", "22023")
            for call in ["create_model('m', 'fake', 3", "alter_model('all-MiniLM-L6-v2'"]
            for argument, value, rule in [
                ("max_inputs_per_request", 0, "above 0"),
                ("max_tokens_per_request", -1, "above 0"),
                ("max_tokens_per_input", 0, "above 0"),
                ("requests_per_minute", 0, "above 0"),
                ("tokens_per_minute", 0, "above 0"),
                ("max_requests_in_flight", 0, "from 1 to 1000"),
                ("max_requests_in_flight", 2147483647, "from 1 to 1000"),
                ("price_per_million_tokens", -0.5, "0 or more"),
                ("daily_token_budget", -1, "0 or more"),
                ("daily_cost_budget", -1, "0 or more"),
                ("timeout_seconds", 0, "above 0 and at most 3600"),
                ("timeout_seconds", 3601, "above 0 and at most 3600"),
            ]
        ),
        *(
            (f"{call}, {argument} => '{value}')", f"{argument} must be {rule}, not {value}", "22023")
            for call in [
                "create_model('m', 'fake', 3",
                "create_rerank_model('m', 'tei'",
                "alter_model('all-MiniLM-L6-v2'",
            ]
            for value in ["NaN", "Infinity"]
            for argument, rule in [
                ("price_per_million_tokens", "0 or more"),
                ("daily_cost_budget", "0 or more"),
                ("timeout_seconds", "above 0 and at most 3600"),
            ]
        ),
        ("alter_model('all-MiniLM-L6-v2', dimensions => 0)", "dimensions must be from 1 to 16000, not 0", "22023"),
        ("create_model('m', 'fake', 3, options => '3')", "options must be a JSON object, not 3", "22023"),
        ("alter_model('all-MiniLM-L6-v2', options => 'null')", "options must be a JSON object, not null", "22023"),
        ("alter_model(NULL, timeout_seconds => 5)", 'model "" does not exist', "42704"),
        ("drop_model(NULL)", 'model "" does not exist', "42704"),
        ("set_default_model(NULL)", 'model "" does not exist', "42704"),
        ("resume_model(NULL)", 'model "" does not exist', "42704"),
        ("alter_model('m')", 'model "m" does not exist', "42704"),
        ("drop_model('m')", 'model "m" does not exist', "42704"),
        ("drop_model('all-MiniLM-L6-v2')", "is in use", "2BP01"),
        ("set_default_model('m')", 'model "m" does not exist', "42704"),
        ("resume_model('m')", 'model "m" does not exist', "42704"),
    ],
)
def test_a_wrong_definition_is_one_clear_error_and_changes_nothing(
    db: Connection, call: str, error: str, sqlstate: str
) -> None:
    with pytest.raises(psycopg.Error, match=error) as caught:
        db.execute(f"SELECT autoembed.{call}")

    assert caught.value.sqlstate == sqlstate
    assert models(db) == BUILTIN


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT autoembed.create_model('m', 'no-such', 3)",
        "SELECT autoembed.alter_model('all-MiniLM-L6-v2', api_key => 'env:X')",
        "SELECT autoembed.embed('a question', 'no-such')",
        "SELECT autoembed.embed(' ')",
        "SELECT autoembed.embed('a question', 'unreachable')",
        "SELECT autoembed.process(batch_size => 0)",
        "CALL autoembed.work(batch_size => 0)",
        "BEGIN; CALL autoembed.work(1)",
        "SELECT autoembed.estimate('notes', content_columns => '{body}', model => 'no-such')",
    ],
)
def test_an_error_of_a_user_shows_nothing_of_python(db: Connection, statement: str) -> None:
    db.execute(
        "SELECT autoembed.create_model('unreachable', 'fake', 3, options => '{\"faults\": [{\"status\": 401}]}')"
    )
    db.execute("CREATE TABLE notes (id integer PRIMARY KEY, body text)")

    with pytest.raises(psycopg.Error) as caught:
        db.execute(statement)

    diagnostic = caught.value.diag
    shown = f"{diagnostic.message_primary} {diagnostic.message_hint} {diagnostic.message_detail} {diagnostic.context}"
    assert not re.search(r"plpy|spiexceptions|Traceback|Python", shown)


def test_the_identity_of_a_model_lists_what_its_vectors_depend_on(db: Connection) -> None:
    options = {"document_prefix": 'a "b" é: '}
    db.execute(
        "SELECT autoembed.create_model('m', 'ollama', 256, model_id => %s, options => %s)",
        ['mo"del\\ é', json.dumps(options)],
    )

    [(facts,)] = db.execute("SELECT autoembed._model_facts(m) FROM autoembed.model AS m WHERE m.name = 'm'").fetchall()

    assert json.loads(facts["identity"]) == ["ollama", 'mo"del\\ é', 256, options["document_prefix"]]


def test_other_fields_of_documents_make_other_vectors_and_those_of_queries_do_not(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute("INSERT INTO notes VALUES (1, 'one')")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    db.execute("SELECT * FROM autoembed.process()")
    states = []
    for options in ({"query_body": {"task": "query"}}, {"document_body": {"task": "passage"}}):
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', options => %s)", [json.dumps(options)])
        states += db.execute("SELECT state FROM autoembed.preview('notes', '1')").fetchall()
    assert states == [("fresh",), ("stale",)]


def test_a_key_pasted_in_place_of_a_reference_is_refused_and_not_repeated(db: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        db.execute("SELECT autoembed.create_model('m', 'openai', 1536, api_key => 'sk-proj-secret')")

    assert "must say where the key is found" in str(caught.value)
    assert "sk-proj-secret" not in f"{caught.value} {caught.value.diag.message_detail}"


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("env:NOT_SET_HERE", "the environment variable NOT_SET_HERE is not set for the database server"),
        ("file:/nowhere/key", "the file /nowhere/key cannot be read (No such file or directory)"),
    ],
)
def test_a_missing_key_is_a_warning_at_once_and_the_reason_later(
    documents: Connection, reference: str, reason: str
) -> None:
    with warnings_of(documents) as heard:
        documents.execute("SELECT autoembed.alter_model('text-embedding-3-small', api_key => %s)", [reference])
    assert any(reason in warning for warning in heard)

    documents.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")
    row = documents.execute("SELECT * FROM autoembed.process()").fetchone()

    assert row is not None
    assert (row.completed, row.retried, row.failed) == (0, 1, 0)
    assert reason in row.failed_jobs[0]["error"]
    documents.execute("SELECT autoembed.alter_model('text-embedding-3-small', api_key => 'env:OPENAI_API_KEY')")
    assert documents.execute("SELECT completed FROM autoembed.process()").fetchone() == (1,)


def test_set_default_model_is_all_that_the_guides_table_needs(db: Connection, api: FakeApi) -> None:
    db.execute("SELECT autoembed.set_default_model('all-MiniLM-L6-v2')")
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    with warnings_of(db) as heard:
        db.execute(GUIDE_TRIGGERS)
    mismatch = 'column "embedding" of table public.documents has 1536 dimensions, model "all-MiniLM-L6-v2" has 384'
    assert any(mismatch in warning for warning in heard)

    db.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")
    with warnings_of(db) as heard:
        assert db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)
    assert any(f"public.documents.embedding is not being embedded: {mismatch}" in warning for warning in heard)

    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    assert db.execute("SELECT completed FROM autoembed.process()").fetchone() == (1,)


def test_set_default_model_warns_of_columns_it_does_not_fit(documents: Connection) -> None:
    with warnings_of(documents) as heard:
        documents.execute("SELECT autoembed.set_default_model('all-MiniLM-L6-v2')")

    assert any("1536 dimensions" in warning and "ALTER TABLE public.documents" in warning for warning in heard)


def test_a_default_model_that_is_gone_is_replaced_by_another(documents: Connection) -> None:
    insert(documents, "one")
    documents.execute("SELECT autoembed.process(); SELECT autoembed.create_model('other', 'fake', 1536)")
    documents.execute("DELETE FROM autoembed.model WHERE name = 'text-embedding-3-small'")

    with warnings_of(documents) as heard:
        documents.execute("SELECT autoembed.set_default_model('other')")

    assert any("public.documents.embedding holds vectors of another model" in warning for warning in heard)
    documents.execute("SELECT autoembed.resync('documents'); SELECT autoembed.process(); SELECT autoembed.process()")
    assert documents.execute("SELECT state, embedded FROM autoembed.status").fetchone() == ("idle", 1)


def test_a_model_whose_folder_is_missing_is_a_warning_at_once(db: Connection) -> None:
    with warnings_of(db) as heard:
        db.execute("SELECT autoembed.create_model('mine', 'local', 384, base_url => '/models/mine')")

    assert any("/models/mine/model.onnx does not exist on the server" in warning for warning in heard)


def test_alter_model_warns_of_the_tables_of_this_model_alone(documents: Connection) -> None:
    documents.execute("SELECT autoembed.create_model('other', 'fake', 3)")
    documents.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")
    documents.execute("DROP FUNCTION embedding_input")

    with warnings_of(documents) as heard:
        documents.execute("SELECT autoembed.alter_model('other', timeout_seconds => 5)")
    assert heard == []

    with warnings_of(documents) as heard:
        documents.execute("SELECT autoembed.alter_model('text-embedding-3-small', timeout_seconds => 5)")
    assert any("public.documents.embedding is not being embedded" in warning for warning in heard)


def test_one_model_with_a_time_that_is_no_number_does_not_end_doctor(documents: Connection) -> None:
    """A dump of an older version may bring such a model."""
    documents.execute("SELECT autoembed.create_rerank_model('broken', 'tei', base_url => 'http://127.0.0.1:1')")
    documents.execute("UPDATE autoembed.model SET timeout_seconds = 'NaN' WHERE name = 'broken'")

    [told] = documents.execute("SELECT * FROM autoembed.doctor() WHERE subject = 'model broken'").fetchall()

    assert not told.ok
    assert told.finding == "an unexpected TypeError in the provider tei"
    assert told.advice
