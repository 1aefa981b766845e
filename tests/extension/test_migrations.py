"""Migrations of attached tables, keys, types and functions are followed, or refused, or said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest

from harness import Connection
from lanes import running_lanes

Connect = Callable[..., Connection]

# Ten rows of the table have been embedded.
ROWS = 10
TEXT = r"concat_ws(E'\n\n', nullif(a, ''), nullif(b, ''))"


@pytest.fixture
def t(db: Connection) -> Connection:
    """A table of ten rows, which are embedded."""
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text, c int)")
    db.execute("SELECT autoembed.enable('t', 'embedding', content_columns => '{a,b}', model => 'test')")
    db.execute("INSERT INTO t SELECT n, 'a' || n, 'b' || n, n FROM generate_series(1, %s) AS n", [ROWS])
    process(db)
    assert sent(db) == ROWS
    return db


@dataclass
class Told:
    """The warnings of a session."""

    warnings: list[tuple[str, str]]

    @classmethod
    def by(cls, db: Connection) -> Told:
        told = cls([])

        def note(diagnostic: Any) -> None:
            if diagnostic.severity_nonlocalized == "WARNING":
                told.warnings.append((diagnostic.message_primary, diagnostic.message_hint))

        db.add_notice_handler(note)
        return told


def one(db: Connection, sql: str) -> Any:
    [row] = db.execute(sql.encode()).fetchall()
    return row


def process(db: Connection) -> None:
    """Embeds all that can be."""
    db.execute("SELECT autoembed.process()")
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
    while one(db, "SELECT completed FROM autoembed.process()").completed:
        pass
    db.execute("SELECT autoembed.process()")


def sent(db: Connection) -> int:
    return int(one(db, "SELECT coalesce(sum(inputs), 0) AS sent FROM autoembed.usage").sent)


def status(db: Connection) -> Any:
    return one(db, "SELECT table_name::text, embedding_column, state, reason, hint FROM autoembed.status")


def wrong(db: Connection, table: str = "t", text: str = TEXT, embedding: str = "embedding") -> list[Any]:
    """The rows whose vector is not that of their text."""
    return db.execute(
        f"SELECT t.* FROM {table} AS t"
        f" WHERE ({embedding} <=> (autoembed.embed({text}, model => 'test'))::halfvec(8) < 0.001) IS NOT TRUE"
    ).fetchall()


# Followed ----------------------------------------------------------------------------------------

READS_NAMES = (
    "CREATE FUNCTION f(r t) RETURNS text LANGUAGE sql STABLE AS"
    " $$SELECT concat(j ->> 'a', j ->> 'more') FROM to_jsonb(r) AS j$$;"
    " SELECT autoembed.alter_pipeline('t', content_function => 'f'); SELECT autoembed.process();"
    " SELECT autoembed.process(); SELECT autoembed.process()"
)
FOLLOWED = {
    # The migration: (the statements, texts that are sent again, the text of a row after it).
    "a content column gets another type": ("ALTER TABLE t ALTER a TYPE varchar(100)", 0, TEXT),
    "a content column is renamed": ("ALTER TABLE t RENAME a TO aa", 0, TEXT.replace("a,", "aa,", 1)),
    "the table is renamed and back": ("ALTER TABLE t RENAME TO s; ALTER TABLE s RENAME TO t", 0, TEXT),
    "the embedding column gets another type": ("ALTER TABLE t ALTER embedding TYPE vector(8)", 0, TEXT),
    "the table is not logged for a while": ("ALTER TABLE t SET UNLOGGED; ALTER TABLE t SET LOGGED", 0, TEXT),
    "the replica identity is the whole row": ("ALTER TABLE t REPLICA IDENTITY FULL", 0, TEXT),
    "the table has row level security": ("ALTER TABLE t ENABLE ROW LEVEL SECURITY", 0, TEXT),
    "the table inherits": ("CREATE TABLE p (a text, b text); ALTER TABLE t INHERIT p", 0, TEXT),
    "a column is added": ("ALTER TABLE t ADD COLUMN t text; ALTER TABLE t ADD COLUMN key text", 0, TEXT),
    "a column that is not needed is dropped": ("ALTER TABLE t DROP COLUMN c", 0, TEXT),
    "the inherited column is renamed": (
        "CREATE TABLE p (a text, b text); ALTER TABLE t INHERIT p; ALTER TABLE p RENAME a TO aa",
        0,
        TEXT.replace("a,", "aa,", 1),
    ),
    "a column of the parent of the parent is renamed": (
        "CREATE TABLE g (a text, b text); CREATE TABLE p () INHERITS (g); ALTER TABLE t INHERIT p;"
        " ALTER TABLE g RENAME a TO aa",
        0,
        TEXT.replace("a,", "aa,", 1),
    ),
    "the table becomes a partition, whose column is renamed": (
        "CREATE TABLE p (LIKE t INCLUDING ALL) PARTITION BY RANGE (id);"
        " ALTER TABLE p ATTACH PARTITION t FOR VALUES FROM (0) TO (1000); ALTER TABLE p RENAME a TO aa",
        0,
        TEXT.replace("a,", "aa,", 1),
    ),
    "the key gets another type": ("ALTER TABLE t ALTER id TYPE bigint", 0, TEXT),
    "the key gets other values": ("ALTER TABLE t ALTER id TYPE text USING 'doc-' || id", ROWS, TEXT),
    "another primary key": (
        "ALTER TABLE t ADD COLUMN uid uuid NOT NULL DEFAULT gen_random_uuid(); ALTER TABLE t DROP CONSTRAINT t_pkey;"
        " ALTER TABLE t ADD PRIMARY KEY (uid); ALTER TABLE t DROP COLUMN id; ALTER TABLE t RENAME uid TO id",
        0,
        TEXT,
    ),
    "a key of two columns": ("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (c, id)", 0, TEXT),
    "a key of other numbers": (
        "ALTER TABLE t DROP CONSTRAINT t_pkey; UPDATE t SET c = 100 - id; ALTER TABLE t ADD PRIMARY KEY (c)",
        0,
        TEXT,
    ),
    "numbers that are swapped": (
        "ALTER TABLE t DROP CONSTRAINT t_pkey; UPDATE t SET c = 11 - id; ALTER TABLE t ADD PRIMARY KEY (c)",
        0,
        TEXT,
    ),
    "a unique index is the key": (
        "ALTER TABLE t ALTER c SET NOT NULL; CREATE UNIQUE INDEX u ON t (c); ALTER TABLE t DROP CONSTRAINT t_pkey",
        0,
        TEXT,
    ),
    "the key's index is made after the old one is gone": (
        "ALTER TABLE t ALTER c SET NOT NULL; ALTER TABLE t DROP CONSTRAINT t_pkey; CREATE UNIQUE INDEX u ON t (c)",
        0,
        TEXT,
    ),
    "the key is dropped and added in one command": (
        "ALTER TABLE t DROP COLUMN id, ADD COLUMN id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY",
        0,
        TEXT,
    ),
    "the same key again": ("ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (id)", 0, TEXT),
    "a value of an enum is renamed": (
        "CREATE TYPE mood AS ENUM ('b1'); UPDATE t SET b = 'b1'; ALTER TABLE t ALTER b TYPE mood USING b::mood;"
        " ALTER TYPE mood RENAME VALUE 'b1' TO 'glad'",
        ROWS,
        TEXT.replace("nullif(b, '')", "b::text"),
    ),
    "a value of an enum in an array is renamed": (
        "CREATE TYPE mood AS ENUM ('b1'); ALTER TABLE t ALTER b TYPE mood[] USING '{b1}';"
        " ALTER TYPE mood RENAME VALUE 'b1' TO 'glad'",
        ROWS,
        TEXT.replace("nullif(b, '')", "b::text"),
    ),
    "a composite type gets an attribute": (
        "CREATE TYPE pair AS (x int); ALTER TABLE t ALTER b TYPE pair USING ROW(1)::pair;"
        " ALTER TYPE pair ADD ATTRIBUTE y int CASCADE",
        ROWS,
        TEXT.replace("nullif(b, '')", "b::text"),
    ),
    "a content column is dropped and added again": (
        "ALTER TABLE t DROP COLUMN b; ALTER TABLE t ADD COLUMN b text DEFAULT 'new'",
        ROWS,
        TEXT,
    ),
    "a content column is replaced in one statement": (
        "ALTER TABLE t DROP COLUMN b, ADD COLUMN b text DEFAULT 'new'",
        ROWS,
        TEXT,
    ),
    "a column of the template is replaced in one statement": (
        "SELECT autoembed.alter_pipeline('t', content_template => '{a}+{b}'); SELECT autoembed.process();"
        " SELECT autoembed.process();"
        " ALTER TABLE t DROP COLUMN IF EXISTS b, ADD COLUMN IF NOT EXISTS b text DEFAULT 'n'",
        2 * ROWS,
        "a || '+' || b",
    ),
    "columns that the content function reads are swapped": (
        f"{READS_NAMES}; ALTER TABLE t RENAME a TO x; ALTER TABLE t RENAME b TO a; ALTER TABLE t RENAME x TO b",
        2 * ROWS,
        "a",
    ),
    "a column that the content function reads is added": (
        f"{READS_NAMES}; ALTER TABLE t ADD COLUMN more text DEFAULT 'more'",
        2 * ROWS,
        "a || 'more'",
    ),
    "the content function gets a setting": (
        "CREATE FUNCTION f(t) RETURNS text LANGUAGE sql STABLE"
        " AS $$SELECT $1.a || current_setting('application_name')$$;"
        " SELECT autoembed.alter_pipeline('t', content_function => 'f'); SELECT autoembed.process();"
        " SELECT autoembed.process(); ALTER FUNCTION f SET application_name = 'set'",
        2 * ROWS,
        "a || 'set'",
    ),
    "an attribute of a composite type is renamed": (
        "CREATE TYPE pair AS (x int); ALTER TABLE t ADD COLUMN p pair DEFAULT ROW(1);"
        " CREATE FUNCTION f(t) RETURNS text LANGUAGE sql STABLE AS $$SELECT $1.a || to_jsonb($1.p)$$;"
        " SELECT autoembed.alter_pipeline('t', content_function => 'f'); SELECT autoembed.process();"
        " SELECT autoembed.process(); ALTER TYPE pair RENAME ATTRIBUTE x TO y",
        2 * ROWS,
        "a || to_jsonb(p)",
    ),
    "a column is added to the table whose row is the content": (
        "CREATE TABLE other (x int); ALTER TABLE t ALTER b TYPE other USING ROW(1)::other;"
        " ALTER TABLE other ADD COLUMN y int",
        ROWS,
        TEXT.replace("nullif(b, '')", "b::text"),
    ),
    "no function bodies are checked": (
        f"{READS_NAMES}; SET check_function_bodies = off;"
        " CREATE OR REPLACE FUNCTION f(r t) RETURNS text LANGUAGE sql STABLE AS $$SELECT upper(r.a)$$;"
        " RESET check_function_bodies; SELECT autoembed.process()",
        2 * ROWS,
        "upper(a)",
    ),
    "event triggers do not fire": (
        "SET session_replication_role = replica; ALTER TABLE t RENAME a TO aa;"
        " ALTER TABLE t ALTER b TYPE varchar(50) USING upper(b); RESET session_replication_role",
        ROWS,
        TEXT.replace("a,", "aa,", 1),
    ),
    "event triggers do not fire for the content function": (
        f"{READS_NAMES}; SET session_replication_role = replica;"
        " CREATE OR REPLACE FUNCTION f(r t) RETURNS text LANGUAGE sql STABLE AS $$SELECT upper(r.a)$$;"
        " RESET session_replication_role; SELECT autoembed.process()",
        2 * ROWS,
        "upper(a)",
    ),
    "a content column is replaced by a generated one": (
        "ALTER TABLE t DROP COLUMN b; ALTER TABLE t ADD COLUMN b text GENERATED ALWAYS AS (upper(a)) STORED",
        ROWS,
        TEXT,
    ),
    "the embedding column is dropped and added again": (
        "ALTER TABLE t DROP COLUMN embedding; ALTER TABLE t ADD COLUMN embedding halfvec(8)",
        ROWS,
        TEXT,
    ),
    "the content function has another body": (
        "CREATE FUNCTION f(t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT $1.a$$;"
        " SELECT autoembed.alter_pipeline('t', content_function => 'f'); SELECT autoembed.process();"
        " SELECT autoembed.process(); SELECT autoembed.process();"
        " CREATE OR REPLACE FUNCTION f(t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT upper($1.a)$$",
        2 * ROWS,
        "upper(a)",
    ),
    "the content function is dropped and created again": (
        "CREATE FUNCTION f(t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT $1.a$$;"
        " SELECT autoembed.alter_pipeline('t', content_function => 'f'); SELECT autoembed.process();"
        " SELECT autoembed.process(); SELECT autoembed.process(); DROP FUNCTION f;"
        " CREATE FUNCTION f(t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT upper($1.a)$$",
        2 * ROWS,
        "upper(a)",
    ),
}


@pytest.mark.parametrize("case", FOLLOWED)
def test_a_change_is_followed(t: Connection, case: str) -> None:
    statements, again, text = FOLLOWED[case]

    # Migrations run in one transaction, but for those that embed meanwhile.
    with nullcontext() if "process" in statements else t.transaction():
        for statement in statements.split("; "):
            t.execute(statement.encode())
    process(t)
    content = "aa" if "aa" in text else "a"
    t.execute(f"UPDATE t SET {content} = {content} || ' changed' WHERE ctid = (SELECT max(ctid) FROM t)")
    process(t)

    assert (status(t).state, status(t).reason) == ("idle", None)
    assert sent(t) == ROWS + again + 1
    assert wrong(t, text=text) == []
    assert one(t, "SELECT count(*) FROM autoembed.embedded").count == ROWS
    assert t.execute("SELECT reason FROM autoembed.failed").fetchall() == []


# Stopped -----------------------------------------------------------------------------------------

F = "CREATE FUNCTION f(t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT $1.a$$"

STOPPED = {
    # The migration: (the statements, the reason, the hint's statement, with what the user puts into it).
    "a content column is dropped": (
        "ALTER TABLE t DROP COLUMN b",
        'table public.t has no column "b"',
        "SELECT autoembed.alter_pipeline('public.t', content_columns => '{a}')",
        "a",
    ),
    "all content columns are dropped": (
        "ALTER TABLE t DROP COLUMN a, DROP COLUMN b",
        'table public.t has no column "a"',
        "SELECT autoembed.alter_pipeline('public.t', content_columns => '{c}')",
        "c::text",
    ),
    "a column of the template is dropped": (
        "SELECT autoembed.alter_pipeline('t', content_template => '{a} {b}'); ALTER TABLE t DROP COLUMN b",
        'table public.t has no column "b"',
        "SELECT autoembed.alter_pipeline('public.t', content_template => '{a}')",
        "a",
    ),
    "a column of the condition is dropped": (
        "SELECT autoembed.alter_pipeline('t', condition => 'c > 0'); ALTER TABLE t DROP COLUMN c",
        'table public.t has no column "c"',
        "SELECT autoembed.alter_pipeline('public.t', condition => '')",
        TEXT,
    ),
    "the type of a column is dropped": (
        "CREATE DOMAIN d AS text; ALTER TABLE t ALTER b TYPE d; DROP DOMAIN d CASCADE",
        'table public.t has no column "b"',
        "SELECT autoembed.alter_pipeline('public.t', content_columns => '{a}')",
        "a",
    ),
    "the key is dropped": (
        "ALTER TABLE t DROP COLUMN id",
        'table public.t has no column "id"',
        "ALTER TABLE public.t ADD COLUMN id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY",
        TEXT,
    ),
    "the columns are not a key any more": (
        "ALTER TABLE t DROP CONSTRAINT t_pkey",
        "column id of table public.t is no longer a key",
        "ALTER TABLE public.t ADD PRIMARY KEY (id)",
        TEXT,
    ),
    "the index of the key is dropped": (
        "ALTER TABLE t DROP CONSTRAINT t_pkey; CREATE UNIQUE INDEX u ON t (id); DROP INDEX u",
        "column id of table public.t is no longer a key",
        "ALTER TABLE public.t ADD PRIMARY KEY (id)",
        TEXT,
    ),
    "the embedding column is dropped": (
        "ALTER TABLE t DROP COLUMN embedding",
        'table public.t has no column "embedding"',
        "ALTER TABLE public.t ADD COLUMN embedding public.halfvec(8)",
        TEXT,
    ),
    "the embedding column is no vector": (
        "ALTER TABLE t ALTER embedding TYPE text USING NULL",
        'column "embedding" of table public.t is of type text',
        "ALTER TABLE public.t ALTER COLUMN embedding TYPE public.halfvec(8) USING NULL",
        TEXT,
    ),
    "the embedding column has other dimensions": (
        "ALTER TABLE t ALTER embedding TYPE halfvec(9) USING NULL",
        'column "embedding" of table public.t has 9 dimensions, model "test" has 8',
        "ALTER TABLE public.t ALTER COLUMN embedding TYPE halfvec(8) USING NULL",
        TEXT,
    ),
    "a rule replaces UPDATE": (
        "CREATE RULE frozen AS ON UPDATE TO t WHERE old.c < 0 DO INSTEAD NOTHING",
        'rule "frozen" of table public.t stands in the way of the embeddings',
        "DROP RULE frozen ON public.t",
        TEXT,
    ),
    "the content function is dropped": (
        f"{F}; SELECT autoembed.alter_pipeline('t', content_function => 'f'); DROP FUNCTION f",
        'there is no function "f" of one row of public.t',
        "CREATE FUNCTION f(public.t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT $1.a$$",
        "a",
    ),
    "the content function is renamed and dropped": (
        f"{F}; SELECT autoembed.alter_pipeline('t', content_function => 'f'); ALTER FUNCTION f RENAME TO g;"
        " DROP FUNCTION g",
        'there is no function "public.g" of one row of public.t',
        "CREATE FUNCTION public.g(public.t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT $1.a$$",
        "a",
    ),
    "the schema of the content function is dropped": (
        f"CREATE SCHEMA s; {F.replace('FUNCTION f', 'FUNCTION s.f')};"
        " SELECT autoembed.alter_pipeline('t', content_function => 's.f'); DROP SCHEMA s CASCADE",
        'there is no function "s.f" of one row of public.t',
        "SELECT autoembed.alter_pipeline('public.t', content_columns => '{a}')",
        "a",
    ),
    "a function of the condition is dropped": (
        "CREATE FUNCTION ok(int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';"
        " SELECT autoembed.alter_pipeline('t', condition => 'ok(c)'); DROP FUNCTION ok",
        "the condition on table public.t uses function public.ok(integer), which is gone or has another name",
        "SELECT autoembed.alter_pipeline('public.t', condition => '')",
        TEXT,
    ),
    "a column of the condition gets another type": (
        "SELECT autoembed.alter_pipeline('t', condition => 'c > 0'); ALTER TABLE t ALTER c TYPE text",
        "the texts of table public.t cannot be read: operator does not exist: text > integer",
        "SELECT autoembed.alter_pipeline('public.t', condition => 'c <> ''''')",
        TEXT,
    ),
    "a column of the condition gets another type for a while": (
        "SELECT autoembed.alter_pipeline('t', condition => 'c > 0'); ALTER TABLE t ALTER c TYPE text",
        "the texts of table public.t cannot be read: operator does not exist: text > integer",
        "ALTER TABLE t ALTER c TYPE int USING c::int",
        TEXT,
    ),
    "a value of an enum in the condition is renamed": (
        "CREATE TYPE mood AS ENUM ('sad', 'glad'); ALTER TABLE t ADD m mood DEFAULT 'glad';"
        " SELECT autoembed.alter_pipeline('t', condition => 'm = ''glad''');"
        " ALTER TYPE mood RENAME VALUE 'glad' TO 'happy'",
        'the texts of table public.t cannot be read: invalid input value for enum mood: "glad"',
        "SELECT autoembed.alter_pipeline('public.t', condition => 'm = ''happy''')",
        TEXT,
    ),
    "a content function in SQL names a column that is renamed": (
        f"{F}; SELECT autoembed.alter_pipeline('t', content_function => 'f'); ALTER TABLE t RENAME a TO aa",
        'the texts of table public.t cannot be read: column "a" not found in data type t',
        "CREATE OR REPLACE FUNCTION f(t) RETURNS text LANGUAGE sql IMMUTABLE AS $$SELECT $1.aa$$",
        "aa",
    ),
}


@pytest.mark.parametrize("case", STOPPED)
def test_what_a_pipeline_cannot_do_without_stops_it_and_the_hint_goes_on(t: Connection, case: str) -> None:
    statements, reason, mend, text = STOPPED[case]
    told = Told.by(t)

    for statement in statements.split("; "):
        t.execute(statement.encode())
    now = status(t)
    # The application goes on writing.
    t.execute("ALTER TABLE t ADD COLUMN other int; UPDATE t SET other = 1")
    t.execute("DELETE FROM t WHERE ctid = (SELECT max(ctid) FROM t)")
    t.execute("CREATE TABLE unrelated (id int PRIMARY KEY); DROP TABLE unrelated")
    process(t)
    process(t)

    assert (now.state, now.reason) == ("stopped", reason)
    assert told.warnings[:1] == [(f"public.t.embedding is not being embedded: {reason}", now.hint)]

    t.execute(mend.encode())
    process(t)

    assert (status(t).state, status(t).reason) == ("idle", None)
    assert wrong(t, text=text) == []


OK = "CREATE OR REPLACE FUNCTION ok(int) RETURNS {} LANGUAGE sql IMMUTABLE AS 'SELECT {}'"
WITH_VECTOR = "SELECT array_agg(id ORDER BY id) AS ids FROM t WHERE embedding IS NOT NULL"


def test_a_function_of_the_condition_that_comes_back_with_another_type_stops_it(t: Connection) -> None:
    t.execute(OK.format("boolean", "$1 > 5").encode())
    t.execute("SELECT autoembed.alter_pipeline('t', condition => 'ok(c)')")
    process(t)

    t.execute("DROP FUNCTION ok")
    t.execute(OK.format("int", "$1").encode())
    process(t)

    assert status(t).state == "stopped"
    assert status(t).reason.endswith("must be type boolean, not type integer")
    assert t.execute("SELECT reason FROM autoembed.failed").fetchall() == []

    t.execute("DROP FUNCTION ok")
    t.execute(OK.format("boolean", "$1 > 3").encode())
    process(t)

    assert (status(t).state, status(t).reason) == ("idle", None)
    assert one(t, WITH_VECTOR).ids == [*range(4, 11)]


def test_another_body_of_a_function_of_the_condition_is_followed(t: Connection) -> None:
    t.execute(OK.format("boolean", "$1 > 5").encode())
    t.execute("SELECT autoembed.alter_pipeline('t', condition => 'ok(c)')")
    process(t)

    t.execute(OK.format("boolean", "$1 > 3").encode())
    process(t)

    assert one(t, WITH_VECTOR).ids == [*range(4, 11)]


OF_ROW = TEXT.replace("(a,", "(r.a,").replace("(b,", "(r.b,")
BODY = "CREATE OR REPLACE FUNCTION public.f(r public.t) RETURNS text LANGUAGE plpgsql AS $f$BEGIN {}; END$f$"

UNSEEN = {
    # A change that no event trigger sees: (what comes before, the change, the reason, the way back).
    "a right to a function of the condition is taken": (
        "CREATE SCHEMA s; CREATE FUNCTION s.ok(int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT true';"
        " GRANT USAGE ON SCHEMA s TO {owner}; SELECT autoembed.alter_pipeline('t', condition => 's.ok(c)')",
        "REVOKE USAGE ON SCHEMA s FROM {owner}",
        "permission denied for schema s",
        "GRANT USAGE ON SCHEMA s TO {owner}",
    ),
    "a cast in the condition is dropped": (
        "CREATE TYPE pair AS (x int, y int);"
        " CREATE FUNCTION pair(int) RETURNS pair LANGUAGE sql IMMUTABLE AS 'SELECT ROW($1, $1)::pair';"
        " CREATE CAST (int AS pair) WITH FUNCTION pair(int);"
        " SELECT autoembed.alter_pipeline('t', condition => '(c::pair) IS NOT NULL')",
        # A session that has a plan goes on with it.
        "DROP CAST (int AS pair); DISCARD PLANS",
        "cannot cast type integer to pair",
        "CREATE CAST (int AS pair) WITH FUNCTION pair(int)",
    ),
    "a table that the content function reads is dropped": (
        "CREATE TABLE public.labels (x int); ALTER TABLE public.labels OWNER TO {owner};"
        + BODY.format("IF EXISTS (SELECT FROM public.labels) THEN RETURN NULL; END IF; RETURN " + OF_ROW)
        + "; ALTER FUNCTION public.f OWNER TO {owner}; SELECT autoembed.alter_pipeline('t', content_function => 'f')",
        "DROP TABLE public.labels",
        'relation "public.labels" does not exist',
        "CREATE TABLE public.labels (x int); ALTER TABLE public.labels OWNER TO {owner}",
    ),
    "a right to what the function of the condition calls is taken": (
        "CREATE SCHEMA s; CREATE FUNCTION s.true() RETURNS boolean LANGUAGE sql AS 'SELECT true';"
        " GRANT USAGE ON SCHEMA s TO {owner}; CREATE FUNCTION ok(int) RETURNS boolean LANGUAGE plpgsql IMMUTABLE"
        " AS 'BEGIN RETURN s.true(); END'; SELECT autoembed.alter_pipeline('t', condition => 'ok(c)')",
        "REVOKE USAGE ON SCHEMA s FROM {owner}",
        "permission denied for schema s",
        "GRANT USAGE ON SCHEMA s TO {owner}",
    ),
    "the owner may not read the table": (
        "SELECT",
        "REVOKE SELECT ON t FROM {owner}",
        "permission denied for table t",
        "GRANT SELECT ON t TO {owner}",
    ),
}


@pytest.mark.parametrize("case", UNSEEN)
def test_a_change_that_nothing_tells_stops_a_pipeline_once_a_row_meets_it(
    t: Connection, role: Callable[[str], str], case: str
) -> None:
    owner = role("owner")
    before, change, reason, back = (text.format(owner=owner) for text in UNSEEN[case])
    t.execute(f"ALTER TABLE t OWNER TO {owner}; GRANT USAGE ON SCHEMA public TO {owner}".encode())
    t.execute(before.encode())
    process(t)
    told = Told.by(t)

    t.execute(change.encode())
    t.execute("UPDATE t SET a = 'changed' WHERE id < 3; INSERT INTO t VALUES (11, 'new', NULL, 11)")
    process(t)
    now = status(t)

    assert (now.state, now.reason) == ("stopped", f"the texts of table public.t cannot be read: {reason}")
    assert t.execute("SELECT reason FROM autoembed.failed").fetchall() == []
    assert told.warnings[:1] == [(f"public.t.embedding is not being embedded: {now.reason}", now.hint)]

    t.execute(back.encode())
    t.execute("UPDATE autoembed.pipeline SET planned_at = planned_at - interval '10 seconds'")
    process(t)

    assert (status(t).state, status(t).reason) == ("idle", None)
    assert wrong(t) == []


ANOTHER_KEY = {
    "by another type at once": ["DROP id, ADD id uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY"],
    "by another type": ["DROP id", "ADD id uuid NOT NULL DEFAULT gen_random_uuid() PRIMARY KEY"],
    "by the same type": ["DROP id", "ADD id serial PRIMARY KEY"],
    "by the same type, step by step": ["DROP id", "ADD id serial", "ADD PRIMARY KEY (id)"],
}


@pytest.mark.parametrize("case", ANOTHER_KEY)
@pytest.mark.parametrize("storage", ["embedding", None])
def test_a_key_column_that_is_replaced_by_one_of_the_same_name_is_another_key(
    db: Connection, storage: str | None, case: str
) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text, c int)")
    db.execute("SELECT autoembed.enable('t', %s, content_columns => '{a,b}', model => 'test')", [storage])
    # The new numbers are those of other rows.
    db.execute("INSERT INTO t SELECT 11 - n, 'a' || n FROM generate_series(1, 10) AS n")
    process(db)
    # A job with an old key waits.
    db.execute("UPDATE t SET a = 'changed' WHERE id = 5")

    for change in ANOTHER_KEY[case]:
        db.execute(f"ALTER TABLE t {change}".encode())
    if storage is None:
        stale = (
            "SELECT FROM t JOIN t_embeddings AS e USING (id)"
            " WHERE (e.embedding <=> autoembed.embed({}, model => 'test')::halfvec(8) < 0.001) IS NOT TRUE"
        )
        assert db.execute(stale.format(TEXT).encode()).fetchall() == []
    process(db)

    assert (status(db).state, status(db).reason) == ("idle", None)
    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []
    assert one(db, "SELECT embedded FROM autoembed.status").embedded == 10
    if storage is None:
        assert one(db, "SELECT count(*) FROM t_embeddings").count == 10
        assert db.execute(stale.format(TEXT).encode()).fetchall() == []
    else:
        assert wrong(db) == []


@pytest.mark.parametrize(
    ("old", "change"),
    [("int", "uuid USING gen_random_uuid()"), ("text", "int USING 7 + length(id)"), ("int", "text USING 'k' || id")],
)
@pytest.mark.parametrize("storage", ["embedding", None])
def test_a_job_that_waits_while_its_key_gets_another_type_fails_no_row(
    db: Connection, storage: str | None, old: str, change: str
) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute(f"CREATE TABLE t (id {old} PRIMARY KEY, a text, b text)".encode())
    db.execute("SELECT autoembed.enable('t', %s, content_columns => '{a,b}', model => 'test')", [storage])
    value = "n" if old == "int" else "repeat('k', n)"
    db.execute(f"INSERT INTO t SELECT {value}, 'a' || n FROM generate_series(1, 10) AS n".encode())
    process(db)
    db.execute("UPDATE t SET a = a || '!'")

    db.execute(f"ALTER TABLE t ALTER id TYPE {change}".encode())
    for _ in range(5):
        process(db)

    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []
    assert one(db, "SELECT embedded, waiting, state FROM autoembed.status") == (10, 0, "idle")


@pytest.fixture
def beside(db: Connection) -> Connection:
    """A table of ten rows, whose embeddings are beside it."""
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text)")
    db.execute("SELECT autoembed.enable('t', content_columns => '{a,b}', model => 'test')")
    db.execute("INSERT INTO t SELECT n, 'a' || n FROM generate_series(1, 10) AS n")
    process(db)
    return db


ALTERED = {
    # A change of an embeddings table: (the change, the reason, the way back).
    "DROP CONSTRAINT t_embeddings_pkey": ("has lost its primary key", "ADD PRIMARY KEY (id, chunk_number)"),
    "RENAME id TO ident": ('has no column "id"', "RENAME ident TO id"),
    "RENAME digest TO hash": ('has no column "digest"', "RENAME hash TO digest"),
    "ADD note text NOT NULL DEFAULT '', ALTER note DROP DEFAULT": (
        "is NOT NULL, and has no default",
        "ALTER note DROP NOT NULL",
    ),
}


@pytest.mark.parametrize("change", ALTERED)
def test_an_embeddings_table_that_takes_no_embeddings_stops_its_pipeline(beside: Connection, change: str) -> None:
    reason, back = ALTERED[change]
    if change.startswith("ADD"):
        added, dropped = change.split(", ")
        beside.execute(f"ALTER TABLE t_embeddings {added}".encode())
        change = dropped
    beside.execute(f"ALTER TABLE t_embeddings {change}".encode())
    beside.execute(
        "INSERT INTO t VALUES (11, 'new'); UPDATE t SET a = 'changed' WHERE id < 3; DELETE FROM t WHERE id = 4"
    )
    process(beside)

    assert status(beside).state == "stopped"
    assert reason in status(beside).reason
    assert beside.execute("SELECT reason FROM autoembed.failed").fetchall() == []

    beside.execute(f"ALTER TABLE t_embeddings {back}".encode())
    process(beside)

    assert (status(beside).state, status(beside).reason) == ("idle", None)
    assert one(beside, "SELECT embedded FROM autoembed.status").embedded == 10
    assert one(beside, "SELECT array_agg(id ORDER BY id) AS ids FROM t_embeddings").ids == [1, 2, 3, *range(5, 12)]


def test_resync_without_the_embeddings_table_says_what_is_missing(beside: Connection) -> None:
    beside.execute("DROP TABLE t_embeddings CASCADE")
    told = Told.by(beside)

    beside.execute("SELECT autoembed.resync('t')")

    assert told.warnings[0][0].endswith("the embeddings table of table public.t was dropped")
    assert status(beside).state == "stopped"


def test_a_view_that_keeps_the_key_of_an_embeddings_table_from_changing_is_named(beside: Connection) -> None:
    beside.execute("CREATE VIEW v AS SELECT * FROM t_embeddings")

    refusal = "view public.v uses this column of its embeddings table"
    with pytest.raises(psycopg.errors.FeatureNotSupported, match=refusal):
        beside.execute("ALTER TABLE t ALTER id TYPE bigint")

    beside.execute("DROP VIEW v; ALTER TABLE t ALTER id TYPE bigint")
    process(beside)
    assert one(beside, "SELECT count(*) FROM t_embeddings").count == 10


@pytest.mark.parametrize("storage", ["embedding", None])
def test_a_body_that_names_a_renamed_column_stops_a_pipeline_and_no_row_fails(
    db: Connection, storage: str | None
) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text, c int)")
    db.execute(BODY.format("RETURN r.a").encode())
    db.execute("SELECT autoembed.enable('t', %s, content_function => 'f', model => 'test')", [storage])
    db.execute("INSERT INTO t SELECT n, 'a' || n FROM generate_series(1, 10) AS n")
    process(db)
    told = Told.by(db)

    db.execute("ALTER TABLE t RENAME a TO aa")
    # One row a time, as an application writes.
    for number in range(11, 17):
        db.execute("INSERT INTO t VALUES (%s, 'new')", [number])
        process(db)
        process(db)
    now = status(db)

    assert (now.state, now.reason) == (
        "stopped",
        'the texts of table public.t cannot be read: record "r" has no field "a"',
    )
    assert now.hint.startswith("Give the function another body: CREATE OR REPLACE FUNCTION public.f(public.t)")
    assert {message for message, _ in told.warnings} == {f"public.t.embedding is not being embedded: {now.reason}"}
    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []

    db.execute("UPDATE autoembed.pipeline SET planned_at = planned_at - interval '10 seconds'")
    process(db)
    assert status(db).state == "stopped"

    db.execute(BODY.format("RETURN r.aa").encode())
    process(db)

    assert (status(db).state, status(db).reason) == ("idle", None)
    assert one(db, "SELECT embedded FROM autoembed.status").embedded == 16
    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []


@pytest.mark.parametrize("storage", ["embedding", None])
def test_a_function_that_a_session_has_called_takes_rows_with_columns_of_other_types(
    db: Connection, connect: Callable[..., Connection], storage: str | None
) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a text, b text, c int)")
    db.execute(BODY.format("RETURN r.a || r.c").encode())
    db.execute("SELECT autoembed.enable('t', %s, content_function => 'f', model => 'test')", [storage])
    db.execute("INSERT INTO t SELECT n, 'a' || n, 'b', n FROM generate_series(1, 10) AS n")
    states = "SELECT DISTINCT p.state FROM t CROSS JOIN autoembed.preview('t', t.id::text) AS p"

    with running_lanes(db, connect):
        for number, new_type in enumerate(("int", "numeric(5, 1)", "text", "bigint USING length(c)")):
            db.execute(f"ALTER TABLE t ALTER c TYPE {new_type}".encode())
            db.execute("INSERT INTO t VALUES (%s, 'new', 'b', 1)", [11 + number])
            db.execute("SELECT autoembed.wait_until_fresh('t', 20)")
            assert (status(db).state, status(db).reason) == ("idle", None), new_type
            assert connect().execute(states).fetchall() == [("fresh",)], new_type


def test_a_body_that_is_broken_from_the_beginning_stops_a_pipeline(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a text)")
    db.execute("INSERT INTO t SELECT n, 'a' || n FROM generate_series(1, 300) AS n")
    db.execute(BODY.format("RETURN nothing(r.a)").encode())
    db.execute("SELECT autoembed.enable('t', content_function => 'f', model => 'test')")
    process(db)

    assert status(db).state == "stopped"
    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []

    db.execute("CREATE FUNCTION nothing(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
    db.execute("UPDATE autoembed.pipeline SET planned_at = planned_at - interval '10 seconds'")
    process(db)

    assert one(db, "SELECT embedded, state FROM autoembed.status") == (300, "idle")


def test_a_function_that_cuts_texts_and_calls_what_is_gone_stops_a_pipeline(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, a text)")
    db.execute("CREATE FUNCTION whole(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
    db.execute("CREATE FUNCTION pieces(text) RETURNS SETOF text LANGUAGE plpgsql AS 'BEGIN RETURN NEXT whole($1); END'")
    db.execute("SELECT autoembed.enable('t', content_columns => '{a}', chunking => 'pieces', model => 'test')")
    db.execute("INSERT INTO t SELECT n, 'a' || n FROM generate_series(1, 10) AS n")
    process(db)
    assert one(db, "SELECT embedded FROM autoembed.status").embedded == 10

    db.execute("DROP FUNCTION whole")
    db.execute("UPDATE t SET a = a || '!'")
    process(db)

    assert status(db).state == "stopped"
    assert "function whole(text) does not exist" in status(db).reason
    assert db.execute("SELECT reason FROM autoembed.failed").fetchall() == []

    db.execute("CREATE FUNCTION whole(text) RETURNS text LANGUAGE sql AS 'SELECT $1'")
    db.execute("UPDATE autoembed.pipeline SET planned_at = planned_at - interval '10 seconds'")
    process(db)

    assert one(db, "SELECT embedded, state FROM autoembed.status") == (10, "idle")


@pytest.mark.parametrize("bad", ["id = 3", "id < 4", "id > 7"])
def test_rows_of_which_the_code_makes_wrong_sql_fail_and_the_others_go_on(t: Connection, bad: str) -> None:
    t.execute(BODY.format("EXECUTE 'SELECT ' || r.a INTO r.a; RETURN r.a").encode())
    t.execute(f"UPDATE t SET a = CASE WHEN {bad} THEN 'gone()' ELSE 'version()' END".encode())
    t.execute("SELECT autoembed.alter_pipeline('t', content_function => 'f')")
    for _ in range(5):
        process(t)

    assert one(t, "SELECT state, reason FROM autoembed.status").reason is None
    assert (
        t.execute("SELECT key FROM autoembed.failed ORDER BY 1").fetchall()
        == t.execute(f"SELECT format('[%s]', id) FROM t WHERE {bad} ORDER BY 1".encode()).fetchall()
    )
    others = t.execute(f"SELECT * FROM t WHERE {bad}".encode()).fetchall()
    assert sorted(wrong(t, text="version()")) == sorted(others)


def test_a_stopped_pipeline_is_said_once_in_the_log(t: Connection) -> None:
    told = Told.by(t)

    t.execute("ALTER TABLE t DROP COLUMN b")
    t.execute("ALTER TABLE t ADD COLUMN d text")
    t.execute("ALTER TABLE t RENAME c TO e")
    t.execute("SELECT autoembed._warn_of_blocked_pipelines(true, '{}')")

    assert len(told.warnings) == 1


@pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
def test_a_table_whose_new_owner_may_not_use_its_schema_waits(
    t: Connection, role: Callable[[str], str], column: str
) -> None:
    owner = role("owner")
    t.execute("CREATE SCHEMA s; CREATE TABLE s.n (id int PRIMARY KEY, a text)")
    t.execute(f"SELECT autoembed.enable('s.n', {column}, content_columns => '{{a}}', model => 'test')".encode())
    told = Told.by(t)

    t.execute(f"ALTER TABLE s.n OWNER TO {owner}")
    t.execute("INSERT INTO s.n VALUES (1, 'one')")
    process(t)

    state = "SELECT state, reason, hint FROM autoembed.status WHERE table_name = 's.n'"
    reason = f"role {owner}, the owner of table s.n, has no right to use its schema"
    assert one(t, state) == ("stopped", reason, f"GRANT USAGE ON SCHEMA s TO {owner}.")
    assert told.warnings[:1] == [(f"s.n.embedding is not being embedded: {reason}", one(t, state).hint)]
    assert t.execute("SELECT reason FROM autoembed.failed").fetchall() == []

    t.execute(one(t, state).hint.rstrip("."))
    process(t)

    assert one(t, state) == ("idle", None, None)
    assert (
        one(
            t,
            "SELECT count(*) FROM autoembed.embedded AS e JOIN autoembed.pipeline AS p ON p.id = e.pipeline_id"
            " WHERE p.table_id = 's.n'::regclass",
        ).count
        == 1
    )


def test_a_dropped_embedding_column_can_be_enabled_again(t: Connection) -> None:
    t.execute("ALTER TABLE t DROP COLUMN embedding")

    t.execute(
        "SELECT autoembed.enable('t', 'embedding', content_columns => '{a}', model => 'test', if_not_exists => true)"
    )
    process(t)

    assert (status(t).state, wrong(t, text="a")) == ("idle", [])


def test_a_column_that_takes_the_place_of_a_dropped_one_keeps_its_pipeline(t: Connection) -> None:
    t.execute("SELECT autoembed.enable('t', 'next', content_columns => '{a}', model => 'test')")
    process(t)
    told = Told.by(t)

    t.execute("ALTER TABLE t DROP COLUMN embedding")
    t.execute("ALTER TABLE t RENAME next TO embedding")
    t.execute("UPDATE t SET a = 'changed'")
    process(t)

    assert (status(t).embedding_column, status(t).state, wrong(t, text="a")) == ("embedding", "idle", [])
    assert [message.split(":")[0] for message, _ in told.warnings] == [
        "public.t.embedding is not being embedded",
        "the pipeline of public.t.embedding has ended",
    ]


# Said --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statements",
    [
        "ALTER TABLE t RENAME TO t_old; ALTER TABLE t_new RENAME TO t",
        "ALTER TABLE t RENAME TO t_old; ALTER TABLE t_new RENAME TO t; DROP TABLE t_old",
        "DROP TABLE t; ALTER TABLE t_new RENAME TO t",
    ],
    ids=["the old one is kept", "the old one is dropped after", "the old one is dropped before"],
)
def test_a_table_that_is_swapped_in_is_said_to_be_without_embeddings(t: Connection, statements: str) -> None:
    t.execute("CREATE TABLE t_new (LIKE t INCLUDING ALL); INSERT INTO t_new SELECT * FROM t")
    told = Told.by(t)
    details: list[str | None] = []
    t.add_notice_handler(lambda diagnostic: details.append(diagnostic.message_detail))

    with t.transaction():
        for statement in statements.split("; "):
            t.execute(statement.encode())

    [(message, hint)] = told.warnings
    assert message == "public.t is not attached to autoembed: it has the name of a table that is"
    assert hint == "Attach it: SELECT autoembed.enable('public.t', ...)."
    is_dropped_before = statements.startswith("DROP")
    assert f"The attached table {'was dropped' if is_dropped_before else 'is public.t_old now'}." in details


# Refused -----------------------------------------------------------------------------------------


def test_pgvector_cannot_be_moved_to_another_schema(t: Connection) -> None:
    t.execute("CREATE SCHEMA extensions")

    with pytest.raises(psycopg.errors.FeatureNotSupported, match="cannot SET SCHEMA of extension"):
        t.execute("ALTER EXTENSION vector SET SCHEMA extensions")


# Partitions --------------------------------------------------------------------------------------


@pytest.fixture
def partitioned(t: Connection) -> Connection:
    """A partitioned table that is embedded by its column b, and t, which may become a partition of it."""
    t.execute("CREATE TABLE p (LIKE t INCLUDING ALL) PARTITION BY RANGE (id)")
    t.execute("SELECT autoembed.enable('p', 'embedding', content_columns => '{b}', model => 'test')")
    process(t)
    return t


def test_an_attached_partition_follows_the_whole_table_until_it_is_detached(partitioned: Connection) -> None:
    told = Told.by(partitioned)

    partitioned.execute("ALTER TABLE p ATTACH PARTITION t FOR VALUES FROM (0) TO (1000)")
    process(partitioned)
    partitioned.execute("UPDATE t SET a = 'other', b = 'other b' WHERE id = 1")
    process(partitioned)
    states = dict(partitioned.execute("SELECT table_name::text, state FROM autoembed.status").fetchall())

    assert states == {"p": "idle", "t": "stopped"}
    assert [message for message, _ in told.warnings] == [
        "public.t.embedding is not being embedded: "
        "table public.t is a partition of public.p, whose own pipeline embeds this column"
    ]
    assert wrong(partitioned, "p", text="b") == []

    partitioned.execute("ALTER TABLE p DETACH PARTITION t")
    process(partitioned)
    partitioned.execute("UPDATE t SET a = 'third' WHERE id = 2")
    process(partitioned)

    assert wrong(partitioned) == []


@pytest.mark.parametrize("end", ["SELECT autoembed.disable('p')", "SELECT autoembed.disable('t')"])
def test_the_embedding_of_the_whole_table_or_of_the_partition_can_be_ended(partitioned: Connection, end: str) -> None:
    partitioned.execute("ALTER TABLE p ATTACH PARTITION t FOR VALUES FROM (0) TO (1000)")
    process(partitioned)

    partitioned.execute(end)
    partitioned.execute("UPDATE t SET a = 'other', b = 'other b' WHERE id = 1")
    process(partitioned)

    assert wrong(partitioned, text=TEXT if "'p'" in end else "b") == []
    assert status(partitioned).state == "idle"


def test_enabling_the_whole_table_stops_the_pipeline_of_a_partition(t: Connection) -> None:
    t.execute("CREATE TABLE p (LIKE t INCLUDING ALL) PARTITION BY RANGE (id)")
    t.execute("ALTER TABLE p ATTACH PARTITION t FOR VALUES FROM (0) TO (1000)")

    t.execute("SELECT autoembed.enable('p', 'embedding', content_columns => '{b}', model => 'test')")
    process(t)
    t.execute("UPDATE t SET b = 'other b' WHERE id = 1")
    process(t)

    assert dict(t.execute("SELECT table_name::text, state FROM autoembed.status").fetchall()) == {
        "p": "idle",
        "t": "stopped",
    }
    assert wrong(t, "p", text="b") == []


def test_the_owner_of_a_stopped_table_can_do_all_that_the_hint_says(
    t: Connection, connect: Connect, role: Callable[[str], str]
) -> None:
    owner = role("owner")
    t.execute("SELECT autoembed.grant_usage(%s)", [owner])
    t.execute(f"GRANT ALL ON SCHEMA public TO {owner}; ALTER TABLE t OWNER TO {owner}")
    mine = connect(user=owner)
    told = Told.by(mine)

    mine.execute("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (c)")
    mine.execute("ALTER TABLE t DROP COLUMN b")
    mine.execute("SELECT autoembed.alter_pipeline('t', content_columns => '{a}')")
    process(t)

    assert len(told.warnings) == 1
    assert (status(t).state, wrong(t, text="a")) == ("idle", [])


# Keys that are spelled in another way ------------------------------------------------------------------

RESPELLED = {
    # The type of a key, and two spellings of the same key.
    "citext": ("citext", "ABC", "abc"),
    "numeric of another scale": ("numeric", "1.0", "1.00"),
    "interval": ("interval", "1 day", "24:00:00"),
    "text of a collation without case": ('text COLLATE "no_case"', "ABC", "abc"),
    "two columns": ("citext, k2 numeric DEFAULT 1", "ABC", "abc"),
}
RESPELLS = {
    "deleted and inserted": "DELETE FROM keyed WHERE k = '{0}'; INSERT INTO keyed (k, a) VALUES ('{1}', 'text')",
    "updated": "UPDATE keyed SET k = '{1}' WHERE k = '{0}'",
    "updated with another text": "UPDATE keyed SET k = '{1}', a = 'another' WHERE k = '{0}'",
}


@pytest.mark.parametrize("change", RESPELLS)
@pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
@pytest.mark.parametrize("case", RESPELLED)
def test_a_row_whose_key_is_spelled_in_another_way_counts_once(
    t: Connection, case: str, column: str, change: str
) -> None:
    kind, old, new = RESPELLED[case]
    t.execute("CREATE EXTENSION citext")
    t.execute("CREATE COLLATION no_case (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    key = "k, k2" if "k2" in kind else "k"
    t.execute(f"CREATE TABLE keyed (k {kind}, a text, PRIMARY KEY ({key}))".encode())
    t.execute(f"SELECT autoembed.enable('keyed', {column}, content_columns => '{{a}}', model => 'test')".encode())
    t.execute(f"INSERT INTO keyed (k, a) VALUES ('{old}', 'text'), ('7', 'other')".encode())
    process(t)

    with t.transaction():
        for statement in RESPELLS[change].format(old, new).split("; "):
            t.execute(statement.encode())
    process(t)

    state = one(t, "SELECT state, embedded, waiting FROM autoembed.status WHERE table_name = 'keyed'")
    assert state == ("idle", 2, 0)
    assert t.execute("SELECT reason FROM autoembed.failed").fetchall() == []
    found = "SELECT count(*) FROM autoembed.search(NULL::keyed, 'text', mode => 'vector', max_rows => 9)"
    assert one(t, found).count == 2


# What no row may suffer by ---------------------------------------------------------------------------


def test_a_table_may_lose_all_its_columns(t: Connection) -> None:
    t.execute(b"ALTER TABLE t DROP COLUMN id, DROP COLUMN a, DROP COLUMN b, DROP COLUMN c, DROP COLUMN embedding")
    t.execute("INSERT INTO t DEFAULT VALUES")
    process(t)
    assert status(t).reason == 'table public.t has no column "id"'


def test_a_stopped_pipeline_clears_no_vectors(t: Connection) -> None:
    """A trigger before the write sees no generated column."""
    t.execute("SELECT autoembed.alter_pipeline('t', on_change => 'clear')")
    t.execute("ALTER TABLE t DROP COLUMN b, ADD COLUMN b text GENERATED ALWAYS AS (upper(a)) STORED")
    t.execute("UPDATE t SET c = 0; UPDATE t SET a = 'new' WHERE id = 1")
    assert "generated" in status(t).reason
    assert one(t, "SELECT count(embedding) FROM t").count == ROWS

    t.execute("ALTER TABLE t DROP COLUMN b, ADD COLUMN b text DEFAULT 'b'")
    process(t)
    assert (status(t).state, wrong(t)) == ("idle", [])
    t.execute("UPDATE t SET c = 1; UPDATE t SET a = 'newer' WHERE id = 1")
    assert one(t, "SELECT count(embedding) FROM t").count == ROWS - 1


@pytest.mark.parametrize("key", ["id", "id, c"])
def test_a_row_that_gets_its_key_while_the_table_has_none_is_embedded(t: Connection, key: str) -> None:
    t.execute(f"ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY ({key})".encode())
    process(t)
    t.execute("ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ALTER id DROP NOT NULL")
    t.execute("INSERT INTO t VALUES (NULL, 'late', 'row', 7)")
    t.execute("UPDATE t SET id = 77 WHERE id IS NULL; UPDATE t SET id = NULL WHERE id = 1")
    t.execute("DELETE FROM t WHERE id IS NULL")
    t.execute(f"ALTER TABLE t ADD PRIMARY KEY ({key})".encode())
    process(t)
    assert (status(t).state, wrong(t)) == ("idle", [])
    assert one(t, "SELECT count(*) FROM autoembed.embedded").count == ROWS


def test_a_table_of_a_type_follows_its_attributes(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TYPE shape AS (id int, a text, b text); CREATE TABLE t OF shape (PRIMARY KEY (id))")
    db.execute("SELECT autoembed.enable('t', content_columns => '{a,b}', model => 'test')")
    db.execute("INSERT INTO t VALUES (1, 'a', 'b')")
    process(db)
    db.execute("ALTER TYPE shape RENAME ATTRIBUTE a TO aa CASCADE")
    db.execute("UPDATE t SET aa = 'new'")
    process(db)
    assert (status(db).state, sent(db)) == ("idle", 2)


def test_a_session_that_did_not_see_enable_is_followed(t: Connection, connect: Connect) -> None:
    """Its event triggers do not see the pipeline. A function that it replaces is old to enable()."""
    t.execute("CREATE TABLE s (id int PRIMARY KEY, a text, b text); INSERT INTO s VALUES (1, 'a', 'b')")
    t.execute("CREATE FUNCTION g(s) RETURNS text LANGUAGE sql AS $$SELECT $1.a$$")
    with connect() as other:
        other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT")
        other.execute("CREATE OR REPLACE FUNCTION g(s) RETURNS text LANGUAGE sql AS $$SELECT upper($1.a)$$")
        t.execute("SELECT autoembed.enable('s', 'embedding', content_function => 'g', model => 'test')")
        t.execute("SELECT autoembed.enable('s', 'second', content_columns => '{b}', model => 'test')")
        process(t)
        other.execute("ALTER TABLE s RENAME b TO bb")
        other.execute("COMMIT")
    process(t)
    t.execute("UPDATE s SET bb = 'new'")
    process(t)
    assert wrong(t, "s", "upper(a)") == []
    assert wrong(t, "s", "bb", "second") == []
