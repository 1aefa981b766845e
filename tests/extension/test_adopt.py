"""enable(adopt => true): vectors that a table has count as those of its texts, and are not paid for again."""

from __future__ import annotations

from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection

ADOPT = "SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}', adopt => true)"


def process(db: Connection) -> Any:
    return db.execute("SELECT * FROM autoembed.process()").fetchone()


def is_right(db: Connection, key: int) -> bool:
    row = db.execute("SELECT body, embedding::vector::real[] AS v FROM notes WHERE id = %s", [key]).fetchone()
    assert row is not None
    return row.v is not None and np.allclose(row.v, embedding_of(row.body), atol=1e-3)


def state_of(db: Connection, key: int) -> str:
    row = db.execute("SELECT state FROM autoembed.preview('notes', %s)", [str(key)]).fetchone()
    assert row is not None
    return str(row.state)


def inputs(db: Connection) -> int:
    row = db.execute("SELECT coalesce(sum(inputs), 0) FROM autoembed.usage").fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    """Three rows with the right vectors, not attached, and one without."""
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, views int DEFAULT 0, embedding halfvec(1536))")
    db.execute("INSERT INTO notes VALUES (1, 'one'), (2, 'two'), (3, 'three')")
    db.execute(ADOPT.replace(", adopt => true", ""))
    process(db)
    db.execute("SELECT autoembed.disable('notes')")
    db.execute("INSERT INTO notes VALUES (4, 'four')")
    return db


def test_vectors_that_exist_are_adopted_without_a_request(notes: Connection) -> None:
    before = inputs(notes)
    notes.execute(ADOPT)
    assert state_of(notes, 2) == "fresh"
    process(notes)
    assert inputs(notes) == before + 1
    assert all(is_right(notes, key) for key in (1, 2, 3, 4))


def test_an_adopted_row_that_changes_is_embedded_again(notes: Connection) -> None:
    before = inputs(notes)
    notes.execute(ADOPT)
    notes.execute("UPDATE notes SET body = 'uno' WHERE id = 1")
    notes.execute("UPDATE notes SET embedding = (SELECT embedding FROM notes WHERE id = 3) WHERE id = 2")
    process(notes)
    # The rows that wait come before those of the table.
    process(notes)
    assert [is_right(notes, key) for key in (1, 2, 3, 4)] == [True] * 4
    assert inputs(notes) == before + 3


def test_a_row_outside_the_condition_loses_its_vector(notes: Connection) -> None:
    notes.execute(ADOPT.replace("adopt", "condition => 'id <> 2', adopt"))
    process(notes)
    assert notes.execute("SELECT id FROM notes WHERE embedding IS NULL").fetchall() == [(2,)]


def test_a_row_whose_text_cannot_be_made_holds_up_no_other(notes: Connection) -> None:
    notes.execute(
        "CREATE FUNCTION brittle(n notes) RETURNS text LANGUAGE plpgsql IMMUTABLE AS"
        " $$BEGIN RETURN CASE WHEN n.id = 2 THEN (1 / (n.views))::text ELSE n.body END; END$$"
    )
    before = inputs(notes)
    notes.execute(ADOPT.replace("content_columns => '{body}'", "content_function => 'brittle'"))
    process(notes)
    assert inputs(notes) == before + 1
    assert state_of(notes, 1) == "fresh"


def test_adopted_vectors_move_beside_the_rows_without_a_request(notes: Connection) -> None:
    before = inputs(notes)
    notes.execute(ADOPT)
    notes.execute("SELECT autoembed.alter_pipeline('notes', storage => 'beside')")
    for _ in range(3):
        process(notes)
    assert inputs(notes) == before + 1
    assert notes.execute("SELECT count(*) FROM notes_embeddings").fetchone() == (4,)


def test_a_message_says_which_vectors_count_as_those_of_which_model(notes: Connection) -> None:
    heard: list[str] = []
    notes.add_notice_handler(lambda notice: heard.append(notice.message_primary or ""))
    notes.execute(ADOPT)
    assert heard == [
        '3 rows of table public.notes have vectors, which count as those of model "text-embedding-3-small"'
    ]


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ("ALTER TABLE notes ALTER COLUMN embedding TYPE halfvec(3) USING NULL", "'embedding'"),
        ("ALTER TABLE notes ALTER COLUMN embedding TYPE halfvec", "'embedding'"),
        ("SELECT", "'embedding', model => 'all-MiniLM-L6-v2'"),
        ("SELECT", "embedding_column => NULL"),
    ],
    ids=["other dimensions", "no dimensions", "other model", "nothing beside the rows"],
)
def test_what_cannot_be_adopted_is_refused(notes: Connection, change: str, arguments: str) -> None:
    notes.execute(change)
    with pytest.raises(psycopg.Error) as caught:
        notes.execute(f"SELECT autoembed.enable('notes', {arguments}, content_columns => '{{body}}', adopt => true)")
    assert caught.value.sqlstate in ("55000", "0A000")
    assert caught.value.diag.message_hint
    assert notes.execute("SELECT count(*) FROM autoembed.pipeline").fetchone() == (0,)
