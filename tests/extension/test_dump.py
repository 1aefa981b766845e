"""A database that is dumped and restored goes on where it was, and nothing is paid for twice."""

from __future__ import annotations

import contextlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection, Server, insert, is_settled, waiting
from waiting import wait_until

Connect = Callable[..., Connection]
Role = Callable[[str], str]
Restore = Callable[..., Connection]

MODEL = "text-embedding-3-small"
TABLES = ["notes", "pages", "stories", "documents"]


@pytest.fixture
def restored(server: Server, dbname: str) -> Iterator[Restore]:
    """Dumps the test's database in the server's container and restores it beside it; a session there."""
    name = f"restored_{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        stack.enter_context(server.database(name))

        def restore(options: str = "", restore_options: str = "", before: str = "SELECT") -> Connection:
            with server.connect(name) as session:
                session.execute(before.encode())
            load = "pg_restore --exit-on-error" if "-F" in options else "psql --quiet -v ON_ERROR_STOP=1 -f"
            command = (
                f"pg_dump -U postgres {options} -f /tmp/{name} {dbname} &&"
                f" {load} /tmp/{name} {restore_options} -U postgres -d {name} 2>&1;"
                f" code=$?; rm -r /tmp/{name}; exit $code"
            )
            code, output = server.container.get_wrapped_container().exec_run(["bash", "-c", command])
            printed = output.decode()
            assert code == 0 and "ERROR:" not in printed, printed[-3000:]
            return stack.enter_context(server.connect(name))

        yield restore


@pytest.fixture
def lived_in(db: Connection, api: FakeApi, role: Role, connect: Connect) -> Connection:
    """Tables of every kind, renamed and changed since, with rows that are embedded and one that has failed."""
    owner = role("owner")
    db.execute("SELECT autoembed.grant_usage(%s)", [owner])
    db.execute("CREATE SCHEMA app")
    db.execute("CREATE TABLE drafts (gone int, id int PRIMARY KEY, heading text, dull int, body text)")
    db.execute("SELECT autoembed.enable('drafts', 'embedding', content_columns => '{heading,body}')")
    db.execute("INSERT INTO drafts (id, heading, body) SELECT n, 'h' || n, 'b' || n FROM generate_series(1, 20) AS n")
    # A dump leaves out dropped columns: the numbers of the columns are others afterwards.
    db.execute("ALTER TABLE drafts DROP COLUMN gone, DROP COLUMN dull")
    db.execute("ALTER TABLE drafts RENAME COLUMN heading TO title")
    db.execute("ALTER TABLE drafts RENAME TO notes")
    db.execute("ALTER TABLE notes ADD COLUMN views int DEFAULT 0")

    db.execute("CREATE TABLE manuals (number int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('manuals', content_columns => '{body}')")
    db.execute("INSERT INTO manuals SELECT n, 'manual ' || n FROM generate_series(1, 5) AS n")

    db.execute(
        "CREATE TABLE app.sites (x int, site text, path text, label text, live boolean, PRIMARY KEY (site, path))"
    )
    db.execute("CREATE FUNCTION shown(site text) RETURNS boolean LANGUAGE sql RETURN site <> 'test'")
    db.execute(
        "SELECT autoembed.enable('app.sites', 'vector', content_template => '# {label}\\n\\n{path}',"
        " condition => 'live AND shown(site)', on_change => 'clear')"
    )
    db.execute("INSERT INTO app.sites (site, path, label, live) VALUES ('a', '/', 'A', true), ('a', '/2', 'No', false)")
    db.execute("ALTER TABLE app.sites DROP COLUMN x")
    db.execute("ALTER TABLE app.sites RENAME COLUMN live TO published")
    db.execute("ALTER TABLE app.sites SET SCHEMA public")
    db.execute("ALTER TABLE sites RENAME TO pages")

    with connect(user=owner) as session:
        db.execute(f"GRANT CREATE ON SCHEMA public TO {owner}")
        session.execute("CREATE TABLE stories (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), content text)")
        session.execute(
            "CREATE FUNCTION story(s stories) RETURNS text LANGUAGE sql AS"
            " $$ SELECT 'by ' || current_user || ': ' || s.content $$"
        )
        session.execute("SELECT autoembed.enable('stories', 'embedding', content_function => 'story')")
        session.execute("INSERT INTO stories (content) VALUES ('once'), ('twice')")

    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(GUIDE_TRIGGERS)
    insert(db, "from the guide", "poison")

    db.execute(
        "SELECT autoembed.create_model('other', 'openai', 256, model_id => 'text-embedding-3-large', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [api.base_url],
    )
    db.execute("SELECT autoembed.allow_http_host('embeddings.example')")
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    process(db)
    assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (1,)
    return db


def process(db: Connection) -> None:
    db.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
    while db.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass


def embedded(db: Connection) -> dict[str, list[str]]:
    """The texts of each table whose vector is theirs; any other vector is a failure."""
    owner = db.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'stories'").fetchone()
    assert owner is not None
    sources = {
        "notes": "concat_ws(E'\\n\\n', title, body), embedding::vector::real[] FROM notes",
        "pages": "'# ' || label || E'\\n\\n' || path, vector::vector::real[] FROM pages",
        "stories": f"'by {owner[0]}: ' || content, embedding::vector::real[] FROM stories",
        "documents": "embedding_input(d), embedding::vector::real[] FROM documents AS d",
        "manuals": "body, (SELECT e.embedding::real[] FROM manuals_embeddings AS e WHERE e.number = m.number)"
        " FROM manuals AS m",
    }
    found: dict[str, list[str]] = {}
    for table, source in sources.items():
        found[table] = []
        for text, vector in db.execute(f"SELECT {source}".encode()).fetchall():
            if vector is not None:
                assert np.allclose(vector, embedding_of(text), atol=1e-3), (table, text)
                found[table].append(text)
        found[table].sort()
    return found


def definitions(db: Connection) -> list[Any]:
    return db.execute(
        "SELECT p.id, p.table_id::text, p.embedding_column, p.key_columns, p.content_columns, p.content_template,"
        " p.content_function, p.content_function_id, p.condition, p.condition_columns, p.model, p.on_change,"
        " p.managed, p.paused FROM autoembed.pipeline AS p ORDER BY p.id"
    ).fetchall()


CONTENTS = {
    "pipeline": "SELECT * FROM autoembed.status ORDER BY 1",
    "model": "SELECT * FROM autoembed.model ORDER BY name",
    "setting": "SELECT * FROM autoembed.setting ORDER BY name",
    "chunks": "SELECT * FROM manuals_chunks ORDER BY number, chunk_number",
    "failure": "SELECT * FROM autoembed.failure ORDER BY id",
    "embedded": "SELECT * FROM autoembed.embedded ORDER BY pipeline_id, key",
    "usage": "SELECT * FROM autoembed.usage ORDER BY day, model, table_name::text",
    "queue": "SELECT msg_id, message FROM pgmq.q_embedding_jobs ORDER BY msg_id",
    "backfill": "SELECT * FROM autoembed.backfill ORDER BY pipeline_id",
    "queues": "SELECT queue_name FROM pgmq.meta ORDER BY queue_name",
    "triggers": "SELECT tgrelid::regclass::text, tgname, tgenabled FROM pg_trigger"
    " WHERE NOT tgisinternal ORDER BY 1, 2",
    "functions": "SELECT p.oid::regprocedure::text, p.proowner::regrole::text, p.prosecdef, p.proacl::text"
    " FROM pg_proc AS p WHERE p.proname ~ '_[0-9]+$' AND p.pronamespace = 'autoembed'::regnamespace ORDER BY 1",
}


@pytest.mark.parametrize(
    ("options", "restore_options"),
    [
        ("", ""),
        ("", "--single-transaction"),
        ("-Fc", ""),
        ("-Fc", "--single-transaction"),
        ("-Fc", "-j4"),
        ("-Fd -j4", "-j4"),
        ("-Fc --section=pre-data --section=data --section=post-data", "--no-comments"),
    ],
)
def test_a_restored_database_knows_what_it_knew(
    lived_in: Connection, restored: Restore, options: str, restore_options: str
) -> None:
    lived_in.execute("SELECT autoembed.pause('pages')")
    insert(lived_in, "waits")
    lived_in.execute("SELECT autoembed.resync('notes')")

    copy = restored(options, restore_options)

    assert_same(copy, lived_in)


@pytest.mark.parametrize(
    ("options", "restore_options"),
    [("--clean --if-exists", ""), ("-Fc", "--clean --if-exists"), ("-Fd", "--clean --if-exists --single-transaction")],
)
def test_a_restore_may_replace_what_is_there(
    lived_in: Connection, restored: Restore, options: str, restore_options: str
) -> None:
    restored().execute("INSERT INTO notes (id, title, body) VALUES (100, 'lost', 'in the restore')")
    lived_in.execute("INSERT INTO notes (id, title, body) VALUES (101, 'new', 'note')")

    copy = restored(options, restore_options)

    assert_same(copy, lived_in)


def test_a_restored_cluster_knows_what_it_knew(lived_in: Connection, server: Server, dbname: str) -> None:
    insert(lived_in, "waits")
    beside = f"beside_{dbname}"
    command = (
        "pg_dumpall -U postgres --exclude-database='[^t]*' --exclude-database='template*'"
        # The names of roles end with that of the database.
        f" | sed -E '/DATABASE|^.connect/s/\\b{dbname}\\b/{beside}/' | psql -U postgres -qf - 2>&1"
    )
    with ExitStack() as stack:
        stack.callback(server.drop_database, beside)
        output = server.container.get_wrapped_container().exec_run(["bash", "-c", command]).output.decode()

        errors = [line for line in output.splitlines() if "ERROR:" in line]
        assert errors and all(re.search('role "[^"]+" already exists', line) for line in errors), errors
        assert_same(stack.enter_context(server.connect(beside)), lived_in)


def assert_same(copy: Connection, lived_in: Connection) -> None:
    assert definitions(copy) == definitions(lived_in)
    for name, sql in CONTENTS.items():
        if name != "pipeline":
            assert copy.execute(sql.encode()).fetchall() == lived_in.execute(sql.encode()).fetchall(), name
    assert [row.advice for row in copy.execute("SELECT * FROM autoembed.doctor()") if "triggers" in row.subject] == (
        [None] * 5
    )


def test_no_foreign_key_joins_tables_of_a_dump(db: Connection) -> None:
    """A restore in parallel loads them in any order."""
    between = db.execute(
        "SELECT k.conname FROM pg_constraint AS k JOIN pg_extension AS e ON e.extname = 'autoembed'"
        " WHERE k.contype = 'f' AND k.conrelid = ANY (e.extconfig) AND k.confrelid = ANY (e.extconfig)"
    ).fetchall()

    assert between == []


def test_nothing_stays_of_a_pipeline_that_has_ended(lived_in: Connection) -> None:
    lived_in.execute("SELECT autoembed.resync(t) FROM unnest('{notes,documents}'::regclass[]) AS t")
    for table in [*TABLES, "manuals"]:
        lived_in.execute(f"SELECT autoembed.disable('{table}')")

    for table in ("pipeline", "backfill", "embedded", "failure", "pipeline_rest"):
        assert lived_in.execute(f"SELECT * FROM autoembed.{table}".encode()).fetchall() == [], table


def test_a_model_that_a_restore_brings_later_is_waited_for(db: Connection, api: FakeApi) -> None:
    db.execute("SELECT autoembed.create_model('later', 'fake', 3)")
    for table, model in (("notes", "later"), ("pages", MODEL)):
        db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text)".encode())
        db.execute("SELECT autoembed.enable(%s, 'embedding', content_columns => '{body}', model => %s)", [table, model])
        db.execute(f"INSERT INTO {table} VALUES (1, 'one')".encode())
    db.execute("CREATE TABLE saved AS SELECT * FROM autoembed.model WHERE name = 'later'")
    db.execute("DELETE FROM autoembed.model WHERE name = 'later'")

    process(db)

    assert db.execute("SELECT count(embedding) FROM pages").fetchone() == (1,)
    state = "SELECT state, reason FROM autoembed.status WHERE table_name = 'notes'"
    assert db.execute(state).fetchone() == ("stopped", 'model "later" does not exist')
    db.execute("INSERT INTO autoembed.model SELECT * FROM saved")
    process(db)
    assert db.execute("SELECT count(embedding) FROM notes").fetchone() == (1,)


def test_a_restored_table_is_embedded_as_before_and_unchanged_texts_are_not_sent_again(
    lived_in: Connection, restored: Restore, api: FakeApi
) -> None:
    before = embedded(lived_in)
    insert(lived_in, "waits")
    lived_in.execute("UPDATE notes SET body = 'new' WHERE id = 1")
    sent = len(api.texts())
    copy = restored()

    process(copy)

    assert sorted(api.texts()[sent:]) == ["# t\n\nwaits", "h1\n\nnew"]
    sent = len(api.texts())
    for table in TABLES:
        copy.execute(f"SELECT autoembed.resync('{table}')")
    process(copy)
    # The one that failed is still refused; nothing else was sent.
    assert {text for text in api.texts()[sent:] if text != "autoembed"} <= {"# t\n\npoison"}
    after = embedded(copy)
    assert after["pages"] == before["pages"] and after["stories"] == before["stories"]
    assert after["documents"] == sorted([*before["documents"], "# t\n\nwaits"])
    assert "h1\n\nnew" in after["notes"] and len(after["notes"]) == 20


def test_each_restored_table_captures_every_kind_of_change(
    lived_in: Connection, restored: Restore, api: FakeApi
) -> None:
    copy = restored()
    sent = len(api.texts())

    copy.execute("INSERT INTO notes (id, title, body) VALUES (100, 'new', 'note')")
    copy.execute("UPDATE notes SET views = 7 WHERE id = 3")
    copy.execute("UPDATE notes SET title = 'changed' WHERE id = 2")
    copy.execute("DELETE FROM notes WHERE id = 4")
    copy.execute("INSERT INTO pages VALUES ('b', '/', 'B', true), ('test', '/', 'T', true)")
    copy.execute("UPDATE pages SET label = 'AA' WHERE path = '/' AND site = 'a'")
    assert copy.execute("SELECT vector IS NULL FROM pages WHERE label = 'AA'").fetchone() == (True,)
    copy.execute("INSERT INTO stories (content) VALUES ('thrice')")
    copy.execute("UPDATE manuals SET body = 'revised' WHERE number = 1; DELETE FROM manuals WHERE number = 2")
    assert copy.execute("SELECT number FROM manuals_embeddings WHERE number = 2").fetchall() == []
    insert(copy, "newer")
    process(copy)

    [owner] = copy.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'stories'").fetchall()
    assert sorted(api.texts()[sent:]) == sorted(
        ["new\n\nnote", "changed\n\nb2", "# B\n\n/", "# AA\n\n/", f"by {owner[0]}: thrice", "# t\n\nnewer", "revised"]
    )
    assert {table: len(texts) for table, texts in embedded(copy).items()} == {
        "notes": 20,
        "pages": 2,
        "stories": 3,
        "documents": 2,
        "manuals": 4,
    }
    assert copy.execute("SELECT key FROM autoembed.embedded WHERE key = '[4]' AND pipeline_id = 1").fetchall() == []


def test_a_restored_table_still_follows_renames_and_drops(
    lived_in: Connection, restored: Restore, api: FakeApi
) -> None:
    copy = restored()
    sent = len(api.texts())

    copy.execute("ALTER TABLE notes RENAME COLUMN title TO headline")
    copy.execute("ALTER TABLE pages RENAME COLUMN published TO visible")
    copy.execute("ALTER TABLE pages RENAME COLUMN label TO name")
    copy.execute("CREATE SCHEMA elsewhere; GRANT USAGE ON SCHEMA elsewhere TO PUBLIC")
    copy.execute("ALTER TABLE stories SET SCHEMA elsewhere")
    copy.execute("ALTER FUNCTION story RENAME TO tale")
    copy.execute("ALTER TABLE notes RENAME TO memos")
    copy.execute("INSERT INTO memos (id, headline, body) VALUES (100, 'new', 'memo')")
    copy.execute("INSERT INTO pages VALUES ('b', '/', 'B', true), ('b', '/2', 'B', false)")
    copy.execute("INSERT INTO elsewhere.stories (content) VALUES ('thrice')")
    process(copy)

    [owner] = copy.execute("SELECT tableowner AS name FROM pg_tables WHERE tablename = 'stories'").fetchall()
    assert sorted(api.texts()[sent:]) == sorted(["# B\n\n/", "new\n\nmemo", f"by {owner.name}: thrice"])
    copy.execute("ALTER TABLE memos DROP COLUMN body")
    copy.execute("INSERT INTO memos (id, headline) VALUES (101, 'no content column any more')")
    tables = copy.execute(
        "SELECT table_name::text AS name FROM autoembed.status WHERE state = 'stopped' ORDER BY 1"
    ).fetchall()
    assert [row.name for row in tables] == ["memos"]


def test_a_backfill_in_the_middle_goes_on_where_it_was(lived_in: Connection, restored: Restore, api: FakeApi) -> None:
    lived_in.execute("SELECT autoembed.reembed('notes')")
    lived_in.execute("SELECT autoembed.process(batch_size => 7, max_requests => 1)")
    assert lived_in.execute("SELECT position, rows_queued FROM autoembed.backfill").fetchone() == ("[7]", 7)
    sent = len(api.texts())

    copy = restored()
    process(copy)

    assert sorted(api.texts()[sent:]) == sorted(f"h{n}\n\nb{n}" for n in range(8, 21))
    assert copy.execute("SELECT count(*) FROM autoembed.backfill").fetchone() == (0,)


def test_failed_rows_and_settings_work_after_a_restore(lived_in: Connection, restored: Restore, api: FakeApi) -> None:
    copy = restored()
    api.behave()

    assert copy.execute("SELECT autoembed.retry_failed('documents')").fetchone() == (1,)
    process(copy)

    assert "# t\n\npoison" in embedded(copy)["documents"]
    assert copy.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
    copy.execute("SELECT autoembed.create_model('far', 'openai', 3, base_url => 'http://embeddings.example/v1')")
    assert copy.execute("SELECT vector_dims(autoembed.embed('a question', 'other'))").fetchone() == (256,)
    assert copy.execute("SELECT vector_dims(autoembed.embed('a question'))").fetchone() == (1536,)
    # New identities do not meet old ones.
    copy.execute("CREATE TABLE more (id int PRIMARY KEY, content text)")
    copy.execute("SELECT autoembed.enable('more', 'embedding', content_columns => '{content}')")
    copy.execute("INSERT INTO more VALUES (1, 'more')")
    process(copy)
    assert copy.execute("SELECT embedding IS NOT NULL FROM more").fetchone() == (True,)


def test_a_restored_owner_keeps_his_rights_and_gets_no_others(
    lived_in: Connection, restored: Restore, server: Server
) -> None:
    copy = restored()
    [owner] = copy.execute("SELECT tableowner AS name FROM pg_tables WHERE tablename = 'stories'").fetchall()

    with server.connect(copy.info.dbname, user=owner.name) as session:
        names = session.execute("SELECT table_name::text AS name FROM autoembed.status").fetchall()
        assert [row.name for row in names] == ["stories"]
        session.execute("SELECT autoembed.alter_pipeline('stories', condition => 'content <> ''twice''')")
        session.execute("INSERT INTO stories (content) VALUES ('thrice')")
    process(copy)

    assert [text.split(": ")[1] for text in embedded(copy)["stories"]] == ["once", "thrice"]


# A schema without its data ---------------------------------------------------------------------------


def test_a_schema_alone_is_restored_and_its_tables_can_be_written(lived_in: Connection, restored: Restore) -> None:
    copy = restored("--schema-only")

    for table in TABLES:
        assert copy.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    copy.execute("INSERT INTO notes (id, title, body) VALUES (1, 'a', 'b')")
    copy.execute("UPDATE notes SET title = 'c'")
    copy.execute("INSERT INTO pages VALUES ('b', '/', 'B', true)")
    copy.execute("INSERT INTO stories (content) VALUES ('once')")
    insert(copy, "text")
    copy.execute("SELECT autoembed.process()")
    copy.execute("DELETE FROM notes")


def test_another_table_enabled_in_a_restored_schema_harms_no_older_one(
    lived_in: Connection, restored: Restore, api: FakeApi
) -> None:
    """The triggers came with the schema and call functions by number; the numbers begin again."""
    copy = restored("--schema-only")
    copy.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
    copy.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
    copy.execute("CREATE TABLE others (code text PRIMARY KEY, content text)")
    copy.execute("SELECT autoembed.enable('others', 'embedding', content_columns => '{content}')")
    sent = len(api.texts())

    copy.execute("INSERT INTO others VALUES ('x', 'other')")
    for number in range(1, 4):
        copy.execute("INSERT INTO notes (id, title, body) VALUES (%s, 'a', 'b')", [number])
    copy.execute("UPDATE notes SET title = 'c'")
    copy.execute("INSERT INTO pages VALUES ('b', '/', 'B', true)")
    process(copy)

    assert api.texts()[sent:] == ["other"]
    assert copy.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)


def test_a_table_of_a_restored_schema_can_be_enabled_again(
    lived_in: Connection, restored: Restore, api: FakeApi
) -> None:
    copy = restored("--schema-only")
    copy.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
    copy.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
    copy.execute("SELECT autoembed.enable('pages', 'vector', content_template => '# {label}\\n\\n{path}')")
    copy.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{title,body}')")
    sent = len(api.texts())

    copy.execute("INSERT INTO notes (id, title, body) VALUES (1, 'a', 'b')")
    copy.execute("INSERT INTO pages VALUES ('b', '/', 'B', true)")
    process(copy)

    assert sorted(api.texts()[sent:]) == ["# B\n\n/", "a\n\nb"]
    assert len(embedded(copy)["notes"]) == len(embedded(copy)["pages"]) == 1


STRAY = "SELECT subject, advice FROM autoembed.doctor() WHERE finding LIKE 'a dump has brought them%' ORDER BY 1"


def test_triggers_without_their_pipeline_are_named_and_taken_away(
    lived_in: Connection, restored: Restore, api: FakeApi, server: Server
) -> None:
    copy = restored("--schema-only")
    copy.execute("SELECT autoembed.alter_model(%s, base_url => %s)", [MODEL, api.base_url])
    copy.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
    stray = copy.execute(STRAY).fetchall()
    assert [row.subject for row in stray] == [
        f"triggers of public.{table}" for table in ("manuals", "manuals_embeddings", "notes", "pages", "stories")
    ]

    copy.execute("SELECT autoembed.disable('pages')")
    copy.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{title,body}')")
    [owner] = copy.execute("SELECT tableowner AS name FROM pg_tables WHERE tablename = 'stories'").fetchall()
    with server.connect(copy.info.dbname, user=owner.name) as session:
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("SELECT autoembed.disable('manuals', if_exists => true)")
        session.execute("SELECT autoembed.disable('stories')")

    left = [row.subject for row in copy.execute(STRAY)]
    assert left == ["triggers of public.manuals", "triggers of public.manuals_embeddings"]
    for advised in stray[:2]:
        copy.execute(advised.advice.split("; or take them away: ")[1].encode())
    assert copy.execute(STRAY).fetchall() == []


def test_a_table_that_is_not_attached_can_be_disabled_if_it_exists(db: Connection) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, embedding halfvec(384))")
    with pytest.raises(psycopg.errors.UndefinedObject, match="not attached"):
        db.execute("SELECT autoembed.disable('notes')")

    db.execute("SELECT autoembed.disable('notes', if_exists => true)")
    db.execute("SELECT autoembed.disable('notes', 'embedding', if_exists => true)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    db.execute("SELECT autoembed.disable('notes', if_exists => true)")

    assert db.execute("SELECT count(*) FROM autoembed.status").fetchone() == (0,)


# One table alone -------------------------------------------------------------------------------------

# A database whose pipeline has the number of that of notes.
ANOTHER = """
    CREATE EXTENSION autoembed CASCADE;
    SELECT autoembed.create_model('fake', 'fake', 1536), autoembed.set_default_model('fake');
    CREATE TABLE others (code text PRIMARY KEY, content text);
    SELECT autoembed.enable('others', 'embedding', content_columns => '{content}', on_change => 'clear');
    INSERT INTO others VALUES ('x', 'other');
"""


@pytest.mark.parametrize("options", ["", "-Fc"])
def test_a_dump_of_one_table_binds_to_no_pipeline_of_another(
    lived_in: Connection, restored: Restore, options: str
) -> None:
    lived_in.execute("SELECT autoembed.alter_pipeline('notes', on_change => 'clear')")

    copy = restored(f"{options} -t notes", before=ANOTHER)

    copy.execute("INSERT INTO notes (id, title, body) VALUES (100, 'new', 'note')")
    copy.execute("UPDATE notes SET title = 'changed' WHERE id = 2")
    copy.execute("DELETE FROM notes WHERE id = 3")
    assert copy.execute("SELECT message -> 'keys' FROM pgmq.q_embedding_jobs").fetchall() == [([["x"]],)]
    assert copy.execute("SELECT count(*) FROM notes WHERE embedding IS NULL").fetchone() == (1,)
    assert copy.execute(STRAY).fetchall() == []
    copy.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{title,body}')")
    process(copy)
    assert copy.execute("SELECT count(*) FROM notes WHERE embedding IS NULL").fetchone() == (0,)
    assert copy.execute("SELECT count(*) FROM others WHERE embedding IS NULL").fetchone() == (0,)
    copy.execute("TRUNCATE notes")
    process(copy)
    assert copy.execute("SELECT count(*) FROM others WHERE embedding IS NULL").fetchone() == (0,)


# The pipeline that has the number of that of manuals has a key of the same type.
ANOTHER_BESIDE = f"""
    {ANOTHER}
    CREATE TABLE shelves (number int PRIMARY KEY, content text);
    SELECT autoembed.enable('shelves', content_columns => '{{content}}');
    INSERT INTO shelves VALUES (1, 'shelf');
"""
# As in a dump without policies.
OPEN = (
    "DROP POLICY IF EXISTS autoembed_readers ON manuals_embeddings;"
    " ALTER TABLE manuals_embeddings DISABLE ROW LEVEL SECURITY"
)


@pytest.mark.parametrize(("options", "change"), [("", "SELECT"), ("-Fc", "SELECT"), ("", OPEN)])
def test_a_dump_of_a_table_and_its_embeddings_shows_them_to_no_reader_of_another_table(
    lived_in: Connection, restored: Restore, role: Role, server: Server, options: str, change: str
) -> None:
    process(lived_in)
    copy = restored(f"{options} -t 'manuals*'", before=ANOTHER_BESIDE)
    reader = role("reader")
    copy.execute(f"GRANT SELECT ON shelves TO {reader}")
    with server.connect(copy.info.dbname, user=reader) as session:
        for statement in (change, "SELECT autoembed.enable('manuals', content_columns => '{body}')"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                session.execute("SELECT FROM manuals_embeddings")
            copy.execute(statement.encode())
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute("SELECT FROM manuals_embeddings")

        copy.execute(f"GRANT SELECT ON manuals TO {reader}")
        process(copy)
        texts = session.execute("SELECT chunk FROM manuals_chunks ORDER BY number").fetchall()
        assert texts == [(f"manual {number}",) for number in range(1, 6)]
    comment = copy.execute("SELECT obj_description('manuals_chunks'::regclass)").fetchone()
    assert comment == ("The chunks of public.manuals with their texts. A text that has changed since is NULL.",)


def test_rows_that_a_restore_has_not_brought_yet_are_not_taken_for_deleted(documents: Connection, api: FakeApi) -> None:
    """A lane runs while a dump is restored. The queue comes first, then the rows, and the triggers last."""
    documents.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    documents.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    documents.execute("INSERT INTO notes VALUES (1, 'one'), (2, 'two')")
    [triggers] = documents.execute(
        "SELECT string_agg(pg_get_triggerdef(oid), ';') AS made,"
        " string_agg(format('DROP TRIGGER %I ON notes', tgname), ';') AS gone"
        " FROM pg_trigger WHERE tgrelid = 'notes'::regclass"
    ).fetchall()
    documents.execute(f"CREATE TABLE saved AS TABLE notes; {triggers.gone}; DELETE FROM notes".encode())

    documents.execute("SELECT autoembed.process()")

    state = "SELECT state, reason FROM autoembed.status WHERE table_name = 'notes'"
    assert documents.execute(state).fetchone() == ("resting", "its triggers are not there")
    documents.execute(f"INSERT INTO notes SELECT * FROM saved; {triggers.made}".encode())
    process(documents)
    assert documents.execute("SELECT count(embedding) FROM notes").fetchone() == (2,)


def test_messages_wait_for_pipelines_that_a_restore_brings_later(db: Connection, api: FakeApi) -> None:
    """A restore in parallel may bring the queue before the pipelines."""
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}', enqueue_existing => false)")
    db.execute("INSERT INTO notes VALUES (1, 'one')")
    db.execute("CREATE TABLE saved AS TABLE autoembed.pipeline")
    db.execute("SET session_replication_role = replica; DELETE FROM autoembed.pipeline")

    assert db.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)

    db.execute(
        "INSERT INTO autoembed.pipeline OVERRIDING SYSTEM VALUE SELECT * FROM saved; RESET session_replication_role"
    )
    process(db)
    assert db.execute("SELECT count(embedding) FROM notes").fetchone() == (1,)


def test_a_key_that_a_parallel_restore_brings_beside_its_pipeline_is_seen(db: Connection, connect: Connect) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("CREATE TABLE notes (id int NOT NULL, body text, CONSTRAINT notes_key PRIMARY KEY (id))")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}', model => 'test')")
    db.execute("CREATE TABLE dump AS SELECT * FROM autoembed.pipeline")
    db.execute("ALTER TABLE notes DROP CONSTRAINT notes_key; DELETE FROM autoembed.pipeline")
    other = connect()

    with other.transaction():
        other.execute("ALTER TABLE notes ADD PRIMARY KEY (id)")
        db.execute("INSERT INTO autoembed.pipeline OVERRIDING SYSTEM VALUE SELECT * FROM dump")
    with connect() as lane:
        lane.execute("SELECT autoembed.resync('notes'); INSERT INTO notes VALUES (1, 'one')")
        lane.execute("SELECT autoembed.process(); SELECT autoembed.process()")

    assert db.execute("SELECT state, reason, embedded FROM autoembed.status").fetchall() == [("idle", None, 1)]


def test_lanes_that_run_while_a_restore_loads_in_parallel_lose_no_row(
    db: Connection, api: FakeApi, restored: Restore, server: Server
) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    db.execute("INSERT INTO notes SELECT n, 'note ' || n || repeat(' word', 400) FROM generate_series(1, 3000) AS n")
    [[target]] = db.execute("SELECT datname FROM pg_database WHERE datname LIKE 'restored%'").fetchall()
    ended = threading.Event()
    calls: list[bool] = []

    def run_lanes() -> None:
        while not ended.is_set():
            # Until the extension is there, and while a lock of the restore ends a lane.
            with contextlib.suppress(psycopg.Error), server.connect(target) as session:
                session.execute("CALL autoembed.work(2)")
                calls.append(ended.is_set())

    lane = threading.Thread(target=run_lanes)
    lane.start()
    try:
        copy = restored("-Fd -j4", "-j4")
        wait_until(lambda: is_settled(copy), 60)
    finally:
        ended.set()
        lane.join()

    assert calls
    assert copy.execute("SELECT count(*) AS rows, count(embedding) AS vectors FROM notes").fetchone() == (3000, 3000)


@pytest.mark.parametrize("jobs", ["", "--jobs=4"])
def test_a_restored_table_follows_the_truncate_of_a_partition(db: Connection, restored: Restore, jobs: str) -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8), autoembed.set_default_model('test')")
    for table in ("notes", "pages"):
        db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)")
        for number in range(8):
            part = f"{table}_{number} PARTITION OF {table} FOR VALUES FROM ({10 * number}) TO ({10 * number + 10})"
            db.execute(f"CREATE TABLE {part}")
        db.execute(f"SELECT autoembed.enable('{table}', content_columns => '{{body}}')")
        db.execute(f"INSERT INTO {table} SELECT n, 'word ' || n FROM generate_series(0, 79) AS n")
    while db.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass

    copy = restored("-Fd", jobs)
    copy.execute("TRUNCATE notes_1, pages_7")

    problems = "SELECT FROM autoembed.pipeline AS p CROSS JOIN LATERAL autoembed._trigger_problems(p) AS t"
    assert copy.execute(problems).fetchall() == []
    for table in ("notes", "pages"):
        assert copy.execute(f"SELECT count(*) FROM {table}_embeddings").fetchone() == (70,)
    while waiting(copy):
        copy.execute("SELECT autoembed.process()")
    assert copy.execute("SELECT count(*) FROM autoembed.embedded").fetchone() == (140,)


# Each is a dump and what restores it, in turn.
DATA_ALONE = {
    "plain": [("-s", ""), ("-a --disable-triggers", "")],
    "custom": [("-Fc", "-s"), ("-Fc", "-a --disable-triggers")],
    "parallel": [("-Fd", "-s"), ("-Fd", "-a --disable-triggers -j4")],
    "inserts": [("-Fc", "-s"), ("-Fc --inserts", "-a -1 --disable-triggers")],
    "replica": [("-Fc", "-s"), ("-Fc", "-a")],
    "sections": [(f"-Fc --section={name}", "") for name in ("pre-data", "data", "post-data")],
}
ROLE = "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET session_replication_role = {}', current_database()); END $$"


@pytest.mark.parametrize("form", DATA_ALONE)
def test_a_restore_of_the_data_alone_brings_back_all_of_it(lived_in: Connection, restored: Restore, form: str) -> None:
    lived_in.execute("SELECT pgmq.create('another'), autoembed.set_default_model('other')")
    lived_in.execute("SELECT autoembed.pause('pages'), autoembed.resync('notes')")

    for options, restore_options in DATA_ALONE[form]:
        role = "replica" if form == "replica" and restore_options == "-a" else "origin"
        copy = restored(options, restore_options, before=ROLE.format(role))

    assert_same(copy, lived_in)


def test_the_triggers_of_a_restore_of_the_data_send_no_text_again(
    lived_in: Connection, restored: Restore, api: FakeApi
) -> None:
    restored("-Fc", "-s")
    copy = restored("-Fc", "-a")
    assert definitions(copy) == definitions(lived_in)
    sent = len(api.texts())

    process(copy)

    # The one that failed is tried again.
    assert set(api.texts()[sent:]) <= {"# t\n\npoison", "autoembed"}
    assert embedded(copy) == embedded(lived_in)


# A dump of which an option leaves a part out ---------------------------------------------------------

LEFT_OUT = "SELECT subject, finding, advice FROM autoembed.doctor() WHERE finding LIKE 'a restore %' ORDER BY subject"


@pytest.mark.parametrize(
    ("options", "restore_options"), [("", ""), ("--inserts", "-1"), ("-Fc", ""), ("-Fd -j2", "-j4"), ("-Fc", "-1")]
)
def test_a_table_that_a_dump_leaves_out_costs_its_own_pipeline_alone(
    lived_in: Connection, restored: Restore, api: FakeApi, options: str, restore_options: str
) -> None:
    lived_in.execute('ALTER TABLE notes RENAME TO "My notes"; UPDATE "My notes" SET body = \'waits\' WHERE id = 1')
    sent = len(api.texts())

    copy = restored(f"{options} --exclude-table='\"My notes\"'", restore_options)

    assert definitions(copy) == [row for row in definitions(lived_in) if row.table_id != '"My notes"']
    assert len(definitions(copy)) == 4
    [left] = copy.execute(LEFT_OUT).fetchall()
    assert left.subject == 'pipeline of public."My notes"'
    assert left.finding == 'a restore could not bring it back: relation "public.My notes" does not exist'
    process(copy)

    restored(f"{options} -t '\"My notes\"'", restore_options)
    copy.execute(left.advice.split("; or forget it: ")[0].removeprefix("Restore what is missing, then ").encode())

    assert copy.execute(LEFT_OUT).fetchall() == []
    assert definitions(copy) == definitions(lived_in)
    process(copy)
    # doctor() sends a word of its own.
    assert [text for text in api.texts()[sent:] if text != "autoembed"] == ["h1\n\nwaits"]


def test_a_pipeline_that_a_restore_has_left_out_can_be_forgotten(lived_in: Connection, restored: Restore) -> None:
    lived_in.execute("UPDATE notes SET body = 'waits' WHERE id = 1")
    copy = restored("--exclude-table=notes")
    [left] = copy.execute(LEFT_OUT).fetchall()

    copy.execute(left.advice.split("; or forget it: ")[1].encode())
    process(copy)

    assert copy.execute(LEFT_OUT).fetchall() == []
    assert copy.execute("SELECT FROM pg_proc WHERE proname ~ '^_content_1$'").fetchall() == []
    for table, column in (("embedded", "pipeline_id::text"), ("_job", "pipeline")):
        assert copy.execute(f"SELECT FROM autoembed.{table} WHERE {column} = '1'".encode()).fetchall() == []


@pytest.mark.parametrize("options", ["-Fc", "--inserts"])
def test_what_a_restore_has_left_out_is_in_the_next_dump(lived_in: Connection, restored: Restore, options: str) -> None:
    lived_in.execute("""INSERT INTO autoembed.restored VALUES ('pipeline', '{"id": 99}', 'a table is missing')""")

    copy = restored(options)

    assert definitions(copy) == definitions(lived_in)
    assert copy.execute("SELECT r.* FROM autoembed.restored AS r").fetchall() == [
        ("pipeline", {"id": 99}, "a table is missing")
    ]


def test_a_dump_without_the_embeddings_brings_back_the_tables_that_hold_their_own(
    lived_in: Connection, restored: Restore
) -> None:
    copy = restored("--exclude-table='*_embeddings' --exclude-table='*_chunks'")

    assert len(definitions(copy)) == 4
    [left] = copy.execute(LEFT_OUT).fetchall()
    assert (left.subject, left.finding) == (
        "pipeline of public.manuals",
        'a restore could not bring it back: relation "public.manuals_embeddings" does not exist',
    )


OPEN_FUNCTIONS = """
    SELECT p.oid::regprocedure::text AS name
    FROM pg_proc AS p
    WHERE p.pronamespace = 'autoembed'::regnamespace AND p.prosecdef
      AND has_function_privilege('public', p.oid, 'EXECUTE')
    ORDER BY 1
"""
RIGHTS = "SELECT finding, advice FROM autoembed.doctor() WHERE NOT ok AND subject LIKE 'rights of %' ORDER BY subject"
WITHOUT_EVENT_TRIGGERS = (
    "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET event_triggers = off', current_database()); END $$"
)


@pytest.fixture
def shelves(db: Connection) -> Connection:
    """A table with embeddings beside the rows, and a model of a function of the user's."""
    db.execute("CREATE FUNCTION numbers(texts text[]) RETURNS vector[] LANGUAGE sql AS 'SELECT ARRAY[]::vector[]'")
    db.execute("SELECT autoembed.create_model('test', 'fake', 8)")
    db.execute("SELECT autoembed.create_model('own', 'function', 8, model_id => 'public.numbers')")
    db.execute("CREATE TABLE shelves (id int PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('shelves', content_columns => '{content}', model => 'test')")
    db.execute("INSERT INTO shelves VALUES (1, 'one'), (2, 'two')")
    process(db)
    return db


@pytest.mark.parametrize(
    ("options", "restore_options"), [("-Fc", "--no-acl"), ("--no-acl", ""), ("-Fc", "--no-acl --no-owner -j2")]
)
def test_a_restore_without_rights_gives_no_role_the_functions_of_an_owner(
    shelves: Connection, role: Role, restored: Restore, server: Server, options: str, restore_options: str
) -> None:
    shelves.execute("ALTER DEFAULT PRIVILEGES GRANT EXECUTE ON FUNCTIONS TO PUBLIC")
    copy = restored(options, restore_options)

    assert copy.execute(OPEN_FUNCTIONS).fetchall() == []
    nobody = role("nobody")
    copy.execute(f"SELECT autoembed.grant_usage('{nobody}')")
    with server.connect(copy.info.dbname, user=nobody) as session:
        for call in ("_content_1(array['[1]'], 9, 9, 9)", "_erase_1(array['[1]'], 'shelves'::regclass)"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match="permission denied for function"):
                session.execute(f"SELECT autoembed.{call}".encode())
        copy.execute(f"GRANT SELECT ON shelves TO {nobody}")
        assert session.execute("SELECT count(*) FROM shelves_embeddings").fetchone() == (2,)
        assert session.execute("SELECT count(chunk) FROM shelves_chunks").fetchone() == (2,)
    assert copy.execute(RIGHTS).fetchall() == []


def test_a_restore_without_rights_and_event_triggers_is_named_and_mended(
    shelves: Connection, role: Role, restored: Restore
) -> None:
    copy = restored("-Fc", "--no-acl", before=WITHOUT_EVENT_TRIGGERS)

    # The row of the pipeline has closed its own functions.
    [left] = copy.execute(OPEN_FUNCTIONS).fetchall()
    assert left.name.startswith("autoembed._embed_document_")
    [found] = copy.execute(RIGHTS).fetchall()
    assert found.finding == f"other roles may call {left.name}"
    copy.execute(found.advice.encode())
    assert copy.execute(OPEN_FUNCTIONS).fetchall() == []
    copy.execute(f"GRANT EXECUTE ON FUNCTION {left.name}, autoembed._content_1 TO PUBLIC".encode())
    assert len(copy.execute(RIGHTS).fetchall()) == 2

    copy.execute(f"SELECT autoembed.grant_usage('{role('someone')}')")

    assert copy.execute(OPEN_FUNCTIONS).fetchall() == []


@pytest.mark.parametrize(
    ("options", "restore_options"),
    [
        # As --no-policies, which is an option since PostgreSQL 18.
        ("-Fc", "-L <(pg_restore -l /tmp/restored_* | grep -vE 'POLICY|ROW SECURITY')"),
        ("-Fc", "-j2 -L <(pg_restore -l /tmp/restored_* | grep -vE 'POLICY|ROW SECURITY')"),
        ("-Fc --section=pre-data --section=data", ""),
    ],
)
def test_a_restore_without_policies_shows_embeddings_to_readers_of_the_rows_alone(
    shelves: Connection, role: Role, restored: Restore, server: Server, options: str, restore_options: str
) -> None:
    copy = restored(options, restore_options)

    reader, nobody = role("reader"), role("nobody")
    copy.execute(f"GRANT SELECT ON shelves TO {reader}")
    copy.execute("SELECT autoembed.resync('shelves')")
    for name, rows in ((reader, 2), (nobody, 0)):
        with server.connect(copy.info.dbname, user=name) as session:
            if rows:
                assert session.execute("SELECT count(*) FROM shelves_embeddings").fetchone() == (rows,)
            else:
                with pytest.raises(psycopg.errors.InsufficientPrivilege, match="table shelves_embeddings"):
                    session.execute("SELECT count(*) FROM shelves_embeddings")


def test_an_open_embeddings_table_is_named_and_the_next_grant_closes_it(
    shelves: Connection, role: Role, connect: Connect
) -> None:
    nobody = role("nobody")
    shelves.execute("DROP POLICY autoembed_readers ON shelves_embeddings")
    shelves.execute("ALTER TABLE shelves_embeddings DISABLE ROW LEVEL SECURITY")
    [found] = shelves.execute(RIGHTS).fetchall()
    assert "no row level security, so roles that may read it see all embeddings; table" in found.finding
    assert "has no policy autoembed_readers" in found.finding

    shelves.execute(f"GRANT SELECT ON shelves_embeddings TO {nobody}")

    assert shelves.execute(RIGHTS).fetchall() == []
    with connect(user=nobody) as session, pytest.raises(psycopg.errors.InsufficientPrivilege):
        session.execute("SELECT FROM shelves_embeddings")


def test_a_reader_whose_right_to_the_embeddings_was_taken_away_is_named_and_gets_it_back(
    shelves: Connection, role: Role, connect: Connect
) -> None:
    reader, other = role("reader"), role("other")
    shelves.execute(f"GRANT SELECT ON shelves TO {reader}; SET event_triggers = off")
    shelves.execute("REVOKE ALL ON shelves_embeddings, shelves_chunks FROM " + reader)
    shelves.execute(f"GRANT SELECT ON shelves_embeddings TO {other}; RESET event_triggers")
    [found] = shelves.execute(RIGHTS).fetchall()
    assert set(found.finding.split("; ")) == {
        f"{reader} may read public.shelves, and not public.shelves_embeddings, public.shelves_chunks",
        f"{other} may not read public.shelves, but public.shelves_embeddings",
    }

    shelves.execute(found.advice.encode())

    assert shelves.execute(RIGHTS).fetchall() == []
    assert connect(user=reader).execute("SELECT count(chunk) FROM shelves_chunks").fetchone() == (2,)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connect(user=other).execute("SELECT FROM shelves_embeddings")


def test_a_revoke_of_the_embeddings_alone_does_not_last(shelves: Connection, role: Role, connect: Connect) -> None:
    reader = role("reader")
    shelves.execute(f"GRANT SELECT ON shelves TO {reader}")
    shelves.execute(f"REVOKE SELECT ON shelves_embeddings, shelves_chunks FROM {reader}")
    assert connect(user=reader).execute("SELECT count(chunk) FROM shelves_chunks").fetchone() == (2,)
