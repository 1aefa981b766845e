"""Arguments that are NULL, empty, endless or out of range: each call works, or is refused in a sentence with a hint."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection

# The arguments without which no call works. A function that is left out takes none, or is a trigger.
NEEDED = {
    "allow_http_host": {"host": "'example.org'"},
    "alter_model": {"name": "'text-embedding-3-small'"},
    "alter_pipeline": {"table_name": "'pages'"},
    "chunk_text": {"content": "'a text'"},
    "create_match_function": {"table_name": "'pages'", "function_name": "'match_pages'"},
    "create_model": {"name": "'m'", "provider": "'fake'", "dimensions": "3"},
    "create_rerank_model": {"name": "'r'", "provider": "'tei'", "base_url": "'http://127.0.0.1:1'"},
    "disable": {"table_name": "'pages'"},
    "drop_model": {"name": "'spare'"},
    "embed": {"content": "'a text'"},
    "embed_query": {"table_name": "'pages'", "query": "'a text'"},
    "enable": {"table_name": "'plain'", "content_columns": "'{body}'"},
    "estimate": {"table_name": "'pages'"},
    "evaluate_search": {"table_name": "'pages'", "judgments": "'judgments'"},
    "grant_lane": {"role": "'postgres'"},
    "grant_monitor": {"role": "'postgres'"},
    "grant_usage": {"role": "'postgres'"},
    "measure_recall": {"table_name": "'pages'"},
    "pause": {"table_name": "'pages'"},
    "preview": {"table_name": "'pages'", "key": "'1'"},
    "process": {},
    "reembed": {"table_name": "'pages'"},
    "reset_search_stats": {},
    "resume": {"table_name": "'pages'"},
    "resume_model": {"name": "'spare'"},
    "resync": {"table_name": "'pages'"},
    "retry_failed": {},
    "schedule": {},
    "search": {"table_name": "NULL::pages", "query": "'a text'"},
    "search_rows": {"table_name": "NULL::pages", "query": "'a text'"},
    "set_default_model": {"name": "'text-embedding-3-small'"},
    "tune": {"table_name": "'pages'"},
    "wait_until_fresh": {"table_name": "'pages'"},
    "work": {"run_seconds": "0"},
    "_rerank": {"model": "'rerank'", "query": "'a text'", "passages": "'{a,b}'"},
}
WITHOUT_ARGUMENTS = {"doctor", "unschedule", "clear_column", "queue_embeddings"}
ODD = {
    "integer": ["NULL", "-1", "0", "2147483647", "-2147483648"],
    "bigint": ["NULL", "-1", "0", "9223372036854775807"],
    "double precision": ["NULL", "-1", "0", "'NaN'", "'Infinity'", "'-Infinity'", "1e300", "1e-300"],
    "numeric": ["NULL", "-1", "0", "'NaN'", "'Infinity'", "1e300"],
    "text": ["NULL", "''", "' '", "repeat('x', 100000)", "E'\\'; --\\n\"'"],
    "name": ["NULL", "''", "'no such'"],
    "regclass": ["NULL", "0", "'pg_class'"],
    "regrole": ["NULL", "0"],
    "text[]": ["NULL", "'{}'", "ARRAY[NULL]", "'{\"\"}'", "'{{a},{b}}'"],
    "name[]": ["NULL", "'{}'", "ARRAY[NULL]", "'{\"\"}'", "'{{a},{b}}'"],
    "boolean": ["NULL"],
    "jsonb": ["NULL", "'null'", "'[]'", "'{}'", "'{\"\": 1e400}'"],
}
# PostgreSQL's own words, without a hint, for a relation that is not there, and for one of the system.
POSTGRES_OWN = {"42P01", "42501"}
INNER = ("Error", "Traceback", "SPI", "syntax error at end")


@pytest.fixture
def pages(db: Connection, api: FakeApi) -> Connection:
    db.execute("""
        CREATE TABLE pages (id int PRIMARY KEY, body text);
        CREATE TABLE plain (id int PRIMARY KEY, body text);
        CREATE TABLE judgments (query text, key text, grade int);
        CREATE FUNCTION give_scores(query text, passages text[]) RETURNS float8[] LANGUAGE sql
        RETURN array_fill(0.5::float8, ARRAY[cardinality(passages)]);
        SELECT autoembed.create_rerank_model('rerank', 'function', 'public.give_scores');
        SELECT autoembed.create_model('spare', 'fake', 3);
        SELECT autoembed.enable('pages', content_columns => '{body}', text_config => 'english');
        INSERT INTO pages SELECT n, 'text ' || n FROM generate_series(1, 20) AS n;
        SELECT autoembed.process();
        INSERT INTO judgments VALUES ('a text', '1', 1);
        SET statement_timeout = '5s';
    """)
    return db


def calls(db: Connection) -> Iterator[tuple[str, str]]:
    """Each public function, with each argument in turn replaced by each odd value of its type."""
    found = db.execute("""
        SELECT p.proname AS name, p.prokind = 'p' AS is_procedure,
               array_agg(a.name ORDER BY a.place) AS names, array_agg(a.type ORDER BY a.place) AS types
        FROM pg_proc AS p
        CROSS JOIN LATERAL (
            SELECT n.place, n.name, format_type(t.type, NULL) AS type
            FROM unnest(p.proargnames) WITH ORDINALITY AS n(name, place)
            JOIN unnest(p.proargtypes::oid[]) WITH ORDINALITY AS t(type, place) USING (place)
        ) AS a
        WHERE p.pronamespace = 'autoembed'::regnamespace AND (p.proname !~ '^_' OR p.proname = '_rerank')
        GROUP BY p.oid
        HAVING NOT (p.proname = 'search' AND 'anyelement' <> ALL (array_agg(a.type)))
        ORDER BY p.proname
    """).fetchall()
    assert {one.name for one in found} | WITHOUT_ARGUMENTS == NEEDED.keys() | WITHOUT_ARGUMENTS
    for one in found:
        for name, type_ in zip(one.names, one.types, strict=True):
            for value in ODD.get(type_, []):
                odd = value if value.startswith("ARRAY") is False else f"{value}::{type_}"
                arguments = ", ".join(f"{n} => {v}" for n, v in {**NEEDED[one.name], name: odd}.items())
                verb = "CALL" if one.is_procedure else "SELECT * FROM"
                yield f"{one.name}({name} => {value[:30]})", f"{verb} autoembed.{one.name}({arguments})"


def fault_of(db: Connection, call: str) -> str | None:
    """The error of a call that shows something inner, or has no hint."""
    try:
        if call.startswith("CALL"):
            db.execute(call.encode())
        else:
            with db.transaction(force_rollback=True):
                db.execute(call.encode())
    except psycopg.Error as error:
        words = f"{error.diag.sqlstate} {error.diag.message_primary} / {error.diag.message_hint}"
        if error.diag.sqlstate in POSTGRES_OWN:
            return None
        is_inner = any(word in (error.diag.message_primary or "") for word in INNER)
        if is_inner or error.diag.sqlstate == "XX000" or not error.diag.message_hint:
            return words
    return None


def test_odd_arguments_are_taken_or_refused_in_a_sentence_with_a_hint(pages: Connection) -> None:
    faults = {name: fault for name, call in calls(pages) if (fault := fault_of(pages, call)) is not None}

    assert not faults, "\n".join(f"{name}: {fault}" for name, fault in faults.items())
