"""A request that cannot be met is refused, with a reason and a way out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import psycopg
import pytest

from extension.pipelines.documents import COLUMNS, TABLE, traces
from harness import Connection, Server

HAS_NONE = "is not attached to autoembed"
EXPRESSION = "boolean expression"


class Refusal(NamedTuple):
    """A request, and its refusal: words of the message and of the hint."""

    call: str
    sqlstate: str
    message: str
    hint: str = ""


REFUSALS = {
    "a view": Refusal(f"enable('a_view', {COLUMNS})", "42809", "app.a_view is a view, which cannot", "holds the rows"),
    "a materialized view": Refusal(
        f"enable('a_matview', {COLUMNS})", "42809", "is a materialized view, which", "holds the rows"
    ),
    "a foreign table": Refusal(
        f"enable('a_foreign_table', {COLUMNS})", "42809", "is a foreign table, which", "holds the rows"
    ),
    "a sequence": Refusal(
        f"enable('a_sequence', {COLUMNS})", "42809", "app.a_sequence is a sequence, which", "holds the rows"
    ),
    "an index": Refusal(
        f"enable('keyed_pkey', {COLUMNS})", "42809", "app.keyed_pkey is an index, which", "holds the rows"
    ),
    "a partitioned index": Refusal(
        f"enable('parts_pkey', {COLUMNS})", "42809", "is a partitioned index, which", "holds the rows"
    ),
    "a composite type": Refusal(
        f"enable('a_type', {COLUMNS})", "42809", "app.a_type is a composite type, which", "holds the rows"
    ),
    "a TOAST table": Refusal(
        f"enable((SELECT reltoastrelid::regclass FROM pg_class WHERE oid = 'documents'::regclass), {COLUMNS})",
        "42809",
        "is a TOAST table, which",
        "holds the rows",
    ),
    "a table of the extension": Refusal(
        f"enable('autoembed.pipeline', {COLUMNS})", "42809", "autoembed.pipeline belongs to autoembed", "of your own"
    ),
    "a table of PostgreSQL": Refusal(
        f"enable('pg_class', {COLUMNS})", "42809", "pg_class belongs to PostgreSQL", "of your own"
    ),
    "a typed table without its column": Refusal(
        "enable('a_typed_table', 'embedding', content_columns => '{title}')",
        "42809",
        "cannot add column to typed table",
    ),
    "a system column for embeddings": Refusal(
        f"enable('documents', 'ctid', {COLUMNS})", "42701", "conflicts with a system column"
    ),
    "an embeddings table without a name": Refusal(
        f"enable('documents', {COLUMNS}, embeddings_table => '')", "42602", 'name "" must have', "Leave"
    ),
    "an embeddings table with a long name": Refusal(
        f"enable('documents', {COLUMNS}, embeddings_table => repeat('ä', 32))", "42622", "from 1 to 63 bytes", "Leave"
    ),
    "a temporary table": Refusal(f"enable('a_temporary_table', {COLUMNS})", "42809", "temporary", "permanent table"),
    "a partition": Refusal(
        f"enable('a_partition', {COLUMNS})", "42809", "app.a_partition is a partition", "enable('app.parts'"
    ),
    "a table without a key": Refusal(f"enable('keyless', {COLUMNS})", "55000", "app.keyless has no key", "primary key"),
    "an index on partitions": Refusal(
        f"enable('parts', 'embedding', {COLUMNS}, create_index => true)", "0A000", "partitioned", "each partition"
    ),
    "no table": Refusal(f"enable(NULL, {COLUMNS})", "22004", "must not be NULL"),
    "an OID of no table": Refusal(f"enable(99::oid::regclass, {COLUMNS})", "42P01", "99"),
    "no content": Refusal(
        "enable('documents')", "22023", "one of content_columns, content_function", "content_columns =>"
    ),
    "two contents": Refusal(
        f"enable('documents', {COLUMNS}, content_template => '{{title}}')",
        "22023",
        "one of content_columns",
        "For example",
    ),
    "content without columns": Refusal(
        "enable('documents', content_columns => '{}')", "22023", "no column", "For example"
    ),
    "a content column NULL": Refusal("enable('documents', content_columns => '{title,NULL}')", "22023", "NULL"),
    "an unknown content column": Refusal(
        "enable('documents', content_columns => '{title,nope}')",
        "42703",
        'app.documents has no column "nope"',
        "title, content",
    ),
    "a system column": Refusal(
        "enable('documents', content_columns => '{ctid}')", "42703", 'no column "ctid"', "title"
    ),
    "itself as content": Refusal(
        "enable('documents', 'v', content_columns => '{v}')", "22023", "own content", "Leave it out"
    ),
    "a template without columns": Refusal(
        "enable('documents', content_template => 'x {{title}}')", "22023", "names no column", "{title}"
    ),
    "half a brace": Refusal("enable('documents', content_template => '{title} {')", "22023", "brace", "{title}"),
    "a template with an unknown column": Refusal(
        "enable('documents', content_template => '{ title }')", "42703", 'no column " title "', "title"
    ),
    "an unknown function": Refusal(
        "enable('documents', content_function => 'nope')",
        "42883",
        'no function "nope" of one row of app.documents',
        "CREATE FUNCTION",
    ),
    "a function of another table": Refusal(
        "enable('keyed', 'v', content_function => 'text_of')", "42883", "of one row of app.keyed", "CREATE FUNCTION"
    ),
    "a function that returns no text": Refusal(
        "enable('documents', content_function => 'number_of')", "42804", "returns integer", "returns text"
    ),
    "a function that returns a set": Refusal(
        "enable('documents', content_function => 'texts_of')", "42883", 'no function "texts_of"', "CREATE FUNCTION"
    ),
    "a stranger's function": Refusal(
        "enable('owned', content_function => 'owned_text')", "42501", "enable_stranger", "OWNER TO enable_host"
    ),
    "an unknown model": Refusal(f"enable('documents', {COLUMNS}, model => 'nope')", "42704", '"nope"', "model"),
    "another on_change": Refusal(
        f"enable('documents', {COLUMNS}, on_change => 'nope')", "22023", "keep or clear, not nope", "clear"
    ),
    "on_change NULL": Refusal(
        f"enable('documents', {COLUMNS}, on_change => NULL)", "22023", "keep or clear, not NULL", "clear"
    ),
    "clear of a column NOT NULL": Refusal(
        "enable('filled', 'embedding', content_columns => '{title}', on_change => 'clear')", "22023", "NOT NULL", "keep"
    ),
    "clear with a generated column": Refusal(
        "enable('made', 'embedding', content_columns => '{title}', on_change => 'clear')",
        "0A000",
        "generated columns",
        "keep",
    ),
    "a text column": Refusal(
        f"enable('documents', 'note', {COLUMNS})",
        "42804",
        'column "note" of table app.documents is of type text',
        "halfvec or vector",
    ),
    "a sparse column": Refusal(
        "enable('filled', 'sparse', content_columns => '{title}')", "42804", "of type", "halfvec or vector"
    ),
    "a generated embedding": Refusal(
        "enable('filled', 'generated', content_columns => '{title}')",
        "42804",
        "a generated column",
        "halfvec or vector",
    ),
    "twice": Refusal(
        "enable('keyed', 'embedding', content_columns => '{title}')",
        "42710",
        "app.keyed.embedding is already attached",
        "alter_pipeline",
    ),
    "a subquery": Refusal(
        f"enable('documents', {COLUMNS}, condition => '(SELECT true)')", "0A000", "subquer", "without subqueries"
    ),
    "an aggregate": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'max(id) > 1')", "42803", "aggregate", EXPRESSION
    ),
    "a window": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'row_number() OVER () > 1')", "42P20", "window", EXPRESSION
    ),
    "a set": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'generate_series(1, 2) > 1')",
        "0A000",
        "set-returning",
        EXPRESSION,
    ),
    "a text as condition": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'title')", "42804", "type boolean", EXPRESSION
    ),
    "a condition on no column": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'nope')", "42703", '"nope"', EXPRESSION
    ),
    "a bad literal": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'id = ''x''')", "22P02", "invalid input", EXPRESSION
    ),
    "two statements": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'true; DROP TABLE app.documents')",
        "42601",
        "syntax error",
        EXPRESSION,
    ),
    "a condition that closes its brackets": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'true); DROP TABLE app.documents; SELECT (true')",
        "42601",
        "syntax error",
        EXPRESSION,
    ),
    "an empty condition": Refusal(
        f"enable('documents', {COLUMNS}, condition => '')", "42601", "syntax error", EXPRESSION
    ),
    "a whole row as condition": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'documents IS NOT NULL')", "42703", "condition", EXPRESSION
    ),
    "a system column as condition": Refusal(
        f"enable('documents', {COLUMNS}, condition => 'tableoid > 0')", "42703", "tableoid"
    ),
    "altering what is not attached": Refusal(
        "alter_pipeline('documents', on_change => 'clear')", "42704", HAS_NONE, "enable"
    ),
    "altering another column": Refusal(
        f"alter_pipeline('keyed', 'nope', {COLUMNS})", "42704", '"nope" of table app.keyed', "enable"
    ),
    "altering to two contents": Refusal(
        f"alter_pipeline('keyed', {COLUMNS}, content_template => '{{title}}')",
        "22023",
        "one of content_columns",
        "For example",
    ),
    "altering to an unknown column": Refusal(
        "alter_pipeline('keyed', content_columns => '{nope}')", "42703", 'has no column "nope"', "title"
    ),
    "altering to a bad condition": Refusal(
        "alter_pipeline('keyed', condition => 'nope')", "42703", '"nope"', EXPRESSION
    ),
    "altering to an unknown model": Refusal("alter_pipeline('keyed', model => 'nope')", "42704", '"nope"', "model"),
    "altering to another on_change": Refusal(
        "alter_pipeline('keyed', on_change => 'nope')", "22023", "keep or clear, not nope", "clear"
    ),
    "altering a guide's table": Refusal(f"alter_pipeline('guided', {COLUMNS})", "55000", "made by hand", "disable"),
    "disabling what is not attached": Refusal("disable('documents')", "42704", HAS_NONE, "enable"),
    "pausing what is not attached": Refusal("pause('documents')", "42704", HAS_NONE, "enable"),
    "resuming what is not attached": Refusal("resume('documents')", "42704", HAS_NONE, "enable"),
    "resyncing what is not attached": Refusal("resync('documents')", "42704", HAS_NONE, "enable"),
    "reembedding what is not attached": Refusal("reembed('documents')", "42704", HAS_NONE, "enable"),
    "reembedding by a bad condition": Refusal("reembed('keyed', condition => 'nope')", "42703", '"nope"', EXPRESSION),
}


@pytest.fixture(scope="module")
def unfit(server: Server, template: str) -> Iterator[Connection]:
    """Tables of all kinds that cannot be attach, or not in every way."""
    name = "refusals"
    with server.database(name, template), server.connect(name) as db, db.transaction(force_rollback=True):
        db.execute(TABLE)
        db.execute("""
            CREATE VIEW a_view AS SELECT * FROM documents;
            CREATE MATERIALIZED VIEW a_matview AS SELECT * FROM documents;
            CREATE EXTENSION file_fdw; CREATE SERVER files FOREIGN DATA WRAPPER file_fdw;
            CREATE FOREIGN TABLE a_foreign_table (id int, title text, content text)
                SERVER files OPTIONS (filename '/dev/null');
            CREATE SEQUENCE a_sequence; CREATE TYPE a_type AS (id int, title text, content text);
            CREATE TYPE a_row AS (id int, title text); CREATE TABLE a_typed_table OF a_row (PRIMARY KEY (id));
            CREATE TEMP TABLE a_temporary_table (id int PRIMARY KEY, title text, content text);
            CREATE TABLE parts (id int PRIMARY KEY, title text, content text) PARTITION BY HASH (id);
            CREATE TABLE a_partition PARTITION OF parts FOR VALUES WITH (MODULUS 1, REMAINDER 0);
            CREATE TABLE keyless (id int, number int UNIQUE, title text, content text);
            CREATE UNIQUE INDEX ON keyless (id) WHERE id > 0; CREATE UNIQUE INDEX ON keyless (abs(id));
            CREATE TABLE keyed (id int PRIMARY KEY, title text);
            SELECT autoembed.enable('keyed', 'embedding', content_columns => '{title}');
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


@pytest.mark.parametrize("refusal", REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_is_refused_with_a_reason_and_a_way_out(unfit: Connection, refusal: Refusal) -> None:
    before = traces(unfit)

    with pytest.raises(psycopg.Error) as error, unfit.transaction(force_rollback=True):
        unfit.execute(f"SELECT autoembed.{refusal.call}".encode())

    diagnostic = error.value.diag
    assert diagnostic.sqlstate == refusal.sqlstate
    assert refusal.message in (diagnostic.message_primary or "")
    assert refusal.hint in (diagnostic.message_hint or "")
    assert traces(unfit) == before
