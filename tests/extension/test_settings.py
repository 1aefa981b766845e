"""Settings of sessions and rights of databases that are unusual, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, Server, waiting, warnings_of
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]

SETTINGS = {
    "backslashes are escapes": "standard_conforming_strings = off",
    "names are quoted": "quote_all_identifiers = on",
    "row security is off": "row_security = off",
}
# A backslash and a quote are in the text, a class of a regular expression in the condition.
TEMPLATE = r"""# {title} \\ it's\n{body}"""
CONDITION = r"title ~ '^\w+ ?\d*$'"


def text_of(title: str, body: str) -> str:
    return f"# {title} \\ it's\n{body}"


@contextmanager
def an_owner(server: Server, db: Connection, dbname: str, role: Callable[[str], str]) -> Iterator[Connection]:
    """A session of a role that owns its schema, and may attach tables."""
    owner = role("owner")
    db.execute(f"CREATE SCHEMA {owner} AUTHORIZATION {owner}")
    db.execute(f"SELECT autoembed.grant_usage('{owner}')")
    with server.connect(dbname, user=owner) as connection:
        yield connection


def is_right(db: Connection) -> bool:
    rows = db.execute("SELECT title, body, embedding::vector::real[] AS v FROM notes").fetchall()
    return all(
        row.v is not None and np.allclose(row.v, embedding_of(text_of(row.title, row.body)), atol=1e-3)
        if row.title != "no match!"
        else row.v is None
        for row in rows
    )


def functions(db: Connection) -> list[Any]:
    made = "SELECT proname, oid FROM pg_proc WHERE proname ~ '^_(content|write|scan|text|capture)_[0-9]+$' ORDER BY 1"
    return db.execute(made).fetchall()


@pytest.mark.parametrize("odd", ["all sessions", "the owner's", "the lanes'"])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_setting_of_a_session_changes_no_text_and_no_condition(
    server: Server,
    db: Connection,
    api: FakeApi,
    dbname: str,
    role: Callable[[str], str],
    connect: Connect,
    setting: str,
    odd: str,
) -> None:
    with an_owner(server, db, dbname, role) as owner:
        statement = f"SET {SETTINGS[setting]}"
        if odd != "the lanes'":
            owner.execute(statement)
        owner.execute("SET escape_string_warning = on")

        def connect_odd(**options: Any) -> Connection:
            lane = connect(**options)
            if odd != "the owner's":
                lane.execute(statement)
            return lane

        with warnings_of(owner) as heard:
            owner.execute("CREATE TABLE notes (id int PRIMARY KEY, title text, body text)")
            # A parameter is no literal, and means the same in each session.
            owner.execute(
                "SELECT autoembed.enable('notes', 'embedding', content_template => %s, condition => %s)",
                [TEMPLATE, CONDITION],
            )
            owner.execute("INSERT INTO notes VALUES (1, 'one', 'a'), (2, 'two 22', 'b'), (3, 'no match!', 'c')")
            before = functions(db)
            with running_lanes(db, connect_odd):
                wait_until(lambda: waiting(db) == 0)
                assert is_right(owner)
                owner.execute("UPDATE notes SET body = 'new' WHERE id = 1")
                owner.execute("UPDATE notes SET title = 'no match!' WHERE id = 2")
                owner.execute("UPDATE notes SET embedding = NULL WHERE id = 1")
                wait_until(lambda: waiting(db) == 0)
                assert is_right(owner)
                sent = api.counters()["requests"]
                owner.execute("SELECT autoembed.resync('notes')")
                wait_until(lambda: db.execute("SELECT FROM autoembed.backfill").rowcount == 0)
                assert api.counters()["requests"] == sent
                owner.execute("SELECT autoembed.reembed('notes', condition => %s)", [r"title ~ '^o\w+$'"])
                wait_until(lambda: db.execute("SELECT FROM autoembed.backfill").rowcount == 0)
                assert api.counters()["requests"] == sent + 1
            # Sessions with other settings do not make the functions again and again.
            assert functions(db) == before
            row = owner.execute("SELECT content, state FROM autoembed.preview('notes', '1')").fetchone()
            assert row == (text_of("one", "new"), "fresh")
            row = owner.execute("SELECT rows FROM autoembed.estimate('notes')").fetchone()
            assert row == (1,)
            owner.execute("ALTER TABLE notes ADD COLUMN more int")
            assert db.execute("SELECT FROM autoembed.backfill").rowcount == 0
            owner.execute("SELECT autoembed.pause('notes')")
            owner.execute("SELECT autoembed.resume('notes')")
            owner.execute("SELECT autoembed.alter_pipeline('notes', condition => '')")
            owner.execute("SELECT autoembed.disable('notes')")
    assert heard == []


def test_without_the_right_to_temporary_tables_only_a_new_condition_is_refused(
    server: Server, db: Connection, api: FakeApi, dbname: str, role: Callable[[str], str]
) -> None:
    """The error spoke of the condition, which was right, and had a hint about expressions."""
    db.execute(f"REVOKE TEMPORARY ON DATABASE {dbname} FROM PUBLIC")
    with an_owner(server, db, dbname, role) as owner:
        owner.execute("CREATE TABLE notes (id int PRIMARY KEY, title text, body text)")
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="may not create temporary tables") as refused:
            owner.execute(
                "SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}', condition => 'id > 0')"
            )
        db.execute(str(refused.value.diag.message_hint).split(", at least")[0])
        owner.execute(
            "SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}', condition => 'id > 0')"
        )
        db.execute(f"REVOKE TEMPORARY ON DATABASE {dbname} FROM {owner.info.user}")
        owner.execute("INSERT INTO notes VALUES (1, 'one', 'a')")
        db.execute("SELECT autoembed.process()")
        assert owner.execute("SELECT embedding IS NOT NULL FROM notes").fetchone() == (True,)


def test_columns_with_the_names_of_generated_sql_capture_nothing(db: Connection, api: FakeApi) -> None:
    """A column t or k1 could be taken for an alias, of a table that had it or that got it later."""
    names = [
        *"tsrnokwxpqabc",
        "k1",
        "k2",
        "key",
        "keys",
        "content",
        "contents",
        "embeddings",
        "model",
        "outcome",
        "new",
        "old",
        "new_rows",
        "old_rows",
        "sent",
        "locked",
        "written",
        "unchanged",
        "after",
        "condition",
        "max_rows",
        "bytes",
        "vector_digest",
        "_rows",
        "_context",
        "tg_op",
        "due_at",
        "message",
        "position",
        "number",
        "value",
    ]
    columns = ", ".join(f'"{name}" int DEFAULT 5' for name in names)
    db.execute(f"CREATE TABLE before (id int, k3 text, {columns}, body text, PRIMARY KEY (id, k3))")
    db.execute("CREATE TABLE later (id int, k3 text, body text, PRIMARY KEY (id, k3))")
    for table in ("before", "later"):
        db.execute(f"CREATE FUNCTION its_text(r {table}) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT r.body'")
        db.execute("CREATE OR REPLACE FUNCTION its_text(r int) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT r::text'")
        attach = f"SELECT autoembed.enable('{table}', content_function => 'its_text', embedding_column => 'by_function'"
        db.execute(attach + ", condition => 'id > 0')")
        db.execute(f"SELECT autoembed.enable('{table}', 'embedding', content_columns => '{{body}}')")
    for name in names:
        db.execute(f'ALTER TABLE later ADD COLUMN "{name}" int DEFAULT 5')

    for table in ("before", "later"):
        db.execute(f"INSERT INTO {table} (id, k3, body) SELECT n, 'k', 'text ' || n FROM generate_series(1, 3) AS n")
        db.execute(f"UPDATE {table} SET body = 'new' WHERE id = 1")
        db.execute(f"UPDATE {table} SET id = 9 WHERE id = 2")
        db.execute("SELECT autoembed.process()")
        for column in ("by_function", "embedding"):
            condition = " AND ".join(f'"{name}" = 5' for name in names)
            db.execute("SELECT autoembed.reembed(%s::text::regclass, %s, condition => %s)", [table, column, condition])
        for _ in range(3):
            db.execute("SELECT autoembed.process(batch_size => 2, max_requests => 1)")
        db.execute("SELECT autoembed.process()")
        assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []
        rows = db.execute(
            f"SELECT body, by_function::vector::real[] AS f, embedding::vector::real[] AS e FROM {table}"
        ).fetchall()
        assert len(rows) == 3
        for row in rows:
            assert np.allclose(row.f, embedding_of(row.body), atol=1e-3)
            assert np.allclose(row.e, embedding_of(row.body), atol=1e-3)
        assert waiting(db) == 0


@pytest.mark.parametrize("form", ["columns", "template"])
def test_a_text_may_come_from_more_columns_than_a_function_has_arguments(
    db: Connection, api: FakeApi, form: str
) -> None:
    names = [f"c{n}" for n in range(250)]
    db.execute(f"CREATE TABLE wide (id int PRIMARY KEY, {', '.join(f'{name} text' for name in names)})")
    content = {
        "columns": f"content_columns => '{{{','.join(names)}}}'",
        "template": f"content_template => '{' '.join(f'{{{name}}}' for name in names)}'",
    }[form]
    db.execute(f"SELECT autoembed.enable('wide', 'embedding', {content})")
    db.execute("INSERT INTO wide (id, c0, c120, c249) VALUES (1, 'first', 'middle', 'last')")
    db.execute("UPDATE wide SET c249 = 'end'")

    db.execute("SELECT autoembed.process()")

    row = db.execute("SELECT content, state FROM autoembed.preview('wide', '1')").fetchone()
    assert row is not None
    assert (row.content.split(), row.state) == (["first", "middle", "end"], "fresh")
    assert [request["texts"] for request in api.log()] == [[row.content]]
