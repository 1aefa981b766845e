"""Whatever a hostile owner writes into the definition of a pipeline, it gains nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import psycopg
import pytest

from extension.pipelines.documents import Connect
from fake_api import FakeApi
from harness import PASSWORD, Server
from lanes import running_lanes
from waiting import wait_until

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
    "enable": "SELECT autoembed.enable('notes', 'embedding', "
    "content_columns => '{content}', enqueue_existing => false)",
    "pipeline": "INSERT INTO autoembed.pipeline (table_id, embedding_column, content_columns, condition)",
    "backfill": "INSERT INTO autoembed.backfill (pipeline_id, condition) SELECT id, ",
    "ending": "); END; $body$; $f$; ALTER ROLE {mallory} SUPERUSER; --",
}
WAYS = {
    "a content function": "SELECT autoembed.enable('notes', 'embedding', "
    "content_function => 'text_of', on_change => 'clear')",
    "a condition": "SELECT autoembed.enable('notes', 'embedding', "
    "content_columns => '{content}', condition => 'attack(content)')",
    "a condition of a reembedding": "{enable}; SELECT autoembed.reembed('notes', condition => 'attack(content)')",
    "a condition inserted": "{pipeline} VALUES ('notes', 'embedding', '{content}', '{mallory}.attack(content)')",
    "a condition that ends the function": "{pipeline} VALUES ('notes', 'embedding', '{content}', $x${ending}$x$)",
    "a condition updated": "{enable}; UPDATE autoembed.pipeline SET condition = '{mallory}.attack(content) AND id > 0'",
    "columns of the condition updated": "SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}',"
    """ condition => 'attack(content)'); UPDATE autoembed.pipeline SET condition_columns = '{"x\\" {ending}": "id"}'""",
    "a template updated": "SELECT autoembed.enable('notes', 'embedding', content_template => '{content}');"
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
        db.execute("SELECT autoembed.enable('documents', 'embedding', content_columns => '{content}')")
        session = connect(user=mallory)
        session.execute(f"SET search_path = {mallory}, public")
        session.execute(HOSTILE.format(mallory=mallory))
        statements = WAYS[way]
        for name, part in [*PARTS.items(), ("mallory", mallory)]:
            statements = statements.replace(f"{{{name}}}", part)
        with pytest.raises(psycopg.errors.SyntaxError) if way in REFUSED_AT_ONCE else nullcontext():
            session.execute(statements.encode())
        session.execute("ALTER SEQUENCE as_owner RESTART")

        # A superuser alters it, writes it, and runs the lane.
        db.execute(f"ALTER TABLE {mallory}.notes ADD more text; ALTER TABLE {mallory}.notes RENAME more TO most")
        db.execute(f"INSERT INTO {mallory}.notes VALUES (2, 'another'); UPDATE {mallory}.notes SET content = 'new'")
        db.execute("INSERT INTO documents VALUES (1, 'of another')")
        db.execute("CREATE TABLE papers (id int PRIMARY KEY, content text); INSERT INTO papers VALUES (1, 'older')")
        db.execute("SELECT autoembed.enable('papers', 'embedding', content_columns => '{content}')")
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
