"""The table of the tests in this folder, and the steps that they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fake_api import FakeApi, embedding_of
from harness import Connection, waiting

Connect = Callable[..., Connection]
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


def enable(db: Connection, arguments: str = COLUMNS, table: str = "documents", column: str = "embedding") -> None:
    db.execute(f"SELECT autoembed.enable('{table}', '{column}', {arguments})")


def attach(db: Connection, arguments: str = COLUMNS) -> None:
    """The table enabled and embedded."""
    enable(db, arguments)
    embed(db)


def embed(db: Connection) -> None:
    """All that waits, and every table that is being scanned."""
    for _ in range(20):
        [report] = db.execute("SELECT read, failed_jobs FROM autoembed.process()").fetchall()
        assert report.failed_jobs == []
        if waiting(db) == 0 and report.read == 0:
            assert db.execute("SELECT FROM autoembed.backfill").fetchall() == []
            return
    raise AssertionError("there is always more to embed")


def send_all(db: Connection, api: FakeApi) -> list[str]:
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
    """The objects of pipelines: their functions, triggers, jobs and rows."""
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
