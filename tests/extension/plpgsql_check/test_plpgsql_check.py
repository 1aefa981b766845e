"""plpgsql_check finds nothing in the functions of the extension, and nothing in those that are made for a table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from testcontainers.core.image import DockerImage

from harness import IMAGE, Connection, run_server

VOLATILE = "routine is marked as STABLE, but expression is VOLATILE"
# Its reports that are no faults, by the name of the function, and why. Its versions differ in their reports.
ACCEPTED = {
    ("_digests", VOLATILE): "The age of a row may be that at any moment of the statement.",
    ("_is_uncommitted", VOLATILE): "The caller's own transaction is in progress throughout the statement.",
    ("_check_table", VOLATILE): "pg_partition_ancestors() is marked as VOLATILE, and reads the catalog alone.",
    ("_without_replica_identity", VOLATILE): "pg_partition_tree() and pg_partition_ancestors(), too.",
    ("_is_subscribed", VOLATILE): "pg_partition_tree(), too.",
    ("_match_function", VOLATILE): "_search_target() looks at what was committed last, and changes nothing.",
    ("_unknown_keys", VOLATILE): "The same.",
    ("_lasting_target", VOLATILE.replace("STABLE", "IMMUTABLE")): "Its query is planned again after a change.",
    ("_lasting_target", 'unused parameter "version"'): "With another version, it is another query.",
    ("search", VOLATILE): "clock_timestamp() tells how long the search took, and nothing that it gives.",
    ("embed", VOLATILE): "It notes what was used.",
    ("_text_3", VOLATILE): "Calls the owner's function, and the owner may have marked it as anything.",
}
# The result of a call that is an expression, so that the CONTEXT of its errors has no SQL.
UNREAD = 'never read variable "_void"'
# Their queries are made of the names of a table, and the type of its rows is known when they run.
DYNAMIC = {"search", "search_rows", "_judgments", "_reranked"}
# Functions name these, which are not there during the check: Supabase's Vault, and a table that one of them makes.
ABSENT = """
CREATE SCHEMA vault;
CREATE TABLE vault.decrypted_secrets (name text, decrypted_secret text);
CREATE TEMP TABLE autoembed_condition (LIKE documents);
"""
# A table for each template, in each of its forms.
TABLES = r"""
CREATE TABLE documents (id int PRIMARY KEY, title text, content text, published boolean);
CREATE FUNCTION text_of(d documents) RETURNS text LANGUAGE sql AS 'SELECT d.title';
SELECT autoembed.create_model('fast', 'fake', 8), autoembed.set_default_model('fast');
SELECT autoembed.enable('documents', 'embedding', content_columns => '{title,content}', condition => 'published');
SELECT autoembed.enable('documents', 'cleared', content_template => '# {title}', on_change => 'clear');
SELECT autoembed.enable(
    'documents', 'made', content_function => 'text_of', condition => 'published', on_change => 'clear',
    replicated => true
);
SELECT autoembed.enable('documents', content_columns => '{content}', on_change => 'clear');
CREATE TABLE parts (a int, b text, year int, body text, PRIMARY KEY (a, b, year)) PARTITION BY RANGE (year);
CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
SELECT autoembed.enable('parts', 'embedding', content_columns => '{body}', on_change => 'clear');
CREATE TABLE bills (number numeric PRIMARY KEY, body text);
SELECT autoembed.enable('bills', content_columns => '{body}');
CREATE TABLE by_hand (id int PRIMARY KEY, title text, embedding halfvec(8));
CREATE FUNCTION text_by_hand(b by_hand) RETURNS text LANGUAGE sql AS 'SELECT b.title';
CREATE TRIGGER queue AFTER INSERT ON by_hand FOR EACH ROW
    EXECUTE FUNCTION autoembed.queue_embeddings('text_by_hand', 'embedding');
CREATE TRIGGER clear BEFORE UPDATE ON by_hand FOR EACH ROW EXECUTE FUNCTION autoembed.clear_column('embedding');
"""
# A trigger function is checked for each table that has it, or if no trigger calls it, for the table of its pipeline.
FUNCTIONS = r"""
SELECT p.oid::regprocedure AS signature, p.proname::text AS name, r.is_trigger,
    CASE WHEN r.is_trigger THEN coalesce(t.tgrelid, e.table_id) ELSE 0 END::regclass AS table_id
FROM pg_proc AS p
JOIN pg_language AS l ON l.oid = p.prolang
LEFT JOIN (SELECT DISTINCT tgfoid, tgrelid FROM pg_trigger) AS t ON t.tgfoid = p.oid
LEFT JOIN autoembed.pipeline AS e ON p.proname ~ ('_' || e.id || '$')
CROSS JOIN LATERAL (SELECT p.prorettype = 'trigger'::regtype AS is_trigger) AS r
WHERE p.pronamespace = 'autoembed'::regnamespace AND l.lanname = 'plpgsql'
"""
# The version in Debian misspells the name of the argument "anyelementtype", so arguments are given by position.
CHECK = f"""
SELECT f.name, c.level, concat_ws(' ', f.signature, c.lineno, c.statement) AS place, c.message
FROM ({FUNCTIONS}) AS f
CROSS JOIN LATERAL plpgsql_check_function_tb(
    f.signature, f.table_id, false, true, false, true, false, false,
    CASE WHEN f.is_trigger THEN 'old_rows' END, CASE WHEN f.is_trigger THEN 'new_rows' END, 'documents'
) AS c
"""


@pytest.fixture(scope="module")
def db() -> Iterator[Connection]:
    """The database that has pg_cron, on a server that has plpgsql_check, too: a layer on the image that is tested."""
    with ExitStack() as stack:
        layer = stack.enter_context(
            DockerImage(Path(__file__).parent, tag=f"{IMAGE}-checked", clean_up=False, buildargs={"IMAGE": IMAGE})
        )
        server = run_server(stack, image=str(layer), AUTOEMBED_LANES="0")
        db = stack.enter_context(server.connect())
        db.execute("CREATE EXTENSION plpgsql_check")
        db.execute(TABLES)
        db.execute(ABSENT)
        yield db


def test_there_are_functions_of_each_template_and_each_trigger_function_has_a_table(db: Connection) -> None:
    functions = db.execute(FUNCTIONS).fetchall()

    assert len(functions) > 100
    assert {"_capture_1", "_clear_2", "_content_3", "_write_5"} <= {function.name for function in functions}
    assert [function.name for function in functions if function.table_id is None] == []


def test_nothing_is_found_but_what_is_accepted(db: Connection) -> None:
    found = db.execute(CHECK).fetchall()

    assert [
        f"{row.level} in {row.place}: {row.message}"
        for row in found
        if (row.name, row.message) not in ACCEPTED and row.message != UNREAD and row.name not in DYNAMIC
    ] == []
