"""create_match_function(): the function that clients of Supabase and LangChain call."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest
from psycopg import sql

from fake_api import FakeApi, embedding_of
from harness import PASSWORD, Connection, Server, rows_read, toast_table_of

DIMENSIONS = 1536
STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
TEXTS = [f"text {n}" for n in range(20)]


def vector(text: str) -> str:
    return json.dumps([float(x) for x in embedding_of(text, DIMENSIONS)])


def nearest(query: str) -> list[int]:
    """The keys of TEXTS, the nearest first."""
    return [
        int(n) + 1
        for n in np.argsort([-np.dot(embedding_of(t, DIMENSIONS), embedding_of(query, DIMENSIONS)) for t in TEXTS])
    ]


@pytest.fixture
def api_db(db: Connection, api: FakeApi) -> Connection:
    """A database whose default model is the fake API's."""
    return db


@pytest.fixture
def attached(api_db: Connection, column: str) -> Connection:
    api_db.execute("CREATE TABLE documents (id bigint PRIMARY KEY, content text, metadata jsonb)")
    api_db.cursor().executemany(
        "INSERT INTO documents VALUES (%s, %s, %s)",
        [(n, text, json.dumps({"even": n % 2 == 0, "id": "other"})) for n, text in enumerate(TEXTS, 1)],
    )
    api_db.execute(f"SELECT autoembed.enable('documents', {column}, content_columns => '{{content}}')")
    api_db.execute("SELECT autoembed.process()")
    api_db.execute("SELECT autoembed.create_match_function('documents')")
    return api_db


def rpc(db: Connection, **arguments: Any) -> list[Any]:
    """Calls it as PostgREST does: by the names of the arguments, out of the body of a request."""
    types = {"query_embedding": "vector", "match_count": "int", "filter": "jsonb"}
    return db.execute(
        sql.SQL("SELECT m.* FROM json_to_record(%s) AS a({}), LATERAL match_documents({}) AS m").format(
            sql.SQL(", ").join(sql.SQL(f"{name} {types[name]}") for name in arguments),
            sql.SQL(", ").join(sql.SQL(f"{name} => a.{name}") for name in arguments),
        ),
        [json.dumps(arguments)],
    ).fetchall()


@STORAGES
def test_a_request_of_supabase_finds_the_nearest_rows_with_the_columns_of_langchain(
    attached: Connection, column: str
) -> None:
    query = [float(x) for x in embedding_of("question", DIMENSIONS)]

    found = rpc(attached, query_embedding=query, match_count=3, filter={})

    assert [row.id for row in found] == nearest("question")[:3]
    assert {"id", "content", "metadata", "similarity"} <= set(found[0]._fields)
    for row in found:
        expected = float(np.dot(embedding_of(row.content, DIMENSIONS), query))
        assert row.similarity == pytest.approx(expected, abs=2e-3)
        assert row.content == TEXTS[row.id - 1]
        assert row.metadata["id"] == "other"
    assert [row.id for row in rpc(attached, query_embedding=query)] == nearest("question")[:10]
    assert len(rpc(attached, query_embedding=query, match_count=100)) == len(TEXTS)
    assert rpc(attached, query_embedding=query, match_count=0) == []


@STORAGES
@pytest.mark.parametrize(
    ("filter", "keys"),
    [
        (None, set(range(1, 21))),
        ({}, set(range(1, 21))),
        ({"id": 7}, {7}),
        ({"content": "text 4"}, {5}),
        ({"metadata": {"even": True}}, set(range(2, 21, 2))),
        ({"even": True}, set(range(2, 21, 2))),
        ({"even": True, "id": 4}, {4}),
        # A column comes before a key of the same name.
        ({"id": "other"}, set()),
        ({"nosuch": 1}, set()),
    ],
)
def test_a_filter_names_columns_or_keys_of_the_metadata(
    attached: Connection, column: str, filter: dict[str, Any] | None, keys: set[int]
) -> None:
    query = [float(x) for x in embedding_of("question", DIMENSIONS)]

    found = rpc(attached, query_embedding=query, match_count=20, filter=filter)

    assert [row.id for row in found] == [key for key in nearest("question") if key in keys]


def test_a_row_counts_once_with_its_nearest_chunk(api_db: Connection) -> None:
    api_db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    long = "\n\n".join(f"# Part {n}\n\nwords {n}" for n in range(40))
    api_db.execute("INSERT INTO documents VALUES (1, %s), (2, 'short')", [long])
    api_db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
    api_db.execute("SELECT autoembed.process()")
    api_db.execute("SELECT autoembed.create_match_function('documents')")
    chunks = api_db.execute("SELECT count(*) FROM documents_embeddings WHERE id = 1").fetchone()
    assert chunks is not None and chunks[0] > 30
    best = api_db.execute(
        "SELECT id, max(1 - (embedding <=> %s::vector)) AS similarity FROM documents_embeddings GROUP BY id"
        " ORDER BY 2 DESC",
        [vector("question")],
    ).fetchall()

    found = api_db.execute("SELECT id, similarity FROM match_documents(%s::vector, 2)", [vector("question")]).fetchall()

    assert [row.id for row in found] == [row.id for row in best]
    assert [row.similarity for row in found] == pytest.approx([row.similarity for row in best])


@STORAGES
def test_it_is_the_owners_and_has_the_rights_of_its_caller(
    attached: Connection, role: Callable[[str], str], column: str
) -> None:
    """A caller needs no right in the schema autoembed."""
    owner, reader = role("owner"), role("reader")
    attached.execute("DROP FUNCTION match_documents")
    for user in (owner, reader):
        attached.execute(f"SELECT autoembed.grant_usage('{user}')")
    attached.execute(f"ALTER TABLE documents OWNER TO {owner}; GRANT CREATE ON SCHEMA public TO {owner}, {reader}")
    attached.execute(f"SET ROLE {reader}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="must be owner of table"):
        attached.execute("SELECT autoembed.create_match_function('documents')")
    attached.execute(f"SET ROLE {owner}; SELECT autoembed.create_match_function('documents')")
    attached.execute("RESET ROLE")
    assert attached.execute(
        "SELECT proowner::regrole::text, prosecdef FROM pg_proc WHERE proname = 'match_documents'"
    ).fetchall() == [(owner, False)]

    stranger = role("stranger")
    find = "SELECT id FROM match_documents(%s::vector, 100) ORDER BY id"
    attached.execute(f"SET ROLE {stranger}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        attached.execute(find, [vector("question")])
    attached.execute(f"RESET ROLE; GRANT SELECT ON documents TO {stranger}")
    attached.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY")
    attached.execute(f"CREATE POLICY few ON documents TO {stranger} USING (id IN (3, 5))")
    attached.execute(f"SET ROLE {stranger}")
    assert attached.execute(find, [vector("question")]).fetchall() == [(3,), (5,)]
    attached.execute("RESET ROLE")


def test_an_owner_who_may_not_create_a_function_there_is_told_so(db: Connection, role: Callable[[str], str]) -> None:
    owner = role("owner")
    db.execute(f"SELECT autoembed.grant_usage('{owner}'); CREATE SCHEMA app; GRANT USAGE ON SCHEMA app TO {owner}")
    db.execute("CREATE TABLE app.notes (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('app.notes', content_columns => '{body}')")
    db.execute(f"ALTER TABLE app.notes OWNER TO {owner}; SET ROLE {owner}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege) as refusal:
        db.execute("SELECT autoembed.create_match_function('app.notes')")
    db.execute("RESET ROLE")

    assert refusal.value.diag.message_primary == f"role {owner} may not create a function in schema app"
    assert refusal.value.diag.message_hint == f"GRANT CREATE ON SCHEMA app TO {owner}."


def test_a_role_that_is_no_superuser_restores_it(
    api_db: Connection, server: Server, dbname: str, role: Callable[[str], str]
) -> None:
    """In the session of a restore pgvector is not loaded, and its settings are not known."""
    owner = role("owner")
    api_db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    api_db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
    api_db.execute(f"ALTER TABLE documents OWNER TO {owner}; GRANT CREATE ON SCHEMA public TO {owner}")
    api_db.execute("SELECT autoembed.create_match_function('documents')")
    signature = "match_documents(vector, integer, jsonb)"

    code, output = server.container.get_wrapped_container().exec_run(
        [
            "bash",
            "-c",
            f"cd /tmp && pg_dump -U postgres -Fc -f {dbname} {dbname} &&"
            f" pg_restore -l {dbname} | grep match_documents > {dbname}.list &&"
            f" psql -U postgres -c 'DROP FUNCTION {signature}' {dbname} &&"
            f" PGPASSWORD={PASSWORD} pg_restore --exit-on-error --no-owner -L {dbname}.list -U {owner} -d {dbname}"
            f" {dbname} 2>&1; code=$?; rm {dbname}*; exit $code",
        ]
    )

    assert code == 0, output.decode()
    assert api_db.execute(
        "SELECT proowner::regrole::text FROM pg_proc WHERE oid = %s::regprocedure", [signature]
    ).fetchone() == (owner,)


def test_the_callers_settings_are_as_before(api_db: Connection) -> None:
    api_db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    api_db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
    api_db.execute("SELECT autoembed.create_match_function('documents')")
    api_db.execute("SET hnsw.ef_search = 7")
    settings = "SELECT current_setting('hnsw.ef_search') AS ef, current_setting('hnsw.iterative_scan') AS scan"

    with api_db.transaction():
        api_db.execute("SET LOCAL hnsw.ef_search = 8; SET LOCAL hnsw.iterative_scan = relaxed_order")
        api_db.execute("SELECT * FROM match_documents(%s::vector)", [vector("question")])
        assert api_db.execute(settings).fetchone() == ("8", "relaxed_order")
    assert api_db.execute(settings).fetchone() == ("7", "off")


@STORAGES
def test_names_are_data(api_db: Connection, column: str) -> None:
    api_db.execute("""
        CREATE SCHEMA "my {{start}} 'schema'";
        CREATE TABLE "my {{start}} 'schema'"."a ""table"" $body$" (
            "the Key" int PRIMARY KEY, t text, _hits text, "100 %s %I" text, "{{end}} $1 'it'" text, gone text, h int
        );
        ALTER TABLE "my {{start}} 'schema'"."a ""table"" $body$" DROP COLUMN gone;
        INSERT INTO "my {{start}} 'schema'"."a ""table"" $body$"
        VALUES (1, 'one', 'a', 'b', 'c', 2), (2, 'two', '', '', '', 0);
    """)
    table = """"my {{start}} 'schema'"."a ""table"" $body$\""""
    api_db.execute(f"SELECT autoembed.enable(%s, {column}, content_columns => '{{t}}')", [table])
    api_db.execute("SELECT autoembed.process()")
    api_db.execute("SELECT autoembed.create_match_function(%s)", [table])

    function = """"my {{start}} 'schema'"."match_a ""table"" $body$\""""
    found = api_db.execute(
        f"SELECT * FROM {function}(%s, filter => %s)".encode(), [vector("one"), '{"t": "one", "100 %s %I": "b"}']
    ).fetchall()
    assert [tuple(row)[:6] for row in found] == [(1, "one", "a", "b", "c", 2)]
    api_db.execute("SELECT autoembed.create_match_function(%s, name => 'Find \"it\"')", [table])
    named = api_db.execute(b"""SELECT * FROM "my {{start}} 'schema'"."Find ""it""\"(%s)""", [vector("two")]).fetchall()
    assert [row[1] for row in named] == ["two", "one"]


# The aliases and the variables of sql/templates/ and of a search.
ALIASES = """
    a b c d e f g h i j k l m n o p q r s t u v w x y z key hit rank score distance place number start stop digest raw
    compared fetched found listed given vector content keys written locked sent old new _hits _limit _r
"""


@STORAGES
def test_columns_of_a_composite_type_may_have_the_names_of_aliases(api_db: Connection, column: str) -> None:
    api_db.execute("CREATE TYPE pair AS (first int, second text)")
    columns = ", ".join(f'"{name}" pair' for name in ALIASES.split())
    api_db.execute(f"CREATE TABLE documents (id int PRIMARY KEY, body text, {columns})".encode())
    arguments = f"{column}, content_columns => '{{body}}', text_config => 'english', condition => 'id > 0'"
    api_db.execute(f"SELECT autoembed.enable('documents', {arguments})".encode())
    api_db.execute("INSERT INTO documents (id, body, c) VALUES (1, 'one', (1, 'x')), (2, 'two', NULL)")
    api_db.execute("SELECT autoembed.process(); SELECT autoembed.create_match_function('documents')")

    found = api_db.execute("SELECT id, body, (c).second FROM match_documents(%s, 1)", [vector("one")]).fetchall()

    assert found == [(1, "one", "x")]
    filtered = api_db.execute("SELECT id FROM match_documents(%s, filter => %s)", [vector("one"), '{"body": "two"}'])
    assert filtered.fetchall() == [(2,)]
    for mode in ("vector", "text", "hybrid"):
        rows = api_db.execute("SELECT key FROM autoembed.search('documents', 'one', 1, mode => %s)", [mode]).fetchall()
        assert rows == [("[1]",)], mode
    if column == "NULL":
        assert api_db.execute("SELECT chunk FROM documents_chunks ORDER BY id").fetchall() == [("one",), ("two",)]
    api_db.execute("UPDATE documents SET body = 'three', c = (3, 'z') WHERE id = 2; DELETE FROM documents WHERE id = 1")
    api_db.execute("SELECT autoembed.process()")
    assert api_db.execute("SELECT id, body FROM match_documents(%s)", [vector("three")]).fetchall() == [(2, "three")]


@STORAGES
@pytest.mark.parametrize("filter", ["{}", '{"even": true}'])
def test_long_columns_are_read_of_the_nearest_rows_alone(attached: Connection, column: str, filter: str) -> None:
    """PostgreSQL reads a long value from another table as soon as it is part of a composite value."""
    attached.execute("ALTER TABLE documents ADD COLUMN long text")
    attached.execute("ALTER TABLE documents ALTER long SET STORAGE EXTERNAL")
    attached.execute("DROP FUNCTION match_documents; SELECT autoembed.create_match_function('documents')")
    toast = toast_table_of(attached, "documents")
    call = f"SELECT long FROM match_documents('{vector('question')}', 2, '{filter}')"
    without = rows_read(attached, call, toast)[toast]

    attached.execute("UPDATE documents SET long = repeat('x', 3000)")

    one = rows_read(attached, "SELECT md5(long) FROM documents LIMIT 1", toast)[toast]
    # Rows that may have several chunks are fetched with some to spare.
    assert rows_read(attached, call, toast)[toast] == without + one * (8 if column == "NULL" else 2)


def test_it_follows_a_new_column_when_it_is_made_again(api_db: Connection) -> None:
    api_db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    api_db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
    first = api_db.execute("SELECT autoembed.create_match_function('documents')").fetchall()
    assert api_db.execute("SELECT autoembed.create_match_function('documents')").fetchall() == first

    api_db.execute("ALTER TABLE documents ADD COLUMN lang text")
    with pytest.raises(psycopg.errors.InvalidFunctionDefinition, match="return type"):
        api_db.execute("SELECT autoembed.create_match_function('documents')")
    api_db.execute("DROP FUNCTION match_documents; SELECT autoembed.create_match_function('documents')")
    assert api_db.execute("SELECT lang FROM match_documents(NULL)").fetchall() == []
    api_db.execute("DROP TABLE documents")


@pytest.mark.parametrize(
    ("call", "sqlstate", "message"),
    [
        ("'pages', name => repeat('x', 64)", "42622", "must have from 1 to 63 bytes"),
        ("'pages', name => ''", "42602", "must have from 1 to 63 bytes"),
        ("'pages', embedding_column => 'e'", "42704", 'column "e" of table'),
        ("'alone'", "42704", "table public.alone is not attached"),
        ("'taken'", "42701", 'has a column "filter"'),
    ],
)
def test_what_cannot_be_made_is_refused_with_a_reason(
    api_db: Connection, call: str, sqlstate: str, message: str
) -> None:
    for table in ("pages (id int PRIMARY KEY, body text)", "taken (id int PRIMARY KEY, body text, filter text)"):
        api_db.execute(f"CREATE TABLE {table}")
        api_db.execute(f"SELECT autoembed.enable('{table.split()[0]}', content_columns => '{{body}}')")
    api_db.execute("CREATE TABLE alone (id int PRIMARY KEY)")

    with pytest.raises(psycopg.Error) as refusal:
        api_db.execute(f"SELECT autoembed.create_match_function({call})")

    assert refusal.value.sqlstate == sqlstate
    assert message in str(refusal.value)


def test_a_negative_count_is_refused(api_db: Connection) -> None:
    api_db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    api_db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
    api_db.execute("SELECT autoembed.create_match_function('documents')")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="match_count must be 0 or more, not -1"):
        api_db.execute("SELECT * FROM match_documents(NULL, -1)")


def test_a_vector_of_another_model_is_refused(api_db: Connection) -> None:
    api_db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    api_db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
    api_db.execute("INSERT INTO documents VALUES (1, 'one')")
    api_db.execute("SELECT autoembed.process(), autoembed.create_match_function('documents')")

    with pytest.raises(psycopg.errors.DataException) as refusal:
        api_db.execute("SELECT * FROM match_documents('[1,2]')")

    diagnosis = refusal.value.diag
    assert diagnosis.message_primary == (
        "query_embedding has 2 dimensions, and the embeddings of table public.documents have others"
    )
    assert "SELECT" not in (diagnosis.context or "")
