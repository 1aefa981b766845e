"""A function of the user's that cuts texts into chunks: its pieces, its rights and limits, and what becomes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, waiting, warnings_of

SPLIT = "CREATE FUNCTION split(t text) RETURNS SETOF text LANGUAGE sql AS $$ SELECT string_to_table(t, '---') $$"
ENABLE = "SELECT autoembed.enable('pages', content_columns => '{body}', chunking => 'split')"


@pytest.fixture
def pages(db: Connection, api: FakeApi) -> Connection:
    """An attached table whose texts a function cuts at each ---."""
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute(SPLIT)
    db.execute(ENABLE)
    return db


def process(db: Connection) -> Any:
    return db.execute("SELECT * FROM autoembed.process()").fetchone()


def process_all(db: Connection) -> None:
    while waiting(db):
        db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        process(db)


def chunks(db: Connection) -> list[Any]:
    return db.execute("SELECT id, chunk_number, chunk FROM pages_chunks ORDER BY id, chunk_number").fetchall()


def failures(db: Connection) -> list[str]:
    return [row.reason for row in db.execute("SELECT reason FROM autoembed.failed ORDER BY key").fetchall()]


def test_the_pieces_of_the_function_are_the_chunks(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one --- two, 🐈‍⬛ ---  --- three'), (2, 'short')")

    process(pages)

    assert chunks(pages) == [(1, 1, "one"), (1, 2, "two, 🐈‍⬛"), (1, 3, "three"), (2, 1, "short")]
    for row in pages.execute(
        "SELECT chunk, substr(p.body, c.chunk_start + 1, c.chunk_end - c.chunk_start) AS part,"
        " embedding::real[] AS vector"
        " FROM pages_embeddings JOIN pages AS p USING (id) JOIN pages_chunks AS c USING (id, chunk_number)"
    ):
        assert row.chunk == row.part
        assert np.allclose(row.vector, embedding_of(row.chunk), atol=2e-3)


def test_only_changed_pieces_are_sent(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one --- two --- three')")
    process(pages)
    before = len(api.log())

    pages.execute("UPDATE pages SET body = 'zero --- one --- 2 --- three'")
    process(pages)

    assert [text for request in api.log()[before:] for text in request["texts"]] == ["zero", "2"]
    assert [chunk for _, _, chunk in chunks(pages)] == ["zero", "one", "2", "three"]


def test_a_piece_that_is_too_long_is_cut_at_its_structure(pages: Connection) -> None:
    long = "\n\n".join(f"This is paragraph {n} of a chapter, and it says so in ten words." for n in range(100))
    pages.execute("INSERT INTO pages VALUES (1, %s)", [f"one --- {long} --- two"])

    process(pages)

    found = [chunk for _, _, chunk in chunks(pages)]
    assert (found[0], found[-1]) == ("one", "two")
    assert len(found) > 4
    assert "".join("".join(chunk.split()) for chunk in found[1:-1]) == "".join(long.split())


def test_a_long_text_is_cut_by_the_function_too(pages: Connection) -> None:
    pages.execute("INSERT INTO pages SELECT 1, string_agg('This is the piece number ' || n, '---') FROM"
                  " generate_series(1, 3000) AS n")  # fmt: skip

    process_all(pages)

    assert len(chunks(pages)) == 3000


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("SELECT 'not in the text'", "is not in the text"),
        ("SELECT unnest(ARRAY[substr(t, 5), left(t, 4)])", "is not in the text"),
        ("SELECT (1 / 0)::text", "division by zero"),
        ("SELECT left(t, 1) FROM generate_series(1, 100001)", "too many pieces"),
    ],
)
def test_what_a_function_gives_may_fail_its_row_alone(pages: Connection, body: str, reason: str) -> None:
    pages.execute(
        "CREATE OR REPLACE FUNCTION split(t text) RETURNS SETOF text LANGUAGE plpgsql AS $$ BEGIN"
        f" IF t LIKE 'bad%%' THEN RETURN QUERY {body}; ELSE RETURN NEXT t; END IF; END $$"
    )
    pages.execute("INSERT INTO pages VALUES (1, 'bad words'), (2, 'good words')")

    process_all(pages)

    [found] = failures(pages)
    assert reason in found
    assert chunks(pages) == [(2, 1, "good words")]


def test_a_function_has_a_second_and_then_its_row_fails(pages: Connection) -> None:
    pages.execute(
        "CREATE OR REPLACE FUNCTION split(t text) RETURNS SETOF text LANGUAGE plpgsql AS $$ BEGIN"
        " IF t = 'slow' THEN PERFORM pg_sleep(60); END IF; RETURN NEXT t; END $$"
    )
    pages.execute("INSERT INTO pages VALUES (1, 'slow'), (2, 'quick')")

    process_all(pages)

    assert failures(pages) == ["the code of the table's owner ran too long, and was cancelled"]
    assert chunks(pages) == [(2, 1, "quick")]


def test_rows_whose_function_takes_long_are_all_cut_in_the_end(pages: Connection) -> None:
    pages.execute(
        "CREATE OR REPLACE FUNCTION split(t text) RETURNS SETOF text LANGUAGE plpgsql AS $$ BEGIN"
        " PERFORM pg_sleep(0.4); RETURN NEXT t; END $$"
    )
    pages.execute("INSERT INTO pages SELECT n, 'text ' || n FROM generate_series(1, 6) AS n")

    process_all(pages)

    assert len(chunks(pages)) == 6
    assert failures(pages) == []


@pytest.mark.parametrize("pieces", ["SELECT NULL::text", "SELECT ''", "SELECT t WHERE false"])
def test_a_text_without_pieces_is_one_chunk(pages: Connection, pieces: str) -> None:
    pages.execute(f"CREATE OR REPLACE FUNCTION split(t text) RETURNS SETOF text LANGUAGE sql AS $$ {pieces} $$")
    pages.execute("INSERT INTO pages VALUES (1, ' one --- two ')")

    process(pages)

    assert chunks(pages) == [(1, 1, "one --- two")]


def test_the_function_runs_as_the_owner_and_leaves_nothing_behind(
    db: Connection, api: FakeApi, role: Callable[[str], str]
) -> None:
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    owner = role("owner")
    db.execute(f"""
        CREATE TABLE pages (id int PRIMARY KEY, body text);
        CREATE TABLE seen (who name);
        ALTER TABLE pages OWNER TO {owner};
        ALTER TABLE seen OWNER TO {owner};
        CREATE FUNCTION split(t text) RETURNS SETOF text LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO seen VALUES (current_user);
            RETURN QUERY SELECT current_user::text WHERE t = current_user;
        END $$;
        ALTER FUNCTION split OWNER TO {owner};
    """)
    db.execute(ENABLE)
    db.execute("INSERT INTO pages VALUES (1, %s)", [owner])

    process(db)

    assert chunks(db) == [(1, 1, owner)]
    assert db.execute("SELECT * FROM seen").fetchall() == []


def test_a_function_of_somebody_else_is_refused(db: Connection, role: Callable[[str], str]) -> None:
    owner, other = role("owner"), role("other")
    db.execute(f"CREATE TABLE pages (id int PRIMARY KEY, body text); ALTER TABLE pages OWNER TO {owner}")
    db.execute(f"{SPLIT}; ALTER FUNCTION split OWNER TO {other}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="lacks the rights"):
        db.execute(ENABLE)


@pytest.mark.parametrize(
    ("arguments", "sqlstate", "words"),
    [
        ("chunking => 'lines'", "42883", 'chunking "lines" is not known'),
        ("chunking => 'pages_text'", "42883", "is not known"),
        ("chunking => 'split', chunk_overlap => 10", "22023", "takes no chunk_overlap"),
        ("chunking => 'split', embedding_column => 'v'", "0A000", "holds one embedding"),
    ],
)
def test_what_cannot_cut_is_refused(db: Connection, arguments: str, sqlstate: str, words: str) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute(SPLIT)
    db.execute("CREATE FUNCTION pages_text(t text) RETURNS text LANGUAGE sql AS 'SELECT t'")

    with pytest.raises(psycopg.Error, match=words) as caught:
        db.execute(f"SELECT autoembed.enable('pages', content_columns => '{{body}}', {arguments})")

    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.message_hint


def test_another_body_cuts_all_texts_again_and_sends_what_is_new(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one --- two+three')")
    process(pages)
    before = len(api.log())

    pages.execute(SPLIT.replace("CREATE", "CREATE OR REPLACE").replace("---", "+"))
    process(pages)
    pages.execute(SPLIT.replace("CREATE", "CREATE OR REPLACE").replace("'---'", "'+++'"))
    process(pages)

    sent = [text for request in api.log()[before:] for text in request["texts"]]
    assert sent == ["one --- two", "three", "one --- two+three"]
    assert chunks(pages) == [(1, 1, "one --- two+three")]


def test_a_function_that_is_renamed_or_moved_is_followed(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one --- two')")
    pages.execute("CREATE SCHEMA tools; ALTER FUNCTION split RENAME TO cut; ALTER FUNCTION cut SET SCHEMA tools")

    process(pages)

    assert [chunk for _, _, chunk in chunks(pages)] == ["one", "two"]
    assert pages.execute("SELECT chunk_function FROM autoembed.pipeline").fetchone() == ("tools.cut",)


def test_a_function_that_is_dropped_stops_the_table_until_it_is_back(pages: Connection) -> None:
    with warnings_of(pages) as warnings:
        pages.execute("DROP FUNCTION split")
    assert "is not being embedded" in warnings[0]
    pages.execute("INSERT INTO pages VALUES (1, 'one --- two')")
    process(pages)
    [row] = pages.execute("SELECT reason FROM autoembed.status").fetchall()
    assert "no such function" in row.reason
    assert chunks(pages) == []

    pages.execute(SPLIT)
    process(pages)

    assert [chunk for _, _, chunk in chunks(pages)] == ["one", "two"]


def test_alter_pipeline_takes_a_function_and_leaves_it(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one --- two')")
    process(pages)

    pages.execute("SELECT autoembed.alter_pipeline('pages', chunking => 'structure')")
    process(pages)
    assert chunks(pages) == [(1, 1, "one --- two")]
    assert pages.execute("SELECT chunk_function, chunk_function_oid FROM autoembed.pipeline").fetchone() == (None, None)

    pages.execute("SELECT autoembed.alter_pipeline('pages', chunking => 'public.split')")
    process(pages)
    assert [chunk for _, _, chunk in chunks(pages)] == ["one", "two"]

    pages.execute("SELECT autoembed.alter_pipeline('pages', storage => 'row')")
    process(pages)
    [(vector,)] = pages.execute("SELECT embedding::real[] FROM pages").fetchall()
    assert np.allclose(vector, embedding_of("one --- two"), atol=2e-3)


def test_preview_and_estimate_know_the_pieces(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one --- two'), (2, ''), (3, 'x')")

    found = pages.execute("SELECT content, chunk_number, chunk_start FROM autoembed.preview('pages', '1')").fetchall()
    estimate = pages.execute("SELECT * FROM autoembed.estimate('pages')").fetchone()

    assert found == [("one", 1, 0), ("two", 2, 8)]
    assert estimate is not None
    assert estimate.rows == 2
    other = pages.execute(
        "SELECT * FROM autoembed.estimate('pages', content_columns => '{body}', chunking => 'split')"
    ).fetchone()
    assert other == estimate


def test_preview_says_why_a_text_cannot_be_cut(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    pages.execute("CREATE OR REPLACE FUNCTION split(t text) RETURNS SETOF text LANGUAGE sql AS $$ SELECT 'two' $$")

    with pytest.raises(psycopg.errors.InvalidParameterValue, match="is not in the text"):
        pages.execute("SELECT autoembed.preview('pages', '1')")


@pytest.fixture
def plain(db: Connection, role: Callable[[str], str]) -> Iterator[str]:
    """A role that may use the extension, and nothing else."""
    name = role("plain")
    db.execute(f"SELECT autoembed.grant_usage('{name}')")
    yield name
    db.execute("RESET ROLE")


def test_chunk_text_runs_a_function_with_the_rights_of_the_caller(db: Connection, plain: str) -> None:
    db.execute(
        "CREATE FUNCTION who(t text) RETURNS SETOF text LANGUAGE sql AS $$ SELECT current_user::text $$;"
        "CREATE FUNCTION secret(t text) RETURNS SETOF text LANGUAGE sql AS $$ SELECT t $$;"
        "REVOKE EXECUTE ON FUNCTION secret FROM PUBLIC"
    )
    db.execute(f"SET ROLE {plain}")

    assert db.execute("SELECT chunk FROM autoembed.chunk_text(current_user, 'who')").fetchone() == (plain,)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        db.execute("SELECT autoembed.chunk_text('x', 'secret')")


def test_chunk_text_finds_a_function_in_the_search_path_of_the_caller(db: Connection) -> None:
    db.execute("CREATE SCHEMA tools; CREATE SCHEMA other")
    db.execute(SPLIT.replace("split", "tools.split"))
    db.execute(SPLIT.replace("split", "other.split").replace("---", "+"))

    with pytest.raises(psycopg.errors.UndefinedFunction):
        db.execute("SELECT autoembed.chunk_text('x', 'split')")
    rows = db.execute("SELECT chunk_start, chunk FROM autoembed.chunk_text('a --- b', 'tools.split')").fetchall()
    assert rows == [(0, "a"), (6, "b")]
    db.execute("SET search_path = other")
    assert db.execute("SELECT count(*) FROM autoembed.chunk_text('a+b', 'split')").fetchone() == (2,)
