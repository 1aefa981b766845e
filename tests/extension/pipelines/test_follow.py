"""Tables that are altered: names, types and columns are followed, and a pipeline ends with what it is made of."""

from __future__ import annotations

import pytest

from extension.pipelines.documents import BOTH, COLUMNS, assert_fresh, attach, embed, queued, send_all, traces
from fake_api import FakeApi
from harness import Connection

PIPELINES = {
    "columns": f"{COLUMNS}, condition => 'published and not archived'",
    "template": r"content_template => '# {title}\n\\ {{{content}}}', condition => 'note IS NULL', on_change => 'clear'",
    "function": "content_function => 'text_of', condition => 'odd(id) OR title IS NOT NULL', on_change => 'clear'",
}
# The change, and the words that name the same thing after it.
RENAMES: dict[str, tuple[str, dict[str, str]]] = {
    "table": ("ALTER TABLE documents RENAME TO papers", {"documents": "papers"}),
    "table to a name that needs quotes": (
        """ALTER TABLE documents RENAME TO "Dokumente; ""x"" {y}" """,
        {"documents": '"Dokumente; ""x"" {y}"'},
    ),
    "to another schema": (
        "CREATE SCHEMA other; ALTER TABLE documents SET SCHEMA other; SET LOCAL search_path = other, app, public",
        {},
    ),
    "content column": (
        'ALTER TABLE documents RENAME content TO "Inhalt ""x"" ü"',
        {"content": '"Inhalt ""x"" ü"'},
    ),
    "content column, by ALTER VIEW": ("ALTER VIEW documents RENAME content TO text", {"content": "text"}),
    "content columns for each other, by ALTER MATERIALIZED VIEW": (
        "ALTER MATERIALIZED VIEW documents RENAME title TO x;"
        "ALTER MATERIALIZED VIEW documents RENAME content TO title;"
        "ALTER MATERIALIZED VIEW documents RENAME x TO content",
        {"title": "content", "content": "title"},
    ),
    "key column, by ALTER FOREIGN TABLE": ("ALTER FOREIGN TABLE documents RENAME id TO number", {"id": "number"}),
    "table, by ALTER INDEX": ("ALTER INDEX documents RENAME TO papers", {"documents": "papers"}),
    "key column": ("ALTER TABLE documents RENAME id TO number", {"id": "number"}),
    "embedding column": ('ALTER TABLE documents RENAME embedding TO "my {vector}"', {"embedding": '"my {vector}"'}),
    "columns of the condition": (
        "ALTER TABLE documents RENAME published TO visible; ALTER TABLE documents RENAME note TO remark",
        {"published": "visible", "note": "remark"},
    ),
    "column of the condition, whose name is used again": (
        "ALTER TABLE documents RENAME published TO visible; ALTER TABLE documents ADD published text;"
        "ALTER TABLE documents RENAME note TO remark; ALTER TABLE documents ADD note text;"
        "UPDATE documents SET note = 'not this', published = 'nor this'",
        {"published": "visible", "note": "remark"},
    ),
    "two content columns for each other": (
        "ALTER TABLE documents RENAME title TO x; ALTER TABLE documents RENAME content TO title;"
        "ALTER TABLE documents RENAME x TO content",
        {"title": "content", "content": "title"},
    ),
    "two columns of the condition for each other": (
        "ALTER TABLE documents RENAME published TO x; ALTER TABLE documents RENAME archived TO published;"
        "ALTER TABLE documents RENAME x TO archived",
        {"published": "archived", "archived": "published"},
    ),
    "key and embedding for each other": (
        "ALTER TABLE documents RENAME id TO x; ALTER TABLE documents RENAME embedding TO id;"
        "ALTER TABLE documents RENAME x TO embedding",
        {"id": "embedding", "embedding": "id"},
    ),
    "two tables for each other": (
        "CREATE TABLE others (LIKE documents INCLUDING ALL); ALTER TABLE documents RENAME TO x;"
        "ALTER TABLE others RENAME TO documents; ALTER TABLE x RENAME TO others",
        {"documents": "others"},
    ),
}


@pytest.mark.parametrize("rename", RENAMES)
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_rename_is_followed_and_costs_nothing(db: Connection, api: FakeApi, pipeline: str, rename: str) -> None:
    db.execute("CREATE FUNCTION odd(n int) RETURNS boolean LANGUAGE sql AS 'SELECT n % 2 = 1'")
    # An SQL function with a body of its own follows its columns, too.
    db.execute("CREATE OR REPLACE FUNCTION text_of(d documents) RETURNS text RETURN d.title || ': ' || d.content")
    attach(db, PIPELINES[pipeline])
    db.execute("CREATE VIEW rows AS SELECT * FROM documents")
    statements, words = RENAMES[rename]

    db.execute(statements)

    def say(words_then: str) -> str:
        return " ".join(words.get(word, word) for word in words_then.split(" "))

    assert send_all(db, api) == []
    db.execute(say("UPDATE documents SET content = 'new' WHERE id = 1"))
    db.execute(say("INSERT INTO documents ( id , title , content ) VALUES (4, 'four', 'c4')"))
    db.execute(say("DELETE FROM documents WHERE id = 2"))
    assert queued(db) == [[1], [2], [4]]
    assert len(send_all(db, api)) == 2
    # The view follows renames by itself: its names are those of before.
    texts = {
        "columns": BOTH,
        "template": r"concat('# ', title, E'\n\\ {', content, '}')",
        "function": "title || ': ' || content",
    }
    assert_fresh(db, texts[pipeline], "app2.rows" if rename == "schema" else "app.rows")

    db.execute(say("UPDATE documents SET published = published"))
    assert queued(db) == []


def test_a_table_with_its_functions_may_be_altered_by_another_owner(db: Connection) -> None:
    db.execute(
        "CREATE ROLE enable_first; CREATE ROLE enable_second; GRANT ALL ON SCHEMA app TO enable_first, enable_second"
    )
    db.execute("ALTER TABLE documents OWNER TO enable_first; ALTER FUNCTION text_of OWNER TO enable_first")
    attach(db, "content_function => 'text_of', condition => 'published', on_change => 'clear'")

    db.execute("ALTER FUNCTION text_of OWNER TO enable_second; ALTER TABLE documents OWNER TO enable_second")

    owners = "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname ~ '^_(text|content|write|scan)_[0-9]'"
    assert db.execute(owners).fetchall() == [("enable_second",)]
    db.execute("DROP OWNED BY enable_first")
    db.execute("UPDATE documents SET content = 'new'")
    embed(db)
    assert_fresh(db, "title || ': ' || content")


RETYPED = {
    "content, its texts changed": ("ALTER TABLE documents ALTER content TYPE varchar(50) USING upper(content)", 3),
    "content, its texts the same": ("ALTER TABLE documents ALTER content TYPE varchar(50)", 0),
    "content to JSON": ("ALTER TABLE documents ALTER content TYPE jsonb USING to_jsonb(content)", 3),
    "generated content": ("ALTER TABLE documents ALTER about SET EXPRESSION AS ('On ' || title)", 3),
    "embedding to vector": ("ALTER TABLE documents ALTER embedding TYPE vector(1536)", 0),
    "embedding emptied": ("ALTER TABLE documents ALTER embedding TYPE vector(1536) USING NULL", 3),
    "embedding dropped and added at once": (
        "ALTER TABLE documents DROP embedding, ADD embedding halfvec(1536)",
        3,
    ),
    "key to bigint": ("ALTER TABLE documents ALTER id TYPE bigint", 0),
    "key to text": ("ALTER TABLE documents ALTER id TYPE text", None),
    "a column added": ("ALTER TABLE documents ADD more text DEFAULT 'more'", 0),
    "a column dropped": ("ALTER TABLE documents DROP note", 0),
}


@pytest.mark.parametrize("alteration", RETYPED)
def test_altered_columns_are_followed_and_texts_that_change_by_it_are_embedded(
    db: Connection, api: FakeApi, alteration: str
) -> None:
    """ALTER TABLE fires no trigger, whatever it does to the rows."""
    db.execute("ALTER TABLE documents ADD about text GENERATED ALWAYS AS ('About ' || title) STORED")
    attach(db, "content_columns => '{title,content,about}', condition => 'published'")
    text = r"concat_ws(E'\n\n', title, content, about)"
    statement, texts = RETYPED[alteration]

    db.execute(statement)

    number = len(send_all(db, api))
    assert texts is None or number == texts
    assert_fresh(db, text)
    db.execute(
        "UPDATE documents SET title = 'new' WHERE id::int = 1; INSERT INTO documents (id, title) VALUES (4, 'four')"
    )
    assert len(send_all(db, api)) == 2
    assert_fresh(db, text)


DROPS = {
    "content column": "ALTER TABLE documents DROP content",
    "embedding column": "ALTER TABLE documents DROP embedding",
    "key column": "ALTER TABLE documents DROP id",
    "column of the condition": "ALTER TABLE documents DROP published",
    "type of a content column": "DROP TYPE app.colour CASCADE",
    "schema of that type": "DROP SCHEMA types CASCADE",
    "extension of a content column": "DROP EXTENSION citext CASCADE",
    "table": "DROP TABLE documents CASCADE",
    "schema of the table": "DROP SCHEMA app CASCADE",
    "owner": "ALTER TABLE documents OWNER TO enable_owner; DROP OWNED BY enable_owner CASCADE",
}


@pytest.mark.parametrize("drop", DROPS)
def test_a_pipeline_stops_or_ends_with_what_it_is_made_of_and_the_table_goes_on(db: Connection, drop: str) -> None:
    """After a drop the application writes on as before; nothing is left that refuses its rows or waits for ever."""
    db.execute(
        "CREATE EXTENSION citext; CREATE TYPE colour AS ENUM ('red'); CREATE ROLE enable_owner; CREATE SCHEMA types"
    )
    db.execute("CREATE DOMAIN types.word AS text")
    db.execute("ALTER TABLE documents ADD c citext, ADD colour colour, ADD word types.word")
    attach(db, "content_columns => '{title,content,c,colour,word}', condition => 'published'")
    db.execute("UPDATE documents SET title = 'new' WHERE id = 1; SELECT autoembed.resync('documents')")

    db.execute(DROPS[drop])

    if db.execute("SELECT to_regclass('app.documents') IS NOT NULL AS there").fetchone() == (True,):
        db.execute(
            "UPDATE documents SET title = 'newer'; INSERT INTO documents (title) VALUES ('four')"
            if drop == "key column"
            else "UPDATE documents SET title = 'newer'; INSERT INTO documents (id, title) VALUES (4, 'four')"
        )
        db.execute("DELETE FROM documents WHERE title = 'four'")
    if drop in ("table", "schema of the table", "owner"):
        embed(db)
        assert traces(db) == []
    else:
        db.execute("SELECT autoembed.process()")
        assert db.execute("SELECT state FROM autoembed.status").fetchall() == [("stopped",)]
        assert db.execute("SELECT tgname FROM pg_trigger WHERE tgname ~ 'autoembed_[0-9]'").fetchall() == []


# With event triggers off, and what the application writes then.
UNSEEN = {
    "a renamed column": "ALTER TABLE documents RENAME content TO text",
    "columns that change places": (
        "ALTER TABLE documents RENAME title TO x; ALTER TABLE documents RENAME content TO title;"
        "ALTER TABLE documents RENAME x TO content"
    ),
    "a dropped column": "ALTER TABLE documents DROP content",
}


@pytest.mark.parametrize("change", UNSEEN)
def test_a_change_of_columns_that_no_event_trigger_sees_stops_writes_for_a_moment(
    db: Connection, api: FakeApi, change: str
) -> None:
    attach(db)
    embed(db)
    db.execute("SET LOCAL event_triggers = off")
    db.execute(UNSEEN[change])
    db.execute("SET LOCAL event_triggers = on")

    embed(db)

    db.execute("UPDATE documents SET title = 'written' WHERE id = 1")
    db.execute("DELETE FROM documents WHERE id = 2")
    if change != "a dropped column":
        embed(db)
        words = {"content": "text"} if change == "a renamed column" else {"title": "content", "content": "title"}
        assert db.execute("SELECT content_columns FROM autoembed.pipeline").fetchone() == (
            [words.get(name, name) for name in ("title", "content")],
        )
