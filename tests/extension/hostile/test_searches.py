"""A search reads the table of somebody else, runs no code of its owner, and shows no hidden row of it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from extension.hostile.tenants import ATTACK, Tenant, assert_nothing_gained
from harness import Connection
from waiting import wait_until

# A table of mallory whose owner's code a careless reader would run. {name}: the key column.
TABLE = """
    CREATE TABLE notes ({name} {type} PRIMARY KEY, content text, mood mood NOT NULL DEFAULT 'sad');
    SELECT autoembed.enable('notes', content_columns => '{content}', text_config => 'english', condition => {condition})
"""
TYPES = """
    CREATE FUNCTION checked() RETURNS boolean LANGUAGE plpgsql AS
        'BEGIN PERFORM {me}.attack(); RETURN true; END';
    CREATE TYPE mood AS ENUM ('glad', 'sad', '{"sad"}', '(sad)', '[sad,sad]');
    CREATE FUNCTION mood_of(word text) RETURNS mood LANGUAGE plpgsql AS
        'BEGIN PERFORM {me}.attack(); RETURN ''sad''; END';
    CREATE CAST (text AS mood) WITH FUNCTION mood_of;
    CREATE FUNCTION json_of(word mood) RETURNS json LANGUAGE plpgsql AS
        'BEGIN PERFORM {me}.attack(); RETURN ''"sad"''; END';
    CREATE CAST (mood AS json) WITH FUNCTION json_of;
    CREATE DOMAIN checked_text AS text CHECK (checked());
    CREATE TYPE pair AS (word checked_text);
    CREATE TYPE span AS RANGE (subtype = text);
    CREATE FUNCTION span_of(word text) RETURNS span LANGUAGE plpgsql AS
        'BEGIN PERFORM {me}.attack(); RETURN span(''sad'', ''sad'', ''[]''); END';
    CREATE CAST (text AS span) WITH FUNCTION span_of;
"""
# The type of the key, and a value of it.
KEYS = {
    "domain": ("checked_text", "sad"),
    "enum": ("mood", "sad"),
    "composite type": ("pair", "(sad)"),
    "array of a domain": ("checked_text[]", "{sad}"),
    "array of an enum": ("mood[]", "{sad}"),
    "range": ("span", "[sad,sad]"),
}
CONDITIONS = {
    "function": "'checked()'",
    "query in a function of PostgreSQL": "'query_to_xml(''SELECT {me}.attack()'', true, true, '''') IS NOT NULL'",
}
# None but the last statement of each gives rows.
SEARCHES = {
    "search by both": "SELECT * FROM autoembed.search('{me}.notes', 'word')",
    "search by meaning": "SELECT * FROM autoembed.search(NULL::{me}.notes, 'word', mode => 'vector')",
    "search by words": "SELECT * FROM autoembed.search('{me}.notes', 'word', mode => 'text')",
    "search of rows": "SELECT * FROM autoembed.search_rows(NULL::{me}.notes, 'word')",
    "search with a condition": """
        SELECT * FROM autoembed.search('{me}.notes', 'word', mode => 'text', condition => 'content <> ''''')""",
    "recall": "SELECT * FROM autoembed.measure_recall('{me}.notes')",
    "tune": "SELECT * FROM autoembed.tune('{me}.notes')",
    "match function": """
        SELECT autoembed.create_match_function('{me}.notes');
        SELECT * FROM {me}.match_notes(autoembed.embed('word'), filter => '{"content": "word"}')""",
}


def found(db: Connection, mallory: Tenant, search: str) -> bool:
    """Whether a superuser who searches the table finds something."""
    *before, last = SEARCHES[search].replace("{me}", mallory.name).split(";")
    for statement in before:
        db.execute(statement)
    return bool(db.execute(last).fetchall())


def table(mallory: Tenant, type: str, value: str, condition: str = "NULL", name: str = "id") -> None:
    made = TABLE.replace("{type}", type).replace("{condition}", condition).replace("{name}", name)
    mallory.run(ATTACK, TYPES, made)
    mallory.session.execute("INSERT INTO notes VALUES (%s, 'word')", [value])


@pytest.mark.parametrize("key", KEYS)
def test_a_search_runs_no_code_of_a_key(db: Connection, mallory: Tenant, key: str) -> None:
    table(mallory, *KEYS[key])
    db.execute("SELECT autoembed.process()")

    for search in SEARCHES:
        assert found(db, mallory, search), search

    assert_nothing_gained(db, mallory)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("written", ["by enable()", "by hand"])
def test_a_search_runs_no_code_of_a_condition(db: Connection, mallory: Tenant, condition: str, written: str) -> None:
    table(mallory, "int", "1", CONDITIONS[condition])
    db.execute("SELECT autoembed.process()")
    if written == "by hand":
        mallory.run("UPDATE autoembed.pipeline SET condition_objects = '{}'")
    mallory.run("UPDATE notes SET content = 'word again'")

    for search in SEARCHES:
        # A text that has changed may not be known yet.
        found(db, mallory, search)

    assert_nothing_gained(db, mallory)


@pytest.mark.parametrize("name", ["share %", "%1$s", 'a"b::text', "{{id}}"])
def test_a_search_takes_any_name_of_a_key(db: Connection, mallory: Tenant, name: str) -> None:
    quoted = '"' + name.replace('"', '""') + '"'
    table(mallory, "int", "1", name=quoted)
    db.execute("SELECT autoembed.process()")

    for search in SEARCHES:
        assert found(db, mallory, search), search


@pytest.mark.parametrize("name", ["x::text", "%1$s::public.halfvec(8) AS d --"])
def test_a_search_takes_any_name_of_an_embedding_column(db: Connection, mallory: Tenant, name: str) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    mallory.session.execute(
        "SELECT autoembed.enable('notes', %s, content_columns => '{content}', text_config => 'english')", [name]
    )
    mallory.run("INSERT INTO notes VALUES (1, 'word'), (2, 'another word')")
    db.execute("SELECT autoembed.process()")

    for search in SEARCHES:
        assert found(db, mallory, search), search


# Columns of an embeddings table that get a type of the owner's. A comparison of the type calls its cast.
CAST = """
    CREATE TYPE number AS (value int);
    CREATE FUNCTION int_of(n number) RETURNS int LANGUAGE plpgsql AS
        'BEGIN PERFORM {me}.attack(); RETURN n.value; END';
    CREATE CAST (number AS int) WITH FUNCTION int_of AS IMPLICIT;
    CREATE FUNCTION bytea_of(n number) RETURNS bytea LANGUAGE plpgsql AS
        'BEGIN PERFORM {me}.attack(); RETURN ''x''; END';
    CREATE CAST (number AS bytea) WITH FUNCTION bytea_of AS IMPLICIT;
"""
COLUMNS = {
    "chunk_number": "ROW(chunk_number)::number",
    "chunk_start": "ROW(chunk_start)::number",
    "chunk_end": "ROW(chunk_end)::number",
    "digest": "ROW(1)::number",
}


@pytest.mark.parametrize("column", COLUMNS)
def test_a_search_calls_no_cast_of_a_column_of_an_embeddings_table(
    db: Connection, mallory: Tenant, column: str
) -> None:
    mallory.run(
        ATTACK,
        CAST,
        "CREATE TABLE notes (id int PRIMARY KEY, content text)",
        "SELECT autoembed.enable('notes', content_columns => '{content}', text_config => 'english')",
        "INSERT INTO notes VALUES (1, 'word')",
    )
    db.execute("SELECT autoembed.process()")
    mallory.run(
        "DROP VIEW notes_chunks; DROP POLICY autoembed_readers ON notes_embeddings",
        f"ALTER TABLE notes_embeddings ALTER {column} TYPE number USING {COLUMNS[column]}",
    )

    for search in SEARCHES:
        with pytest.raises(psycopg.errors.DatatypeMismatch, match="have other types than"):
            found(db, mallory, search)

    assert_nothing_gained(db, mallory)


def test_a_key_of_an_embeddings_table_gets_its_type_again_and_the_rows_their_embeddings(
    db: Connection, mallory: Tenant
) -> None:
    mallory.run(
        ATTACK,
        CAST,
        "CREATE TABLE notes (id int PRIMARY KEY, content text)",
        "SELECT autoembed.enable('notes', content_columns => '{content}', text_config => 'english')",
        "INSERT INTO notes VALUES (1, 'word')",
    )
    db.execute("SELECT autoembed.process()")

    mallory.run(
        "DROP VIEW notes_chunks; DROP POLICY autoembed_readers ON notes_embeddings",
        "ALTER TABLE notes_embeddings ALTER id TYPE number USING ROW(id)::number",
    )
    db.execute("SELECT autoembed.process()")

    assert db.execute(f"SELECT id FROM {mallory.name}.notes_embeddings".encode()).fetchall() == [(1,)]
    for search in SEARCHES:
        assert found(db, mallory, search), search
    assert_nothing_gained(db, mallory)


# These stand before those of PostgreSQL in a search_path.
SHADOWED_TYPES = ["text", "name", "oid", "regclass", "json", "jsonb", "bytea", "timestamptz"]
SHADOWED_OPERATORS = {
    "=": "text name oid int4 int8 float8",
    "<>": "text int4",
    "||": "text bytea",
    **dict.fromkeys(("<", "<=", ">", ">=", "+", "-", "*"), "int4 int8 float8"),
}


def test_a_search_takes_no_type_or_operator_from_the_search_path(
    db: Connection, mallory: Tenant, connect: Callable[..., Connection]
) -> None:
    mallory.run(
        ATTACK,
        """CREATE FUNCTION checked() RETURNS boolean LANGUAGE plpgsql SET search_path = pg_catalog AS
               'BEGIN PERFORM {me}.attack(); RETURN true; END'""",
        "CREATE TABLE notes (id int PRIMARY KEY, content text)",
        "SELECT autoembed.enable('notes', content_columns => '{content}', text_config => 'english')",
        "INSERT INTO notes VALUES (1, 'word'), (2, 'another word')",
        *(f"CREATE DOMAIN {{me}}.{type} AS pg_catalog.{type} CHECK ({{me}}.checked())" for type in SHADOWED_TYPES),
        "CREATE DOMAIN {me}.record AS pg_catalog.text CHECK ({me}.checked())",
        *(
            f"""CREATE FUNCTION {{me}}.act(pg_catalog.{left}, pg_catalog.{right}) RETURNS boolean LANGUAGE plpgsql AS
                    'BEGIN RETURN {{me}}.checked(); END';
                CREATE OPERATOR {{me}}.{operator} (
                    LEFTARG = pg_catalog.{left}, RIGHTARG = pg_catalog.{right}, FUNCTION = {{me}}.act
                )""".replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION")
            for operator, types in SHADOWED_OPERATORS.items()
            for left in types.split()
            for right in types.split()
        ),
    )
    db.execute("SELECT autoembed.process()")

    # The names in a condition are the caller's own.
    for search in SEARCHES.keys() - {"search with a condition"}:
        session = connect(options=f"-c search_path={mallory.name},pg_catalog,public")
        assert found(session, mallory, search), search

    assert_nothing_gained(db, mallory)


@pytest.mark.parametrize("mode", ["vector", "hybrid", "text"])
def test_no_plan_of_a_search_shows_a_hidden_row(db: Connection, bob: Tenant, mallory: Tenant, mode: str) -> None:
    bob.run(
        "ALTER TABLE letters ALTER id TYPE text",
        "SELECT autoembed.alter_pipeline('letters', text_config => 'english')",
        "INSERT INTO letters SELECT 'seen' || n, 'a letter' FROM generate_series(1, 30) AS n",
        "INSERT INTO letters VALUES ('hidden key', 'a letter of secrets')",
        "ALTER TABLE letters ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY seen ON letters TO {mallory.name} USING (id ~ 'seen')",
        f"GRANT USAGE ON SCHEMA {{me}} TO {mallory.name}; GRANT SELECT ON letters TO {mallory.name}",
    )
    db.execute("SELECT autoembed.process()")
    # Not yet in the index.
    bob.run("UPDATE letters SET content = 'a letter of more secrets' WHERE id = 'hidden key'")
    shown: list[str] = []
    mallory.session.add_notice_handler(lambda notice: shown.append(f"{notice.message_primary}{notice.message_detail}"))
    mallory.run("SET client_min_messages = log; SET debug_print_plan = on")

    for condition in ("NULL", "$$set_config('debug_print_plan', 'on', false) IS NOT NULL$$"):
        arguments = f"'{bob.name}.letters', 'secrets', 10, 0, {condition}, NULL, '{mode}'"
        mallory.session.execute(f"SELECT FROM autoembed.search({arguments})")
        mallory.session.execute(f"SELECT FROM autoembed._search_page({arguments}, 0.7, 0, false, NULL)")

    plans = "".join(shown)
    assert "PLANNEDSTMT" in plans
    # A plan writes each byte of a text as a number.
    assert " ".join(str(byte) for byte in b"hidden key") not in plans
    assert mallory.session.execute("SHOW debug_print_plan").fetchall() == [("on",)]


# A provider that takes as long as a lock is held.
SLOW_MODELS = """
    CREATE SCHEMA app;
    CREATE FUNCTION app.vectors(texts text[]) RETURNS vector[] LANGUAGE plpgsql AS $$
    BEGIN
        IF texts = '{slow}' THEN
            PERFORM pg_advisory_xact_lock(1);
        END IF;
        RETURN array_fill('[1,0,0,0,0,0,0,1]'::vector, ARRAY[cardinality(texts)]);
    END $$;
    CREATE FUNCTION app.scores(query text, passages text[]) RETURNS real[] LANGUAGE plpgsql AS $$
    BEGIN
        PERFORM pg_advisory_xact_lock(1);
        RETURN array_fill(1::real, ARRAY[cardinality(passages)]);
    END $$;
    SELECT autoembed.create_model('waits', 'function', 8, 'app.vectors'), autoembed.set_default_model('waits'),
           autoembed.create_rerank_model('scores', 'function', 'app.scores');
"""
SLOW_SEARCHES = {
    "embedding": "'slow', mode => 'vector'",
    "embedding, with a condition": "'slow', mode => 'vector', condition => 'true'",
    "embedding, for both": "'slow'",
    "reranking": "'quick', rerank_model => 'scores'",
}


@pytest.mark.parametrize("search", SLOW_SEARCHES)
def test_a_search_reads_no_table_that_takes_the_place_of_another_meanwhile(
    db: Connection, mallory: Tenant, connect: Callable[..., Connection], dbname: str, search: str
) -> None:
    db.execute(SLOW_MODELS)
    db.execute(f"GRANT CREATE ON DATABASE {dbname} TO {mallory.name}".encode())
    mallory.run(
        ATTACK,
        "CREATE TABLE notes (id int PRIMARY KEY, content text)",
        "SELECT autoembed.enable('notes', content_columns => '{content}', text_config => 'english')",
        "INSERT INTO notes SELECT n, 'a note' FROM generate_series(1, 20) AS n",
    )
    db.execute("SELECT autoembed.process()")
    session = connect()
    ended: list[Any] = []

    def run() -> None:
        query = f"SELECT key FROM autoembed.search('{mallory.name}.notes'::regclass, {SLOW_SEARCHES[search]})"
        try:
            ended.append(len(session.execute(query.encode()).fetchall()))
        except psycopg.Error as error:
            ended.append(error.sqlstate)

    db.execute("SELECT pg_advisory_lock(1)")
    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: db.execute("SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").rowcount == 1)
    if search != "reranking":
        # The search holds a lock until it has read the table. A superuser may rename the schema even so.
        with pytest.raises(psycopg.errors.LockNotAvailable):
            mallory.run("ALTER SCHEMA {me} RENAME TO away_{me}")
    db.execute(f"SET event_triggers = off; ALTER SCHEMA {mallory.name} RENAME TO away_{mallory.name}".encode())
    db.execute("RESET event_triggers")
    mallory.run(
        "CREATE SCHEMA {me}",
        """CREATE FUNCTION {me}.checked() RETURNS boolean LANGUAGE plpgsql AS
               'BEGIN INSERT INTO away_{me}.ran VALUES (current_user); RETURN true; END'""",
        *(
            f"CREATE VIEW {{me}}.{name} AS SELECT * FROM away_{{me}}.{name} WHERE {{me}}.checked()"
            for name in ("notes", "notes_embeddings")
        ),
    )
    db.execute("SELECT pg_advisory_unlock(1)")
    thread.join()
    mallory.run("DROP SCHEMA {me} CASCADE; ALTER SCHEMA away_{me} RENAME TO {me}")

    assert ended == [10 if search == "reranking" else "40001"]
    assert_nothing_gained(db, mallory)
