"""Attaching a table, changing how it is embedded, and letting it go; what its owner alters meanwhile is followed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import PASSWORD, Connection, Server, waiting, warnings_of
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]

DATABASE = "enable"
TABLE = """
CREATE SCHEMA app;
SET LOCAL search_path = app, public;
CREATE TABLE documents (
    id int PRIMARY KEY, title text, content text,
    published boolean DEFAULT true, archived boolean DEFAULT false, note text
);
CREATE FUNCTION text_of(d documents) RETURNS text LANGUAGE sql AS $$SELECT d.title || ': ' || d.content$$;
INSERT INTO documents (id, title, content) VALUES (1, 'one', 'c1'), (2, 'two', 'c2'), (3, 'three', 'c3');
"""
COLUMNS = "content_columns => '{title,content}'"
BOTH = r"concat_ws(E'\n\n', title, content)"


@pytest.fixture(scope="module")
def enabled(server: Server, template: str) -> Iterator[Connection]:
    """A database for all tests that need no second session."""
    with server.janitor(DATABASE, template), server.connect(DATABASE) as db:
        url = server.fake_api(DATABASE).base_url
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [url])
        for name, dimensions in (("small", 256), ("large", 1536), ("huge", 3072), ("giant", 4096)):
            db.execute(
                "SELECT autoembed.create_model(%s, 'openai', %s, model_id => 'text-embedding-3-large', base_url => %s,"
                " api_key => 'env:OPENAI_API_KEY')",
                [name, dimensions, url],
            )
        db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
        yield db


@pytest.fixture
def api(server: Server) -> FakeApi:
    api = server.fake_api(DATABASE)
    api.reset()
    return api


@pytest.fixture
def db(enabled: Connection, api: FakeApi) -> Iterator[Connection]:
    """A session with the table documents of three rows, in a transaction that is rolled back."""
    with enabled.transaction(force_rollback=True):
        enabled.execute(TABLE)
        yield enabled


def enable(db: Connection, arguments: str = COLUMNS, table: str = "documents") -> None:
    db.execute(f"SELECT autoembed.enable('{table}', {arguments})")


def attached(db: Connection, arguments: str = COLUMNS) -> None:
    """The table enabled and embedded."""
    enable(db, arguments)
    embed(db)


def embed(db: Connection) -> None:
    """All that waits, and every table that is being looked through."""
    for _ in range(20):
        [report] = db.execute("SELECT read, failed_jobs FROM autoembed.process()").fetchall()
        assert report.failed_jobs == []
        if waiting(db) == 0 and report.read == 0:
            assert db.execute("SELECT FROM autoembed.backfill").fetchall() == []
            return
    raise AssertionError("there is always more to embed")


def sent(db: Connection, api: FakeApi) -> list[str]:
    """The texts that are sent until nothing waits."""
    before = len(api.texts())
    embed(db)
    return sorted(api.texts()[before:])


def queued(db: Connection) -> list[Any]:
    rows = db.execute("SELECT jsonb_path_query(message, '$.keys[*]') AS key FROM pgmq.q_embedding_jobs").fetchall()
    return sorted(row.key for row in rows)


def vectors(db: Connection, column: str = "embedding") -> dict[Any, bool]:
    """Which rows have a vector, by key."""
    return dict(db.execute(f"SELECT id, {column} IS NOT NULL FROM documents ORDER BY id").fetchall())


def assert_fresh(
    db: Connection,
    text: str = BOTH,
    table: str = "documents",
    column: str = "embedding",
    model: str = "text-embedding-3-small",
) -> None:
    """Every row with a text has its vector, every other none."""
    rows = db.execute(f"SELECT ({text}) AS content, {column}::vector::real[] AS vector FROM {table}").fetchall()
    assert rows
    for row in rows:
        if row.content is None or not row.content.strip():
            assert row.vector is None
        else:
            assert row.vector is not None, row.content
            assert np.allclose(row.vector, embedding_of(row.content, len(row.vector), model), atol=1e-3), row.content


def traces(db: Connection) -> list[Any]:
    """What is there of pipelines: their functions, triggers, jobs and rows."""
    return db.execute("""
        SELECT 'function' AS kind, proname::text AS name FROM pg_proc
        WHERE pronamespace = 'autoembed'::regnamespace AND proname ~ '_[0-9]+$'
        UNION ALL SELECT 'trigger', tgname FROM pg_trigger
        WHERE tgname LIKE '%autoembed%' AND tgrelid <> 'pgmq.meta'::regclass AND NOT tgisinternal
        UNION ALL SELECT 'job', message::text FROM pgmq.q_embedding_jobs
        UNION ALL SELECT 'pipeline', id::text FROM autoembed.pipeline
        UNION ALL SELECT 'backfill', pipeline_id::text FROM autoembed.backfill
        UNION ALL SELECT 'embedded', key FROM autoembed.embedded
        UNION ALL SELECT 'failure', key FROM autoembed.failure
    """).fetchall()


# What is embedded ----------------------------------------------------------------------------------

FORMS = {
    "two columns": (COLUMNS, BOTH),
    "one column": ("content_columns => '{content}'", "content"),
    "columns in another order": (
        "content_columns => '{content,title,id}'",
        r"concat_ws(E'\n\n', content, title, id)",
    ),
    "a template": (
        r"content_template => '# {title}\n\n{content}'",
        r"CASE WHEN num_nonnulls(title, content) > 0 THEN concat('# ', title, E'\n\n', content) END",
    ),
    "a template with braces, backslashes and quotes": (
        r"content_template => '{{{title}}} }}{{ \\n ''$1'' %s %I'",
        r"CASE WHEN title IS NOT NULL THEN concat('{', title, '} }{ \n ''$1'' %s %I') END",
    ),
    "a template of one column alone": ("content_template => '{title}'", "title"),
    "a function": ("content_function => 'text_of'", "title || ': ' || content"),
    "a function by its full name": ("content_function => 'app.text_of'", "title || ': ' || content"),
    "a function by its quoted name": ("""content_function => '"Text von"'""", "upper(title)"),
    "a function with a plain name in need of quotes": ("content_function => 'Text von'", "upper(title)"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_content_gives_its_text_before_and_after_a_change(db: Connection, form: str) -> None:
    arguments, text = FORMS[form]
    db.execute("CREATE FUNCTION \"Text von\"(documents) RETURNS varchar(9) LANGUAGE sql AS 'SELECT upper($1.title)'")
    db.execute("INSERT INTO documents (id, title, content) VALUES (4, 'four', NULL), (5, NULL, 'c5'), (6, NULL, NULL)")
    attached(db, arguments)
    assert_fresh(db, text)

    db.execute("UPDATE documents SET title = content, content = title")
    embed(db)
    assert_fresh(db, text)


def test_a_row_that_failed_before_its_tables_truncation_is_read_stays_known(db: Connection, api: FakeApi) -> None:
    """The newest messages are claimed before older ones."""
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    attached(db)
    db.execute("UPDATE documents SET content = 'poison' WHERE id = 1")
    db.execute("SELECT autoembed.process(); TRUNCATE documents")
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = 'infinity'; INSERT INTO documents VALUES (5, 'poison', 'poison')")
    db.execute("SELECT autoembed.process(); UPDATE pgmq.q_embedding_jobs SET vt = '-infinity'")
    assert db.execute("SELECT key FROM autoembed.failed ORDER BY key").fetchall() == [("[1]",), ("[5]",)]

    for _ in range(2):
        db.execute("SELECT autoembed.process()")

    assert waiting(db) == 0
    assert db.execute("SELECT key FROM autoembed.failed").fetchall() == [("[5]",)]


def test_a_blank_text_has_no_embedding(db: Connection, api: FakeApi) -> None:
    attached(db, "content_columns => '{content}'")

    db.execute("UPDATE documents SET content = (ARRAY['', E' \\n\\t', NULL])[id]")

    assert sent(db, api) == []
    assert vectors(db) == {1: False, 2: False, 3: False}


def test_the_condition_says_which_rows_have_an_embedding_at_all(db: Connection, api: FakeApi) -> None:
    db.execute("UPDATE documents SET archived = true WHERE id = 1; UPDATE documents SET published = NULL WHERE id = 2")
    attached(db, f"{COLUMNS}, condition => 'published and not archived'")
    assert vectors(db) == {1: False, 2: False, 3: True}

    db.execute("UPDATE documents SET archived = false")
    assert queued(db) == [[1]]
    assert sent(db, api) == ["one\n\nc1"]
    assert vectors(db) == {1: True, 2: False, 3: True}

    db.execute("UPDATE documents SET published = false")
    assert queued(db) == [[1], [3]]
    assert sent(db, api) == []
    assert vectors(db) == {1: False, 2: False, 3: False}

    db.execute("UPDATE documents SET title = 'unseen'; INSERT INTO documents VALUES (4, 'unseen', '', false)")
    assert queued(db) == []
    db.execute("INSERT INTO documents (id, title) VALUES (5, 'seen'), (6, 'seen too')")
    assert queued(db) == [[5], [6]]


@pytest.mark.parametrize(
    "condition",
    [
        "title <> 'two' AND length(content) BETWEEN 1 AND 10",
        "title = ANY (ARRAY['one', 'three']::varchar[])",
        "title ~ '^(one|three)$' -- and a comment",
        "CASE WHEN id = 2 THEN false ELSE true END",
        "odd(id)",
        "(id, title) IS DISTINCT FROM (2, 'two')",
    ],
)
def test_a_condition_may_be_any_expression_of_a_rows_columns(db: Connection, condition: str) -> None:
    db.execute("CREATE FUNCTION odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1")
    db.execute("SELECT autoembed.enable('documents', content_columns => '{title}', condition => %s)", [condition])
    embed(db)
    assert vectors(db) == {1: True, 2: False, 3: True}

    db.execute("UPDATE documents SET title = title")
    assert queued(db) == []


# The column ----------------------------------------------------------------------------------------


def test_a_missing_column_is_added_with_the_dimensions_of_the_model(db: Connection) -> None:
    enable(db, f"'v', {COLUMNS}, model => 'small'")

    kind = "SELECT format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'documents'::regclass"
    assert db.execute(f"{kind} AND attname = 'v'").fetchone() == ("halfvec(256)",)
    embed(db)
    assert_fresh(db, column="v", model="text-embedding-3-large")


@pytest.mark.parametrize("kind", ["vector(1536)", "halfvec(1536)", "vector", "halfvec"])
def test_vector_and_halfvec_columns_both_work(db: Connection, kind: str) -> None:
    db.execute(f"ALTER TABLE documents ADD embedding {kind}")
    attached(db)

    assert_fresh(db)


def test_dimensions_that_do_not_fit_are_said_at_once_and_jobs_wait(db: Connection, api: FakeApi) -> None:
    db.execute("ALTER TABLE documents ADD embedding halfvec(1000)")
    with warnings_of(db) as warnings:
        enable(db)
    assert warnings[0].startswith(
        'column "embedding" of table app.documents has 1000 dimensions, model "text-embedding-3-small" has 1536'
    )
    assert "ALTER TABLE app.documents ALTER COLUMN embedding TYPE halfvec(1536) USING NULL" in warnings[0]
    assert db.execute("SELECT read, failed FROM autoembed.process()").fetchone() == (0, 0)

    db.execute("ALTER TABLE app.documents ALTER COLUMN embedding TYPE halfvec(1536) USING NULL")
    embed(db)
    assert_fresh(db)


def test_more_dimensions_than_an_index_takes_are_said_with_the_way_out(db: Connection) -> None:
    with warnings_of(db) as warnings:
        enable(db, f"{COLUMNS}, model => 'huge'")
    assert warnings == []
    with warnings_of(db) as warnings:
        enable(db, f"'more', {COLUMNS}, model => 'giant'")
    [warning] = warnings
    assert "4096 dimensions cannot have an HNSW index, which takes up to 4000" in warning
    assert "dimensions => " in warning


def test_an_index_that_cannot_be_built_is_refused_with_the_way_out(db: Connection) -> None:
    unfit = psycopg.errors.ObjectNotInPrerequisiteState
    with pytest.raises(unfit, match="4096 dimensions cannot have an HNSW index"), db.transaction():
        enable(db, f"{COLUMNS}, model => 'giant', create_index => true")
    db.execute("ALTER TABLE documents ADD embedding vector")
    with pytest.raises(unfit, match='"embedding" of table .* has no dimensions') as error, db.transaction():
        enable(db, f"{COLUMNS}, create_index => true")

    db.execute(str(error.value.diag.message_hint).encode())
    enable(db, f"{COLUMNS}, create_index => true")

    assert db.execute("SELECT create_index FROM autoembed.backfill").fetchall() == [(True,)]


def test_several_pipelines_live_on_one_table(db: Connection, api: FakeApi) -> None:
    enable(db, "content_columns => '{title}'")
    enable(db, "'small', content_columns => '{content}', model => 'small', on_change => 'clear'")
    enable(db, "'third', content_function => 'text_of'")
    embed(db)
    assert len(api.texts()) == 9

    db.execute("UPDATE documents SET content = 'new' WHERE id = 1")
    assert vectors(db) == {1: True, 2: True, 3: True}
    assert vectors(db, "small") == {1: False, 2: True, 3: True}
    assert sent(db, api) == ["new", "one: new"]
    assert_fresh(db, "title")
    assert_fresh(db, "content", column="small", model="text-embedding-3-large")
    assert_fresh(db, "title || ': ' || content", column="third")

    db.execute("SELECT autoembed.disable('documents', 'small')")
    db.execute("UPDATE documents SET content = 'newer', title = 'newer' WHERE id = 1")
    assert sent(db, api) == ["newer", "newer: newer"]
    with pytest.raises(psycopg.errors.AmbiguousColumn, match="several embedding columns"), db.transaction():
        db.execute("SELECT autoembed.reembed('documents')")


# on_change -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["two columns", "a template", "a function", "condition"])
def test_clear_removes_the_vector_in_the_write_that_changes_the_text_and_keep_does_not(
    db: Connection, form: str
) -> None:
    arguments = {
        **{name: value[0] for name, value in FORMS.items()},
        "condition": f"{COLUMNS}, condition => 'published'",
    }
    enable(db, f"{arguments[form]}, on_change => 'clear'")
    enable(db, f"'kept', {arguments[form]}, on_change => 'keep'")
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


# Ending, pausing, changing ---------------------------------------------------------------------------


@pytest.mark.parametrize("drop_column", [False, True])
@pytest.mark.parametrize(
    "arguments", [COLUMNS, "content_function => 'text_of', condition => 'published', on_change => 'clear'"]
)
def test_disable_leaves_nothing_but_the_vectors(db: Connection, arguments: str, drop_column: bool) -> None:
    attached(db, arguments)
    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; SELECT autoembed.resync('documents')")
    assert {trace.kind for trace in traces(db)} >= {"function", "trigger", "job", "pipeline", "backfill", "embedded"}

    db.execute("SELECT autoembed.disable('documents', drop_column => %s)", [drop_column])

    assert traces(db) == []
    db.execute("UPDATE documents SET content = 'newer'; DELETE FROM documents WHERE id = 2")
    if drop_column:
        with pytest.raises(psycopg.errors.UndefinedColumn), db.transaction():
            vectors(db)
    else:
        assert vectors(db)[3]
    attached(db, arguments)
    assert set(vectors(db).values()) == {True}


def test_what_was_enabled_is_gone_when_the_transaction_is_rolled_back(db: Connection) -> None:
    with db.transaction(force_rollback=True):
        attached(db)

    assert traces(db) == []


def test_a_paused_table_goes_on_where_it_stood(db: Connection, api: FakeApi) -> None:
    enable(db)
    db.execute("SELECT autoembed.pause('documents')")
    assert sent_while_paused(db, api) == []

    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4')")
    assert sent_while_paused(db, api) == []
    assert queued(db) == [[1], [4]]

    db.execute("SELECT autoembed.resume('documents')")
    embed(db)
    assert len(api.texts()) == 4
    assert_fresh(db)


def sent_while_paused(db: Connection, api: FakeApi) -> list[str]:
    assert db.execute("SELECT read, retried, failed FROM autoembed.process()").fetchone() == (0, 0, 0)
    return api.texts()


ALTERATIONS = {
    "content_columns => '{title}'": (["three", "two"], "CASE WHEN published THEN title END"),
    "content_columns => '{title,content}'": ([], "CASE WHEN published THEN concat_ws(E'\\n\\n', title, content) END"),
    r"content_template => '{title}\n\n{content}'": (
        ["one\n\n"],
        r"CASE WHEN published THEN concat(title, E'\n\n', content) END",
    ),
    "content_function => 'text_of'": (
        ["three: c3", "two: c2"],
        "CASE WHEN published THEN title || ': ' || content END",
    ),
    "condition => 'true'": (["four\n\nc4"], BOTH),
    "condition => ''": (["four\n\nc4"], BOTH),
    "condition => 'id > 1'": (["four\n\nc4"], f"CASE WHEN id > 1 THEN {BOTH} END"),
    "condition => 'published IS TRUE'": ([], f"CASE WHEN published THEN {BOTH} END"),
    "on_change => 'clear'": ([], f"CASE WHEN published THEN {BOTH} END"),
    "truncate => false": ([], f"CASE WHEN published THEN {BOTH} END"),
    "model => ''": ([], f"CASE WHEN published THEN {BOTH} END"),
    "content_columns => '{title}', condition => 'id = 4'": (["four"], "CASE WHEN id = 4 THEN title END"),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_alteration_sends_exactly_the_rows_to_which_it_makes_a_difference(
    db: Connection, api: FakeApi, alteration: str
) -> None:
    """One row has no content, so that some forms give it the same text; one is not published."""
    db.execute(
        "UPDATE documents SET content = NULL WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4', false)"
    )
    attached(db, f"{COLUMNS}, condition => 'published'")
    texts, text = ALTERATIONS[alteration]

    db.execute(f"SELECT autoembed.alter_pipeline('documents', {alteration})")

    assert sent(db, api) == texts
    assert_fresh(db, text)
    db.execute("UPDATE documents SET title = upper(title)")
    embed(db)
    assert_fresh(db, text)


def test_another_model_embeds_all_rows_anew(db: Connection, api: FakeApi) -> None:
    attached(db)
    db.execute("SELECT autoembed.alter_pipeline('documents', model => 'large')")
    assert len(sent(db, api)) == 3
    assert_fresh(db, model="text-embedding-3-large")

    with warnings_of(db) as warnings:
        db.execute("SELECT autoembed.alter_pipeline('documents', model => 'small')")
    assert any('has 1536 dimensions, model "small" has 256' in warning for warning in warnings)
    assert db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)
    assert set(vectors(db).values()) == {True}

    db.execute("SELECT autoembed.alter_pipeline('documents', model => '')")
    assert len(sent(db, api)) == 3
    assert_fresh(db)


def test_reembed_sends_all_rows_or_those_that_a_condition_holds_for(db: Connection, api: FakeApi) -> None:
    attached(db, f"{COLUMNS}, condition => 'published'")
    db.execute("SELECT autoembed.reembed('documents')")
    assert len(sent(db, api)) == 3
    db.execute("SELECT autoembed.reembed('documents', condition => 'title < ''p''')")
    assert sent(db, api) == ["one\n\nc1"]
    db.execute("UPDATE documents SET published = false WHERE id = 1")
    db.execute("SELECT autoembed.reembed('documents', 'embedding', 'id <= 2')")
    assert sent(db, api) == ["two\n\nc2"]

    # Two one after the other: neither is forgotten.
    db.execute("SELECT autoembed.reembed('documents', condition => 'id = 2')")
    db.execute("SELECT autoembed.reembed('documents', condition => 'id = 3')")
    assert set(sent(db, api)) >= {"two\n\nc2", "three\n\nc3"}


WITHOUT_TRIGGERS = {
    "disabled triggers": ("ALTER TABLE documents DISABLE TRIGGER USER", "ALTER TABLE documents ENABLE TRIGGER USER"),
    "replica": ("SET LOCAL session_replication_role = replica", "SET LOCAL session_replication_role = origin"),
}


@pytest.mark.parametrize("how", WITHOUT_TRIGGERS)
def test_resync_finds_what_no_trigger_saw_and_sends_nothing_else(db: Connection, api: FakeApi, how: str) -> None:
    attached(db)
    off, on = WITHOUT_TRIGGERS[how]
    db.execute(off)
    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4')")
    db.execute("UPDATE documents SET embedding = NULL WHERE id = 2; UPDATE documents SET note = 'seen'")
    db.execute(on)
    assert queued(db) == []

    db.execute("SELECT autoembed.resync('documents')")

    assert sent(db, api) == ["four\n\nc4", "one\n\nnew", "two\n\nc2"]
    assert_fresh(db)
    db.execute("SELECT autoembed.resync('documents')")
    assert sent(db, api) == []


def test_resync_after_the_digests_are_lost_embeds_all(db: Connection, api: FakeApi) -> None:
    attached(db)
    db.execute("TRUNCATE autoembed.embedded")
    db.execute("SELECT autoembed.resync('documents')")

    assert len(sent(db, api)) == 3


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


# Names may change ------------------------------------------------------------------------------------

PIPELINES = {
    "columns": f"{COLUMNS}, condition => 'published and not archived'",
    "template": r"content_template => '# {title}\n\\ {{{content}}}', condition => 'note IS NULL', on_change => 'clear'",
    "function": "content_function => 'text_of', condition => 'odd(id) OR title IS NOT NULL', on_change => 'clear'",
}
# What is altered, and the words by which the same is said then.
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
    attached(db, PIPELINES[pipeline])
    db.execute("CREATE VIEW rows AS SELECT * FROM documents")
    statements, words = RENAMES[rename]

    db.execute(statements)

    def say(words_then: str) -> str:
        return " ".join(words.get(word, word) for word in words_then.split(" "))

    assert sent(db, api) == []
    db.execute(say("UPDATE documents SET content = 'new' WHERE id = 1"))
    db.execute(say("INSERT INTO documents ( id , title , content ) VALUES (4, 'four', 'c4')"))
    db.execute(say("DELETE FROM documents WHERE id = 2"))
    assert queued(db) == [[1], [2], [4]]
    assert len(sent(db, api)) == 2
    # The view follows renames by itself: its names are those of before.
    texts = {
        "columns": BOTH,
        "template": r"concat('# ', title, E'\n\\ {', content, '}')",
        "function": "title || ': ' || content",
    }
    assert_fresh(db, texts[pipeline], "app2.rows" if rename == "schema" else "app.rows")

    db.execute(say("UPDATE documents SET published = published"))
    assert queued(db) == []


# What a condition uses, besides columns: how it goes, and comes back.
HELPERS = """
CREATE SCHEMA helpers;
CREATE FUNCTION helpers.odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1;
CREATE OPERATOR helpers.%% (FUNCTION = helpers.odd, RIGHTARG = int);
CREATE TYPE helpers.colour AS ENUM ('one', 'two', 'three');
CREATE COLLATION helpers.plain (LOCALE = 'C');
"""
ODD = "helpers.odd(id)"
GOING: dict[str, tuple[str, str, str]] = {
    "a function, renamed": (
        ODD,
        "ALTER FUNCTION helpers.odd RENAME TO uneven",
        "ALTER FUNCTION helpers.uneven RENAME TO odd",
    ),
    "a function, moved": (
        ODD,
        "ALTER FUNCTION helpers.odd SET SCHEMA public",
        "ALTER FUNCTION public.odd SET SCHEMA helpers",
    ),
    "a function, dropped": (
        ODD,
        "DROP FUNCTION helpers.odd CASCADE",
        "CREATE FUNCTION helpers.odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1",
    ),
    "a function, another of its name in its place": (
        ODD,
        "DROP FUNCTION helpers.odd CASCADE;"
        "CREATE FUNCTION helpers.odd(t text) RETURNS boolean LANGUAGE sql RETURN true",
        "CREATE FUNCTION helpers.odd(n int) RETURNS boolean LANGUAGE sql RETURN n % 2 = 1",
    ),
    "its schema, renamed": (ODD, "ALTER SCHEMA helpers RENAME TO tools", "ALTER SCHEMA tools RENAME TO helpers"),
    "its schema, dropped": (ODD, "DROP SCHEMA helpers CASCADE", HELPERS),
    "an operator": (
        "OPERATOR(helpers.%%) id",
        "DROP OPERATOR helpers.%% (NONE, int)",
        "CREATE OPERATOR helpers.%% (FUNCTION = helpers.odd, RIGHTARG = int)",
    ),
    "a type": (
        "title::helpers.colour <> 'two'",
        "ALTER TYPE helpers.colour RENAME TO color",
        "ALTER TYPE helpers.color RENAME TO colour",
    ),
    "a collation": (
        "title COLLATE helpers.plain <> 'two'",
        "DROP COLLATION helpers.plain",
        "CREATE COLLATION helpers.plain (LOCALE = 'C')",
    ),
}


def odd_pipeline(db: Connection, condition: str) -> None:
    db.execute(HELPERS)
    db.execute("SELECT autoembed.enable('documents', content_columns => '{content}', condition => %s)", [condition])
    embed(db)


def state(db: Connection) -> tuple[str, str | None, str | None]:
    [row] = db.execute("SELECT state, reason, hint FROM autoembed.status").fetchall()
    return row.state, row.reason, row.hint


@pytest.mark.parametrize("going", GOING)
@pytest.mark.parametrize("mended", ["it comes back", "the condition is given anew"])
def test_what_a_condition_uses_may_go_and_its_rows_wait_until_that_is_mended(
    db: Connection, going: str, mended: str
) -> None:
    condition, goes, comes_back = GOING[going]
    odd_pipeline(db, condition)
    assert vectors(db) == {1: True, 2: False, 3: True}

    db.execute(goes)
    db.execute("UPDATE documents SET content = 'new'; INSERT INTO documents VALUES (5, 'three', 'c5')")
    with warnings_of(db) as warnings:
        report = db.execute("SELECT read, failed FROM autoembed.process()").fetchone()
    assert report == (0, 0)
    assert queued(db) == [[1], [2], [3], [5]]
    stopped, reason, hint = state(db)
    assert stopped == "stopped"
    assert reason is not None and "the condition on table app.documents uses" in reason and " helpers." in reason
    assert hint is not None and "autoembed.alter_pipeline('app.documents', condition => …)" in hint
    assert any(reason in warning and hint in warning for warning in warnings)
    finding = "SELECT ok, finding, advice FROM autoembed.doctor() WHERE subject = 'table app.documents.embedding'"
    assert db.execute(finding).fetchone() == (False, reason, hint)
    # Nothing else of the pipeline is refused meanwhile.
    db.execute("ALTER TABLE documents RENAME content TO body; UPDATE documents SET body = body || '!' WHERE id = 1")
    db.execute("SELECT autoembed.alter_pipeline('documents', on_change => 'clear'), autoembed.resync('documents')")

    if mended == "it comes back":
        db.execute(comes_back)
    else:
        db.execute("SELECT autoembed.alter_pipeline('documents', condition => 'id <> 2')")
    embed(db)
    assert vectors(db) == {1: True, 2: False, 3: True, 5: True}
    assert state(db) == ("idle", None, None)


def test_a_type_that_a_conditions_function_takes_may_be_renamed(db: Connection) -> None:
    db.execute(HELPERS)
    db.execute("CREATE FUNCTION warm(c helpers.colour) RETURNS boolean LANGUAGE sql RETURN c::text <> 'two'")
    db.execute("ALTER TABLE documents ADD colour helpers.colour; UPDATE documents SET colour = title::helpers.colour")
    attached(db, "content_columns => '{content}', condition => 'warm(colour)'")

    db.execute("ALTER TYPE helpers.colour RENAME TO color; UPDATE documents SET content = 'new'")
    embed(db)

    assert state(db) == ("idle", None, None)
    assert_fresh(db, "CASE WHEN id <> 2 THEN content END")


# What keeps a pipeline from being embedded, whose tables may be altered all the same.
HELD_UP = {
    "dimensions that do not fit": (COLUMNS, "ALTER TABLE documents ALTER embedding TYPE halfvec(3) USING NULL"),
    "a type that is none of vectors": (COLUMNS, "ALTER TABLE documents ALTER embedding TYPE text USING NULL"),
    "a content function that is gone": ("content_function => 'text_of'", "DROP FUNCTION text_of"),
    "a condition's function that is gone": (
        f"{COLUMNS}, condition => 'helpers.odd(id)'",
        "DROP FUNCTION helpers.odd CASCADE",
    ),
    "a column that must not be NULL": (
        f"{COLUMNS}, on_change => 'clear'",
        "ALTER TABLE documents ALTER embedding SET NOT NULL",
    ),
}


@pytest.mark.parametrize("held_up", HELD_UP)
def test_a_rename_refuses_no_row_whatever_keeps_its_table_from_being_embedded(db: Connection, held_up: str) -> None:
    arguments, holds_up = HELD_UP[held_up]
    db.execute(HELPERS)
    attached(db, arguments)
    db.execute(holds_up)

    db.execute("ALTER TABLE documents RENAME id TO number; ALTER TABLE documents RENAME content TO body")
    if "NULL" not in held_up:
        db.execute("UPDATE documents SET body = 'new'; INSERT INTO documents VALUES (4, 'four', 'c4')")
    db.execute("DELETE FROM documents WHERE number = 2")

    assert [2] in queued(db)
    assert state(db)[0] == "stopped"


def test_a_table_with_its_functions_may_be_altered_by_another_owner(db: Connection) -> None:
    db.execute(
        "CREATE ROLE enable_first; CREATE ROLE enable_second; GRANT ALL ON SCHEMA app TO enable_first, enable_second"
    )
    db.execute("ALTER TABLE documents OWNER TO enable_first; ALTER FUNCTION text_of OWNER TO enable_first")
    attached(db, "content_function => 'text_of', condition => 'published', on_change => 'clear'")

    db.execute("ALTER FUNCTION text_of OWNER TO enable_second; ALTER TABLE documents OWNER TO enable_second")

    owners = "SELECT DISTINCT proowner::regrole::text FROM pg_proc WHERE proname ~ '^_(text|content|write|scan)_[0-9]'"
    assert db.execute(owners).fetchall() == [("enable_second",)]
    db.execute("DROP OWNED BY enable_first")
    db.execute("UPDATE documents SET content = 'new'")
    embed(db)
    assert_fresh(db, "title || ': ' || content")


# Policies may bind the owner himself ---------------------------------------------------------------

FORCED = {
    "none at all": ("", False),
    "one that hides rows": ("CREATE POLICY few ON documents USING (id < 3)", False),
    "one that hides rows by a setting": (
        "CREATE POLICY tenant ON documents USING (note = current_setting('x'))",
        False,
    ),
    "one that lets all be seen, but not written": ("CREATE POLICY seen ON documents FOR SELECT USING (true)", False),
    "another's": ("CREATE POLICY others ON documents TO enable_other USING (true)", False),
    "a restrictive one beside": (
        "CREATE POLICY every ON documents USING (true); CREATE POLICY few ON documents AS RESTRICTIVE USING (id < 3)",
        False,
    ),
    "one that hides nothing": ("CREATE POLICY every ON documents USING (true)", True),
    "one for a group of the owner's": ("CREATE POLICY every ON documents TO enable_group USING (true)", True),
    "a restrictive one for others beside": (
        "CREATE POLICY every ON documents TO enable_owner USING (true);"
        "CREATE POLICY few ON documents AS RESTRICTIVE TO enable_other USING (id < 3)",
        True,
    ),
}


@pytest.mark.parametrize("policies", FORCED)
def test_policies_that_may_hide_rows_from_their_owner_are_reported_and_leave_none_out(
    db: Connection, policies: str
) -> None:
    statements, sound = FORCED[policies]
    db.execute("CREATE ROLE enable_group; CREATE ROLE enable_other; CREATE ROLE enable_owner IN ROLE enable_group")
    db.execute("GRANT ALL ON SCHEMA app TO enable_owner; ALTER TABLE documents OWNER TO enable_owner")
    attached(db)
    db.execute("ALTER TABLE documents ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY")
    db.execute(f"{statements}; UPDATE documents SET content = 'new'")

    if not sound:
        assert db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)
        assert queued(db) == [[1], [2], [3]]
        problem = "row level security is forced on the owner of table app.documents and may hide rows from him"
        stopped, reason, hint = state(db)
        assert (stopped, reason) == ("stopped", problem)
        assert hint is not None and "CREATE POLICY embeddings ON app.documents TO enable_owner USING (true)" in hint
        finding = "SELECT finding, advice FROM autoembed.doctor() WHERE NOT ok AND subject ~ '^table'"
        assert db.execute(finding).fetchall() == [(problem, hint)]
        db.execute("ALTER TABLE documents NO FORCE ROW LEVEL SECURITY")

    embed(db)
    assert_fresh(db)


# Types and columns may change ------------------------------------------------------------------------

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
    attached(db, "content_columns => '{title,content,about}', condition => 'published'")
    text = r"concat_ws(E'\n\n', title, content, about)"
    statement, texts = RETYPED[alteration]

    db.execute(statement)

    number = len(sent(db, api))
    assert texts is None or number == texts
    assert_fresh(db, text)
    db.execute(
        "UPDATE documents SET title = 'new' WHERE id::int = 1; INSERT INTO documents (id, title) VALUES (4, 'four')"
    )
    assert len(sent(db, api)) == 2
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
def test_a_pipeline_ends_with_what_it_is_made_of_and_the_table_goes_on(db: Connection, drop: str) -> None:
    """What is dropped, the application writes on as before; nothing is left that refuses its rows or waits for ever."""
    db.execute(
        "CREATE EXTENSION citext; CREATE TYPE colour AS ENUM ('red'); CREATE ROLE enable_owner; CREATE SCHEMA types"
    )
    db.execute("CREATE DOMAIN types.word AS text")
    db.execute("ALTER TABLE documents ADD c citext, ADD colour colour, ADD word types.word")
    attached(db, "content_columns => '{title,content,c,colour,word}', condition => 'published'")
    db.execute("UPDATE documents SET title = 'new' WHERE id = 1; SELECT autoembed.resync('documents')")

    db.execute(DROPS[drop])

    if db.execute("SELECT to_regclass('app.documents') IS NOT NULL AS there").fetchone() == (True,):
        db.execute(
            "UPDATE documents SET title = 'newer'; INSERT INTO documents (title) VALUES ('four')"
            if drop == "key column"
            else "UPDATE documents SET title = 'newer'; INSERT INTO documents (id, title) VALUES (4, 'four')"
        )
        db.execute("DELETE FROM documents WHERE title = 'four'")
    embed(db)
    assert traces(db) == []


def test_a_content_function_that_is_dropped_stops_its_pipeline_until_it_is_there_again(
    db: Connection, api: FakeApi
) -> None:
    attached(db, "content_function => 'text_of'")
    db.execute("DROP FUNCTION text_of")

    db.execute("UPDATE documents SET content = 'new' WHERE id = 1; INSERT INTO documents VALUES (4, 'four', 'c4')")
    with warnings_of(db) as warnings:
        assert db.execute("SELECT read, failed FROM autoembed.process()").fetchone() == (0, 0)
    assert any('there is no function "text_of" of one row of app.documents' in warning for warning in warnings)

    db.execute(
        "CREATE FUNCTION text_of(d documents) RETURNS text LANGUAGE sql AS 'SELECT d.title || '': '' || d.content'"
    )
    assert sent(db, api) == ["four: c4", "one: new"]
    assert_fresh(db, "title || ': ' || content")


def test_partitions_that_come_and_go_are_followed(db: Connection, api: FakeApi) -> None:
    db.execute("""
        CREATE TABLE parts (id int PRIMARY KEY, title text) PARTITION BY RANGE (id);
        CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10);
        CREATE TABLE high (title text, embedding halfvec(1536), gone int, id int NOT NULL);
        ALTER TABLE high DROP gone;
        INSERT INTO parts VALUES (1, 'one');
        INSERT INTO high VALUES ('eleven', NULL, 11), ('twelve', NULL, 12);
    """)
    enable(db, "content_columns => '{title}'", "parts")
    embed(db)

    db.execute("ALTER TABLE parts ATTACH PARTITION high FOR VALUES FROM (10) TO (20)")
    assert sent(db, api) == ["eleven", "twelve"]
    db.execute("UPDATE high SET title = 'new' WHERE id = 11; INSERT INTO parts VALUES (13, 'thirteen')")
    db.execute(
        "CREATE TABLE higher PARTITION OF parts FOR VALUES FROM (20) TO (30);"
        "INSERT INTO higher VALUES (21, 'twenty-one')"
    )
    assert queued(db) == [[11], [13], [21]]
    embed(db)
    assert_fresh(db, "title", "parts")

    db.execute("ALTER TABLE parts DETACH PARTITION high")
    db.execute("UPDATE high SET title = 'unseen'; INSERT INTO high (id, title) VALUES (14, 'unseen')")
    assert sent(db, api) == []
    db.execute("UPDATE parts SET title = 'seen' WHERE id = 1")
    assert sent(db, api) == ["seen"]


def test_a_deferrable_primary_key_is_a_key(db: Connection) -> None:
    db.execute("CREATE TABLE deferred (id int PRIMARY KEY DEFERRABLE INITIALLY DEFERRED, content text)")
    db.execute("INSERT INTO deferred VALUES (1, 'one')")
    enable(db, "content_columns => '{content}'", "deferred")
    db.execute("UPDATE deferred SET content = 'new', id = 2; SET CONSTRAINTS ALL IMMEDIATE")
    embed(db)

    assert_fresh(db, "content", "deferred")


def test_a_row_without_a_key_holds_up_no_other(db: Connection) -> None:
    attached(db)
    db.execute("ALTER TABLE documents DROP CONSTRAINT documents_pkey; ALTER TABLE documents ALTER id DROP NOT NULL")
    db.execute("INSERT INTO documents VALUES (NULL, 'none', 'c'), (4, 'four', 'c4')")
    for _ in range(3):
        db.execute("SELECT autoembed.process()")

    assert vectors(db)[4]


def test_rows_of_tables_that_inherit_are_none_of_the_table(db: Connection, api: FakeApi) -> None:
    db.execute("ALTER TABLE documents ADD embedding halfvec(1536)")
    db.execute("CREATE TABLE special () INHERITS (documents); INSERT INTO special VALUES (1, 'child', 'c1')")
    attached(db)

    assert len(api.texts()) == 3
    assert_fresh(db, table="ONLY documents")
    assert db.execute("SELECT embedding FROM special").fetchall() == [(None,)]


# What is refused -------------------------------------------------------------------------------------

HAS_NONE = "is not attached to autoembed"
EXPRESSION = "boolean expression"
# What is asked (TWO: two content columns), its SQLSTATE, and words of the message and of the hint.
REFUSALS: dict[str, tuple[str, str, str, str]] = {
    "a view": ("enable('a_view', TWO)", "42809", "app.a_view is a view, which cannot", "holds the rows"),
    "a materialized view": ("enable('a_matview', TWO)", "42809", "is a materialized view, which", "holds the rows"),
    "a foreign table": ("enable('a_foreign_table', TWO)", "42809", "is a foreign table, which", "holds the rows"),
    "a sequence": ("enable('a_sequence', TWO)", "42809", "app.a_sequence is a sequence, which", "holds the rows"),
    "an index": ("enable('keyed_pkey', TWO)", "42809", "app.keyed_pkey is an index, which", "holds the rows"),
    "a partitioned index": ("enable('parts_pkey', TWO)", "42809", "is a partitioned index, which", "holds the rows"),
    "a composite type": ("enable('a_type', TWO)", "42809", "app.a_type is a composite type, which", "holds the rows"),
    "a TOAST table": (
        "enable((SELECT reltoastrelid::regclass FROM pg_class WHERE oid = 'documents'::regclass), TWO)",
        "42809",
        "is a TOAST table, which",
        "holds the rows",
    ),
    "a temporary table": ("enable('a_temporary_table', TWO)", "42809", "temporary", "permanent table"),
    "a partition": ("enable('a_partition', TWO)", "42809", "app.a_partition is a partition", "enable('app.parts'"),
    "a table without a key": ("enable('keyless', TWO)", "55000", "app.keyless has no key", "primary key"),
    "an index on partitions": ("enable('parts', TWO, create_index => true)", "0A000", "partitioned", "each partition"),
    "no table": ("enable(NULL, TWO)", "22004", "must not be NULL", ""),
    "no column": ("enable('documents', NULL, TWO)", "22004", "must not be NULL", ""),
    "an OID of no table": ("enable(99::oid::regclass, TWO)", "42P01", "99", ""),
    "no content": ("enable('documents')", "22023", "one of content_columns, content_function", "content_columns =>"),
    "two contents": (
        "enable('documents', TWO, content_template => '{title}')",
        "22023",
        "one of content_columns",
        "For example",
    ),
    "content without columns": ("enable('documents', content_columns => '{}')", "22023", "no column", "For example"),
    "a content column NULL": ("enable('documents', content_columns => '{title,NULL}')", "22023|22004", "NULL", ""),
    "an unknown content column": (
        "enable('documents', content_columns => '{title,nope}')",
        "42703",
        'app.documents has no column "nope"',
        "title, content",
    ),
    "a system column": ("enable('documents', content_columns => '{ctid}')", "42703", 'no column "ctid"', "title"),
    "itself as content": ("enable('documents', 'v', content_columns => '{v}')", "22023", "own content", "Leave it out"),
    "a template without columns": (
        "enable('documents', content_template => 'x {{title}}')",
        "22023",
        "names no column",
        "{title}",
    ),
    "half a brace": ("enable('documents', content_template => '{title} {')", "22023", "brace", "{title}"),
    "a template with an unknown column": (
        "enable('documents', content_template => '{ title }')",
        "42703",
        'no column " title "',
        "title",
    ),
    "an unknown function": (
        "enable('documents', content_function => 'nope')",
        "42883",
        'no function "nope" of one row of app.documents',
        "CREATE FUNCTION",
    ),
    "a function of another table": (
        "enable('keyed', 'v', content_function => 'text_of')",
        "42883",
        "of one row of app.keyed",
        "CREATE FUNCTION",
    ),
    "a function that returns no text": (
        "enable('documents', content_function => 'number_of')",
        "42804",
        "returns integer",
        "returns text",
    ),
    "a function that returns a set": (
        "enable('documents', content_function => 'texts_of')",
        "42883",
        'no function "texts_of"',
        "CREATE FUNCTION",
    ),
    "a stranger's function": (
        "enable('owned', content_function => 'owned_text')",
        "42501",
        "enable_stranger",
        "OWNER TO enable_host",
    ),
    "an unknown model": ("enable('documents', TWO, model => 'nope')", "22023|42704", '"nope"', "model"),
    "another on_change": ("enable('documents', TWO, on_change => 'nope')", "22023", "keep or clear, not nope", "clear"),
    "on_change NULL": ("enable('documents', TWO, on_change => NULL)", "22023", "keep or clear, not NULL", "clear"),
    "clear of a column NOT NULL": (
        "enable('filled', content_columns => '{title}', on_change => 'clear')",
        "0A000|22023",
        "NOT NULL",
        "keep",
    ),
    "clear with a generated column": (
        "enable('made', content_columns => '{title}', on_change => 'clear')",
        "0A000",
        "generated columns",
        "keep",
    ),
    "a text column": (
        "enable('documents', 'note', TWO)",
        "42804",
        'column "note" of table app.documents is of type text',
        "halfvec or vector",
    ),
    "a sparse column": (
        "enable('filled', 'sparse', content_columns => '{title}')",
        "42804",
        "of type",
        "halfvec or vector",
    ),
    "a generated embedding": (
        "enable('filled', 'generated', content_columns => '{title}')",
        "42804",
        "a generated column",
        "halfvec or vector",
    ),
    "twice": (
        "enable('keyed', content_columns => '{title}')",
        "42710",
        "app.keyed.embedding is already attached",
        "alter_pipeline",
    ),
    "a subquery": ("enable('documents', TWO, condition => '(SELECT true)')", "0A000", "subquer", "without subqueries"),
    "an aggregate": ("enable('documents', TWO, condition => 'max(id) > 1')", "42803", "aggregate", EXPRESSION),
    "a window": (
        "enable('documents', TWO, condition => 'row_number() OVER () > 1')",
        "42P20",
        "window",
        EXPRESSION,
    ),
    "a set": (
        "enable('documents', TWO, condition => 'generate_series(1, 2) > 1')",
        "0A000",
        "set-returning",
        EXPRESSION,
    ),
    "a text as condition": ("enable('documents', TWO, condition => 'title')", "42804", "type boolean", EXPRESSION),
    "a condition on no column": ("enable('documents', TWO, condition => 'nope')", "42703", '"nope"', EXPRESSION),
    "a bad literal": ("enable('documents', TWO, condition => 'id = ''x''')", "22P02", "invalid input", EXPRESSION),
    "two statements": (
        "enable('documents', TWO, condition => 'true; DROP TABLE app.documents')",
        "42601",
        "syntax error",
        EXPRESSION,
    ),
    "a condition that closes its brackets": (
        "enable('documents', TWO, condition => 'true); DROP TABLE app.documents; SELECT (true')",
        "42601",
        "syntax error",
        EXPRESSION,
    ),
    "an empty condition": ("enable('documents', TWO, condition => '')", "42601", "syntax error", EXPRESSION),
    "a whole row as condition": (
        "enable('documents', TWO, condition => 'documents IS NOT NULL')",
        "0A000|22023|42601|42703|42P01|42P10",
        "condition",
        EXPRESSION,
    ),
    "a system column as condition": (
        "enable('documents', TWO, condition => 'tableoid > 0')",
        "0A000|22023|42601|42703|42P01|42P10",
        "tableoid",
        "",
    ),
    "altering what is not attached": ("alter_pipeline('documents', on_change => 'clear')", "42704", HAS_NONE, "enable"),
    "altering another column": ("alter_pipeline('keyed', 'nope', TWO)", "42704", '"nope" of table app.keyed', "enable"),
    "altering to two contents": (
        "alter_pipeline('keyed', TWO, content_template => '{title}')",
        "22023",
        "one of content_columns",
        "For example",
    ),
    "altering to an unknown column": (
        "alter_pipeline('keyed', content_columns => '{nope}')",
        "42703",
        'has no column "nope"',
        "title",
    ),
    "altering to a bad condition": ("alter_pipeline('keyed', condition => 'nope')", "42703", '"nope"', EXPRESSION),
    "altering to an unknown model": ("alter_pipeline('keyed', model => 'nope')", "22023|42704", '"nope"', "model"),
    "altering to another on_change": (
        "alter_pipeline('keyed', on_change => 'nope')",
        "22023",
        "keep or clear, not nope",
        "clear",
    ),
    "altering a guide's table": ("alter_pipeline('guided', TWO)", "55000", "made by hand", "disable"),
    "disabling what is not attached": ("disable('documents')", "42704", HAS_NONE, "enable"),
    "pausing what is not attached": ("pause('documents')", "42704", HAS_NONE, "enable"),
    "resuming what is not attached": ("resume('documents')", "42704", HAS_NONE, "enable"),
    "resyncing what is not attached": ("resync('documents')", "42704", HAS_NONE, "enable"),
    "reembedding what is not attached": ("reembed('documents')", "42704", HAS_NONE, "enable"),
    "reembedding by a bad condition": ("reembed('keyed', condition => 'nope')", "42703", '"nope"', EXPRESSION),
}


@pytest.fixture(scope="module")
def unfit(server: Server, template: str) -> Iterator[Connection]:
    """Tables of all kinds that cannot be attached, or not in every way."""
    name = f"{DATABASE}_not"
    with server.janitor(name, template), server.connect(name) as db, db.transaction(force_rollback=True):
        db.execute(TABLE)
        db.execute("""
            CREATE VIEW a_view AS SELECT * FROM documents;
            CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM documents;
            CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
            CREATE FOREIGN TABLE a_foreign_table (id int, title text, content text)
                SERVER files OPTIONS (filename '/dev/null');
            CREATE SEQUENCE a_sequence; CREATE TYPE a_type AS (id int, title text, content text);
            CREATE TEMP TABLE a_temporary_table (id int PRIMARY KEY, title text, content text);
            CREATE TABLE parts (id int PRIMARY KEY, title text, content text) PARTITION BY HASH (id);
            CREATE TABLE a_partition PARTITION OF parts FOR VALUES WITH (MODULUS 1, REMAINDER 0);
            CREATE TABLE keyless (id int, number int UNIQUE, title text, content text);
            CREATE UNIQUE INDEX ON keyless (id) WHERE id > 0; CREATE UNIQUE INDEX ON keyless (abs(id));
            CREATE TABLE keyed (id int PRIMARY KEY, title text);
            SELECT autoembed.enable('keyed', content_columns => '{title}');
            CREATE TABLE guided (id int PRIMARY KEY, title text, content text, embedding halfvec(1536));
            CREATE FUNCTION guided_text(g guided) RETURNS text LANGUAGE sql AS 'SELECT g.title';
            CREATE TRIGGER embed AFTER INSERT ON guided FOR EACH ROW
                EXECUTE FUNCTION autoembed.queue_embeddings('guided_text', 'embedding');
            CREATE FUNCTION number_of(d documents) RETURNS integer LANGUAGE sql AS 'SELECT d.id';
            CREATE FUNCTION texts_of(d documents) RETURNS SETOF text LANGUAGE sql AS 'SELECT d.title';
            CREATE TABLE filled (
                id int PRIMARY KEY, title text, sparse sparsevec(9), embedding halfvec(1536) NOT NULL,
                generated halfvec(3) GENERATED ALWAYS AS ('[1,2,3]'::halfvec(3)) STORED
            );
            CREATE TABLE made (id int PRIMARY KEY, body text, title text GENERATED ALWAYS AS (upper(body)) STORED);
            CREATE ROLE enable_stranger; CREATE ROLE enable_host; GRANT ALL ON SCHEMA app TO enable_stranger;
            CREATE TABLE owned (id int PRIMARY KEY, title text); ALTER TABLE owned OWNER TO enable_host;
            CREATE FUNCTION owned_text(o owned) RETURNS text LANGUAGE sql AS 'SELECT o.title';
            ALTER FUNCTION owned_text OWNER TO enable_stranger;
        """)
        yield db


@pytest.mark.parametrize("what", REFUSALS)
def test_what_cannot_be_is_refused_with_a_reason_and_a_way_out(unfit: Connection, what: str) -> None:
    call, sqlstates, message, hint = REFUSALS[what]
    before = traces(unfit)

    with pytest.raises(psycopg.Error) as error, unfit.transaction(force_rollback=True):
        unfit.execute(f"SELECT autoembed.{call.replace('TWO', COLUMNS)}".encode())

    diagnostic = error.value.diag
    assert diagnostic.sqlstate in sqlstates.split("|")
    assert message in (diagnostic.message_primary or "")
    assert hint in (diagnostic.message_hint or "")
    assert traces(unfit) == before


def test_an_option_that_is_null_is_as_if_it_were_not_given(db: Connection) -> None:
    nulls = ("model", "condition", "truncate", "create_index", "replicated", "if_not_exists")
    enable(db, ", ".join([COLUMNS, *(f"{name} => NULL" for name in nulls)]))
    embed(db)

    assert_fresh(db)


def test_if_not_exists_leaves_what_is_there_as_it_is(db: Connection, api: FakeApi) -> None:
    attached(db)
    with warnings_of(db) as notices:
        enable(db, "content_columns => '{title}', if_not_exists => true")

    assert notices == ["app.documents.embedding is already attached, skipping"]
    assert sent(db, api) == []
    enable(db, "'other', content_columns => '{title}', if_not_exists => true")
    assert len(sent(db, api)) == 3


def test_a_temporary_table_of_the_same_name_is_not_in_the_way_of_a_condition(db: Connection) -> None:
    db.execute("CREATE TEMP TABLE documents (x int)")
    db.execute("SELECT autoembed.enable('app.documents', content_columns => '{title}', condition => 'published')")
    assert db.execute("SELECT count(*) FROM pg_temp.documents").fetchone() == (0,)
    embed(db)

    assert_fresh(db, "title", "app.documents")


# The application's rows ------------------------------------------------------------------------------

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
    enable(db, f"'kept', {form}, replicated => true")
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


# Rights ----------------------------------------------------------------------------------------------


def test_a_plain_owner_and_the_members_of_an_owning_role_may_do_all_of_it(db: Connection) -> None:
    db.execute("CREATE ROLE enable_owner; CREATE ROLE enable_member IN ROLE enable_owner")
    db.execute("ALTER TABLE documents OWNER TO enable_owner; ALTER FUNCTION text_of OWNER TO enable_owner")
    db.execute("GRANT USAGE ON SCHEMA app TO enable_owner")
    for role in ("enable_owner", "enable_member"):
        db.execute(f"SELECT autoembed.grant_usage('{role}')")
        db.execute(f"SET LOCAL ROLE {role}")
        enable(db, f"{COLUMNS}, condition => 'published', on_change => 'clear'")
        enable(db, "'other', content_function => 'text_of', replicated => true, create_index => true")
        enable(db, f"'other', {COLUMNS}, if_not_exists => true")
        for call in (
            "alter_pipeline('documents', 'other', model => 'text-embedding-3-small', truncate => false)",
            "alter_pipeline('documents', 'embedding', content_template => '{title}', condition => '')",
            "alter_pipeline('documents', 'embedding', on_change => 'keep')",
            "pause('documents')",
            "resume('documents', 'other')",
            "resume('documents')",
            "resync('documents')",
            "reembed('documents', 'embedding', 'id = 1')",
            "disable('documents', 'other', drop_column => true)",
        ):
            db.execute(f"SELECT autoembed.{call}".encode())
        assert db.execute("SELECT content_template FROM autoembed.pipeline").fetchall() == [("{title}",)]
        db.execute("RESET ROLE")
        embed(db)
        assert_fresh(db, "title")
        db.execute(f"SET LOCAL ROLE {role}")
        db.execute("SELECT autoembed.disable('documents', drop_column => true)")
        db.execute("RESET ROLE")
        assert traces(db) == []


CALLS = [
    f"enable('app.documents', 'mine', {COLUMNS})",
    "alter_pipeline('app.documents', on_change => 'clear')",
    "disable('app.documents', drop_column => true)",
    "pause('app.documents')",
    "resume('app.documents')",
    "resync('app.documents')",
    "reembed('app.documents')",
]
# Of the pipeline P on the table T.
STATEMENTS = [
    "INSERT INTO autoembed.pipeline (table_id, embedding_column, content_columns) VALUES (T, 'embedding', '{title}')",
    "INSERT INTO autoembed.backfill (pipeline_id) VALUES (P)",
    "UPDATE autoembed.pipeline SET table_id = 'pg_class'::regclass",
    "UPDATE autoembed.pipeline SET key_columns = '{}'",
    "UPDATE autoembed.pipeline SET built_from = ''",
    "UPDATE autoembed.pipeline SET managed = false",
    "UPDATE autoembed.pipeline SET content_function_id = 1",
    "UPDATE autoembed.backfill SET served_at = '-infinity'",
    "DELETE FROM autoembed.pipeline",
    "DELETE FROM autoembed.backfill",
    "LOCK TABLE autoembed.pipeline IN ROW EXCLUSIVE MODE",
    "SELECT * FROM autoembed.embedded",
    "SELECT * FROM autoembed.failure",
    "SELECT * FROM autoembed.lane",
    "SELECT * FROM autoembed.model",
    "SELECT * FROM pgmq.q_embedding_jobs",
    "INSERT INTO pgmq.q_embedding_jobs (vt, message) VALUES (now(), '{}')",
    "SELECT autoembed.process()",
    "SELECT autoembed.retry_failed()",
    "SELECT autoembed._content_P(ARRAY['[1]'], 0, 0)",
    "SELECT autoembed._text_P(d) FROM app.documents AS d",
    "SELECT autoembed._scan_P(NULL, NULL, 9)",
    "SELECT autoembed._write_P('{}', '{}', 'm', '{}')",
    "SELECT autoembed._build_pipeline(P)",
]


def test_another_role_may_do_nothing_and_sees_nothing(db: Connection) -> None:
    """It may attach tables of its own, and even read and write this one."""
    attached(db, f"{COLUMNS}, condition => 'length(content) < 20'")
    db.execute("SELECT autoembed.reembed('documents')")
    [pipeline] = db.execute("SELECT id, table_id::oid AS table_id FROM autoembed.pipeline").fetchall()
    db.execute(
        "INSERT INTO autoembed.failure (pipeline_id, key, error_class, reason, attempts, excerpt)"
        f" VALUES ({pipeline.id}, '[9]', 'row', 'secret', 1, 'secret')"
    )
    db.execute("CREATE ROLE enable_other; SELECT autoembed.grant_usage('enable_other')")
    db.execute("GRANT ALL ON SCHEMA app TO enable_other; GRANT ALL ON documents TO enable_other")
    before = traces(db)
    db.execute("SET LOCAL ROLE enable_other")

    for call in CALLS:
        with (
            pytest.raises(psycopg.errors.InsufficientPrivilege, match="must be owner of table app.doc"),
            db.transaction(),
        ):
            db.execute(f"SELECT autoembed.{call}".encode())
    for statement in STATEMENTS:
        statement = statement.replace("T,", f"{pipeline.table_id},").replace("_P(", f"_{pipeline.id}(")
        with pytest.raises(psycopg.errors.InsufficientPrivilege), db.transaction():
            db.execute(statement.replace("(P)", f"({pipeline.id})").encode())
    for relation in ("pipeline", "backfill", "failed", "status", "progress"):
        assert db.execute(f"SELECT * FROM autoembed.{relation}").fetchall() == []
    for change in ("pipeline SET paused = true", "pipeline SET ended = true", "backfill SET position = '[1]'"):
        assert db.execute(f"UPDATE autoembed.{change}").rowcount == 0
    db.execute("RESET ROLE")
    assert traces(db) == before

    db.execute("SET LOCAL ROLE enable_other; UPDATE documents SET content = 'new' WHERE id = 1; RESET ROLE")
    assert queued(db) == [[1]]
    embed(db)
    assert_fresh(db)


# A role that owns a table, and a function of its own that tries what it can. Sequences, which no rollback puts back,
# note as whom it ran.
HOSTILE = """
CREATE SCHEMA {mallory};
CREATE TABLE notes (id int PRIMARY KEY, content varchar, embedding halfvec(1536));
CREATE SEQUENCE as_owner; CREATE SEQUENCE as_other;
CREATE FUNCTION attack(content varchar) RETURNS boolean LANGUAGE plpgsql AS $attack$
DECLARE
    statement varchar;
BEGIN
    FOREACH statement IN ARRAY ARRAY[
        'RESET ROLE', 'SET ROLE postgres', 'RESET SESSION AUTHORIZATION', 'SET SESSION AUTHORIZATION postgres',
        'ALTER ROLE {mallory} SUPERUSER', 'CREATE TABLE {mallory}.loot AS TABLE public.secrets',
        'UPDATE autoembed.pipeline SET key_columns = ''{{x}}''', 'DELETE FROM pgmq.q_embedding_jobs',
        'SELECT nextval(''{mallory}.as_'' || CASE current_user WHEN ''{mallory}'' THEN ''owner'' ELSE ''other'' END)'
    ]
    LOOP
        BEGIN
            EXECUTE statement;
        EXCEPTION WHEN insufficient_privilege OR invalid_parameter_value THEN
            NULL;
        END;
    END LOOP;
    RETURN true;
END;
$attack$;
CREATE FUNCTION text_of(n notes) RETURNS text LANGUAGE plpgsql AS
    'BEGIN PERFORM {mallory}.attack(n.content); RETURN n.content; END';
INSERT INTO notes VALUES (1, 'a note');
"""
# enable: without a look at the rows that are there; ending: of every quotation that SQL knows.
PARTS = {
    "enable": "SELECT autoembed.enable('notes', content_columns => '{content}', enqueue_existing => false)",
    "pipeline": "INSERT INTO autoembed.pipeline (table_id, embedding_column, content_columns, condition)",
    "backfill": "INSERT INTO autoembed.backfill (pipeline_id, condition) SELECT id, ",
    "ending": "); END; $body$; $f$; ALTER ROLE {mallory} SUPERUSER; --",
}
WAYS = {
    "a content function": "SELECT autoembed.enable('notes', content_function => 'text_of', on_change => 'clear')",
    "a condition": "SELECT autoembed.enable('notes', content_columns => '{content}', condition => 'attack(content)')",
    "a condition of a reembedding": "{enable}; SELECT autoembed.reembed('notes', condition => 'attack(content)')",
    "a condition inserted": "{pipeline} VALUES ('notes', 'embedding', '{content}', '{mallory}.attack(content)')",
    "a condition that ends the function": "{pipeline} VALUES ('notes', 'embedding', '{content}', $x${ending}$x$)",
    "a condition updated": "{enable}; UPDATE autoembed.pipeline SET condition = '{mallory}.attack(content) AND id > 0'",
    "columns of the condition updated": "SELECT autoembed.enable('notes', content_columns => '{content}',"
    """ condition => 'attack(content)'); UPDATE autoembed.pipeline SET condition_columns = '{"x\\" {ending}": "id"}'""",
    "a template updated": "SELECT autoembed.enable('notes', content_template => '{content}');"
    "UPDATE autoembed.pipeline SET content_template = $x$'{ending} {content}$x$",
    "a backfill inserted": "{enable}; {backfill} '{mallory}.attack(content)' FROM autoembed.pipeline",
    "a backfill of no keys": "{enable}; {backfill} 'false) UNION ALL SELECT ''no key'' -- ' FROM autoembed.pipeline",
    "a backfill without end": "{enable}; {backfill} 'false) UNION ALL SELECT ''['' || n || '']'' FROM"
    " generate_series(1, 50000) AS n -- ' FROM autoembed.pipeline",
    "a backfill of hostile keys": "{enable}; {backfill} 'false) UNION ALL SELECT ''[{}, null, [1], \"x\"]'' UNION ALL"
    " SELECT NULL -- ' FROM autoembed.pipeline",
}
REFUSED_AT_ONCE = ["a condition that ends the function"]


@pytest.fixture
def own_api(server: Server, connect: Connect, dbname: str) -> Iterator[FakeApi]:
    """The fake API for a database of the test's own, which the default model speaks to."""
    api = server.fake_api(dbname)
    with connect() as db:
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
        db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    yield api
    api.release()


@pytest.fixture
def mallory(connect: Connect, dbname: str) -> Iterator[str]:
    name = f"mallory_{dbname}"
    with connect() as db:
        db.execute(f"CREATE ROLE {name} LOGIN PASSWORD '{PASSWORD}'")
        yield name
        db.execute(f"DROP OWNED BY {name} CASCADE; DROP ROLE {name}")


@pytest.mark.parametrize("way", WAYS)
def test_a_hostile_owner_gains_nothing_and_holds_up_nobody(
    own_api: FakeApi, connect: Connect, mallory: str, dbname: str, way: str
) -> None:
    with connect() as db:
        db.execute(f"GRANT CREATE ON DATABASE {dbname} TO {mallory}; SELECT autoembed.grant_usage('{mallory}')")
        db.execute(
            "CREATE TABLE secrets AS SELECT 'a secret'; CREATE TABLE documents (id int PRIMARY KEY, content text)"
        )
        db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
        session = connect(user=mallory)
        session.execute(f"SET search_path = {mallory}, public")
        session.execute(HOSTILE.format(mallory=mallory))
        statements = WAYS[way]
        for name, part in [*PARTS.items(), ("mallory", mallory)]:
            statements = statements.replace(f"{{{name}}}", part)
        with pytest.raises(psycopg.errors.SyntaxError) if way in REFUSED_AT_ONCE else nullcontext():
            session.execute(statements.encode())
        session.execute("ALTER SEQUENCE as_owner RESTART")

        # As a superuser, who alters it, writes it, and runs the lane.
        db.execute(f"ALTER TABLE {mallory}.notes ADD more text; ALTER TABLE {mallory}.notes RENAME more TO most")
        db.execute(f"INSERT INTO {mallory}.notes VALUES (2, 'another'); UPDATE {mallory}.notes SET content = 'new'")
        db.execute("INSERT INTO documents VALUES (1, 'of another')")
        db.execute("CREATE TABLE papers (id int PRIMARY KEY, content text); INSERT INTO papers VALUES (1, 'older')")
        db.execute("SELECT autoembed.enable('papers', content_columns => '{content}')")
        with running_lanes(db, connect) as [lane]:
            for table in ("documents", "papers"):
                done = partial(db.execute, f"SELECT FROM {table} WHERE embedding IS NOT NULL")
                wait_until(partial(lambda done: lane.error or done().fetchone() is not None, done))
            untried = "SELECT count(*) FROM pgmq.q_embedding_jobs WHERE message -> 'attempts' IS NULL AND read_ct = 0"
            wait_until(lambda: lane.error or db.execute(untried).fetchone() == (0,))
        assert lane.error is None
        db.execute("SELECT autoembed.process()")

        assert db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [mallory]).fetchone() == (False,)
        assert db.execute("SELECT to_regclass(%s)", [f"{mallory}.loot"]).fetchone() == (None,)
        ran = f"SELECT is_called FROM {mallory}.as_"
        assert db.execute(f"{ran}owner").fetchone() == ("attack" in WAYS[way] or "text_of" in WAYS[way],)
        assert db.execute(f"{ran}other").fetchone() == (False,)
        assert db.execute("SELECT key_columns FROM autoembed.pipeline ORDER BY id").fetchone() == (["id"],)
        longest = "SELECT max(jsonb_array_length(message -> 'keys')) <= 1000 FROM pgmq.q_embedding_jobs"
        assert db.execute(longest).fetchone() in [(None,), (True,)]


# While a request is in flight --------------------------------------------------------------------------

MEANWHILE = {
    "disabled": "SELECT autoembed.disable('documents')",
    "disabled, its column dropped": "SELECT autoembed.disable('documents', drop_column => true)",
    "dropped": "DROP TABLE documents",
    "its column dropped": "ALTER TABLE documents DROP embedding",
    "its content dropped": "ALTER TABLE documents DROP content",
    "its table renamed": "ALTER TABLE documents RENAME TO papers",
    "its columns renamed": "ALTER TABLE documents RENAME content TO body; ALTER TABLE documents RENAME id TO number",
    "its content altered": "SELECT autoembed.alter_pipeline('documents', content_template => 'new {content}')",
    "paused": "SELECT autoembed.pause('documents')",
    "its column altered": "ALTER TABLE documents ALTER embedding TYPE vector(1536)",
    "its column altered and altered back": "ALTER TABLE documents ALTER embedding TYPE vector(1536);"
    "ALTER TABLE documents ALTER embedding TYPE halfvec(1536)",
    "its column shortened": "ALTER TABLE documents ALTER embedding TYPE halfvec(3)",
    "its condition's function dropped": "DROP FUNCTION odd",
    "its condition's function made anew": "DROP FUNCTION odd; CREATE FUNCTION odd(n int) RETURNS boolean RETURN n > 0",
}
# What is put right afterwards.
MENDED = {
    "its column shortened": "ALTER TABLE documents ALTER embedding TYPE halfvec(1536) USING NULL",
    "its condition's function dropped": "CREATE FUNCTION odd(n int) RETURNS boolean RETURN n > 0",
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
def test_a_lane_takes_it_calmly_when_its_table_changes_under_a_request_in_flight(
    own_api: FakeApi, connect: Connect, meanwhile: str
) -> None:
    with connect() as db:
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text); INSERT INTO documents VALUES (1, 'one')")
        db.execute("CREATE FUNCTION odd(n int) RETURNS boolean RETURN n % 2 = 1")
        condition = ", condition => 'odd(id)'" if "condition" in meanwhile else ""
        db.execute(f"SELECT autoembed.enable('documents', content_columns => '{{content}}'{condition})")
        own_api.behave(hold=True)
        with running_lanes(db, connect) as [lane]:
            own_api.wait_for(held=1)
            db.execute("SET lock_timeout = '2s'")
            db.execute(MEANWHILE[meanwhile])
            own_api.release()
            own_api.wait_until_idle()
            db.execute("CREATE TABLE others (id int PRIMARY KEY, content text); INSERT INTO others VALUES (1, 'other')")
            db.execute("SELECT autoembed.enable('others', content_columns => '{content}')")
            embedded = "SELECT embedding IS NOT NULL FROM others"
            wait_until(lambda: lane.error or db.execute(embedded).fetchone() == (True,))
            assert lane.error is None
            db.execute("UPDATE autoembed.pipeline SET paused = false")
            if meanwhile in MENDED:
                reason = "SELECT reason FROM autoembed.status WHERE table_name = 'documents'::regclass"
                assert db.execute(reason).fetchone() != (None,)
                assert db.execute("SELECT * FROM autoembed.failed").fetchall() == []
            db.execute(MENDED.get(meanwhile, ""))
            due = (
                "SELECT EXISTS (SELECT FROM pgmq.q_embedding_jobs) OR EXISTS (SELECT FROM autoembed.backfill)"
                " OR EXISTS (SELECT FROM autoembed.failed)"
            )
            wait_until(lambda: lane.error or db.execute(due).fetchone() == (False,))
            assert lane.error is None
        table = "papers" if meanwhile == "its table renamed" else "documents"
        if meanwhile in list(MEANWHILE)[5:]:
            text = {"its columns renamed": "body", "its content altered": "'new ' || content"}.get(meanwhile, "content")
            assert_fresh(db, text, table)


def test_an_update_of_another_column_does_not_fetch_a_long_text(own_api: FakeApi, connect: Connect) -> None:
    long_text = "SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 500)"
    with connect() as db:
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text, views int DEFAULT 0)")
        db.execute("SELECT autoembed.enable('documents', content_columns => '{content}')")
        db.execute(f"INSERT INTO documents SELECT n, ({long_text} WHERE n > 0) FROM generate_series(1, 20) AS n")

        def blocks_fetched() -> int:
            db.execute("SELECT pg_stat_force_next_flush()")
            [(blocks,)] = db.execute(
                "SELECT toast_blks_hit + toast_blks_read FROM pg_statio_user_tables WHERE relid = 'documents'::regclass"
            )
            return int(blocks)

        before = blocks_fetched()
        db.execute("UPDATE documents SET views = views + 1")
        assert blocks_fetched() == before

        db.execute("SELECT upper(content) FROM documents")
        assert blocks_fetched() > before


ANOTHER_MODEL = [
    "alter_pipeline('documents', model => 'other')",
    "alter_model('mine', model_id => 'text-embedding-3-large', base_url => '{url}')",
]


@pytest.mark.parametrize("change", ANOTHER_MODEL)
def test_an_answer_of_the_model_before_is_never_written_over_that_of_the_model_now(
    server: Server, own_api: FakeApi, connect: Connect, dbname: str, change: str
) -> None:
    """Two lanes, and the older answer comes last; both models have vectors of one length."""
    url = server.fake_api(f"{dbname}_other").base_url
    with connect() as db:
        for model, kind, base_url in (("mine", "small", own_api.base_url), ("other", "large", url)):
            db.execute(
                "SELECT autoembed.create_model(%s, 'openai', 1536, model_id => %s, base_url => %s,"
                " api_key => 'env:OPENAI_API_KEY')",
                [model, f"text-embedding-3-{kind}", base_url],
            )
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
        db.execute("SELECT autoembed.enable('documents', content_columns => '{content}', model => 'mine')")
        own_api.behave(hold=True)
        with running_lanes(db, connect, 2):
            db.execute("INSERT INTO documents VALUES (1, 'one')")
            own_api.wait_for(held=1)
            db.execute(f"SELECT autoembed.{change.format(url=url)}")
            db.execute("SELECT autoembed.resync('documents')")
            wait_until(lambda: db.execute("SELECT FROM documents WHERE embedding IS NOT NULL").fetchone() is not None)
            own_api.release()
            wait_until(lambda: waiting(db) == 0)
        assert_fresh(db, "content", model="text-embedding-3-large")
