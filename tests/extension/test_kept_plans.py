"""A session and a lane keep a bounded number of plans, however many tables they meet, and make none twice in a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fake_api import FakeApi
from harness import Connection

Connect = Callable[..., Connection]

TABLES = 12
# So many plans are kept here of statements that are made for a table: fewer than for all tables.
MOST_KEPT = 12

PLANS = "SELECT count(*) FROM pg_backend_memory_contexts WHERE name LIKE 'PL/Python plan%'"
HELPERS = f"""
CREATE FUNCTION keep_few() RETURNS void LANGUAGE plpython3u AS $$
    import sys
    sys.modules["autoembed.database.statements"].MAX_KEPT_PLANS = {MOST_KEPT}
$$;
CREATE FUNCTION count_prepared() RETURNS void LANGUAGE plpython3u AS $$
    prepare, GD["made"] = plpy.prepare, []
    plpy.prepare = lambda *arguments: (GD["made"].append(1), prepare(*arguments))[1]
$$;
CREATE FUNCTION prepared() RETURNS bigint LANGUAGE plpython3u AS $$
    made, GD["made"] = len(GD["made"]), []
    return made
$$
"""
SEARCH = "SELECT count(*) FROM autoembed.search(NULL::{}, 'the answer', mode => '{}')"


def number(session: Connection, statement: str) -> int:
    [(value,)] = session.execute(statement.encode()).fetchall()
    return int(value)


@pytest.fixture
def tables(db: Connection, api: FakeApi) -> list[str]:
    """Tables with a text index, each with a row that waits."""
    db.execute(HELPERS)
    db.execute(
        "SELECT autoembed.create_model('short', 'openai', 8, 'text-embedding-3-small', %s, 'env:OPENAI_API_KEY')",
        [api.base_url],
    )
    names = [f"t{number}" for number in range(TABLES)]
    for name in names:
        db.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, content text)".encode())
        db.execute(
            "SELECT autoembed.enable(%s, content_columns => '{content}', model => 'short', text_config => 'english')",
            [name],
        )
        db.execute(f"INSERT INTO {name} VALUES (1, 'the answer')".encode())
    return names


def test_a_session_that_searches_many_tables_keeps_few_plans(
    db: Connection, tables: list[str], connect: Connect
) -> None:
    session = connect()
    modes = ("text", "hybrid")

    def search(names: list[str]) -> int:
        for name in names:
            for mode in modes:
                assert number(session, SEARCH.format(name, mode)) == 1
        return number(session, PLANS)

    search(tables[:1])
    session.execute("SELECT keep_few()")
    most = search(tables[1:4])

    assert search(tables) <= most
    for name in tables:
        db.execute(f"ALTER TABLE {name} RENAME TO {name}_again".encode())
    assert search([f"{name}_again" for name in tables]) <= most


def test_a_search_that_is_repeated_prepares_nothing(db: Connection, tables: list[str], connect: Connect) -> None:
    """Nor do searches of many tables in turn."""
    session = connect()
    session.execute("SELECT count_prepared()")

    def search(mode: str) -> int:
        for name in tables:
            assert number(session, SEARCH.format(name, mode)) == 1
        return number(session, "SELECT prepared()")

    for mode in ("text", "hybrid", "vector"):
        search(mode)
        assert search(mode) == 0
        if mode == "text":
            db.execute("SELECT autoembed.process()")


@pytest.mark.parametrize("call", ["CALL autoembed.work(1)", "SELECT autoembed.process()"])
def test_a_lane_that_embeds_many_tables_keeps_few_plans(
    db: Connection, tables: list[str], connect: Connect, call: str
) -> None:
    session = connect()
    for name in tables[8:]:
        session.execute("SELECT autoembed.pause(%s)", [name])
    session.execute(call.encode())
    session.execute("SELECT keep_few()")
    session.execute("UPDATE t0 SET content = 'another answer'")
    session.execute(call.encode())
    most = number(session, PLANS)

    for name in tables[8:]:
        session.execute("SELECT autoembed.resume(%s)", [name])
    session.execute(call.encode())

    assert number(session, "SELECT count(*) FROM pgmq.q_embedding_jobs") == 0
    assert number(session, "SELECT count(*) FROM autoembed.failed") == 0
    assert number(session, PLANS) <= most
