"""Odd tables, writes and migrations, relatives of such that went wrong: every vector is the one of its row's text."""

from __future__ import annotations

from typing import NamedTuple

import pytest

from harness import Connection


class Variant(NamedTuple):
    """A table; its text as SQL; what happens before and after its rows have vectors; its name at the end."""

    create: str
    content: str
    text: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    name: str = "t"


def plain(*after: str, text: str = "body", name: str = "t") -> Variant:
    """A plain table of five rows to which something happens."""
    rows = "INSERT INTO t SELECT n, 'text ' || n FROM generate_series(1, 5) AS n"
    create = "CREATE TABLE t (id int PRIMARY KEY, body text, embedding halfvec(8))"
    return Variant(create, "content_columns => '{body}'", text, (rows,), after, name)


SWAP = "UPDATE t SET embedding = (SELECT o.embedding FROM t AS o WHERE o.id = 6 - t.id)"
VARIANTS = {
    "rows that swap their vectors": plain(SWAP),
    "MERGE that writes vectors": plain(
        "MERGE INTO t USING (VALUES (1, 'merged', '[1,1,1,1,1,1,1,1]'::halfvec), (9, 'new', '[1,1,1,1,1,1,1,1]'))"
        " AS v(id, body, e) ON t.id = v.id WHEN MATCHED THEN UPDATE SET body = v.body, embedding = v.e"
        " WHEN NOT MATCHED THEN INSERT VALUES (v.id, v.body, v.e)"
    ),
    "a default for the vector": plain(
        "ALTER TABLE t ALTER embedding SET DEFAULT '[1,0,0,0,0,0,0,0]'",
        "INSERT INTO t (id, body) VALUES (6, 'six')",
        "UPDATE t SET embedding = DEFAULT WHERE id = 2",
    ),
    "keys that move twice": plain("UPDATE t SET id = id + 10", "UPDATE t SET id = 30 - id WHERE id > 12"),
    "writes that no trigger sees, and a resync": plain(
        "SET session_replication_role = replica",
        "INSERT INTO t VALUES (6, 'unseen')",
        "UPDATE t SET body = 'changed' WHERE id = 2",
        "RESET session_replication_role",
        "SELECT autoembed.resync('t')",
    ),
    "a schema that is renamed, and a table that moves": plain(
        "CREATE SCHEMA one",
        "ALTER TABLE t SET SCHEMA one",
        'ALTER SCHEMA one RENAME TO "a b"',
        """UPDATE "a b".t SET body = 'moved' WHERE id < 3""",
        name='"a b".t',
    ),
    "a key of another type and name in one transaction": plain(
        "BEGIN; ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ALTER id TYPE bigint;"
        " ALTER TABLE t ADD CONSTRAINT again PRIMARY KEY (id); ALTER TABLE t ALTER body TYPE varchar(50); COMMIT",
        "UPDATE t SET body = 'other' WHERE id < 3; INSERT INTO t VALUES (9, 'nine')",
    ),
    "reserved words, another persistence, a new column": plain(
        'ALTER TABLE t SET UNLOGGED; ALTER TABLE t RENAME TO "from"; ALTER TABLE "from" RENAME body TO "where"',
        'ALTER TABLE "from" ADD at timestamptz DEFAULT clock_timestamp()',
        """UPDATE "from" SET "where" = 'again ' || id WHERE id < 3""",
        text='"where"',
        name='"from"',
    ),
    "columns with the names of generated SQL": Variant(
        "CREATE TABLE t (new_rows int PRIMARY KEY, old_rows text, o text, n text, key text, keys text, content text,"
        " r text, pipeline int, embedding halfvec(8))",
        "content_columns => '{old_rows,o,n,key,keys,content,r}', condition => 'pipeline IS NULL'",
        r"concat_ws(E'\n\n', old_rows, o, n, key, keys, content, r)",
        ("INSERT INTO t SELECT i, 'a', 'b', 'c', 'd', 'e', 'f', 'g' FROM generate_series(1, 5) AS i",),
        ("UPDATE t SET o = 'other', n = NULL WHERE new_rows = 2; DELETE FROM t WHERE new_rows = 3",),
    ),
    "format signs and slots in names": Variant(
        'CREATE TABLE t ("id%I" int, "{a}" text, "b%%" text, "{{key}}" text, embedding halfvec(8),'
        ' PRIMARY KEY ("id%I", "{{key}}"))',
        """content_columns => array['{a}', 'b%%']::name[]""",
        r"""concat_ws(E'\n\n', "{a}", "b%%")""",
        (r"""INSERT INTO t VALUES (1, 'x', 'y', E'k\\\'"\n'), (2, 'x', 'y', '%s')""",),
        (
            """UPDATE t SET "{a}" = 'z'; ALTER TABLE t RENAME "{{key}}" TO "$template$";"""
            """ ALTER TABLE t RENAME TO "%s {{slots}} $1" """,
        ),
        '"%s {{slots}} $1"',
    ),
    "keys written under other settings": Variant(
        "CREATE TABLE t (d date, ts timestamptz, f float8, i interval, b bytea, body text, embedding halfvec(8),"
        " PRIMARY KEY (d, ts, f, i, b))",
        "content_columns => '{body}'",
        "body",
        (
            "SET datestyle = 'German, DMY'; SET intervalstyle = 'sql_standard'; SET extra_float_digits = -15;"
            " SET bytea_output = 'escape'; SET timezone = 'Asia/Kolkata'",
            "INSERT INTO t SELECT date '2024-02-01' + n,"
            " timestamptz '2024-02-01 00:00:00.123456+00' + n * interval '1 day', 1.0 / 3 + n,"
            " n * interval '1 mon 2 days 03:04:05.6', decode('ff00' || lpad(n::text, 2, '0'), 'hex'), 'd' || n"
            " FROM generate_series(1, 5) AS n",
        ),
        ("UPDATE t SET body = body || '!' WHERE f < 3", "RESET ALL"),
    ),
    "long and odd keys": Variant(
        "CREATE TABLE t (k text, b bytea, body text, embedding halfvec(8), PRIMARY KEY (k, b))",
        "content_columns => '{body}'",
        "body",
        (r"""INSERT INTO t VALUES (repeat(E'\\"\n', 400), decode(repeat('00ff', 500), 'hex'), 'long'),"""
         r""" (E'\uFFFE\u200B', '', 'odd')""",),
        ("UPDATE t SET k = k || 'x'",),
    ),
    "types of the key that change": Variant(
        "CREATE TYPE kind AS ENUM ('a', 'b'); CREATE DOMAIN name_of AS text CHECK (value <> '');"
        " CREATE TABLE t (a kind, b name_of, body text, embedding halfvec(8), PRIMARY KEY (a, b))",
        "content_columns => '{body,b}'",
        r"concat_ws(E'\n\n', body, nullif(b, ''))",
        ("INSERT INTO t VALUES ('a', 'x', '1'), ('b', 'y', '2')",),
        (
            "ALTER TYPE kind RENAME VALUE 'a' TO 'aa'; ALTER TYPE kind ADD VALUE 'c'",
            "ALTER DOMAIN name_of DROP CONSTRAINT name_of_check; ALTER DOMAIN name_of RENAME TO other_name",
            "INSERT INTO t VALUES ('c', '', '3'); UPDATE t SET body = '11' WHERE a = 'aa'",
        ),
    ),
    "a partition that goes to another table": Variant(
        "CREATE TABLE t (id int PRIMARY KEY, body text, embedding halfvec(8)) PARTITION BY RANGE (id);"
        " CREATE TABLE one PARTITION OF t FOR VALUES FROM (0) TO (100);"
        " CREATE TABLE other (id int PRIMARY KEY, body text, embedding halfvec(8)) PARTITION BY RANGE (id);"
        " SELECT autoembed.enable('other', 'embedding', content_template => 'other {body}', model => 'eight')",
        "content_columns => '{body}'",
        "'other ' || body",
        ("INSERT INTO t SELECT n, 'text ' || n FROM generate_series(1, 5) AS n",),
        (
            "BEGIN; ALTER TABLE t DETACH PARTITION one;"
            " ALTER TABLE other ATTACH PARTITION one FOR VALUES FROM (0) TO (100); COMMIT",
            "UPDATE other SET body = 'changed' WHERE id = 2",
        ),
        "other",
    ),
}  # fmt: skip


def process(db: Connection) -> None:
    for _ in range(20):
        if db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,):
            return
    raise AssertionError("rows wait for ever")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_row_has_the_vector_of_its_text(db: Connection, name: str) -> None:
    variant = VARIANTS[name]
    db.execute("SELECT autoembed.create_model('eight', provider => 'fake', model_id => 'x', dimensions => 8)")
    db.execute(variant.create.encode())
    db.execute(f"SELECT autoembed.enable('t', 'embedding', {variant.content}, model => 'eight')".encode())
    for statement in variant.before:
        db.execute(statement.encode())
    process(db)

    for statement in variant.after:
        db.execute(statement.encode())
        process(db)

    wrong = (
        f"SELECT x.*, autoembed.embed({variant.text}, 'eight') AS right FROM {variant.name} AS x"
        f" WHERE (embedding <-> autoembed.embed({variant.text}, 'eight') < 0.01) IS NOT TRUE"
    )
    assert db.execute(wrong.encode()).fetchall() == []
    assert db.execute("SELECT table_name, key, reason FROM autoembed.failed").fetchall() == []
    assert db.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone() == (0,)


def test_a_lock_that_an_owners_trigger_feigns_ends_on_the_failed_list(db: Connection) -> None:
    db.execute("SELECT autoembed.create_model('eight', provider => 'fake', model_id => 'x', dimensions => 8)")
    db.execute("CREATE TABLE t (id int PRIMARY KEY, body text, embedding halfvec(8))")
    db.execute("SELECT autoembed.enable('t', 'embedding', content_columns => '{body}', model => 'eight')")
    db.execute(
        "CREATE FUNCTION busy() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE 'busy' USING ERRCODE = 'lock_not_available'; END $$"
    )
    db.execute("CREATE TRIGGER busy BEFORE UPDATE ON t FOR EACH ROW WHEN (NEW.id = 1) EXECUTE FUNCTION busy()")
    db.execute("INSERT INTO t SELECT n, 'text ' || n FROM generate_series(1, 5) AS n")
    for _ in range(5):
        db.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
        process(db)

    assert db.execute("SELECT key, reason FROM autoembed.failed").fetchall() == [("[1]", "busy")]
    assert db.execute("SELECT count(*) FROM t WHERE embedding IS NOT NULL").fetchone() == (4,)
