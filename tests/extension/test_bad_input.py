"""Mistakes in a table or a trigger: said at the earliest moment, in one sentence, and never by refusing a row."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from fake_api import FakeApi
from harness import GUIDE_TABLE, Connection, warnings_of

TRIGGER = """
    CREATE TRIGGER embed {when} ON {table} FOR EACH {level}
    EXECUTE FUNCTION autoembed.{function}({arguments})
"""


@pytest.mark.parametrize(
    ("changes", "error", "sqlstate"),
    [
        (
            {"arguments": "'embeding_input', 'embedding'"},
            'no function "embeding_input" of one row of public.documents',
            "42883",
        ),
        ({"arguments": "'embedding_input', 'embeding'"}, 'table public.documents has no column "embeding"', "42703"),
        (
            {"arguments": "'embedding_input', 'title'"},
            'column "title" of table public.documents is of type text',
            "42804",
        ),
        (
            {"arguments": "'returns_number', 'embedding'"},
            r"function public.returns_number\(public.documents\) returns integer",
            "42804",
        ),
        ({"arguments": "'embedding_input'"}, "takes two arguments", "22023"),
        ({"level": "STATEMENT"}, "works only FOR EACH ROW", "0A000"),
        ({"when": "BEFORE INSERT"}, "is for AFTER triggers", "22023"),
        ({"table": "no_id", "arguments": "'no_id_text', 'embedding'"}, 'public.no_id has no column "id"', "42703"),
        ({"function": "clear_column", "when": "BEFORE UPDATE", "arguments": "'embeding'"}, "no column", "42703"),
        ({"function": "clear_column", "when": "AFTER UPDATE", "arguments": "'embedding'"}, "BEFORE UPDATE", "22023"),
    ],
)
def test_a_wrong_trigger_is_refused_when_it_is_created(
    db: Connection, api: FakeApi, changes: dict[str, str], error: str, sqlstate: str
) -> None:
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute("CREATE FUNCTION returns_number(d documents) RETURNS integer LANGUAGE sql AS 'SELECT 1'")
    db.execute("CREATE TABLE no_id (name text, embedding halfvec(1536))")
    db.execute("CREATE FUNCTION no_id_text(n no_id) RETURNS text LANGUAGE sql AS 'SELECT n.name'")
    trigger = {
        "when": "AFTER INSERT",
        "table": "documents",
        "level": "ROW",
        "function": "queue_embeddings",
        "arguments": "'embedding_input', 'embedding'",
        **changes,
    }

    with pytest.raises(psycopg.Error, match=error) as caught:
        db.execute(TRIGGER.format(**trigger))

    assert caught.value.sqlstate == sqlstate
    assert caught.value.diag.message_hint


def test_an_ordinary_trigger_is_none_of_our_business(db: Connection) -> None:
    db.execute("CREATE TABLE t (id int)")
    db.execute("CREATE FUNCTION f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END'")
    db.execute("CREATE TRIGGER ordinary BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION f()")

    db.execute("INSERT INTO t VALUES (1)")


@pytest.mark.parametrize(
    ("ddl", "reason"),
    [
        ("ALTER TABLE documents DROP COLUMN embedding", 'table public.documents has no column "embedding"'),
        ("DROP FUNCTION embedding_input", 'there is no function "embedding_input" of one row of public.documents'),
        (
            "DROP INDEX documents_embedding_idx; ALTER TABLE documents ALTER embedding TYPE halfvec(3) USING NULL",
            'column "embedding" of table public.documents has 3 dimensions, model "text-embedding-3-small" has 1536',
        ),
        (
            "ALTER TABLE documents ALTER embedding TYPE text",
            'column "embedding" of table public.documents is of type text',
        ),
    ],
)
def test_what_goes_wrong_after_the_trigger_is_a_warning_and_the_row_is_kept(
    documents: Connection, api: FakeApi, ddl: str, reason: str
) -> None:
    """If jobs of a blocked pipeline are claimed, the pass reads them in vain, again and again."""
    documents.execute("DROP TRIGGER clear_document_embedding_on_update ON documents")
    if "TYPE text" in ddl:
        documents.execute("DROP INDEX documents_embedding_idx")
    documents.execute("INSERT INTO documents (title, content) VALUES ('before', 'c')")
    documents.execute(ddl)

    documents.execute("INSERT INTO documents (title, content) VALUES ('after', 'c')")
    with warnings_of(documents) as heard:
        assert documents.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)

    assert any(f"public.documents.embedding is not being embedded: {reason}" in warning for warning in heard)
    assert documents.execute("SELECT count(*) FROM documents").fetchone() == (2,)
    assert documents.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone() == (2,)


def test_a_table_whose_id_was_renamed_still_takes_rows(documents: Connection) -> None:
    """If the trigger does not catch the missing column, the INSERT fails."""
    documents.execute("ALTER TABLE documents RENAME COLUMN id TO number")

    with warnings_of(documents) as heard:
        documents.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")

    assert any("not queued for embedding: the table has no column id" in warning for warning in heard)
    assert documents.execute("SELECT count(*) FROM documents").fetchone() == (1,)


def test_a_dropped_table_takes_its_jobs_along(documents: Connection, api: FakeApi) -> None:
    """If pipelines without a table are not dropped, their jobs stay."""
    documents.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")
    documents.execute("DROP TABLE documents CASCADE")

    row = documents.execute("SELECT read, failed FROM autoembed.process()").fetchone()

    assert row == (0, 0)
    assert documents.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone() == (0,)
    assert documents.execute("SELECT count(*) FROM autoembed.pipeline").fetchone() == (0,)
    assert documents.execute("SELECT count(*) FROM pg_proc WHERE proname ~ '^_(content|write)_[0-9]'").fetchone() == (
        0,
    )


def test_a_renamed_table_is_followed(documents: Connection, api: FakeApi) -> None:
    """Functions that are not built again when the name has changed look for the old table."""
    documents.execute("INSERT INTO documents (title, content) VALUES ('t', 'c')")
    documents.execute("CREATE SCHEMA archive")
    documents.execute("ALTER TABLE documents RENAME TO papers")
    documents.execute("ALTER TABLE papers SET SCHEMA archive")

    documents.execute("INSERT INTO archive.papers (title, content) VALUES ('u', 'd')")

    assert documents.execute("SELECT completed FROM autoembed.process()").fetchone() == (2,)
    assert documents.execute("SELECT count(embedding) FROM archive.papers").fetchone() == (2,)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("[1, 2]", "the message is not an object"),
        ('"text"', "the message is not an object"),
        ("{}", "the message lacks id"),
        ('{"id": 1}', "the message lacks schema, table, contentFunction, embeddingColumn"),
        ('{"pipeline": 1, "keys": "all"}', "the message's keys are not rows' keys"),
        ('{"pipeline": "1; DROP TABLE documents", "id": 1}', "pipeline or attempts is not a number"),
        (
            '{"id": 1, "schema": "public", "table": "documents; DROP TABLE documents", "contentFunction": "f",'
            ' "embeddingColumn": "embedding"}',
            'there is no table public."documents; DROP TABLE documents"',
        ),
        (
            '{"id": 1, "schema": "public", "table": "documents", "contentFunction": "pg_sleep(9)",'
            ' "embeddingColumn": "embedding"}',
            'there is no function "pg_sleep(9)" of one row of public.documents',
        ),
    ],
)
def test_a_broken_message_ends_in_the_failed_list_with_its_reason(
    documents: Connection, message: str, reason: str
) -> None:
    """If the error of one message is not caught, it ends the pass, and the good row is not embedded."""
    documents.execute("SELECT pgmq.send('embedding_jobs', %s)", [message])
    documents.execute("INSERT INTO documents (title, content) VALUES ('a good', 'row')")

    row = documents.execute("SELECT read, completed, failed FROM autoembed.process()").fetchone()

    assert row == (2, 1, 1)
    [failure] = documents.execute("SELECT error_class, reason, message::text FROM autoembed.failed").fetchall()
    assert failure.error_class == "message"
    assert reason in failure.reason
    assert documents.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone() == (0,)


def test_a_broken_message_does_not_wait_for_a_model(documents: Connection) -> None:
    """It is of no pipeline; taken for one of the default model's, it would rest with it."""
    documents.execute("SELECT autoembed._rest_model(autoembed._default_model(), 60, false, 'it is down', 'down')")
    documents.execute("SELECT pgmq.send('embedding_jobs', '{\"id\": 1}')")

    row = documents.execute("SELECT read, failed FROM autoembed.process()").fetchone()

    assert row == (1, 1)


def test_a_message_for_a_row_key_of_another_type_ends_in_the_failed_list(documents: Connection) -> None:
    """Without max_attempts it loops for ever; if the error is not caught, every pass ends with it."""
    documents.execute(
        "SELECT pgmq.send('embedding_jobs', jsonb_build_object('id', 'not a number', 'schema', 'public', 'table',"
        " 'documents', 'contentFunction', 'embedding_input', 'embeddingColumn', 'embedding'))"
    )

    for _ in range(5):
        documents.execute("SELECT autoembed.process()")
        documents.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")

    [failure] = documents.execute("SELECT reason, attempts FROM autoembed.failed").fetchall()
    assert "invalid input syntax for type integer" in failure.reason
    assert failure.attempts == 5


def test_a_content_function_of_somebody_elses_is_refused(
    documents: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    owner, stranger = role("owner"), role("stranger")
    documents.execute(f"ALTER TABLE documents OWNER TO {owner}")
    documents.execute(f"ALTER FUNCTION embedding_input OWNER TO {stranger}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="which lacks the rights of") as caught:
        documents.execute(
            "CREATE TRIGGER again AFTER INSERT ON documents FOR EACH ROW"
            " EXECUTE FUNCTION autoembed.queue_embeddings('public.embedding_input', 'embedding')"
        )

    assert "ALTER FUNCTION public.embedding_input(public.documents) OWNER TO" in (caught.value.diag.message_hint or "")
