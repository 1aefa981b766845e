"""The owner of a table attaches, alters and detaches it, and nobody else."""

from __future__ import annotations

import psycopg
import pytest

from extension.pipelines.documents import COLUMNS, assert_fresh, attach, embed, enable, queued, traces
from harness import Connection


def test_a_plain_owner_and_the_members_of_an_owning_role_may_do_all_of_it(db: Connection) -> None:
    db.execute("CREATE ROLE enable_owner; CREATE ROLE enable_member IN ROLE enable_owner")
    db.execute("ALTER TABLE documents OWNER TO enable_owner; ALTER FUNCTION text_of OWNER TO enable_owner")
    db.execute("GRANT USAGE ON SCHEMA app TO enable_owner")
    for role in ("enable_owner", "enable_member"):
        db.execute(f"SELECT autoembed.grant_usage('{role}')")
        db.execute(f"SET LOCAL ROLE {role}")
        enable(db, f"{COLUMNS}, condition => 'published', on_change => 'clear'")
        enable(db, "content_function => 'text_of', replicated => true, create_index => true", column="other")
        enable(db, f"{COLUMNS}, if_not_exists => true", column="other")
        for call in (
            "alter_pipeline('documents', 'other', model => 'text-embedding-3-small', truncate => false)",
            "alter_pipeline('documents', 'embedding', content_template => '{title}', condition => '')",
            "alter_pipeline('documents', 'embedding', on_change => 'keep')",
            "pause('documents')",
            "resume('documents', 'other')",
            "resume('documents')",
            "resync('documents')",
            "reembed('documents', 'embedding', 'id = 1')",
            "disable('documents', 'other', drop => true)",
        ):
            db.execute(f"SELECT autoembed.{call}".encode())
        assert db.execute("SELECT content_template FROM autoembed.pipeline").fetchall() == [("{title}",)]
        db.execute("RESET ROLE")
        embed(db)
        assert_fresh(db, "title")
        db.execute(f"SET LOCAL ROLE {role}")
        db.execute("SELECT autoembed.disable('documents', drop => true)")
        db.execute("RESET ROLE")
        assert traces(db) == []


CALLS = [
    f"enable('app.documents', 'mine', {COLUMNS})",
    "alter_pipeline('app.documents', on_change => 'clear')",
    "disable('app.documents', drop => true)",
    "pause('app.documents')",
    "resume('app.documents')",
    "resync('app.documents')",
    "reembed('app.documents')",
]
# The acts on the pipeline P on the table T.
STATEMENTS = [
    "INSERT INTO autoembed.pipeline (table_id, embedding_column, content_columns) VALUES (T, 'embedding', '{title}')",
    "INSERT INTO autoembed.backfill (pipeline_id) VALUES (P)",
    "UPDATE autoembed.pipeline SET table_id = 'pg_class'::regclass",
    "UPDATE autoembed.pipeline SET key_columns = '{}'",
    "UPDATE autoembed.pipeline SET built_from = ''",
    "UPDATE autoembed.pipeline SET managed = false",
    "UPDATE autoembed.pipeline SET content_function_id = 'pg_catalog.version'",
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
    "SELECT autoembed._content_P(ARRAY['[1]'], 0, 0)",
    "SELECT autoembed._text_P(d) FROM app.documents AS d",
    "SELECT autoembed._scan_P(NULL, NULL, 9, 9)",
    "SELECT autoembed._write_P('{}', '{}', 'm', '{}', '{}')",
    "SELECT autoembed._build_pipeline(P)",
]


def test_another_role_may_do_nothing_and_sees_nothing(db: Connection) -> None:
    """It may attach tables of its own, and even read and write this one."""
    attach(db, f"{COLUMNS}, condition => 'length(content) < 20'")
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
