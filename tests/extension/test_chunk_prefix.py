"""chunk_prefix: what each chunk is embedded behind, such as the title of its row."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, waiting, warnings_of

BODY = "\n\n".join(f"# Part {n}\n\nThese are the words of part {n}, and some more of them." for n in range(3))


@pytest.fixture
def pages(db: Connection, api: FakeApi) -> Connection:
    """An attached table whose chunks are embedded behind the titles of their rows."""
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, title text, body text, views int)")
    db.execute(
        "SELECT autoembed.enable('pages', content_columns => '{body}', chunk_prefix => '{title}', chunk_size => 60)"
    )
    return db


def process(db: Connection) -> Any:
    return db.execute("SELECT * FROM autoembed.process()").fetchone()


def sent(api: FakeApi, before: int) -> list[str]:
    return [text for request in api.log()[before:] for text in request["texts"]]


def assert_beside(db: Connection) -> None:
    """Checks that each chunk is a part of its text, and has the embedding of that part behind the title."""
    rows = db.execute(
        "SELECT p.title, p.body, c.chunk, e.chunk_start, e.chunk_end, e.embedding::real[] AS vector FROM pages AS p"
        " JOIN pages_embeddings AS e USING (id) JOIN pages_chunks AS c USING (id, chunk_number)"
    ).fetchall()
    assert rows
    for row in rows:
        assert row.chunk == row.body[row.chunk_start : row.chunk_end]
        behind = f"{row.title}\n\n" if row.title else ""
        assert np.allclose(row.vector, embedding_of(behind + row.chunk), atol=2e-3), row.chunk
    assert waiting(db) == 0


def test_each_chunk_is_embedded_behind_the_title_and_shown_without_it(pages: Connection, api: FakeApi) -> None:
    pages.execute(
        "INSERT INTO pages VALUES (1, 'Owls', %s), (2, NULL, %s), (3, '', 'short'), (4, 'x', NULL)", [BODY, BODY]
    )

    process(pages)

    assert_beside(pages)
    assert sum(text.startswith("Owls\n\n") for text in sent(api, 0)) == 3
    assert pages.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (7,)


def test_another_title_sends_all_chunks_again_and_another_word_one(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'Owls', %s), (2, 'Cats', %s)", [BODY, BODY])
    process(pages)
    before = len(api.log())

    pages.execute("UPDATE pages SET title = 'Eagles' WHERE id = 1")
    process(pages)
    assert len(sent(api, before)) == 3
    assert_beside(pages)

    before = len(api.log())
    pages.execute("UPDATE pages SET body = replace(body, 'words of part 1', 'WORDS of part 1') WHERE id = 1")
    pages.execute("UPDATE pages SET views = 1")
    process(pages)
    assert len(sent(api, before)) == 1
    assert_beside(pages)


def test_a_title_that_changes_during_the_request_is_not_lost(pages: Connection, api: FakeApi, connect: Any) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'Owls', 'words')")
    api.behave(hold="Owls")

    with ThreadPoolExecutor() as pool:
        passed = pool.submit(process, connect())
        api.wait_for(held=1)
        pages.execute("UPDATE pages SET title = 'Cats'")
        api.release()
        passed.result()
    assert pages.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (0,)

    pages.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
    process(pages)
    assert_beside(pages)


@pytest.mark.parametrize(
    "arguments",
    [
        "chunking => 'tokens'",
        "chunking => 'none', chunk_size => NULL",
        "content_function => 'text_of'",
        "condition => 'views = 1'",
    ],
)
def test_a_prefix_goes_with_every_way_to_cut_and_every_content(db: Connection, api: FakeApi, arguments: str) -> None:
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, title text, body text, views int)")
    db.execute("CREATE FUNCTION text_of(pages) RETURNS text LANGUAGE sql AS 'SELECT $1.body'")
    content = "" if "content_function" in arguments else "content_columns => '{body}', "
    db.execute(f"SELECT autoembed.enable('pages', {content}{arguments}, chunk_prefix => 'On {{title}}:')")
    db.execute("INSERT INTO pages VALUES (1, 'Owls', 'words', 1)")
    process(db)

    db.execute("UPDATE pages SET title = 'Cats'")
    process(db)

    assert sent(api, 0) == ["On Owls:\n\nwords", "On Cats:\n\nwords"]
    [(vector,)] = db.execute("SELECT embedding::real[] FROM pages_embeddings").fetchall()
    assert np.allclose(vector, embedding_of("On Cats:\n\nwords"), atol=2e-3)


def test_the_prefix_counts_against_the_size_of_a_chunk(pages: Connection, api: FakeApi) -> None:
    title = "one of the titles that have some words"
    pages.execute("INSERT INTO pages VALUES (1, %s, %s)", [title, " ".join(BODY.split()) * 4])

    process(pages)

    assert_beside(pages)
    rows = pages.execute("SELECT tokens, truncated, content FROM autoembed.preview('pages', '1')").fetchall()
    assert all(20 < row.tokens <= 60 and not row.truncated and title not in row.content for row in rows)
    assert len(rows) == pages.execute("SELECT count(*) FROM pages_embeddings").fetchone()[0]  # type: ignore[index]


def test_a_prefix_that_leaves_no_room_fails_its_row_alone(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, %s, 'words'), (2, 'Cats', 'words')", ["a long title " * 30])

    process(pages)

    [(key, reason)] = pages.execute("SELECT key, reason FROM autoembed.failed").fetchall()
    assert "leave no room in a chunk of 60 tokens" in reason
    assert_beside(pages)
    with pytest.raises(psycopg.errors.InvalidParameterValue, match="leave no room"):
        pages.execute("SELECT autoembed.preview('pages', '1')")


def test_alter_pipeline_gives_and_takes_a_prefix(pages: Connection, api: FakeApi) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'Owls', 'words')")
    process(pages)

    pages.execute("SELECT autoembed.alter_pipeline('pages', chunk_prefix => '')")
    process(pages)
    pages.execute("SELECT autoembed.alter_pipeline('pages', chunk_prefix => '{{{title}}}')")
    process(pages)
    pages.execute("SELECT autoembed.alter_pipeline('pages', on_change => 'clear')")
    process(pages)

    assert sent(api, 0) == ["Owls\n\nwords", "words", "{Owls}\n\nwords"]
    pages.execute("UPDATE pages SET title = 'Cats'")
    assert pages.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (0,)
    pages.execute("SELECT autoembed.alter_pipeline('pages', storage => 'row')")
    process(pages)
    assert sent(api, 0)[3:] == ["words"]


def test_a_column_that_is_renamed_is_followed_and_one_that_is_dropped_stops_the_table(pages: Connection) -> None:
    pages.execute("ALTER TABLE pages RENAME title TO heading")
    pages.execute("INSERT INTO pages VALUES (1, 'Owls', 'words')")
    process(pages)
    assert pages.execute("SELECT chunk_prefix FROM autoembed.pipeline").fetchone() == ("{heading}",)
    pages.execute("ALTER TABLE pages RENAME heading TO title")
    assert_beside(pages)

    with warnings_of(pages) as warnings:
        pages.execute("ALTER TABLE pages DROP title")

    assert 'has no column "title"' in warnings[0]
    [(reason, hint)] = pages.execute("SELECT reason, hint FROM autoembed.status").fetchall()
    assert 'has no column "title"' in reason
    pages.execute(hint[hint.index("SELECT") : hint.index(";")])
    pages.execute("INSERT INTO pages (id, body) VALUES (2, 'more')")
    process(pages)
    assert pages.execute("SELECT id FROM pages_embeddings ORDER BY id").fetchall() == [(1,), (2,)]


@pytest.mark.parametrize(
    ("prefix", "more", "words"),
    [
        ("{nothing}", "", 'has no column "nothing"'),
        ("{title", "", "chunk_prefix '{title' names no column or has an unmatched brace"),
        ("Manual:", "", "names no column"),
        ("{title}", ", embedding_column => 'v'", "holds one embedding"),
    ],
)
def test_a_prefix_that_cannot_be_is_refused(db: Connection, prefix: str, more: str, words: str) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, title text, body text)")

    with pytest.raises(psycopg.Error, match=words) as caught:
        db.execute(
            f"SELECT autoembed.enable('pages', content_columns => '{{body}}', chunk_prefix => %s{more})", [prefix]
        )

    assert caught.value.diag.message_hint


def test_search_shows_the_passage_without_the_title_and_none_of_another_title(pages: Connection) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'Owls', 'words')")
    process(pages)
    assert pages.execute("SELECT chunk FROM autoembed.search('pages', 'words')").fetchall() == [("words",)]

    pages.execute("UPDATE pages SET title = 'Cats'")

    assert pages.execute("SELECT chunk FROM autoembed.search('pages', 'words')").fetchall() == [(None,)]


def test_who_may_not_read_the_title_sees_no_embedding(pages: Connection, role: Any) -> None:
    pages.execute("INSERT INTO pages VALUES (1, 'Owls', 'words')")
    process(pages)
    reader = role("reader")
    pages.execute(f"GRANT SELECT (id, body) ON pages TO {reader}; SET ROLE {reader}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        pages.execute("SELECT * FROM pages_embeddings").fetchall()

    pages.execute(f"RESET ROLE; GRANT SELECT (title) ON pages TO {reader}; SET ROLE {reader}")
    assert len(pages.execute("SELECT * FROM pages_embeddings").fetchall()) == 1
    pages.execute("RESET ROLE")


def test_estimate_counts_the_prefix_of_each_chunk(pages: Connection) -> None:
    pages.execute("INSERT INTO pages SELECT n, 'A title of some words', %s FROM generate_series(1, 5) AS n", [BODY * 3])

    def tokens(arguments: str) -> int:
        row = pages.execute(f"SELECT tokens FROM autoembed.estimate('pages'{arguments})").fetchone()
        assert row is not None
        return int(row.tokens)

    assert tokens("") > 1.2 * tokens(", chunk_prefix => ''")
    content = ", content_columns => '{body}', chunk_size => 60"
    assert tokens(f"{content}, chunk_prefix => '{{title}}'") == tokens("")
