"""The triggers of a table at a write: they queue its rows, clear vectors, and refuse nothing."""

from __future__ import annotations

import psycopg
import pytest

from extension.pipelines.documents import COLUMNS, FORMS, assert_fresh, embed, enable, queued, vectors
from harness import Connection, waiting

PASS_FOR_A_LANE = """
CREATE ROLE lane_impostor;
GRANT USAGE ON SCHEMA app TO lane_impostor;
GRANT SELECT, UPDATE ON documents TO lane_impostor;
SELECT set_config('autoembed.writing', 'documents'::regclass::oid::text, true);
SET LOCAL SESSION AUTHORIZATION lane_impostor;
"""


@pytest.mark.parametrize("form", ["two columns", "a template", "a function", "condition"])
def test_clear_removes_the_vector_in_the_write_that_changes_the_text_and_keep_does_not(
    db: Connection, form: str
) -> None:
    arguments = {
        **{name: value[0] for name, value in FORMS.items()},
        "condition": f"{COLUMNS}, condition => 'published'",
    }
    enable(db, f"{arguments[form]}, on_change => 'clear'")
    enable(db, f"{arguments[form]}, on_change => 'keep'", column="kept")
    embed(db)

    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; UPDATE documents SET note = 'seen'")
    db.execute("UPDATE documents SET content = content, title = title")
    assert vectors(db) == {1: False, 2: True, 3: True}
    assert vectors(db, "kept") == {1: True, 2: True, 3: True}

    db.execute("SELECT autoembed.alter_pipeline('documents', 'embedding', on_change => 'keep')")
    db.execute("SELECT autoembed.alter_pipeline('documents', 'kept', on_change => 'clear')")
    db.execute("UPDATE documents SET content = 'newer' WHERE id = 2")
    assert vectors(db) == {1: False, 2: True, 3: True}
    assert vectors(db, "kept") == {1: True, 2: False, 3: True}
    embed(db)
    assert set(vectors(db).values()) == set(vectors(db, "kept").values()) == {True}


@pytest.mark.parametrize(
    "form", ["content_function => 'about'", "content_columns => '{title}', condition => 'length(about) > 0'"]
)
def test_clear_never_takes_away_the_vector_that_is_being_written(db: Connection, form: str) -> None:
    """A trigger before the write does not see generated columns; one that compares without them clears every write."""
    db.execute("ALTER TABLE documents ADD about text GENERATED ALWAYS AS ('about ' || title) STORED")
    db.execute("CREATE FUNCTION about(d documents) RETURNS text LANGUAGE sql AS 'SELECT d.about'")
    try:
        with db.transaction():
            enable(db, f"{form}, on_change => 'clear'")
    except psycopg.errors.FeatureNotSupported as error:
        assert "keep" in (error.diag.message_hint or "")
        enable(db, form)
    embed(db)
    assert set(vectors(db).values()) == {True}
    db.execute("UPDATE documents SET note = 'seen'")
    assert set(vectors(db).values()) == {True}


@pytest.mark.parametrize("arguments", [COLUMNS, "content_function => 'text_of', condition => 'published'"])
def test_replicated_rows_are_captured_where_that_was_asked_for(db: Connection, arguments: str) -> None:
    """The worker of a subscription applies rows in this mode."""
    enable(db, f"{arguments}, replicated => true, on_change => 'clear'")
    embed(db)
    db.execute("SET LOCAL session_replication_role = replica")
    db.execute("INSERT INTO documents VALUES (4, 'four', 'c4'); UPDATE documents SET content = 'new' WHERE id = 1")
    db.execute("DELETE FROM documents WHERE id = 2; UPDATE documents SET note = 'seen'")

    assert queued(db) == [[1], [2], [4]]
    assert vectors(db) == {1: False, 3: True, 4: False}
    embed(db)
    db.execute("TRUNCATE documents")
    assert waiting(db) == 1
    db.execute("SELECT autoembed.alter_pipeline('documents', on_change => 'keep')")
    db.execute("INSERT INTO documents VALUES (5, 'five', 'c5')")
    assert queued(db) == [[5]]


TROUBLES = {
    "an exception": "RAISE 'no text'",
    "an assertion": "ASSERT false, 'no text'",
    "a cancel": "RAISE query_canceled",
    "a shutdown": "RAISE admin_shutdown",
    "a lack of memory": "RAISE out_of_memory",
    "a code of nobody's": "RAISE 'no text' USING ERRCODE = 'ZZ999'",
    "a division by zero": "PERFORM 1 / (length(t) - length(t))",
    "a recursion without end": "PERFORM app.troubled(t)",
    "a table that is not there": "PERFORM * FROM nowhere",
    "a commit": "COMMIT",
    "too many rows": "PERFORM (SELECT * FROM (VALUES (1), (2)) AS v)",
    "a serialization failure": "RAISE serialization_failure",
}


@pytest.mark.parametrize(
    "form", ["content_function => 'text_of'", "content_columns => '{title}', condition => 'troubled(content)'"]
)
@pytest.mark.parametrize("trouble", TROUBLES)
def test_no_row_is_refused_whatever_its_owners_code_raises(db: Connection, form: str, trouble: str) -> None:
    troubled = "CREATE OR REPLACE FUNCTION troubled(t text) RETURNS boolean LANGUAGE plpgsql AS $${}$$"
    db.execute(troubled.format("BEGIN RETURN true; END"))
    db.execute(
        "CREATE OR REPLACE FUNCTION text_of(d documents) RETURNS text LANGUAGE sql AS"
        " $$SELECT d.content WHERE app.troubled(d.content)$$"
    )
    enable(db, f"{form}, on_change => 'clear'")
    enable(db, f"{form}, replicated => true", column="kept")
    embed(db)
    db.execute(troubled.format(f"BEGIN IF t LIKE 'bad%' THEN {TROUBLES[trouble]}; END IF; RETURN true; END"))

    db.execute("INSERT INTO documents VALUES (4, 'four', 'bad'), (5, 'five', 'good')")
    db.execute("UPDATE documents SET content = 'bad' WHERE id = 1")
    db.execute("UPDATE documents SET content = 'bad too' WHERE id = 4")
    db.execute("UPDATE documents SET content = CASE id WHEN 4 THEN 'good' ELSE 'bad' END WHERE id > 3")
    db.execute(
        "INSERT INTO documents VALUES (1, '', 'bad 2') ON CONFLICT (id) DO UPDATE SET content = excluded.content"
    )
    with db.cursor() as cursor, cursor.copy("COPY documents (id, content) FROM STDIN") as copy:
        copy.write("6\tbad\n7\tgood\n")
    db.execute("DELETE FROM documents WHERE id = 5")

    assert {key for [key] in queued(db)} >= {1, 4, 6, 7}
    contents = dict(db.execute("SELECT id, content FROM documents").fetchall())
    assert contents == {1: "bad 2", 2: "c2", 3: "c3", 4: "good", 6: "bad", 7: "good"}


@pytest.mark.parametrize("column", ["'embedding'", "NULL"])
@pytest.mark.parametrize(
    "form",
    [
        "content_columns => '{content}'",
        "content_columns => '{content}', condition => 'published'",
        "content_function => 'text_of'",
    ],
)
def test_no_role_that_writes_rows_passes_for_a_lane(db: Connection, form: str, column: str) -> None:
    """A setting tells a trigger that a lane writes a vector. Any session can have it."""
    db.execute(f"SELECT autoembed.enable('documents', {column}, {form})")
    embed(db)

    db.execute(PASS_FOR_A_LANE)
    db.execute("UPDATE documents SET content = 'new' WHERE id = 1")
    if column != "NULL":
        db.execute("UPDATE documents SET embedding = array_fill(1, ARRAY[1536])::vector WHERE id = 2")
    db.execute("RESET SESSION AUTHORIZATION")

    assert queued(db) == ([[1]] if column == "NULL" else [[1], [2]])
    embed(db)
    if column != "NULL":
        assert_fresh(db, "title || ': ' || content" if "text_of" in form else "content")


def test_no_role_that_writes_rows_passes_for_a_lane_before_triggers_made_by_hand(db: Connection) -> None:
    db.execute("""
        ALTER TABLE documents ADD about text GENERATED ALWAYS AS ('about ' || title) STORED,
            ADD embedding vector(1536);
        CREATE TRIGGER queue AFTER INSERT OR UPDATE ON documents
            FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('text_of', 'embedding');
        CREATE TRIGGER clear BEFORE UPDATE OF content, about, embedding ON documents
            FOR EACH ROW EXECUTE FUNCTION autoembed.clear_column('embedding');
        UPDATE documents SET note = 'first';
    """)
    embed(db)
    assert set(vectors(db).values()) == {True}

    db.execute(PASS_FOR_A_LANE)
    db.execute("UPDATE documents SET content = 'new' WHERE id = 1")
    db.execute("UPDATE documents SET embedding = array_fill(1, ARRAY[1536])::vector WHERE id = 2")
    db.execute("RESET SESSION AUTHORIZATION")

    assert vectors(db) == {1: False, 2: True, 3: True}
    embed(db)
    assert_fresh(db, "title || ': ' || content")


def test_a_role_that_is_taken_to_embed_passes_for_a_lane(db: Connection) -> None:
    enable(db)
    db.execute("CREATE ROLE lane_taker NOINHERIT; GRANT postgres TO lane_taker")
    db.execute("SET LOCAL SESSION AUTHORIZATION lane_taker; SET LOCAL ROLE postgres")
    db.execute("SELECT autoembed.process()")
    assert vectors(db) == {1: True, 2: True, 3: True}
    assert queued(db) == []


# pl_reserved_kwlist.h. SQL lets some of them be names without quotes.
RESERVED = """
    all begin by case declare else end execute for foreach from if in into loop not null or strict then to using when
    while
"""
# pl_unreserved_kwlist.h.
UNRESERVED = """
    absolute alias and array assert backward call chain close collate column column_name commit constant constraint
    constraint_name continue current cursor datatype debug default detail diagnostics do dump elseif elsif errcode error
    exception exit fetch first forward get hint import info insert is last log merge message message_text move next no
    notice open option perform pg_context pg_datatype_name pg_exception_context pg_exception_detail pg_exception_hint
    pg_routine_oid print_strict_params prior query raise relative reset return returned_sqlstate reverse rollback
    row_count rowtype schema schema_name scroll set slice sqlstate stacked table table_name type use_column use_variable
    variable_conflict warning
"""


@pytest.mark.parametrize("storage", ["inline", "beside"])
def test_columns_may_have_the_names_of_all_keywords_of_plpgsql(db: Connection, storage: str) -> None:
    words = [f'"{word}"' for word in (RESERVED + UNRESERVED).split()]
    embedding = "embedding_column => 'e', on_change => 'clear', " * (storage == "inline")
    for start in range(0, len(words), 30):
        # A key has 32 columns at most.
        keys, contents = words[start : start + 30], words[:start] + words[start + 30 :]
        db.execute(
            f"CREATE TABLE words ({' int, '.join(keys)} int, {' text, '.join(contents)} text, z text,"
            f" PRIMARY KEY ({', '.join(keys)}))"
        )
        db.execute(f"SELECT autoembed.enable('words', {embedding}content_columns => '{{{','.join(contents)}}}')")
        for number in "12":
            db.execute(f"INSERT INTO words ({', '.join(keys)}) VALUES ({', '.join(number * len(keys))})")
        embed(db)
        for word in contents:
            db.execute("DELETE FROM pgmq.q_embedding_jobs; UPDATE words SET z = 'seen'")
            db.execute(f"UPDATE words SET {word} = 'new' WHERE {keys[0]} = 1")
            assert queued(db) == [[1] * len(keys)]
        db.execute(f"UPDATE words SET {keys[-1]} = 3 WHERE {keys[0]} = 2")
        assert len(queued(db)) == 3
        embed(db)
        rows = "SELECT count(e) FROM words" if storage == "inline" else "SELECT count(*) FROM words_embeddings"
        assert db.execute(rows.encode()).fetchall() == [(1,)]
        db.execute("DROP TABLE words; SELECT autoembed._drop_orphaned_pipelines()")


def test_a_column_may_be_renamed_to_a_keyword_of_plpgsql(db: Connection) -> None:
    """The key, the content and the embedding, each to any of them."""
    names, words = ["k", "c", "e"], RESERVED.split()
    db.execute("CREATE TABLE words (k int PRIMARY KEY, c text, z text)")
    db.execute("SELECT autoembed.enable('words', 'e', content_columns => '{c}', on_change => 'clear')")
    db.execute("INSERT INTO words VALUES (1, NULL, NULL), (2, NULL, NULL)")
    embed(db)
    for number in range(len(words)):
        after = [words[number - role] for role in range(3)]
        for role in range(3):
            db.execute(f'ALTER TABLE words RENAME "{names[role]}" TO new_{role}')
        for role in range(3):
            db.execute(f'ALTER TABLE words RENAME new_{role} TO "{after[role]}"')
        names = key, content, embedding = after
        db.execute(f"UPDATE words SET z = '{number}'; UPDATE words SET \"{content}\" = '{number}' WHERE \"{key}\" = 1")
        assert queued(db) == [[1]], names
        embed(db)
        assert db.execute(f'SELECT count("{embedding}") FROM words').fetchall() == [(1,)], names
