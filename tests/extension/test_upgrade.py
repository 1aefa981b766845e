"""ALTER EXTENSION autoembed UPDATE, from every released version: the data stays, the objects are those of a new one."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from fake_api import FakeApi
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection, Server, insert, is_settled, put_file
from waiting import wait_until

EXTENSION = Path(__file__).resolve().parents[2] / "extension"
RELEASED = sorted(path.stem.partition("--")[2] for path in EXTENSION.glob("autoembed--*.sql"))
CURRENT = re.findall(r"^default_version = '(.*)'$", (EXTENSION / "autoembed.control").read_text(), re.MULTILINE)[0]

# What a catalog says of the extension's objects. No row has an OID, and their order has no meaning.
OBJECTS = [
    """
    SELECT pg_describe_object(d.classid, d.objid, 0)
    FROM pg_depend AS d
    JOIN pg_extension AS e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass
    WHERE e.extname = 'autoembed' AND d.deptype = 'e'
    """,
    # The functions of one pipeline have its number in their names, and OIDs in their bodies.
    r"""
    SELECT p.oid::regprocedure::text, regexp_replace(pg_get_functiondef(p.oid), '\m\d{5,}\M', 'OID', 'g'),
        p.proacl::text, obj_description(p.oid)
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace
    """,
    """
    SELECT c.oid::regclass::text, c.relkind::text, c.relacl::text, obj_description(c.oid),
        CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END
    FROM pg_class AS c
    WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v', 'S', 'c', 'i')
    """,
    """
    SELECT a.attrelid::regclass::text, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
        pg_get_expr(d.adbin, d.adrelid), a.attacl::text, col_description(a.attrelid, a.attnum)
    FROM pg_attribute AS a
    JOIN pg_class AS c ON c.oid = a.attrelid
    LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE c.relnamespace = 'autoembed'::regnamespace AND c.relkind IN ('r', 'v') AND a.attnum > 0
    """,
    """
    SELECT c.conrelid::regclass::text, c.conname, pg_get_constraintdef(c.oid)
    FROM pg_constraint AS c
    WHERE c.connamespace = 'autoembed'::regnamespace
    """,
    """
    SELECT i.indrelid::regclass::text, pg_get_indexdef(i.indexrelid)
    FROM pg_index AS i
    JOIN pg_class AS c ON c.oid = i.indrelid
    WHERE c.relnamespace IN ('autoembed'::regnamespace, 'pgmq'::regnamespace)
    """,
    """
    SELECT t.tgrelid::regclass::text, t.tgname, t.tgenabled, pg_get_triggerdef(t.oid)
    FROM pg_trigger AS t
    WHERE NOT t.tgisinternal
    """,
    "SELECT evtname, evtevent, evtfoid::regproc::text, evttags, evtenabled FROM pg_event_trigger",
    """
    SELECT i.classoid::regclass::text, pg_describe_object(i.classoid, i.objoid, i.objsubid), i.initprivs::text
    FROM pg_init_privs AS i
    WHERE i.privtype = 'e' AND pg_describe_object(i.classoid, i.objoid, i.objsubid) LIKE '%autoembed%'
    """,
    """
    SELECT u.dumped::regclass::text, u.condition
    FROM pg_extension AS e, unnest(e.extconfig, e.extcondition) AS u(dumped, condition)
    WHERE e.extname = 'autoembed'
    """,
]

# Tables of each kind that a pipeline may have.
TABLES = r"""
    SELECT autoembed.create_model('small', 'fake', 8);
    SELECT autoembed.set_default_model('small');
    CREATE TABLE pages (id int PRIMARY KEY, title text, body text);
    SELECT autoembed.enable('pages', content_columns => '{title,body}');
    CREATE TABLE visits (a int, b text, c uuid DEFAULT gen_random_uuid(), body text, PRIMARY KEY (a, b, c));
    SELECT autoembed.enable('visits', content_columns => '{body}', on_change => 'clear');
    CREATE TABLE parts (id bigint, year int, body text, PRIMARY KEY (id, year)) PARTITION BY RANGE (year);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
    SELECT autoembed.enable('parts', content_columns => '{body}');
    CREATE TABLE "Odd name" ("the key" timestamptz PRIMARY KEY, body text);
    CREATE FUNCTION odd_text(r "Odd name") RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT r.body';
    SELECT autoembed.enable('"Odd name"', content_function => 'odd_text');
    CREATE TABLE notes (id int PRIMARY KEY, title text, body text, ok boolean DEFAULT true);
    SELECT autoembed.enable('notes', content_template => '# {title}\n\n{body}', condition => 'ok AND length(body) > 1');
    CREATE TABLE letters (id int PRIMARY KEY, title text, embedding halfvec(8));
    CREATE FUNCTION embedding_input(l letters) RETURNS text LANGUAGE sql IMMUTABLE AS 'SELECT l.title';
    CREATE TRIGGER after_insert AFTER INSERT ON letters
        FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('embedding_input', 'embedding');
    CREATE TRIGGER after_update AFTER UPDATE ON letters
        FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('embedding_input', 'embedding');
"""
ROWS = """
    INSERT INTO pages VALUES (1, 'a', 'b'), (2, 'c', 'd');
    INSERT INTO visits (a, b, body) VALUES (1, 'x', 'hello');
    INSERT INTO parts VALUES (1, 1, 'p');
    INSERT INTO "Odd name" VALUES ('2020-02-02', 'odd');
    INSERT INTO notes (id, title, body) VALUES (1, 't', 'body'), (2, 't', 'other body');
    INSERT INTO letters VALUES (1, 'dear');
"""
CHANGES = """
    UPDATE pages SET body = 'changed' WHERE id = 1;
    UPDATE visits SET body = 'changed';
    UPDATE parts SET body = 'changed';
    UPDATE "Odd name" SET body = 'changed';
    UPDATE notes SET body = 'changed' WHERE id = 1;
    UPDATE letters SET title = 'changed';
"""
WITHOUT_VECTOR = """
    SELECT 'pages' AS name, count(*) FILTER (WHERE embedding IS NULL) AS missing FROM pages
    UNION ALL SELECT 'visits', count(*) FILTER (WHERE embedding IS NULL) FROM visits
    UNION ALL SELECT 'parts', count(*) FILTER (WHERE embedding IS NULL) FROM parts
    UNION ALL SELECT 'Odd name', count(*) FILTER (WHERE embedding IS NULL) FROM "Odd name"
    UNION ALL SELECT 'notes', count(*) FILTER (WHERE embedding IS NULL) FROM notes
    UNION ALL SELECT 'letters', count(*) FILTER (WHERE embedding IS NULL) FROM letters
"""


@pytest.fixture(scope="module")
def releases(server: Server) -> None:
    """Puts the scripts of released versions, which the image lacks, where the server looks for them."""
    with server.connect() as db:
        row = db.execute("SELECT setting FROM pg_config WHERE name = 'SHAREDIR'").fetchone()
    assert row is not None
    for version in RELEASED:
        put_file(server.container, EXTENSION / f"autoembed--{version}.sql", f"{row.setting}/extension")


@pytest.fixture
def database(server: Server, releases: None) -> Iterator[Callable[[str | None], Connection]]:
    """Makes empty databases with the extension in a version; None: without it."""
    with ExitStack() as stack:

        def made(version: str | None) -> Connection:
            name = f"test_{uuid.uuid4().hex[:12]}"
            stack.enter_context(server.janitor(name))
            connection = stack.enter_context(server.connect(name))
            if version is not None:
                connection.execute(f"CREATE EXTENSION autoembed VERSION '{version}' CASCADE")
            return connection

        yield made


def objects(db: Connection) -> list[set[str]]:
    return [{repr(tuple(row)) for row in db.execute(query)} for query in OBJECTS]


def process_all(db: Connection) -> None:
    wait_until(lambda: db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,) and is_settled(db), 30)


def columns_of_vectors(db: Connection) -> list[str]:
    return [f"{row.name}: {row.missing}" for row in db.execute(WITHOUT_VECTOR) if row.missing]


def test_there_is_a_released_version() -> None:
    assert RELEASED
    assert CURRENT not in RELEASED


@pytest.mark.parametrize("version", RELEASED)
def test_an_updated_database_has_the_objects_of_a_new_one(
    database: Callable[[str | None], Connection], version: str
) -> None:
    updated, new = database(version), database(CURRENT)
    for db in (updated, new):
        db.execute(TABLES)

    updated.execute("ALTER EXTENSION autoembed UPDATE")

    for query, there, here in zip(OBJECTS, objects(updated), objects(new), strict=True):
        assert sorted(there - here) == [], query
        assert sorted(here - there) == [], query


@pytest.mark.parametrize("version", RELEASED)
def test_what_is_embedded_stays_so_what_waits_is_embedded_and_changes_are_followed(
    database: Callable[[str | None], Connection], version: str
) -> None:
    db = database(version)
    db.execute(TABLES)
    db.execute(ROWS)
    process_all(db)
    db.execute("INSERT INTO pages VALUES (3, 'it', 'waits')")

    db.execute("ALTER EXTENSION autoembed UPDATE")

    before = db.execute("SELECT id, embedding::text FROM pages WHERE id < 3 ORDER BY id").fetchall()
    process_all(db)
    assert columns_of_vectors(db) == []
    old = db.execute("SELECT embedding::text FROM letters").fetchone()
    db.execute(CHANGES)
    process_all(db)
    assert columns_of_vectors(db) == []
    assert db.execute("SELECT embedding::text FROM letters").fetchone() != old
    assert db.execute("SELECT id, embedding::text FROM pages WHERE id = 2").fetchall() == before[1:]
    assert db.execute("SELECT embedding::text FROM pages WHERE id = 1").fetchone() != before[0][1:]
    assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)


@pytest.mark.parametrize("version", RELEASED)
def test_no_text_is_sent_again_because_of_an_update(
    database: Callable[[str | None], Connection], server: Server, version: str
) -> None:
    db = database(version)
    api: FakeApi = server.fake_api(db.info.dbname)
    db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(GUIDE_TRIGGERS)
    insert(db, "one", "two")
    process_all(db)
    sent = len(api.log())

    db.execute("ALTER EXTENSION autoembed UPDATE")
    db.execute("UPDATE documents SET title = title")
    process_all(db)

    assert len(api.log()) == sent > 0


@pytest.mark.parametrize("version", RELEASED)
def test_rights_that_were_granted_are_there_after_an_update(
    database: Callable[[str | None], Connection], version: str
) -> None:
    db = database(version)
    reader, owner = (f"role_{uuid.uuid4().hex[:12]}" for _ in range(2))
    db.execute(f"CREATE ROLE {reader}; CREATE ROLE {owner}")
    try:
        db.execute(f"SELECT autoembed.grant_usage('{owner}')")
        db.execute(f"GRANT USAGE ON SCHEMA autoembed TO {reader}; GRANT SELECT ON autoembed.setting TO {reader}")
        db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")

        db.execute("ALTER EXTENSION autoembed UPDATE")

        db.execute(f"SET ROLE {reader}")
        db.execute("SELECT * FROM autoembed.setting")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            db.execute("SELECT autoembed.embed('a')")
        db.execute(f"RESET ROLE; SET ROLE {owner}")
        db.execute("CREATE TABLE own (id int PRIMARY KEY, body text)")
        db.execute("SELECT autoembed.enable('own', content_columns => '{body}')")
        db.execute("SELECT autoembed.pause('own'); SELECT autoembed.resume('own')")
        db.execute("RESET ROLE")
    finally:
        db.execute("RESET ROLE")
        db.execute(f"DROP OWNED BY {reader}, {owner} CASCADE; DROP ROLE {reader}, {owner}")


def test_the_version_that_is_installed_needs_no_update(database: Callable[[str | None], Connection]) -> None:
    db = database(CURRENT)
    before = objects(db)

    db.execute("ALTER EXTENSION autoembed UPDATE")

    assert objects(db) == before
