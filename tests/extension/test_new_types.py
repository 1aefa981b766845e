"""New types of keys and contents: each row keeps or gets the embedding of its text, and nothing else is left."""

from __future__ import annotations

import pytest

from extension.status.steps import Connect, one, process, status
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection

STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
WRONG = {
    "NULL": "SELECT n.id FROM notes AS n FULL JOIN notes_embeddings AS e USING (id) WHERE"
    " e.embedding IS DISTINCT FROM autoembed.embed(n.content, 'test')::halfvec",
    "'embedding'": "SELECT id FROM notes WHERE embedding IS DISTINCT FROM autoembed.embed(content, 'test')::halfvec",
}
# The type of the key, its values for n, its new type, and the new values.
KEYS = {
    "integer to uuid": ("int", "n", "uuid", "md5(id::text)::uuid"),
    "text to uuid": ("text", "md5(n::text)", "uuid", "id::uuid"),
    "uuid to text": ("uuid", "md5(n::text)::uuid", "text", "id::text"),
    "integer to other integers": ("int", "n", "int", "id + 2"),
    "integer to numeric between integers": ("int", "n", "numeric", "id + 0.5"),
    "integer to other text": ("int", "n", "text", "'k' || id"),
    "text to integer": ("text", "'k' || n", "int", "substr(id, 2)::int"),
    "text to enum": ("text", "'k' || n", "kind", "id::kind"),
    "enum to text": ("kind", "('k' || n)::kind", "text", "id::text"),
    "text to citext": ("text", "'k' || n", "citext", "id"),
    "text to a domain": ("text", "'k' || n", "name_of", "id"),
    "time stamp to date": (
        "timestamptz",
        "timestamptz '2026-01-01 12:00 UTC' + n * interval '1 day'",
        "date",
        "(id AT TIME ZONE 'UTC')::date",
    ),
    "array to integer": ("int[]", "ARRAY[n]", "int", "id[1]"),
    "bytea to text": ("bytea", "n::text::bytea", "text", "encode(id, 'escape')"),
}


def attach(db: Connection, column: str, key: str, values: str) -> None:
    db.execute("CREATE EXTENSION citext; CREATE DOMAIN name_of AS text CHECK (value <> '')")
    db.execute("CREATE TYPE kind AS ENUM ('k1', 'k2', 'k3', 'k4', 'k5')")
    db.execute("SELECT autoembed.create_model('test', 'fake', 8); SELECT autoembed.set_default_model('test')")
    db.execute(f"CREATE TABLE notes (id {key} PRIMARY KEY, content text)".encode())
    db.execute(
        f"SELECT autoembed.enable('notes', {column}, content_columns => '{{content}}',"
        " text_config => 'english')".encode()
    )
    db.execute(f"INSERT INTO notes SELECT {values}, 'note ' || n FROM generate_series(1, 5) AS n".encode())
    process(db)


def settle(db: Connection) -> None:
    process(db)
    while status(db).state != "idle":
        process(db)


def assert_right(db: Connection, column: str, rows: int) -> None:
    settle(db)
    assert db.execute(WRONG[column].encode()).fetchall() == []
    assert (status(db).embedded, status(db).failed) == (rows, 0)
    assert one(db, "SELECT count(*) AS n FROM autoembed.text_document WHERE is_live").n == rows


@STORAGES
@pytest.mark.parametrize("change", KEYS)
def test_a_key_gets_another_type_or_other_values(db: Connection, column: str, change: str) -> None:
    key, values, new_key, new_values = KEYS[change]
    attach(db, column, key, values)

    db.execute(f"ALTER TABLE notes ALTER id TYPE {new_key} USING {new_values}".encode())
    assert_right(db, column, 5)
    db.execute(
        "UPDATE notes SET content = 'other' WHERE content = 'note 1'; DELETE FROM notes WHERE content = 'note 2'"
    )
    assert_right(db, column, 4)

    found = db.execute("SELECT key FROM autoembed.search('notes', 'note', 9, mode => 'hybrid')").fetchall()
    assert len(found) == len(set(found)) == 4


@pytest.mark.parametrize("change", ["uuid to text", "text to citext", "text to enum", "enum to text"])
def test_a_key_with_the_same_values_costs_nothing(db: Connection, change: str) -> None:
    key, values, new_key, new_values = KEYS[change]
    attach(db, "NULL", key, values)

    db.execute(f"ALTER TABLE notes ALTER id TYPE {new_key} USING {new_values}".encode())
    settle(db)

    assert one(db, "SELECT inputs FROM autoembed.usage WHERE table_name IS NOT NULL").inputs == 5


@STORAGES
@pytest.mark.parametrize("partitioned", [False, True])
def test_a_content_of_the_same_type_gets_other_values(db: Connection, column: str, partitioned: bool) -> None:
    attach(db, column, "int", "n")
    if partitioned:
        db.execute("SELECT autoembed.disable('notes', drop => true); ALTER TABLE notes RENAME TO part")
        db.execute("CREATE TABLE notes (LIKE part INCLUDING ALL) PARTITION BY RANGE (id)")
        db.execute("ALTER TABLE notes ATTACH PARTITION part FOR VALUES FROM (0) TO (100)")
        db.execute(
            f"SELECT autoembed.enable('notes', {column}, content_columns => '{{content}}',"
            " text_config => 'english')".encode()
        )
        settle(db)

    db.execute("ALTER TABLE notes ALTER content TYPE text USING upper(content) || id")

    assert_right(db, column, 5)


@STORAGES
def test_a_key_loses_a_column_that_it_can_do_without(db: Connection, column: str) -> None:
    attach(db, column, "int", "n")
    db.execute("SELECT autoembed.disable('notes', drop => true)")
    db.execute("ALTER TABLE notes DROP CONSTRAINT notes_pkey, ADD COLUMN side int NOT NULL DEFAULT 0")
    db.execute("CREATE UNIQUE INDEX both_columns ON notes (id, side)")
    db.execute(
        f"SELECT autoembed.enable('notes', {column}, content_columns => '{{content}}',"
        " text_config => 'english')".encode()
    )
    settle(db)

    db.execute("ALTER TABLE notes ADD PRIMARY KEY (id)")
    db.execute("ALTER TABLE notes DROP COLUMN side")
    db.execute("UPDATE notes SET content = 'other' WHERE id = 1")

    assert_right(db, column, 5)
    assert one(db, "SELECT key_columns FROM autoembed.pipeline").key_columns == ["id"]


@STORAGES
@pytest.mark.parametrize("change", ["content TYPE bigint", "id TYPE bigint", "embedding TYPE vector(8)"])
def test_a_session_that_has_written_before_goes_on_writing(
    db: Connection, connect: Connect, column: str, change: str
) -> None:
    if change.startswith("embedding") and column == "NULL":
        change = "side TYPE bigint"
    db.execute("SELECT autoembed.create_model('test', 'fake', 8); SELECT autoembed.set_default_model('test')")
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, content int, side int)")
    db.execute(f"SELECT autoembed.enable('notes', {column}, content_columns => '{{content}}')".encode())
    application = connect()

    def write() -> None:
        application.execute("INSERT INTO notes (id, content) VALUES (1, 1), (2, 2)")
        application.execute("UPDATE notes SET content = content + 1")
        application.execute("UPDATE notes SET id = id + 2")
        application.execute("DELETE FROM notes WHERE id = 3")

    write()
    application.execute("DELETE FROM notes")
    db.execute(f"ALTER TABLE notes ALTER {change}".encode())
    write()
    settle(db)

    assert (status(db).embedded, status(db).failed) == (1, 0)


@pytest.mark.parametrize("types", [["bigint"], ["bigint", "text"]])
def test_a_session_that_has_fired_the_guides_triggers_goes_on_writing(
    db: Connection, connect: Connect, types: list[str]
) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8); SELECT autoembed.set_default_model('test')")
    db.execute(GUIDE_TABLE.format(dimensions=8).replace("generated always as identity", ""))
    db.execute(GUIDE_TRIGGERS)
    application = connect()
    application.execute("INSERT INTO documents (id, title, content) VALUES (1, 'a', 'b')")

    for number, new_type in enumerate(types, 2):
        db.execute(f"ALTER TABLE documents ALTER id TYPE {new_type}".encode())
        application.execute("INSERT INTO documents (id, title, content) VALUES (%s, 'a', 'c')", [str(number)])
        application.execute("UPDATE documents SET content = 'd'")
    process(db)

    wrong = (
        "SELECT id FROM documents AS d WHERE embedding IS DISTINCT FROM"
        " autoembed.embed(embedding_input(d), 'test')::halfvec"
    )
    assert db.execute(wrong).fetchall() == []
