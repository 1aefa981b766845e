"""chunk_text(): shows how a text is cut, by the local model's tokenizer or an estimate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from harness import Connection

CHAPTER = "\n\n".join(f"This is paragraph {n} of a chapter, and it says so in ten or twenty words." for n in range(30))
BOOK = f"# Owls\n\n{CHAPTER}\n\n# Cats 🐈‍⬛\n\n{CHAPTER}"


def chunks(db: Connection, text: str | None, arguments: str = "") -> list[Any]:
    return db.execute(f"SELECT * FROM autoembed.chunk_text(%s{arguments})", [text]).fetchall()


def test_a_text_is_cut_at_its_headings_within_the_tokens_of_the_local_model(db: Connection) -> None:
    found = chunks(db, BOOK)

    assert [chunk.chunk_number for chunk in found] == list(range(1, len(found) + 1))
    assert len(found) > 4
    assert all(chunk.token_count <= 256 for chunk in found)
    assert sum(chunk.chunk.startswith(("# Owls", "# Cats 🐈‍⬛")) for chunk in found) == 2
    assert "".join("".join(chunk.chunk.split()) for chunk in found) == "".join(BOOK.split())


def test_offsets_are_characters_of_the_text_as_postgres_counts_them(db: Connection) -> None:
    rows = db.execute(
        "SELECT c.chunk, substring(t.text FROM c.chunk_start + 1 FOR c.chunk_end - c.chunk_start) AS by_offsets"
        " FROM (SELECT %s AS text) AS t CROSS JOIN LATERAL autoembed.chunk_text(t.text, chunk_size => 40) AS c",
        [BOOK],
    ).fetchall()

    assert len(rows) > 20
    assert [row.chunk for row in rows] == [row.by_offsets for row in rows]


@pytest.mark.parametrize("text", [None, "", " \n\t "], ids=["NULL", "empty", "blank"])
def test_a_text_without_words_has_no_chunks(db: Connection, text: str | None) -> None:
    assert chunks(db, text) == []


def test_short_texts_are_one_chunk_with_the_tokens_of_the_tokenizer(db: Connection) -> None:
    assert chunks(db, "the owl sleeps") == [(1, 0, 14, 5, "the owl sleeps")]


def test_none_is_one_chunk_however_long(db: Connection) -> None:
    [chunk] = chunks(db, BOOK, ", 'none'")

    assert (chunk.chunk_start, chunk.chunk_end, chunk.chunk) == (0, len(BOOK), BOOK)
    assert chunk.token_count > 1000


def test_an_overlap_repeats_the_end_of_the_chunk_before(db: Connection) -> None:
    found = chunks(db, BOOK, ", 'tokens', chunk_size => 100, chunk_overlap => 20")

    assert all(after.chunk_start < before.chunk_end for before, after in zip(found, found[1:], strict=False))
    assert all(chunk.token_count <= 100 for chunk in found)


def test_chunks_for_a_model_with_an_api_are_estimated_and_smaller_than_it_takes(db: Connection) -> None:
    found = chunks(db, BOOK, ", model => 'text-embedding-3-small'")

    assert 2 <= len(found) < len(chunks(db, BOOK))
    assert all(chunk.token_count <= 512 for chunk in found)


def test_the_prefix_of_documents_counts(db: Connection) -> None:
    db.execute(
        "SELECT autoembed.create_model('prefixed', 'local', 384, 'all-MiniLM-L6-v2',"
        """ options => '{"document_prefix": "a passage of a book: "}')"""
    )

    assert chunks(db, "the owl sleeps", ", model => 'prefixed'") == [(1, 0, 14, 11, "the owl sleeps")]


MISTAKES = {
    "too large": ("chunk_size => 257", 'chunk_size is 257, and model "all-MiniLM-L6-v2" takes at most 256 tokens'),
    "too small": ("chunk_size => 0", 'chunk_size is 0, and model "all-MiniLM-L6-v2" needs at least 16'),
    "too much overlap": (
        "chunk_overlap => 129",
        "chunk_overlap is 129, and must be between 0 and half of the chunk_size of 256",
    ),
}


@pytest.mark.parametrize(("arguments", "problem"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_sentence_with_a_hint(db: Connection, arguments: str, problem: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as caught:
        chunks(db, BOOK, f", {arguments}")

    assert caught.value.diag.message_primary == problem
    assert caught.value.diag.message_hint


def test_an_unknown_model_is_an_error_that_names_the_models(db: Connection) -> None:
    with pytest.raises(psycopg.errors.UndefinedObject, match='model "nobody" does not exist'):
        chunks(db, BOOK, ", model => 'nobody'")


def test_a_model_without_its_files_is_an_error_that_names_the_file(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('gone', 'local', 384, base_url => '/nowhere')")

    with pytest.raises(psycopg.errors.ExternalRoutineException) as caught:
        chunks(db, BOOK, ", model => 'gone'")

    assert caught.value.diag.message_primary == (
        'model "gone" cannot count tokens: the model\'s file /nowhere/model.onnx does not exist on the server'
    )


def test_a_role_may_call_it_after_grant_usage(
    db: Connection, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    name = role("reader")
    session = connect(user=name)

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        chunks(session, BOOK)
    db.execute("SELECT autoembed.grant_usage(%s)", [name])

    assert chunks(session, BOOK) == chunks(db, BOOK)


def test_a_cut_that_runs_can_be_cancelled(db: Connection) -> None:
    db.execute("SET statement_timeout = '1s'")

    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute("SELECT count(*) FROM autoembed.chunk_text(repeat(%s, 20000))", [CHAPTER])
