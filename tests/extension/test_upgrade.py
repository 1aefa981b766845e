"""ALTER EXTENSION autoembed UPDATE: the objects are those of a new installation, and nothing that was there is lost.

Updates are tested from each released version to the present one, and from the present one to "next": a release with
other code, which build.py makes as it will make the next one.
"""

from __future__ import annotations

import difflib
import re
import shutil
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import build
import numpy as np
import psycopg
import pytest
from psycopg.rows import tuple_row

from fake_api import FakeApi, embedding_of
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, PASSWORD, Connection, Server, insert, is_settled, put_file, waiting
from waiting import wait_until

RELEASED = sorted(path.stem.partition("--")[2] for path in (build.ROOT / "extension").glob("autoembed--*.sql"))
CURRENT = build.version()
UPDATES = [*((version, CURRENT) for version in RELEASED), (CURRENT, "next")]
MODEL = "text-embedding-3-small"

every_update = pytest.mark.parametrize("update", UPDATES, ids="-".join, indirect=True)
every_release = pytest.mark.parametrize("update", UPDATES[:-1], ids="-".join, indirect=True)

Update = tuple[str, str]
Connect = Callable[..., Connection]


def test_there_is_a_released_version() -> None:
    assert RELEASED
    assert CURRENT not in RELEASED


# The scripts -----------------------------------------------------------------------------------------


def next_release(folder: Path) -> list[Path]:
    """The scripts of a release after the present one: the state is the same, every function has other code."""
    for name in ("sql", "plpy_src", "extension"):
        shutil.copytree(build.ROOT / name, folder / name)
    shutil.copy(build.ROOT / "build.py", folder)
    control = folder / "extension/autoembed.control"
    control.write_text(control.read_text().replace(CURRENT, "next"))
    name = f"autoembed--{CURRENT}.sql"
    (folder / "extension" / name).write_text(build.scripts()[name])
    (folder / f"sql/upgrade/{CURRENT}--next.sql").touch()
    for template in (folder / "sql/templates").glob("*.sql"):
        template.write_text(template.read_text().replace("$body$\n", "$body$\n-- next\n", 1))
    module = folder / "plpy_src/autoembed/__init__.py"
    module.write_text(module.read_text() + "# next\n")
    subprocess.run([sys.executable, folder / "build.py", folder / "made"], check=True, capture_output=True)
    return [folder / "made" / name for name in ("autoembed--next.sql", f"autoembed--{CURRENT}--next.sql")]


@pytest.fixture(scope="module")
def releases(server: Server, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Puts the scripts that the image lacks where the server looks for them. The default version stays."""
    with server.connect() as db:
        [folder] = db.execute(
            "SELECT setting || '/extension' AS path FROM pg_config WHERE name = 'SHAREDIR'"
        ).fetchall()
    scripts = [build.ROOT / f"extension/autoembed--{version}.sql" for version in RELEASED]
    for script in [*scripts, *next_release(tmp_path_factory.mktemp("next"))]:
        put_file(server.container, script, folder.path)


def update_to(db: Connection, version: str) -> None:
    db.execute("ALTER EXTENSION autoembed UPDATE" + (f" TO '{version}'" if version != CURRENT else ""))


# A database that is lived in -------------------------------------------------------------------------

# Tables of each kind, in the order of their pipelines' ids.
TABLES = r"""
    CREATE TABLE pages (id int PRIMARY KEY, title text, body text, views int DEFAULT 0);
    SELECT autoembed.enable('pages', 'embedding', content_columns => '{title,body}');
    CREATE TABLE visits (a int, b text, "a day" date DEFAULT '2020-02-02', body text, PRIMARY KEY (a, b, "a day"));
    SELECT autoembed.enable('visits', 'embedding', content_columns => '{body}', on_change => 'clear');
    CREATE TABLE parts (id bigint, year int, body text, embedding vector(1536), PRIMARY KEY (id, year))
        PARTITION BY RANGE (year);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (100) TO (200);
    SELECT autoembed.enable('parts', 'embedding', content_columns => '{body}');
    CREATE TABLE "Odd notes" (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), title text, body text, ok boolean);
    SELECT autoembed.enable('"Odd notes"', 'embedding', content_template => '# {title}\n\n{body}', condition => 'ok');
    CREATE TABLE copies (id int PRIMARY KEY, body text);
    SELECT autoembed.enable('copies', 'embedding', content_columns => '{body}', replicated => true);
    CREATE TABLE quiet (id int PRIMARY KEY, body text);
    SELECT autoembed.enable('quiet', 'embedding', content_columns => '{body}');
    CREATE TABLE lengths (id int PRIMARY KEY, body text);
    SELECT autoembed.enable('lengths', 'embedding', content_columns => '{body}', model => 'length');
    CREATE TABLE tired (id int PRIMARY KEY, body text);
    SELECT autoembed.enable('tired', 'embedding', content_columns => '{body}', model => 'tired');
    CREATE TABLE narrow (id int PRIMARY KEY, body text);
    SELECT autoembed.enable('narrow', 'embedding', content_columns => '{body}');
    ALTER TABLE narrow ALTER COLUMN embedding TYPE halfvec(3);
"""
MODELS = """
    CREATE SCHEMA app;
    CREATE FUNCTION app.length(texts text[]) RETURNS vector[] LANGUAGE sql
        RETURN ARRAY(SELECT ARRAY[length(u.t), 1]::vector FROM unnest(texts) WITH ORDINALITY AS u(t, n) ORDER BY u.n);
    SELECT autoembed.create_model('length', 'function', 2, 'app.length');
    SELECT autoembed.set_default_model('text-embedding-3-small');
"""
STORIES = """
    CREATE TABLE stories (id int PRIMARY KEY, content text);
    CREATE FUNCTION story(s stories) RETURNS text LANGUAGE sql AS $$ SELECT current_user || ': ' || s.content $$;
    SELECT autoembed.enable('stories', 'embedding', content_function => 'story');
"""
FIRST_ROWS = """
    INSERT INTO pages VALUES (1, 'a', 'b'), (2, 'c', 'd');
    INSERT INTO visits (a, b, body) VALUES (1, 'x', 'visit');
    INSERT INTO parts VALUES (1, 1, 'part'), (1, 101, 'other part');
    INSERT INTO "Odd notes" (title, body, ok) VALUES ('t', 'note', true), ('t', 'not this one', false);
    INSERT INTO copies VALUES (1, 'copy');
    INSERT INTO quiet VALUES (1, 'quiet');
    INSERT INTO lengths VALUES (1, 'four');
    INSERT INTO stories VALUES (1, 'once');
    INSERT INTO documents (title, content) VALUES ('t', 'document'), ('t', 'poison');
"""
LONG = """
    CREATE TABLE long (id int PRIMARY KEY, body text);
    INSERT INTO long SELECT n, 'long ' || n FROM generate_series(1, 20) AS n;
    SELECT autoembed.enable('long', 'embedding', content_columns => '{body}');
"""
WAITING_ROWS = """
    UPDATE pages SET body = 'waits' WHERE id = 2;
    UPDATE visits SET body = 'visit waits';
    INSERT INTO parts VALUES (2, 150, 'part waits');
    INSERT INTO "Odd notes" (title, body, ok) VALUES ('t', 'note waits', true);
    INSERT INTO copies VALUES (2, 'copy waits');
    INSERT INTO quiet VALUES (2, 'quiet waits');
    INSERT INTO lengths VALUES (2, 'waiting');
    INSERT INTO tired VALUES (1, 'tired');
    INSERT INTO narrow VALUES (1, 'narrow');
    INSERT INTO stories VALUES (2, 'waits');
    INSERT INTO documents (title, content) VALUES ('t', 'document waits');
"""
SENT_OF_WAITING_ROWS = sorted(
    [
        "# t\n\ndocument waits",
        "# t\n\nnote waits",
        "c\n\nwaits",
        "copy waits",
        *(f"long {n}" for n in range(8, 21)),
        "part waits",
        "upgrade_owner: waits",
        "visit waits",
    ]
)
# The pauses, rests and faults go on.
NOT_FRESH = {
    "quiet": ["quiet waits"],
    "tired": ["tired"],
    "narrow": ["narrow"],
    "documents": ["# t\n\npoison"],
}
# Queries of each table's texts and vectors. Rows that need no vector are left out.
VECTORS = {
    "pages": "SELECT concat_ws(E'\\n\\n', title, body), embedding FROM pages",
    "visits": "SELECT body, embedding FROM visits",
    "parts": "SELECT body, embedding FROM parts",
    "Odd notes": """SELECT '# ' || title || E'\\n\\n' || body, embedding FROM "Odd notes" WHERE ok""",
    "copies": "SELECT body, embedding FROM copies",
    "quiet": "SELECT body, embedding FROM quiet",
    "lengths": "SELECT body, embedding FROM lengths",
    "tired": "SELECT body, embedding FROM tired",
    "narrow": "SELECT body, embedding FROM narrow",
    "stories": "SELECT 'upgrade_owner: ' || content, embedding FROM stories",
    "documents": "SELECT embedding_input(d), embedding FROM documents AS d",
    "long": "SELECT body, embedding FROM long",
}
TENANTS = ("upgrade_owner", "upgrade_watcher", "upgrade_lane")


# Messages and backfills that nothing holds up.
WORK = """
    SELECT FROM autoembed.pipeline AS p
    WHERE p.table_id NOT IN ('quiet'::regclass, 'tired'::regclass, 'narrow'::regclass)
      AND (EXISTS (SELECT FROM pgmq.q_embedding_jobs AS q WHERE q.message ->> 'pipeline' = p.id::text)
           OR EXISTS (SELECT FROM autoembed.backfill AS b WHERE b.pipeline_id = p.id))
"""


def process(db: Connection) -> None:
    """Works off what can be worked off now, delays left out."""

    def everything_is_done() -> bool:
        db.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp() WHERE vt > clock_timestamp()")
        read = db.execute("SELECT read FROM autoembed.process()").fetchone()
        return read == (0,) and db.execute(WORK).fetchone() is None

    wait_until(everything_is_done)


def live_in(db: Connection, connect: Connect, api: FakeApi, with_lane_role: bool) -> None:
    """Attaches tables of each kind: rows that are embedded, rows that wait, one that has failed, half a backfill."""
    db.execute("GRANT CREATE ON SCHEMA public TO upgrade_owner")
    db.execute("SELECT autoembed.grant_usage('upgrade_owner'), autoembed.grant_monitor('upgrade_watcher')")
    db.execute(
        "GRANT EXECUTE ON FUNCTION autoembed.alter_model, autoembed.set_default_model TO upgrade_watcher, PUBLIC"
    )
    db.execute("GRANT SELECT ON autoembed.setting TO PUBLIC")
    if with_lane_role:
        db.execute("SELECT autoembed.grant_lane('upgrade_lane')")
    db.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
    db.execute(
        "SELECT autoembed.create_model('tired', 'openai', 1536, %s, base_url => %s, api_key => 'env:OPENAI_API_KEY')",
        [MODEL, api.base_url],
    )
    db.execute(MODELS)
    db.execute(TABLES)
    with connect(user="upgrade_owner") as owner:
        owner.execute(STORIES)
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(GUIDE_TRIGGERS)
    db.execute(FIRST_ROWS)
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    process(db)
    assert failed(db) == ["# t\n\npoison"]
    db.execute(LONG)
    db.execute("SELECT autoembed.process(batch_size => 7, max_requests => 1)")
    assert db.execute("SELECT max(position) FROM autoembed.backfill").fetchone() == ("[7]",)
    db.execute("SELECT autoembed.pause('quiet')")
    db.execute(
        "INSERT INTO autoembed.model_rest (model, until, failures, needs_attention, reason)"
        " VALUES ('tired', clock_timestamp() + interval '1 hour', 3, true, 'wants its key')"
    )
    db.execute(WAITING_ROWS)


def failed(db: Connection) -> list[str]:
    return [row.excerpt for row in db.execute("SELECT excerpt FROM autoembed.failed ORDER BY excerpt")]


def not_fresh(db: Connection) -> dict[str, list[str]]:
    """The texts of each table whose vector is missing or not theirs."""
    found: dict[str, list[str]] = {}
    for table, query in VECTORS.items():
        rows = db.execute(f"SELECT r.text, r.v::vector::real[] FROM ({query}) AS r(text, v)".encode()).fetchall()
        assert rows
        for text, vector in rows:
            right = [len(text), 1] if table == "lengths" else embedding_of(text)
            if vector is None or not np.allclose(vector, right, atol=1e-3):
                found.setdefault(table, []).append(text)
    return found


@pytest.fixture(scope="module")
def api(server: Server) -> FakeApi:
    return server.fake_api("upgrade")


@pytest.fixture(scope="module")
def lived_in(server: Server, releases: None, api: FakeApi) -> Iterator[Callable[..., str]]:
    """Makes templates of databases: the extension in one version, set up as in another one."""
    made: dict[Any, str] = {}
    with ExitStack() as stack:
        db = stack.enter_context(server.connect())
        for role in TENANTS:
            db.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'")
            stack.callback(db.execute, f"DROP ROLE {role}")

        def template(version: str, as_in: str) -> str:
            if (version, as_in) not in made:
                name = f"upgrade_{uuid.uuid4().hex[:12]}"
                stack.enter_context(server.database(name))
                with server.connect(name) as connection:
                    connection.execute(f"CREATE EXTENSION autoembed VERSION '{version}' CASCADE")
                    live_in(connection, lambda **o: server.connect(name, **o), api, with_lane_role=as_in == CURRENT)
                made[version, as_in] = name
            return made[version, as_in]

        yield template


@pytest.fixture
def update(request: pytest.FixtureRequest) -> Update:
    """The version before and the version after."""
    versions: Update = request.param
    return versions


@pytest.fixture
def dbname(server: Server, lived_in: Callable[..., str], update: Update) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with server.database(name, lived_in(update[0], as_in=update[0])):
        yield name


@pytest.fixture
def sent(api: FakeApi, dbname: str) -> Callable[[], list[str]]:
    """The texts sent since the last call, but for the probe's word."""
    seen = len(api.texts())

    def since() -> list[str]:
        nonlocal seen
        texts = api.texts()
        before, seen = seen, len(texts)
        return sorted(text for text in texts[before:] if text != "autoembed")

    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    return since


# The objects -----------------------------------------------------------------------------------------

ACL = "(SELECT string_agg(a.item::text, ' ' ORDER BY a.item::text) FROM unnest({}) AS a(item))"
# Each gives names and definitions. No definition has an OID.
OBJECTS = [
    """
    SELECT 'extension', concat_ws(E'\n', pg_get_userbyid(e.extowner), e.extnamespace::regnamespace, e.extrelocatable, (
        SELECT string_agg(concat(u.id::regclass, ' ', u.condition), E'\n' ORDER BY u.id::regclass::text)
        FROM unnest(e.extconfig, e.extcondition) AS u(id, condition)
    ))
    FROM pg_extension AS e
    WHERE e.extname = 'autoembed'
    """,
    """
    SELECT 'dependency', concat_ws(' ', d.deptype, pg_describe_object(d.classid, d.objid, 0))
    FROM pg_depend AS d
    JOIN pg_extension AS e ON e.oid = d.refobjid AND d.refclassid = 'pg_extension'::regclass
    WHERE e.extname = 'autoembed'
    """,
    f"""
    SELECT concat('schema ', n.nspname), concat_ws(' ', n.nspowner::regrole, {ACL.format("n.nspacl")})
    FROM pg_namespace AS n
    WHERE n.nspname = 'autoembed'
    """,
    # The functions of a pipeline have its table's OID in their bodies.
    rf"""
    SELECT p.oid::regprocedure::text, concat_ws(E'\n', p.proowner::regrole, {ACL.format("p.proacl")}, CASE
        WHEN p.proname ~ '_\d+$' THEN regexp_replace(pg_get_functiondef(p.oid), '\m\d{{5,}}\M', 'OID', 'g')
        ELSE pg_get_functiondef(p.oid)
    END)
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace
    """,
    f"""
    SELECT c.oid::regclass::text, concat_ws(E'\n', concat_ws(
        ' ', c.relkind, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity, c.reloptions, c.relowner::regrole,
        {ACL.format("c.relacl")}
    ), CASE c.relkind WHEN 'v' THEN pg_get_viewdef(c.oid) WHEN 'i' THEN pg_get_indexdef(c.oid) END)
    FROM pg_class AS c
    WHERE c.relnamespace IN ('autoembed'::regnamespace, 'pgmq'::regnamespace)
    """,
    f"""
    SELECT concat(a.attrelid::regclass, '.', a.attname), concat_ws(
        ' ', a.attnum, format_type(a.atttypid, a.atttypmod), a.attcollation, a.attnotnull, a.attidentity,
        a.attgenerated, a.attstorage, pg_get_expr(d.adbin, d.adrelid), {ACL.format("a.attacl")}
    )
    FROM pg_attribute AS a
    JOIN pg_class AS c ON c.oid = a.attrelid
    LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
    WHERE c.relnamespace IN ('autoembed'::regnamespace, 'pgmq'::regnamespace) AND c.relkind IN ('r', 'v')
      AND a.attnum > 0
    """,
    """
    SELECT concat(c.conrelid::regclass, ' ', c.conname), pg_get_constraintdef(c.oid)
    FROM pg_constraint AS c
    WHERE c.connamespace IN ('autoembed'::regnamespace, 'pgmq'::regnamespace)
    """,
    """
    SELECT concat('policy ', c.oid::regclass, ' ', p.polname), concat_ws(
        ' ', p.polcmd, p.polpermissive, p.polroles::text, pg_get_expr(p.polqual, c.oid),
        pg_get_expr(p.polwithcheck, c.oid)
    )
    FROM pg_policy AS p
    JOIN pg_class AS c ON c.oid = p.polrelid
    """,
    """
    SELECT concat('trigger ', t.tgrelid::regclass, ' ', t.tgname), concat(t.tgenabled, ' ', pg_get_triggerdef(t.oid))
    FROM pg_trigger AS t
    WHERE NOT t.tgisinternal
    """,
    """
    SELECT concat('event trigger ', t.evtname), concat_ws(
        ' ', t.evtevent, t.evtowner::regrole, t.evtfoid::regproc, t.evtenabled, t.evttags::text
    )
    FROM pg_event_trigger AS t
    """,
    f"""
    SELECT concat('initial privileges ', pg_describe_object(i.classoid, i.objoid, i.objsubid)), concat(
        i.privtype, {ACL.format("i.initprivs")}
    )
    FROM pg_init_privs AS i
    WHERE i.objoid >= 16384
    """,
    """
    SELECT concat('comment ', pg_describe_object(d.classoid, d.objoid, d.objsubid)), d.description
    FROM pg_description AS d
    WHERE d.objoid >= 16384
    """,
    "SELECT concat('row of model ', m.name), to_jsonb(m)::text FROM autoembed.model AS m",
    "SELECT concat('row of turn ', t.name), to_jsonb(t)::text FROM autoembed.turn AS t",
]


def objects(db: Connection) -> list[str]:
    """All objects of the extension and of its tables, each line of a definition behind the object's name."""
    cursor = db.cursor(row_factory=tuple_row)
    rows = [(str(name), str(text)) for query in OBJECTS for name, text in cursor.execute(query.encode())]
    return [f"{name}: {line}" for name, text in sorted(rows) for line in text.splitlines() or [""]]


def functions_of_tables(db: Connection) -> list[str]:
    return [line for line in objects(db) if re.match(r"autoembed\._[a-z]+_[0-9]+\(", line)]


def assert_same(updated: list[str], new: list[str]) -> None:
    found = list(difflib.unified_diff(new, updated, "new", "updated", lineterm="", n=0))
    assert not found, "\n".join(found)


@contextmanager
def clone(server: Server, template: str) -> Iterator[Connection]:
    name = f"clone_{uuid.uuid4().hex[:12]}"
    with server.database(name, template), server.connect(name) as connection:
        yield connection


@every_update
def test_an_updated_database_has_the_objects_of_a_new_one(
    server: Server, lived_in: Callable[..., str], connect: Connect, update: Update
) -> None:
    """Those of its tables and the rights of its roles, too."""
    updated = connect()

    update_to(updated, update[1])

    with clone(server, lived_in(update[1], as_in=update[0])) as new:
        assert_same(objects(updated), objects(new))


@every_update
def test_the_objects_belong_to_the_owner_of_the_extension_whoever_updates_it(
    server: Server, lived_in: Callable[..., str], connect: Connect, update: Update
) -> None:
    db = connect()
    db.execute("CREATE ROLE upgrade_admin SUPERUSER")
    try:
        db.execute("SET ROLE upgrade_admin")
        update_to(db, update[1])
        db.execute("RESET ROLE")

        with clone(server, lived_in(update[1], as_in=update[0])) as new:
            assert_same(objects(db), objects(new))
    finally:
        db.execute("RESET ROLE; REASSIGN OWNED BY upgrade_admin TO postgres; DROP ROLE upgrade_admin")


@every_update
def test_a_dump_of_an_updated_database_has_the_grants_of_a_new_one(
    server: Server, lived_in: Callable[..., str], connect: Connect, update: Update
) -> None:
    updated = connect()
    update_to(updated, update[1])

    def grants(db: Connection) -> set[str]:
        code, output = server.container.get_wrapped_container().exec_run(
            ["pg_dump", "-U", "postgres", "--schema-only", db.info.dbname]
        )
        assert code == 0, output.decode()
        return set(re.findall(r"^GRANT .* TO upgrade_.*;$", output.decode(), re.MULTILINE))

    with clone(server, lived_in(update[1], as_in=update[0])) as new:
        assert grants(updated) == grants(new)
        assert any("FUNCTION autoembed.enable(" in grant for grant in grants(updated))


# Its contents ----------------------------------------------------------------------------------------

KEPT = {
    "pipeline": "SELECT p.id, p.table_id::text,"
    " to_jsonb(p) - '{built_from,content_function_id,content_function_oid,ended,warned_of,stale_since}'::text[]"
    " - '{embeddings_table,chunking,chunk_size,chunk_overlap,text_config,chunk_function,chunk_function_oid}'::text[]"
    " - '{ef_search,recall_target,recall,recall_measured_at,adopts,chunk_prefix,binary_index}'::text[]"
    " - '{plan_problem,planned_at,former_chunking}'::text[]"
    ", autoembed._content_function_of(p)::regprocedure FROM autoembed.pipeline AS p ORDER BY p.id",
    # A model that had no price may have one.
    "model": "SELECT to_jsonb(m) - '{timeout_seconds,price_per_million_tokens}'::text[]"
    " FROM autoembed.model AS m ORDER BY m.name",
    "setting": "SELECT * FROM autoembed.setting ORDER BY name",
    "model_rest": "SELECT model, until, failures, needs_attention, reason FROM autoembed.model_rest",
    "backfill": (
        "SELECT to_jsonb(b) - '{served_at,rows_recorded,condition_objects}'::text[] FROM autoembed.backfill AS b"
    ),
    "embedded": "SELECT pipeline_id, key, digest, truncated FROM autoembed.embedded ORDER BY pipeline_id, key",
    "failure": "SELECT * FROM autoembed.failure ORDER BY id",
    "usage": "SELECT to_jsonb(u) - 'cost' FROM autoembed.usage AS u ORDER BY u.day, u.model, u.table_name::text",
    "queue": "SELECT * FROM pgmq.q_embedding_jobs ORDER BY msg_id",
    "progress": "SELECT * FROM autoembed.progress ORDER BY 1",
}


def kept(db: Connection) -> dict[str, Any]:
    tables = {name: f"SELECT r::text FROM ({query}) AS r ORDER BY 1" for name, query in VECTORS.items()}
    return {name: db.execute(query.encode()).fetchall() for name, query in (KEPT | tables).items()}


@every_update
def test_nothing_is_lost_and_no_text_is_sent_again(
    connect: Connect, update: Update, sent: Callable[[], list[str]]
) -> None:
    db = connect()
    before = kept(db)

    update_to(db, update[1])

    assert kept(db) == before
    process(db)
    assert sent() == SENT_OF_WAITING_ROWS
    assert not_fresh(db) == NOT_FRESH
    assert failed(db) == ["# t\n\npoison"]
    for table in VECTORS:
        db.execute("SELECT autoembed.resync(quote_ident(%s)::regclass)", [table])
    process(db)
    assert set(sent()) <= {"# t\n\npoison"}


@every_update
def test_an_updated_database_keeps_its_promises(
    connect: Connect, update: Update, api: FakeApi, sent: Callable[[], list[str]]
) -> None:
    db = connect()
    update_to(db, update[1])
    process(db)
    sent()

    db.execute("SELECT autoembed.resume('quiet'), autoembed.resume_model('tired')")
    db.execute("ALTER TABLE narrow ALTER COLUMN embedding TYPE halfvec(1536) USING NULL")
    db.execute("UPDATE pages SET views = 7, body = CASE id WHEN 1 THEN 'changed' ELSE body END")
    db.execute("UPDATE visits SET body = 'visit changed'")
    assert db.execute("SELECT embedding FROM visits").fetchall() == [(None,)]
    db.execute("UPDATE parts SET year = 50, body = 'part moved' WHERE year = 101")
    db.execute("""UPDATE "Odd notes" SET ok = NOT ok WHERE body IN ('note', 'not this one')""")
    db.execute("SET session_replication_role = replica")
    db.execute("INSERT INTO copies VALUES (3, 'replicated')")
    db.execute("RESET session_replication_role")
    db.execute("UPDATE stories SET content = 'changed' WHERE id = 1")
    db.execute(
        "UPDATE documents SET title = title; UPDATE documents SET content = 'changed' WHERE content = 'document'"
    )
    db.execute("DELETE FROM long WHERE id = 1")
    insert(db, "more poison")
    process(db)

    assert set(sent()) == {
        "# t\n\nchanged", "# t\n\nmore poison", "# t\n\nnot this one", "a\n\nchanged", "narrow", "part moved",
        "quiet waits", "replicated", "tired", "upgrade_owner: changed", "visit changed",
    }  # fmt: skip
    assert failed(db) == ["# t\n\nmore poison", "# t\n\npoison"]
    assert not_fresh(db) == {"documents": ["# t\n\npoison", "# t\n\nmore poison"]}
    api.behave()
    db.execute("SELECT autoembed.retry_failed()")
    process(db)
    assert not_fresh(db) == {} and failed(db) == [] and is_settled(db)
    nearest = "SELECT title, body FROM pages ORDER BY embedding <=> autoembed.embed(%s) LIMIT 1"
    assert db.execute(nearest, ["c\n\nwaits"]).fetchall() == [("c", "waits")]
    # Its advice on lanes and extensions is not for a test.
    faults = "SELECT subject FROM autoembed.doctor() WHERE NOT ok AND subject !~ '^(lanes|extension .*)$'"
    assert db.execute(faults).fetchall() == []
    db.execute("ALTER TABLE pages RENAME COLUMN body TO words; ALTER TABLE visits DROP COLUMN body")
    db.execute("INSERT INTO pages VALUES (3, 'e', 'f'); INSERT INTO visits (a, b) VALUES (2, 'y')")
    process(db)
    assert sorted(set(sent()) - {"# t\n\npoison", "# t\n\nmore poison", "c\n\nwaits"}) == ["e\n\nf"]


@every_update
def test_roles_can_do_what_they_could(connect: Connect, update: Update) -> None:
    db = connect()
    update_to(db, update[1])

    owner, watcher = connect(user="upgrade_owner"), connect(user="upgrade_watcher")

    tables = "SELECT table_name::text AS name FROM autoembed.status ORDER BY 1"
    assert [row.name for row in owner.execute(tables)] == ["stories"]
    owner.execute("SELECT autoembed.pause('stories'), autoembed.resume('stories'), autoembed.reembed('stories')")
    owner.execute("SELECT autoembed.alter_pipeline('stories', on_change => 'clear')")
    assert owner.execute("SELECT content FROM autoembed.preview('stories', '1')").fetchall() == [
        ("upgrade_owner: once",)
    ]
    owner.execute("SELECT * FROM autoembed.estimate('stories')")
    owner.execute("SELECT autoembed.embed('words')")
    owner.execute("CREATE TABLE own (id int PRIMARY KEY, body text)")
    owner.execute("SELECT autoembed.enable('own', 'embedding', content_columns => '{body}')")
    owner.execute("SELECT autoembed.disable('own'); SELECT autoembed.disable('stories')")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        owner.execute("SELECT autoembed.disable('pages')")
    assert len(watcher.execute(tables).fetchall()) == len(VECTORS) - 1
    assert watcher.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (1,)
    watcher.execute(
        "SELECT * FROM autoembed.progress; SELECT * FROM autoembed.model_rest; SELECT * FROM autoembed.usage"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        watcher.execute("SELECT autoembed.embed('words')")


@pytest.mark.parametrize("update", UPDATES[-1:], ids="-".join, indirect=True)
def test_a_role_of_lanes_runs_the_new_ones(connect: Connect, update: Update) -> None:
    db = connect()
    update_to(db, update[1])

    lane = connect(user="upgrade_lane")

    def works() -> bool:
        lane.execute("CALL autoembed.work(run_seconds => 1)")
        return not_fresh(db) == NOT_FRESH

    wait_until(works, 60)


@every_update
def test_a_session_that_was_open_before_goes_on_with_the_new_code(connect: Connect, update: Update) -> None:
    db, session = connect(), connect()
    for _ in range(6):
        # psycopg prepares what is executed more than five times.
        session.execute("SELECT autoembed.embed('before')")
        session.execute("SELECT autoembed.process(max_requests => 1)")

    update_to(db, update[1])

    db.execute("INSERT INTO pages VALUES (10, 'written', 'after')")
    assert session.execute("SELECT vector_dims(autoembed.embed('after'))").fetchone() == (1536,)
    process(session)
    assert not_fresh(db) == NOT_FRESH
    session.execute("DO LANGUAGE plpython3u $$ plpy.execute(f\"SET test.build = '{GD['autoembed']}'\") $$")
    [code] = db.execute("SELECT prosrc FROM pg_proc WHERE oid = 'autoembed._load_python'::regproc").fetchall()
    [running] = session.execute("SELECT current_setting('test.build') AS build").fetchall()
    assert f'GD["autoembed"] = "{running.build}"' in code.prosrc


@every_update
def test_an_update_chooses_no_function_for_a_model(
    connect: Connect, update: Update, sent: Callable[[], list[str]]
) -> None:
    """Another role has put its own in the place of the one that a superuser chose; it would see all texts."""
    db, owner = connect(), connect(user="upgrade_owner")
    db.execute("GRANT USAGE, CREATE ON SCHEMA app TO upgrade_owner; DROP FUNCTION app.length(text[])")
    owner.execute("CREATE FUNCTION app.length(texts text[]) RETURNS vector[] RETURN ARRAY['[7,7]'::vector]")

    update_to(db, update[1])

    db.execute("SELECT autoembed.process()")
    assert db.execute("SELECT embedding FROM lengths WHERE id = 2").fetchall() == [(None,)]
    db.execute("SELECT autoembed.alter_model('length')")
    db.execute("SELECT autoembed.process()")
    assert db.execute("SELECT embedding::text FROM lengths WHERE id = 2").fetchall() == [("[7,7]",)]


@every_update
def test_a_model_that_cannot_be_used_keeps_no_database_from_its_update(connect: Connect, update: Update) -> None:
    db = connect()
    db.execute("DROP FUNCTION app.length(text[])")
    db.execute("CREATE FUNCTION app.length(texts text[]) RETURNS int RETURN 7")

    update_to(db, update[1])

    assert db.execute("SELECT extversion FROM pg_extension WHERE extname = 'autoembed'").fetchone() == (update[1],)


# Under load ------------------------------------------------------------------------------------------

# A lane of the version before goes on beside the new one until this time is up.
LANE_SECONDS = 10


@dataclass
class Load:
    """Threads that write and embed; each begins again when its session ends, as pg_cron's jobs do."""

    connect: Connect
    errors: list[str] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    written: int = 0

    def write(self) -> None:
        db = self.connect()
        while not self.ended.is_set():
            # The lanes are to be done soon after.
            wait_until(lambda: self.ended.is_set() or waiting(db) < 300)
            self.written += 1
            number = self.written
            db.execute("INSERT INTO pages VALUES (%s, 'new', %s)", [100 + number, f"page {number}"])
            db.execute("UPDATE pages SET body = %s WHERE id = %s", [f"changed {number}", 100 + number // 2])
            db.execute("INSERT INTO stories VALUES (%s, %s)", [100 + number, f"story {number}"])
            db.execute("UPDATE visits SET body = %s", [f"visit {number}"])
            db.execute("UPDATE documents SET content = %s WHERE id = 1", [f"document {number}"])

    def embed(self) -> None:
        while not self.ended.is_set():
            try:
                with self.connect() as db:
                    db.execute(f"CALL autoembed.work({LANE_SECONDS})")
            except psycopg.Error as error:
                self.errors.append(str(error))


@every_update
def test_an_update_while_lanes_run_and_rows_are_written_loses_no_row(
    connect: Connect, update: Update, api: FakeApi, sent: Callable[[], list[str]]
) -> None:
    db = connect()
    api.behave(delay_seconds=0.05, faults=[{"status": 400, "match": "poison", "times": "forever"}])
    load = Load(connect)
    threads = [threading.Thread(target=run) for run in (load.write, load.embed, load.embed)]
    lanes = "SELECT count(*) FROM autoembed.lane"
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: load.written > 30 and db.execute(lanes).fetchone() == (2,), 90)

        update_to(db, update[1])

        [now] = db.execute("SELECT clock_timestamp() AS time").fetchall()
        new = "SELECT count(*), count(*) FILTER (WHERE backend_start > %s) AS new FROM autoembed.lane"
        wait_until(lambda: db.execute(new, [now.time]).fetchone() == (2, 2), 90)
        errors, written = len(load.errors), load.written
        wait_until(lambda: load.written > written + 30, 90)
    finally:
        load.ended.set()
        db.execute("UPDATE autoembed.lane SET stop = true")
        for thread in threads:
            thread.join(20)
    process(db)
    assert not_fresh(db) == NOT_FRESH
    assert failed(db) == ["# t\n\npoison"]
    # A lane of the version before may end with an error, and so may one that begins during the update.
    assert load.errors[errors:] == []


@every_update
def test_an_update_waits_for_no_writer_and_no_writer_for_an_update(connect: Connect, update: Update) -> None:
    db, writer, other = connect(), connect(), connect()
    # The guide's triggers read the table of pipelines. An update that changes that table takes turns with them.
    writes = """
        SET lock_timeout = '2s';
        UPDATE pages SET body = 'written' WHERE id = {id};
        INSERT INTO stories VALUES ({id} + 10, 'written');
        INSERT INTO "Odd notes" (title, body, ok) VALUES ('t', 'written', true);
        UPDATE parts SET body = 'written' WHERE id = {id};
    """
    with writer.transaction():
        writer.execute(writes.format(id=1))
        with db.transaction():
            db.execute("SET LOCAL lock_timeout = '2s'")
            update_to(db, update[1])
            other.execute(writes.format(id=2))

    process(db)
    assert not_fresh(db) == NOT_FRESH


@every_update
def test_an_update_gives_up_rather_than_stop_all_who_come_after_it(connect: Connect, update: Update) -> None:
    """It would wait for a table of autoembed that a tenant's transaction has read, and all others behind it."""
    db, tenant = connect(), connect(user="upgrade_owner")
    db.execute("SET statement_timeout = '20s'")
    with tenant.transaction(force_rollback=True):
        tenant.execute("SELECT FROM autoembed.status; SELECT FROM autoembed.pipeline")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            update_to(db, update[1])

    update_to(db, update[1])


@every_update
def test_a_table_that_its_owner_has_locked_keeps_no_database_from_its_update(connect: Connect, update: Update) -> None:
    db, owner = connect(), connect()
    with owner.transaction():
        owner.execute("LOCK TABLE pages, stories")
        with db.transaction():
            db.execute("SET LOCAL statement_timeout = '20s'")
            update_to(db, update[1])

    process(db)
    assert not_fresh(db) == NOT_FRESH


# A dump of the version before ------------------------------------------------------------------------


DEFINITIONS = """
    SELECT p.id, to_jsonb(p) - '{built_from,table_shape,content_function_oid,chunk_function_oid}'::text[] AS definition
    FROM autoembed.pipeline AS p
    ORDER BY p.id
"""


@pytest.mark.parametrize("form", ["plain", "custom"])
@every_release
def test_a_dump_of_an_older_version_is_restored_into_this_one(
    server: Server, dbname: str, connect: Connect, update: Update, form: str, sent: Callable[[], list[str]]
) -> None:
    before = connect()
    before.execute("SELECT autoembed.resync('copies')")
    name = f"restored_{uuid.uuid4().hex[:12]}"
    load = {"plain": "psql --quiet --echo-errors", "custom": "pg_restore"}[form]
    command = f"pg_dump -U postgres -F {form} {dbname} | {load} -U postgres -d {name} 2>&1"
    with server.database(name):
        _, output = server.container.get_wrapped_container().exec_run(["bash", "-c", command])
        with server.connect(name) as db:
            # A dump names functions in its grants, and this version has not all of them. No other statement fails.
            statements = re.findall(r"ERROR: .*\n(?:STATEMENT:  |Command was: )(\w+)", output.decode())
            assert set(statements) == {"GRANT"} and output.decode().count("ERROR: ") == len(statements), output.decode()
            db.execute(
                "SELECT autoembed.grant_usage('upgrade_owner'); SELECT autoembed.grant_monitor('upgrade_watcher')"
            )
            update_to(before, update[1])
            assert db.execute(DEFINITIONS).fetchall() == before.execute(DEFINITIONS).fetchall()
            process(db)

            # That a model rests is not in a dump, and its row is embedded.
            assert sent() == sorted([*SENT_OF_WAITING_ROWS, "tired"])
            assert failed(db) == ["# t\n\npoison"]
            assert not_fresh(db) == {table: texts for table, texts in NOT_FRESH.items() if table != "tired"}
            # The functions of tables that wait are those of the dump until they are embedded.
            for each in (db, before):
                each.execute("SELECT autoembed.resume('quiet')")
                each.execute("ALTER TABLE narrow ALTER COLUMN embedding TYPE halfvec(1536) USING NULL")
            process(db)
            assert_same(functions_of_tables(db), functions_of_tables(before))


# Hostile functions -----------------------------------------------------------------------------------

# Each is a better match for some call than PostgreSQL's own, which takes any type, or the same for a session that has
# "public" first in its search_path.
HOSTILE_FUNCTIONS = {
    "format(text, text)": "pg_catalog.format($1, VARIADIC ARRAY[$2])",
    "format(text, name)": "pg_catalog.format($1, VARIADIC ARRAY[$2])",
    "format(text, regclass)": "pg_catalog.format($1, VARIADIC ARRAY[$2])",
    "format(text, regprocedure)": "pg_catalog.format($1, VARIADIC ARRAY[$2])",
    "format(text, text, text)": "pg_catalog.format($1, VARIADIC ARRAY[$2, $3])",
    "format(text, text, text, text)": "pg_catalog.format($1, VARIADIC ARRAY[$2, $3, $4])",
    "concat(text, text)": "pg_catalog.concat(VARIADIC ARRAY[$1, $2])",
    "concat(text, text, text)": "pg_catalog.concat(VARIADIC ARRAY[$1, $2, $3])",
    "concat_ws(text, text, text)": "pg_catalog.concat_ws($1, VARIADIC ARRAY[$2, $3])",
    "quote_literal(integer)": "pg_catalog.quote_literal($1::text)",
    "set_config(text, text, boolean)": "pg_catalog.set_config($1, $2, $3)",
}
HOSTILE_OPERATORS = {
    "= (text, text)": "pg_catalog.texteq($1, $2)",
    "= (name, name)": "pg_catalog.nameeq($1, $2)",
    "= (oid, oid)": "pg_catalog.oideq($1, $2)",
    "= (regclass, regclass)": "pg_catalog.oideq($1, $2)",
    "= (text[], text[])": "pg_catalog.array_eq($1, $2)",
    "|| (text, integer)": "pg_catalog.textcat($1, $2::text)",
    "|| (text, regclass)": "pg_catalog.textcat($1, $2::text)",
}


def set_traps(owner: Connection) -> None:
    """Functions and operators in the schema public that note who runs them, and do what PostgreSQL's own do."""
    owner.execute("CREATE TABLE public.caught (name text, role name)")

    def trap(name: str, result: str, call: str) -> None:
        owner.execute(
            f"CREATE FUNCTION public.{name} RETURNS {result} LANGUAGE plpgsql AS $$ BEGIN"
            f" INSERT INTO public.caught VALUES ('{name}', current_user); RETURN {call}; END $$".encode()
        )

    for name, call in HOSTILE_FUNCTIONS.items():
        trap(name, "text", call)
    for number, (name, call) in enumerate(HOSTILE_OPERATORS.items()):
        symbol, left, right = re.findall(r"(\S+) \((.*), (.*)\)", name)[0]
        trap(f"operator_{number}({left}, {right})", "boolean" if symbol == "=" else "text", call)
        owner.execute(
            f"CREATE OPERATOR public.{symbol}"
            f" (LEFTARG = {left}, RIGHTARG = {right}, FUNCTION = public.operator_{number})".encode()
        )


# The extension's objects that depend on an object in the schema public that is of no extension.
DEPENDENT_ON_PUBLIC = """
    SELECT pg_describe_object(d.classid, d.objid, d.objsubid) AS object,
        pg_describe_object(d.refclassid, d.refobjid, 0) AS other
    FROM pg_depend AS d
    CROSS JOIN LATERAL pg_identify_object(d.refclassid, d.refobjid, 0) AS o
    WHERE o.schema = 'public' AND d.deptype <> 'e' AND d.refclassid IN ('pg_proc'::regclass, 'pg_operator'::regclass)
      AND pg_describe_object(d.classid, d.objid, d.objsubid) ~ 'autoembed'
      AND NOT EXISTS (
          SELECT FROM pg_depend AS m
          WHERE m.classid = d.refclassid AND m.objid = d.refobjid AND m.deptype = 'e'
      )
"""


@pytest.fixture
def hostile(server: Server, lived_in: Callable[..., str]) -> Iterator[Connection]:
    """A database with what autoembed needs, its owner no superuser."""
    name = f"hostile_{uuid.uuid4().hex[:12]}"
    with server.database(name), server.connect(name, options="-c search_path=public,pg_catalog") as db:
        db.execute(f"ALTER DATABASE {name} OWNER TO upgrade_owner")
        db.execute("CREATE EXTENSION plpython3u; CREATE EXTENSION vector; CREATE EXTENSION pgmq")
        yield db


def assert_nothing_was_caught(server: Server, dbname: str) -> None:
    with server.connect(dbname, options="-c search_path=pg_catalog") as db:
        assert db.execute("SELECT name, role FROM public.caught WHERE role <> 'upgrade_owner'").fetchall() == []
        assert db.execute(DEPENDENT_ON_PUBLIC).fetchall() == []


def test_an_installation_runs_no_function_of_the_databases_owner(hostile: Connection, server: Server) -> None:
    with server.connect(hostile.info.dbname, user="upgrade_owner") as owner:
        set_traps(owner)

    hostile.execute("CREATE EXTENSION autoembed")

    assert_nothing_was_caught(server, hostile.info.dbname)


@pytest.mark.parametrize("installed", ["before", "after"])
@pytest.mark.parametrize("version", [before for before, _ in UPDATES])
def test_an_update_runs_no_function_of_the_databases_owner(
    hostile: Connection, server: Server, version: str, installed: str
) -> None:
    """After an installation that ran such functions, as 0.1.0 does, the update leaves no trace of them."""
    with server.connect(hostile.info.dbname, user="upgrade_owner") as owner:
        if installed == "before":
            hostile.execute(f"CREATE EXTENSION autoembed VERSION '{version}'")
        set_traps(owner)
        if installed == "after":
            hostile.execute(f"CREATE EXTENSION autoembed VERSION '{version}'")
        hostile.execute("SELECT autoembed.create_model('small', 'fake', 8)")
        hostile.execute("SELECT autoembed.grant_usage('upgrade_owner')")
        hostile.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
        hostile.execute("SELECT autoembed.enable('pages', 'embedding', content_columns => '{body}', model => 'small')")
        hostile.execute("TRUNCATE public.caught")

        update_to(hostile, dict(UPDATES)[version])

        assert_nothing_was_caught(server, hostile.info.dbname)
        hostile.execute("INSERT INTO pages VALUES (1, 'text')")
        hostile.execute("SELECT autoembed.process(); SELECT * FROM autoembed.status; SELECT * FROM autoembed.progress")
        assert hostile.execute("SELECT count(*) FROM pages WHERE embedding IS NOT NULL").fetchone() == (1,)
        assert_nothing_was_caught(server, hostile.info.dbname)
