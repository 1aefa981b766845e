"""CREATE EXTENSION, DROP EXTENSION, and the contracts that every object keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection
from lanes import running_lanes
from waiting import wait_until

MEMBERS = Path(__file__).parent / "members.txt"

# Functions and procedures of the extension, those made for a pipeline included.
ROUTINES = """
    SELECT p.oid::regprocedure::text AS name, p.*
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace
"""


def everything(db: Connection) -> list[tuple[object, ...]]:
    """Every schema, relation, function, trigger and event trigger outside the system's schemas."""
    return db.execute("""
        SELECT 'schema', nspname::text FROM pg_namespace WHERE nspname !~ '^pg_|^information_schema$'
        UNION ALL
        SELECT 'relation', oid::regclass::text
        FROM pg_class
        WHERE oid >= 16384 AND relnamespace <> 'pg_toast'::regnamespace AND relpersistence <> 't'
        UNION ALL
        SELECT 'function', oid::regprocedure::text FROM pg_proc WHERE oid >= 16384
        UNION ALL
        SELECT 'trigger', tgname::text FROM pg_trigger WHERE NOT tgisinternal
        UNION ALL
        SELECT 'event trigger', evtname::text FROM pg_event_trigger
        UNION ALL
        SELECT 'queue', queue_name FROM pgmq.meta
        ORDER BY 1, 2
    """).fetchall()


@pytest.mark.parametrize(
    "statement",
    [
        "DROP EXTENSION autoembed",
        "drop extension if exists autoembed restrict;",
        'DROP EXTENSION pgmq, "autoembed"',
        "DROP EXTENSION autoembed, pgmq",
    ],
)
def test_drop_extension_without_cascade_names_the_tables_that_are_attached(db: Connection, statement: str) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, a text)")
    db.execute('CREATE TABLE "Odd, one" (id int PRIMARY KEY, a text)')
    db.execute("SELECT autoembed.enable('notes', content_columns => '{a}')")
    db.execute("""SELECT autoembed.enable('"Odd, one"', content_columns => '{a}')""")

    with pytest.raises(psycopg.errors.DependentObjectsStillExist, match="tables are attached to autoembed") as caught:
        db.execute(statement.encode())

    assert caught.value.diag.message_detail == 'These tables are attached: public."Odd, one", public.notes.'
    assert "CASCADE" in str(caught.value.diag.message_hint)
    db.execute("SELECT autoembed.disable('notes')")


def test_drop_extension_leaves_nothing_behind_and_create_works_again(db: Connection) -> None:
    db.execute("DROP EXTENSION autoembed, pgmq CASCADE")
    db.execute("CREATE EXTENSION pgmq")
    before = everything(db)
    db.execute("CREATE EXTENSION autoembed")
    db.execute(GUIDE_TABLE.format(dimensions=384))
    db.execute(GUIDE_TRIGGERS)
    db.execute("INSERT INTO documents (title, content) VALUES ('a', 'b')")
    db.execute("SELECT autoembed.process()")

    db.execute("DROP EXTENSION autoembed CASCADE")
    db.execute("UPDATE documents SET title = 'the table works on'")
    db.execute("DROP TABLE documents CASCADE")

    assert everything(db) == before
    db.execute("CREATE EXTENSION autoembed")
    assert db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)


def test_a_queue_of_the_guides_name_is_one_clear_error(db: Connection) -> None:
    db.execute("DROP EXTENSION autoembed CASCADE")
    db.execute("SELECT pgmq.create('embedding_jobs')")

    with pytest.raises(psycopg.errors.DuplicateObject, match="the queue embedding_jobs exists already") as caught:
        db.execute("CREATE EXTENSION autoembed")

    assert "pgmq.drop_queue" in (caught.value.diag.message_hint or "")


def test_a_reset_that_drops_the_schema_of_pgvector_leaves_nothing_in_the_way(db: Connection) -> None:
    db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.create_model('fake', 'fake', 3), autoembed.set_default_model('fake')")
    enable = "SELECT autoembed.enable('documents', content_columns => '{content}')"
    db.execute(enable.encode())

    for _ in range(2):
        db.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public; GRANT USAGE ON SCHEMA public TO PUBLIC")
        db.execute("CREATE EXTENSION autoembed CASCADE")
        db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text); INSERT INTO documents VALUES (1, 'one')")
        db.execute("SELECT autoembed.create_model('fake', 'fake', 3), autoembed.set_default_model('fake')")
        db.execute(enable.encode())
        while db.execute("SELECT FROM autoembed.backfill").rowcount:
            db.execute("SELECT autoembed.process()")
        assert db.execute("SELECT count(*) FROM documents_embeddings").fetchone() == (1,)


def test_a_schema_of_the_extensions_name_is_one_clear_error(db: Connection) -> None:
    db.execute("DROP EXTENSION autoembed CASCADE; CREATE SCHEMA autoembed")

    with pytest.raises(psycopg.errors.DuplicateSchema, match="the schema autoembed exists already") as caught:
        db.execute("CREATE EXTENSION autoembed")

    db.execute(str(caught.value.diag.message_hint).split(": ")[1].split(" or ")[0].encode())
    db.execute("CREATE EXTENSION autoembed")


def test_the_members_of_the_extension_are_those_in_the_list(db: Connection) -> None:
    rows = db.execute("""
        SELECT pg_describe_object(d.classid, d.objid, 0) AS member
        FROM pg_depend AS d
        JOIN pg_extension AS e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass
        WHERE e.extname = 'autoembed' AND d.deptype = 'e'
        ORDER BY 1
    """).fetchall()
    # Row types and the like come with their relations.
    members = [row.member for row in rows if not row.member.startswith("type ")]

    assert "\n".join(sorted(members)) + "\n" == MEMBERS.read_text()


def test_every_object_has_a_comment(db: Connection) -> None:
    db.execute(GUIDE_TABLE.format(dimensions=384))
    rows = db.execute("""
        SELECT p.oid::regprocedure::text AS name
        FROM pg_proc AS p
        WHERE p.pronamespace = 'autoembed'::regnamespace AND obj_description(p.oid, 'pg_proc') IS NULL
        UNION ALL
        SELECT c.oid::regclass::text
        FROM pg_class AS c
        WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v')
          AND obj_description(c.oid, 'pg_class') IS NULL
        UNION ALL
        SELECT c.oid::regclass || '.' || a.attname
        FROM pg_class AS c
        JOIN pg_attribute AS a ON a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped
        WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v')
          AND c.relname !~ '^_' AND col_description(c.oid, a.attnum) IS NULL
    """).fetchall()

    assert rows == []


def test_every_function_pins_its_search_path(documents: Connection) -> None:
    # A procedure with a SET clause cannot commit, and a condition of search() is in the caller's search_path. These
    # qualify all names.
    rows = documents.execute(f"""
        SELECT r.name
        FROM ({ROUTINES}) AS r
        WHERE NOT coalesce(array_to_string(r.proconfig, ',') LIKE '%search_path=%pg_temp%', false)
    """).fetchall()

    assert sorted(row.name for row in rows) == [
        "autoembed._distances(regclass,name,vector,text,integer,boolean,integer)",
        "autoembed._estimated_matches(regclass,text)",
        "autoembed._exact_answers(regclass,name,text[],integer,integer)",
        "autoembed._judged_keys(regclass,name,jsonb)",
        "autoembed._judgments(regclass)",
        "autoembed._measured_recall(regclass,name,integer,integer,vector[],text[],double precision[],integer[])",
        "autoembed._nearest(regclass,name,text,integer,boolean,integer)",
        "autoembed._nearest_rows_1(text,boolean,integer,integer)",
        "autoembed._note_search(integer,integer,boolean)",
        "autoembed._reranked(record,text,text,integer,integer,integer)",
        "autoembed._search_page(regclass,text,integer,integer,text,name,text,double precision,integer,boolean,integer)",
        "autoembed._work(double precision,integer,integer,integer,boolean)",
        "autoembed.chunk_text(text,text,integer,integer,text)",
        "autoembed.evaluate_search(regclass,regclass,integer,name)",
        "autoembed.measure_recall(regclass,text[],integer,integer,name)",
        "autoembed.search(anyelement,text,integer,integer,text,name,text,double precision,text)",
        "autoembed.search(regclass,text,integer,integer,text,name,text,double precision,text)",
        "autoembed.search(text,text,integer,integer,text,name,text,double precision,text)",
        "autoembed.search_rows(anyelement,text,integer,integer,text,name,text,double precision,text)",
        "autoembed.tune(regclass,double precision,text[],name)",
        "autoembed.work(double precision,integer,integer,integer,boolean)",
    ]


def test_nothing_is_for_public(documents: Connection, role: Callable[[str], str]) -> None:
    nobody = role("nobody")
    rows = documents.execute(f"""
        SELECT r.name FROM ({ROUTINES}) AS r WHERE has_function_privilege('{nobody}', r.oid, 'EXECUTE')
        UNION ALL
        SELECT c.oid::regclass::text
        FROM pg_class AS c
        WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v')
          AND has_table_privilege('{nobody}', c.oid, 'SELECT,INSERT,UPDATE,DELETE,TRUNCATE')
        UNION ALL
        SELECT 'schema' WHERE has_schema_privilege('{nobody}', 'autoembed', 'USAGE,CREATE')
    """).fetchall()

    # search() and the view of chunks call these. Without a right in the schema nobody can name them.
    assert sorted(row.name for row in rows) == [
        "autoembed._nearest_rows_1(text,boolean,integer,integer)",
        "autoembed._part_of_long_text(text,text,integer,integer)",
    ]


def test_a_session_older_than_the_extension_never_runs_old_python(db: Connection) -> None:
    db.execute("SELECT autoembed.embed('warm up')")
    db.execute(
        "CREATE OR REPLACE FUNCTION autoembed._load_python() RETURNS void LANGUAGE plpython3u SET search_path ="
        " pg_catalog, pg_temp AS $$ plpy.error('loaded anew') $$"
    )

    def loads_anew() -> bool:
        try:
            db.execute("SELECT autoembed.embed('again')")
        except Exception as error:
            return "loaded anew" in str(error)
        return False

    assert not loads_anew()
    changed = db.execute(
        "SELECT replace(pg_get_functiondef('autoembed._embed'::regproc), substring(prosrc FROM '!= \"(\\w+)\"'),"
        " 'other') AS ddl FROM pg_proc WHERE oid = 'autoembed._embed'::regproc"
    ).fetchone()
    assert changed is not None
    db.execute(changed.ddl)
    assert loads_anew()


def test_sessions_load_the_modules_that_a_lane_has_compiled_if_they_are_whole(
    db: Connection, connect: Callable[..., Connection]
) -> None:
    db.execute(
        "CREATE FUNCTION loaded_compiled() RETURNS boolean LANGUAGE plpython3u AS $$\nimport sys\n"
        "return bool(sys.meta_path[0].compiled) $$;"
        "CREATE FUNCTION cut_off(file text) RETURNS void LANGUAGE plpython3u AS $$\nimport os\n"
        "os.truncate(file, 100000) $$"
    )
    [build] = db.execute(
        "SELECT substring(prosrc FROM '!= \"(\\w+)\"') AS hash FROM pg_proc WHERE oid = 'autoembed._embed'::regproc"
    )
    files = f"SELECT 'pg_stat_tmp/' || f FROM pg_ls_dir('pg_stat_tmp') AS f WHERE f ~ '{build.hash}.*[.]code$'"

    def loads_compiled() -> bool:
        with connect() as session:
            session.execute("SELECT autoembed.process()")
            return session.execute("SELECT loaded_compiled()").fetchone() == (True,)

    with running_lanes(db, connect):
        [(kept,)] = wait_until(lambda: db.execute(files).fetchall())
    assert loads_compiled()

    db.execute("SELECT cut_off(%s)", [kept])
    assert not loads_compiled()

    with running_lanes(db, connect):
        wait_until(loads_compiled)
