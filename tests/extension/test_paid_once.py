"""No text is paid for twice: at another number of dimensions, after DROP EXTENSION, with the guide's table."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fake_api import FakeApi
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection
from lanes import running_lanes

Connect = Callable[..., Connection]
ROWS = 30
FRESH = "SELECT autoembed.wait_until_fresh(%s, 40)"


def inputs(db: Connection) -> int:
    row = db.execute("SELECT coalesce(sum(inputs), 0) FROM autoembed.usage").fetchone()
    assert row is not None
    return int(row[0])


def use(db: Connection, api: FakeApi) -> None:
    """The default model speaks to the fake API, as in a fresh database."""
    db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")


def make_again(db: Connection, api: FakeApi) -> None:
    db.execute("DROP EXTENSION autoembed CASCADE")
    db.execute("CREATE EXTENSION autoembed CASCADE")
    use(db, api)


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute(f"INSERT INTO notes SELECT n, 'text ' || n FROM generate_series(1, {ROWS}) AS n")
    for dimensions in (8, 16):
        db.execute(
            "SELECT autoembed.create_model(%s, provider => 'fake', model_id => 'x', dimensions => %s)",
            [f"of {dimensions}", dimensions],
        )
    return db


# The statements are those of the documents and of the hints, each in the order in which somebody may say them.
CHANGES = {
    "another model, beside": ("", ["SELECT autoembed.alter_pipeline('notes', model => 'of 16')"]),
    "the model's own, beside": (
        "",
        [
            "SELECT autoembed.alter_model('of 8', dimensions => 16)",
            "TRUNCATE notes_embeddings",
            "ALTER TABLE notes_embeddings ALTER COLUMN embedding TYPE halfvec(16)",
            "SELECT autoembed.resync('notes')",
        ],
    ),
    "another model, in the row": (
        "'embedding', ",
        [
            "ALTER TABLE notes ALTER COLUMN embedding TYPE halfvec(16) USING NULL",
            "SELECT autoembed.alter_pipeline('notes', model => 'of 16')",
        ],
    ),
    "another model before its column": (
        "'embedding', ",
        [
            "SELECT autoembed.alter_pipeline('notes', model => 'of 16')",
            "ALTER TABLE notes ALTER COLUMN embedding TYPE halfvec(16) USING NULL",
        ],
    ),
    "the model's own, in the row": (
        "'embedding', ",
        [
            "SELECT autoembed.alter_model('of 8', dimensions => 16)",
            "SELECT autoembed.resync('notes')",
            "ALTER TABLE notes ALTER COLUMN embedding TYPE halfvec(16) USING NULL",
        ],
    ),
}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "in a transaction"])
@pytest.mark.parametrize("change", CHANGES)
def test_other_dimensions_have_each_text_sent_once(
    notes: Connection, connect: Connect, change: str, together: bool
) -> None:
    place, statements = CHANGES[change]
    notes.execute(f"SELECT autoembed.enable('notes', {place}content_columns => '{{body}}', model => 'of 8')")
    with running_lanes(notes, connect):
        assert notes.execute(FRESH, ["notes"]).fetchone() == (True,)
        assert inputs(notes) == ROWS

        if together:
            with notes.transaction():
                for statement in statements:
                    notes.execute(statement.encode())
        else:
            for statement in statements:
                notes.execute(statement.encode())

        assert notes.execute(FRESH, ["notes"]).fetchone() == (True,)
    table = "notes" if place else "notes_embeddings"
    sizes = f"SELECT vector_dims(embedding) AS size, count(*) AS rows FROM {table} GROUP BY 1"
    assert notes.execute(sizes.encode()).fetchall() == [(16, ROWS)]
    assert inputs(notes) == 2 * ROWS


@pytest.mark.parametrize("place", ["'embedding', adopt => true, ", ""], ids=["in the row", "beside"])
def test_an_extension_that_is_dropped_and_made_again_sends_no_text_again(
    db: Connection, api: FakeApi, connect: Connect, place: str
) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute(f"INSERT INTO notes SELECT n, 'text ' || n FROM generate_series(1, {ROWS}) AS n")
    enable = f"SELECT autoembed.enable('notes', {place}content_columns => '{{body}}')"
    db.execute(enable.replace("adopt => true, ", "").encode())
    with running_lanes(db, connect):
        assert db.execute(FRESH, ["notes"]).fetchone() == (True,)

    make_again(db, api)
    db.execute(enable.encode())
    db.execute("INSERT INTO notes VALUES (0, 'later')")
    with running_lanes(db, connect):
        assert db.execute(FRESH, ["notes"]).fetchone() == (True,)
        assert inputs(db) == 1
        db.execute("SELECT autoembed.resync('notes')")
        assert db.execute(FRESH, ["notes"]).fetchone() == (True,)
    assert inputs(db) == 1
    table = "notes" if place else "notes_embeddings"
    assert db.execute(f"SELECT count(embedding) FROM {table}".encode()).fetchone() == (ROWS + 1,)


def test_the_guides_table_is_adopted(db: Connection, api: FakeApi, connect: Connect) -> None:
    """Its triggers are taken away first, as its vectors are to be kept by triggers of autoembed."""
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(GUIDE_TRIGGERS)
    db.execute(f"INSERT INTO documents (title, content) SELECT 'T' || n, 'c' FROM generate_series(1, {ROWS}) AS n")
    with running_lanes(db, connect):
        assert db.execute(FRESH, ["documents"]).fetchone() == (True,)

    make_again(db, api)
    db.execute(
        "SELECT autoembed.enable('documents', 'embedding', content_function => 'embedding_input', adopt => true)"
    )
    db.execute("UPDATE documents SET title = 'other' WHERE id = 1")
    with running_lanes(db, connect):
        assert db.execute(FRESH, ["documents"]).fetchone() == (True,)
    assert inputs(db) == 1
