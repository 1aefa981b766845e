"""Nobody gains rights: a table owner's code runs with the owner's rights, whichever role runs the lane."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection, assert_fresh, insert, is_settled, waiting
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]
Role = Callable[[str], str]

# A table of mallory's in a schema of his own, and a function that tries what it can and notes as whom it ran.
HOSTILE_TABLE = """
CREATE TABLE notes (id int PRIMARY KEY, content text, embedding halfvec(1536));
CREATE TABLE ran (who name);
CREATE FUNCTION attack() RETURNS void LANGUAGE plpgsql AS $attack$
DECLARE
    statement varchar;
BEGIN
    FOREACH statement IN ARRAY ARRAY[
        'RESET ROLE', 'SET ROLE postgres', 'SET ROLE NONE', 'RESET SESSION AUTHORIZATION',
        'SET SESSION AUTHORIZATION postgres', 'SET SESSION AUTHORIZATION DEFAULT',
        'ALTER ROLE {mallory} SUPERUSER', 'CREATE TABLE IF NOT EXISTS {mallory}.loot AS TABLE public.documents',
        'INSERT INTO {mallory}.ran SELECT current_user'
    ]
    LOOP
        BEGIN
            EXECUTE statement;
        EXCEPTION WHEN insufficient_privilege OR invalid_parameter_value THEN
            NULL;
        END;
    END LOOP;
END;
$attack$;
CREATE FUNCTION attack_of(content varchar) RETURNS varchar LANGUAGE plpgsql IMMUTABLE AS $attack$
BEGIN
    PERFORM {mallory}.attack();
    RETURN content;
END;
$attack$;
CREATE FUNCTION attack_of_trigger() RETURNS trigger LANGUAGE plpgsql AS $attack$
BEGIN
    PERFORM {mallory}.attack();
    RETURN NEW;
END;
$attack$;
CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.content';
CREATE TRIGGER embed AFTER INSERT OR UPDATE OF content ON notes
    FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding');
INSERT INTO notes VALUES (1, 'a note');
"""

# Where his code can stand, so that reading his text or writing his vector runs it.
WAYS_IN = {
    "content function": """
        CREATE OR REPLACE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT attack_of(n.content)'""",
    "trigger before": "CREATE TRIGGER attack BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION attack_of_trigger()",
    "trigger after": "CREATE TRIGGER attack AFTER UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION attack_of_trigger()",
    "trigger of the statement": "CREATE TRIGGER attack AFTER UPDATE ON notes EXECUTE FUNCTION attack_of_trigger()",
    "trigger deferred to the commit": """
        CREATE CONSTRAINT TRIGGER attack AFTER UPDATE ON notes DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION attack_of_trigger()""",
    "trigger deferred by a trigger": """
        CREATE TABLE trap (id int);
        CREATE CONSTRAINT TRIGGER attack AFTER INSERT ON trap DEFERRABLE INITIALLY IMMEDIATE
            FOR EACH ROW EXECUTE FUNCTION attack_of_trigger();
        CREATE FUNCTION defer() RETURNS trigger LANGUAGE plpgsql AS '
            BEGIN
                SET CONSTRAINTS ALL DEFERRED;
                INSERT INTO {mallory}.trap VALUES (1);
                RETURN NEW;
            EXCEPTION WHEN insufficient_privilege THEN
                RETURN NEW;
            END';
        CREATE CONSTRAINT TRIGGER defer AFTER UPDATE ON notes DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION defer()""",
    "check": "ALTER TABLE notes ADD CHECK (attack_of(content) IS NOT NULL) NOT VALID",
    "index": "CREATE INDEX ON notes (attack_of(content)) WHERE embedding IS NOT NULL",
    "generated column": """
        ALTER TABLE notes ADD state text GENERATED ALWAYS AS (attack_of((embedding IS NULL)::text)) STORED""",
    "default": """
        CREATE TABLE history (id int, at text DEFAULT attack_of('now'));
        CREATE FUNCTION history() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO {mallory}.history (id) VALUES (OLD.id); RETURN NEW; END';
        CREATE TRIGGER history BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION history()""",
    "domain of the key": """
        CREATE DOMAIN number AS int CHECK (attack_of('x') IS NOT NULL);
        ALTER TABLE notes ALTER id TYPE number""",
    "operator of the key": """
        CREATE DOMAIN word AS varchar;
        ALTER TABLE notes ALTER id TYPE varchar(9);
        CREATE FUNCTION equal(a varchar, b varchar) RETURNS boolean LANGUAGE plpgsql AS
            'BEGIN PERFORM {mallory}.attack(); RETURN a::text = b::text; END';
        CREATE OPERATOR = (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = equal)""",
    "functions named as ours": """
        CREATE FUNCTION unnest(a text[]) RETURNS SETOF text LANGUAGE plpgsql AS
            'BEGIN PERFORM {mallory}.attack(); RETURN QUERY SELECT pg_catalog.unnest(a); END';
        CREATE OR REPLACE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS
            'SELECT string_agg(u, '' '') || attack_of('''') FROM unnest(ARRAY[n.content]) AS u'""",
}


@pytest.fixture
def mallory(documents: Connection, role: Role) -> str:
    """A role that may attach tables of its own and owns a schema; beside it are documents that it may not read."""
    name = role("mallory")
    documents.execute(f"CREATE SCHEMA {name} AUTHORIZATION {name}")
    documents.execute(f"GRANT USAGE ON SCHEMA autoembed TO {name}")
    documents.execute(f"GRANT EXECUTE ON FUNCTION autoembed.queue_embeddings, autoembed.clear_column TO {name}")
    insert(documents, "a secret")
    return name


def run(session: Connection, mallory: str, *scripts: str) -> None:
    for script in scripts:
        session.execute(script.replace("{mallory}", mallory))


def embed(db: Connection, connect: Connect, door: str) -> None:
    if door == "process":
        db.execute("SELECT autoembed.process()")
    else:
        with running_lanes(db, connect):
            wait_until(lambda: is_settled(db))


def assert_nothing_gained(db: Connection, mallory: str) -> None:
    assert db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [mallory]).fetchone() == (False,)
    assert db.execute("SELECT to_regclass(%s)", [f"{mallory}.loot"]).fetchone() == (None,)
    # The code that ran while texts were read has left no trace.
    assert {row.who for row in db.execute(f"SELECT who FROM {mallory}.ran")} <= {mallory}


@pytest.mark.parametrize("door", ["process", "work"])
@pytest.mark.parametrize("way_in", WAYS_IN)
def test_an_owners_code_runs_as_the_owner(
    documents: Connection, mallory: str, connect: Connect, way_in: str, door: str
) -> None:
    run(connect(user=mallory), mallory, HOSTILE_TABLE, WAYS_IN[way_in], "TRUNCATE ran")

    embed(documents, connect, door)

    assert_nothing_gained(documents, mallory)
    assert documents.execute(f"SELECT embedding IS NOT NULL FROM {mallory}.notes").fetchone() == (True,)
    assert_fresh(documents)


# Traces that a content function can leave in the session of a lane, for the statements that come after it.
TRAPS = {
    "search_path": """
        CREATE DOMAIN text AS pg_catalog.text CHECK ({mallory}.attack_of(VALUE::varchar) IS NOT NULL);
        CREATE FUNCTION trap() RETURNS void LANGUAGE plpgsql AS
            'BEGIN SET search_path = {mallory}, pg_catalog; PERFORM {mallory}.attack(); END'""",
    "temporary domain": """
        CREATE FUNCTION trap() RETURNS void LANGUAGE plpgsql AS '
            BEGIN
                PERFORM {mallory}.attack();
                CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK ({mallory}.attack_of(VALUE::varchar) IS NOT NULL);
            EXCEPTION WHEN duplicate_object OR insufficient_privilege THEN NULL;
            END'""",
    "operator": """
        CREATE FUNCTION equal(a name, b pg_catalog.text) RETURNS boolean LANGUAGE plpgsql AS
            'BEGIN PERFORM {mallory}.attack(); RETURN a::pg_catalog.text OPERATOR(pg_catalog.=) b; END';
        CREATE OPERATOR = (LEFTARG = name, RIGHTARG = pg_catalog.text, FUNCTION = equal);
        CREATE FUNCTION equal(a name, b name) RETURNS boolean LANGUAGE plpgsql AS
            'BEGIN PERFORM {mallory}.attack(); RETURN a OPERATOR(pg_catalog.=) b; END';
        CREATE OPERATOR = (LEFTARG = name, RIGHTARG = name, FUNCTION = equal);
        CREATE FUNCTION trap() RETURNS void LANGUAGE plpgsql AS
            'BEGIN SET search_path = {mallory}, pg_catalog; PERFORM {mallory}.attack(); END'""",
}
SPRING_TRAP = """
CREATE OR REPLACE FUNCTION note_text(n notes) RETURNS pg_catalog.text LANGUAGE plpgsql AS
    'BEGIN PERFORM {mallory}.trap(); RETURN n.content; END'
"""


@pytest.mark.parametrize("door", ["process", "work"])
@pytest.mark.parametrize("trap", TRAPS)
def test_what_an_owners_code_leaves_in_the_session_is_not_used(
    documents: Connection, mallory: str, connect: Connect, trap: str, door: str
) -> None:
    run(connect(user=mallory), mallory, HOSTILE_TABLE, TRAPS[trap], SPRING_TRAP, "TRUNCATE ran")

    with connect() as caller:
        embed(caller, connect, door)

    assert_nothing_gained(documents, mallory)
    assert_fresh(documents)


@pytest.mark.parametrize("when", ["read", "written"])
def test_an_owners_code_changes_no_setting_of_the_callers_session(
    documents: Connection, mallory: str, connect: Connect, when: str
) -> None:
    settings = "SELECT name, setting FROM pg_settings WHERE name <> 'plpgsql.extra_errors' ORDER BY name"
    change = "SET search_path = {mallory}, pg_catalog; SET statement_timeout = '9min'; SET check_function_bodies = off;"
    where = {
        "read": f"""CREATE OR REPLACE FUNCTION note_text(n notes) RETURNS text LANGUAGE plpgsql AS
                        $$BEGIN {change} RETURN n.content; END$$""",
        "written": f"""CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {change} RETURN NEW; END$$;
                       CREATE TRIGGER change BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION change()""",
    }
    run(connect(user=mallory), mallory, HOSTILE_TABLE, where[when])
    documents.execute("LOAD 'plpython3'")
    before = documents.execute(settings).fetchall()

    documents.execute("SELECT autoembed.process()")

    after = documents.execute(settings).fetchall()
    assert [row for row in after if row not in before] == []


@pytest.mark.parametrize("when", ["read", "written"])
def test_an_owners_code_replaces_no_prepared_statement_of_the_caller(
    documents: Connection, mallory: str, connect: Connect, when: str
) -> None:
    """No rollback undoes PREPARE; and drivers call theirs by names that can be guessed."""
    plant = "DEALLOCATE known; EXECUTE 'PREPARE known AS SELECT {mallory}.attack()';"
    act = plant + " EXECUTE 'PREPARE planted AS SELECT 1';"
    act = f"BEGIN {act} EXCEPTION WHEN insufficient_privilege THEN NULL; END;"
    where = {
        "read": f"""CREATE OR REPLACE FUNCTION note_text(n notes) RETURNS text LANGUAGE plpgsql AS
                        $$BEGIN {act} RETURN n.content; END$$""",
        "written": f"""CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN {act} RETURN NEW; END$$;
                       CREATE TRIGGER change BEFORE UPDATE ON notes FOR EACH ROW EXECUTE FUNCTION change()""",
    }
    run(connect(user=mallory), mallory, HOSTILE_TABLE, where[when])
    documents.execute("PREPARE known AS SELECT 1; PREPARE other AS SELECT 2")

    documents.execute("SELECT autoembed.process()")

    left = "SELECT name FROM pg_prepared_statements WHERE name IN ('known', 'other', 'planted')"
    assert documents.execute(left).fetchall() == [("known",), ("other",)]
    assert documents.execute("EXECUTE known").fetchone() == (1,)
    assert_nothing_gained(documents, mallory)


def test_a_key_types_cast_to_json_runs_as_the_writer(documents: Connection, mallory: str, connect: Connect) -> None:
    """The queueing trigger has rights that the writer has not, and to_jsonb() calls a cast that the type brings."""
    session = connect(user=mallory)
    run(
        session,
        mallory,
        HOSTILE_TABLE,
        """
        CREATE TYPE size AS ENUM ('small');
        CREATE FUNCTION size_json(s size) RETURNS json LANGUAGE plpgsql AS
            'BEGIN PERFORM {mallory}.attack(); RETURN ''"small"''; END';
        CREATE CAST (size AS json) WITH FUNCTION size_json;
        CREATE TABLE sizes (id size PRIMARY KEY, content text, embedding halfvec(1536));
        CREATE FUNCTION size_text(s sizes) RETURNS text LANGUAGE sql AS 'SELECT s.content';
        CREATE TRIGGER embed AFTER INSERT ON sizes
            FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('size_text', 'embedding');
        SELECT attack();
        INSERT INTO sizes VALUES ('small', 'a text');
        """,
    )

    assert_nothing_gained(documents, mallory)


# Names that end every quotation that SQL knows.
INJECTION = "$body$;ALTER ROLE {mallory} SUPERUSER;SELECT $body$"


@pytest.mark.parametrize("what", ["table", "column", "function"])
def test_a_name_is_a_name_and_never_a_statement(documents: Connection, role: Role, connect: Connect, what: str) -> None:
    # Names have 63 bytes, so the role's is short.
    mallory = "m" + role("x")[-5:]
    documents.execute(f"CREATE ROLE {mallory} LOGIN PASSWORD 'postgres'")
    try:
        documents.execute(f"CREATE SCHEMA {mallory} AUTHORIZATION {mallory}")
        documents.execute(f"GRANT USAGE ON SCHEMA autoembed TO {mallory}")
        documents.execute(f"GRANT EXECUTE ON FUNCTION autoembed.queue_embeddings TO {mallory}")
        names = {"table": "notes", "column": "embedding", "function": "note_text"}
        names[what] = INJECTION.replace("{mallory}", mallory)
        session = connect(user=mallory)
        # With it on, the mangled function would not even parse.
        session.execute("SET check_function_bodies = off")
        session.execute(f"""
            CREATE TABLE "{names["table"]}" (id int PRIMARY KEY, content text, "{names["column"]}" halfvec(1536));
            CREATE FUNCTION "{names["function"]}"(n "{names["table"]}") RETURNS text LANGUAGE sql AS 'SELECT n.content';
            CREATE TRIGGER embed AFTER INSERT ON "{names["table"]}" FOR EACH ROW
                EXECUTE FUNCTION autoembed.queue_embeddings('{names["function"]}', '{names["column"]}');
            INSERT INTO "{names["table"]}" VALUES (1, 'a note');
        """)

        documents.execute("SELECT autoembed.process()")

        assert documents.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [mallory]).fetchone() == (False,)
        assert session.execute(f'SELECT "{names["column"]}" IS NOT NULL FROM "{names["table"]}"').fetchone() == (True,)
    finally:
        documents.execute(f"DROP OWNED BY {mallory} CASCADE; DROP ROLE {mallory}")


@pytest.mark.parametrize(
    "errcode",
    [
        "query_canceled",
        "admin_shutdown",
        "case_not_found",
        "invalid_schema_name",
        "connection_failure",
        "2D000",
        "ZZ999",
    ],
)
def test_an_error_of_any_class_in_a_content_function_fails_its_row_alone(documents: Connection, errcode: str) -> None:
    """An error that ended the pass would end every pass: its row comes first again and again."""
    documents.execute(
        "CREATE OR REPLACE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE plpgsql AS $$ BEGIN"
        f" IF doc.id = 1 THEN RAISE EXCEPTION 'not this one' USING ERRCODE = '{errcode}'; END IF;"
        " RETURN '# ' || doc.title || E'\\n\\n' || doc.content; END $$"
    )
    insert(documents, "bad", "good", "better")
    # The new function has the table scanned, which tries the row that has failed again.
    for _ in range(12):
        try:
            documents.execute("SELECT autoembed.process()")
        except psycopg.Error as error:
            assert "not this one" in str(error)
        documents.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")

    assert documents.execute("SELECT id FROM documents WHERE embedding IS NULL").fetchall() == [(1,)]
    [failure] = documents.execute("SELECT key, reason FROM autoembed.failed").fetchall()
    assert failure == ("[1]", "not this one")
    assert waiting(documents) == 0


OWN_FUNCTIONS = {
    "ALTER FUNCTION autoembed._content_{id}(text[], int8, int8, int8) SECURITY INVOKER": "cannot be altered",
    "ALTER ROUTINE autoembed._write_{id}(text[], bytea[], text, text[], halfvec[]) SECURITY INVOKER": (
        "cannot be altered"
    ),
    "ALTER FUNCTION autoembed._write_{id}(text[], bytea[], text, text[], halfvec[]) RESET ALL": "cannot be altered",
    "ALTER FUNCTION autoembed._content_{id}(text[], int8, int8, int8) RENAME TO mine": (
        "permission denied|cannot be altered"
    ),
    "ALTER FUNCTION autoembed._content_{id}(text[], int8, int8, int8) OWNER TO postgres": "must be able to SET ROLE",
    "CREATE OR REPLACE FUNCTION autoembed._content_{id}(keys text[]) RETURNS TABLE (key text, content text,"
    " has_embedding boolean) LANGUAGE sql AS 'SELECT NULL, NULL, true'": "permission denied for schema autoembed",
    "CREATE FUNCTION autoembed._content_{id}(keys text) RETURNS text LANGUAGE sql AS 'SELECT NULL'": (
        "permission denied for schema autoembed"
    ),
}


@pytest.mark.parametrize("statement", OWN_FUNCTIONS)
def test_an_owner_cannot_change_the_functions_made_for_him(
    documents: Connection, mallory: str, connect: Connect, statement: str
) -> None:
    session = connect(user=mallory)
    run(session, mallory, HOSTILE_TABLE)
    pipeline = documents.execute("SELECT max(id) AS id FROM autoembed.pipeline").fetchone()
    assert pipeline is not None
    before = documents.execute("SELECT * FROM pg_proc WHERE proowner = %s::regrole", [mallory]).fetchall()

    with pytest.raises(psycopg.Error, match=OWN_FUNCTIONS[statement]):
        session.execute(statement.replace("{id}", str(pipeline.id)).replace("{mallory}", mallory))

    assert documents.execute("SELECT * FROM pg_proc WHERE proowner = %s::regrole", [mallory]).fetchall() == before


@pytest.mark.parametrize("change", ["DROP FUNCTION {function}", "ALTER FUNCTION {function} SET SCHEMA {mallory}"])
def test_functions_that_an_owner_took_away_are_made_anew(
    documents: Connection, mallory: str, connect: Connect, change: str
) -> None:
    session = connect(user=mallory)
    run(session, mallory, HOSTILE_TABLE)
    pipeline = documents.execute("SELECT max(id) AS id FROM autoembed.pipeline").fetchone()
    assert pipeline is not None
    function = f"autoembed._content_{pipeline.id}(text[], int8, int8, int8)"
    session.execute(change.format(function=function, mallory=mallory))

    def is_embedded() -> bool:
        documents.execute("SELECT autoembed.process()")
        return documents.execute(f"SELECT embedding IS NOT NULL FROM {mallory}.notes").fetchone() == (True,)

    # On a machine with much else to do, the code of an owner may need another try.
    wait_until(is_embedded, 60)


@pytest.mark.parametrize("statement", ["SELECT * FROM documents", "UPDATE documents SET title = 'mine'"])
def test_a_content_function_cannot_reach_another_owners_table(
    documents: Connection, mallory: str, connect: Connect, statement: str
) -> None:
    run(
        connect(user=mallory),
        mallory,
        HOSTILE_TABLE,
        f"""CREATE OR REPLACE FUNCTION note_text(n notes) RETURNS text LANGUAGE plpgsql AS
                $$BEGIN EXECUTE $sql${statement}$sql$; RETURN n.content; END$$""",
    )

    row = documents.execute("SELECT completed, retried, failed_jobs FROM autoembed.process()").fetchone()

    assert row is not None
    assert (row.completed, row.retried) == (1, 1)
    assert [failed["error"] for failed in row.failed_jobs] == ["permission denied for table documents"]
    assert_fresh_rows(documents)


def assert_fresh_rows(db: Connection) -> None:
    """Does the work of assert_fresh(), while something else waits."""
    assert db.execute("SELECT count(*) FROM documents WHERE embedding IS NULL OR title <> 't'").fetchone() == (0,)


@pytest.mark.parametrize("table", ['"Tablé; DROP"', '"Doc ""x"""', '"it\'s"', '"a%sb"', '"日本語 $1"', '"select"'])
@pytest.mark.parametrize("schema", ["public", '"My ""Schéma"""'])
def test_names_that_need_quotes_work(db: Connection, api: FakeApi, schema: str, table: str) -> None:
    db.execute(f"CREATE SCHEMA IF NOT EXISTS {schema}")
    db.execute("CREATE SCHEMA texts")
    db.execute(f'CREATE TABLE {schema}.{table} (id int PRIMARY KEY, content text, "the ""vector""" halfvec(1536))')
    db.execute(
        f"CREATE FUNCTION texts.\"Its text\"(t {schema}.{table}) RETURNS text LANGUAGE sql AS 'SELECT t.content'"
    )
    db.execute(
        f"CREATE TRIGGER embed AFTER INSERT OR UPDATE OF content ON {schema}.{table} FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('texts.Its text', 'the \"vector\"')"
    )
    db.execute(
        f"CREATE TRIGGER clear BEFORE UPDATE OF content ON {schema}.{table} FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.clear_column('the \"vector\"')"
    )
    vector = f'SELECT "the ""vector""" IS NOT NULL FROM {schema}.{table}'
    for statement in (
        f"INSERT INTO {schema}.{table} VALUES (1, 'old')",
        f"UPDATE {schema}.{table} SET content = 'new'",
    ):
        db.execute(statement)
        assert db.execute(vector).fetchone() == (False,)
        db.execute("SELECT autoembed.process()")
        assert db.execute(vector).fetchone() == (True,)

    assert api.texts() == ["old", "new"]


def test_a_pipeline_follows_its_table_to_a_new_owner(documents: Connection, role: Role) -> None:
    insert(documents, "one")
    new = role("new")
    documents.execute(f"ALTER TABLE documents OWNER TO {new}; ALTER FUNCTION embedding_input OWNER TO {new}")

    documents.execute("SELECT autoembed.process()")

    assert_fresh(documents)
    owners = documents.execute(
        "SELECT DISTINCT proowner::regrole::text AS owner FROM pg_proc WHERE proname ~ '^_(content|write)_[0-9]'"
    ).fetchall()
    assert owners == [(new,)]


def test_a_pipeline_waits_while_its_function_is_not_the_new_owners(documents: Connection, role: Role) -> None:
    insert(documents, "one")
    documents.execute(
        f"ALTER TABLE documents OWNER TO {role('new')}; ALTER FUNCTION embedding_input OWNER TO {role('stranger')}"
    )

    assert documents.execute("SELECT read FROM autoembed.process()").fetchone() == (0,)
    assert waiting(documents) == 1


def test_a_role_with_process_alone_embeds_tables_that_it_cannot_read(
    documents: Connection, role: Role, connect: Connect
) -> None:
    insert(documents, "one")
    clerk = role("clerk")
    documents.execute(f"GRANT USAGE ON SCHEMA autoembed TO {clerk}")
    documents.execute(f"GRANT EXECUTE ON FUNCTION autoembed.process TO {clerk}")
    session = connect(user=clerk)

    assert session.execute("SELECT completed FROM autoembed.process()").fetchone() == (1,)

    assert_fresh(documents)
    for statement in (
        "TABLE documents",
        "SELECT autoembed._content_1('{[1]}', 0, 0)",
        "SELECT autoembed._claim(1, 1, '{}', '{}', '{}')",
        "TABLE autoembed.failed",
        "TABLE autoembed.model",
        "TABLE pgmq.q_embedding_jobs",
        "SELECT autoembed.alter_model('text-embedding-3-small', base_url => 'http://elsewhere')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(statement)


def test_a_role_with_a_right_to_triggers_alone_cannot_attach_a_table(
    documents: Connection, mallory: str, connect: Connect
) -> None:
    documents.execute("DROP TRIGGER embed_documents_on_insert ON documents")
    documents.execute(f"GRANT TRIGGER ON documents TO {mallory}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connect(user=mallory).execute(
            "CREATE FUNCTION note(d documents) RETURNS text LANGUAGE sql AS 'SELECT d.content';"
            "CREATE TRIGGER embed AFTER INSERT ON documents FOR EACH ROW"
            " EXECUTE FUNCTION autoembed.queue_embeddings('note', 'embedding')"
        )


# An embedding function of mallory's, by which a superuser has documents embedded. {act}: what else he does in it.
HOSTILE_FUNCTION = """
CREATE OR REPLACE FUNCTION {mallory}.vectors(texts text[]) RETURNS public.vector[] LANGUAGE plpgsql AS $function$
BEGIN
    {act}
    RETURN array_fill('[1,2]'::public.vector, ARRAY[cardinality(texts)]);
END $function$;
"""


@pytest.fixture
def embedder(documents: Connection, mallory: str, connect: Connect) -> str:
    """Mallory, whose function embeds the documents, and his attacks."""
    run(connect(user=mallory), mallory, HOSTILE_TABLE, HOSTILE_FUNCTION.replace("{act}", ""), "TRUNCATE ran")
    documents.execute("SELECT autoembed.create_model('his', 'function', 2, %s)", [f"{mallory}.vectors"])
    documents.execute("CREATE TABLE texts (id int PRIMARY KEY, content text)")
    documents.execute("SELECT autoembed.enable('texts', 'embedding', content_columns => '{content}', model => 'his')")
    documents.execute("INSERT INTO texts VALUES (1, 'a text')")
    return mallory


def embedded_by(documents: Connection, connect: Connect, role: Role, door: str) -> None:
    """Has the function of the model "his" called by a superuser's pass or lane, or by somebody else's search."""
    if door != "embed":
        embed(documents, connect, door)
        assert documents.execute("SELECT embedding IS NOT NULL FROM texts").fetchone() == (True,)
        return
    reader = role("reader")
    documents.execute(f"GRANT USAGE ON SCHEMA autoembed TO {reader}")
    documents.execute(f"GRANT EXECUTE ON FUNCTION autoembed.embed TO {reader}")
    with connect(user=reader) as session:
        assert session.execute("SELECT autoembed.embed('x', 'his')::text").fetchone() == ("[1,2]",)


@pytest.mark.parametrize("door", ["process", "work", "embed"])
@pytest.mark.parametrize(
    "act",
    [
        "PERFORM {mallory}.attack();",
        "SET search_path = {mallory}, pg_catalog; PERFORM {mallory}.attack();",
        """CREATE TABLE {mallory}.trap (id int);
           CREATE CONSTRAINT TRIGGER attack AFTER INSERT ON {mallory}.trap DEFERRABLE INITIALLY DEFERRED
               FOR EACH ROW EXECUTE FUNCTION {mallory}.attack_of_trigger();
           BEGIN INSERT INTO {mallory}.trap VALUES (1); EXCEPTION WHEN insufficient_privilege THEN NULL; END;""",
        """BEGIN
               CREATE DOMAIN pg_temp.text AS pg_catalog.text CHECK ({mallory}.attack_of(VALUE::varchar) IS NOT NULL);
           EXCEPTION WHEN insufficient_privilege THEN NULL;
           END;
           SET search_path = pg_temp, {mallory}, pg_catalog;""",
    ],
    ids=["attack", "search_path", "deferred trigger", "temporary domain"],
)
def test_an_embedding_function_runs_as_its_owner_and_leaves_nothing_behind(
    documents: Connection, embedder: str, connect: Connect, role: Role, act: str, door: str
) -> None:
    run(connect(user=embedder), embedder, HOSTILE_FUNCTION.replace("{act}", act))

    embedded_by(documents, connect, role, door)

    assert_nothing_gained(documents, embedder)


def test_an_embedding_function_is_its_owner_to_itself(documents: Connection, embedder: str, connect: Connect) -> None:
    act = "RAISE EXCEPTION 'I am %', current_user;"
    run(connect(user=embedder), embedder, HOSTILE_FUNCTION.replace("{act}", act))

    with pytest.raises(psycopg.Error, match=f"I am {embedder}"):
        documents.execute("SELECT autoembed.embed('x', 'his')")


@pytest.mark.parametrize("call", ["SELECT autoembed.process()", "SELECT autoembed.embed('x', 'his')"])
def test_an_embedding_function_changes_nothing_of_the_callers_session(
    documents: Connection, embedder: str, connect: Connect, call: str
) -> None:
    act = """
        SET search_path = {mallory}, pg_catalog; SET statement_timeout = '9min';
        PERFORM set_config('autoembed.writing', '1', false);
        BEGIN
            DEALLOCATE known;
            EXECUTE 'PREPARE known AS SELECT {mallory}.attack()';
            EXECUTE 'PREPARE planted AS SELECT 1';
        EXCEPTION WHEN insufficient_privilege THEN NULL;
        END;
    """
    run(connect(user=embedder), embedder, HOSTILE_FUNCTION.replace("{act}", act))
    settings = "SELECT name, setting FROM pg_settings WHERE name <> 'plpgsql.extra_errors' ORDER BY name"
    documents.execute("LOAD 'plpython3'; PREPARE known AS SELECT 1; PREPARE other AS SELECT 2")
    before = documents.execute(settings).fetchall()

    documents.execute(call.encode())

    assert [row for row in documents.execute(settings).fetchall() if row not in before] == []
    assert documents.execute("SELECT current_setting('autoembed.writing', true)").fetchone() in [("",), (None,)]
    left = "SELECT name FROM pg_prepared_statements WHERE name IN ('known', 'other', 'planted')"
    assert documents.execute(left).fetchall() == [("known",), ("other",)]
    assert_nothing_gained(documents, embedder)


# Who owns the schema may put another function in the place of a superuser's; and functions change hands.
@pytest.mark.parametrize("call", ["SELECT autoembed.process()", "SELECT autoembed.embed('x', 'ours')"])
@pytest.mark.parametrize("theft", ["replaced", "given away"])
def test_another_owners_function_of_the_same_name_is_not_called(
    documents: Connection, embedder: str, connect: Connect, theft: str, call: str
) -> None:
    attack = HOSTILE_FUNCTION.replace("{act}", "PERFORM {mallory}.attack(); RAISE EXCEPTION 'I am %', current_user;")
    ours = HOSTILE_FUNCTION.replace("vectors", "ours").replace("{act}", "")
    run(documents, embedder, ours)
    documents.execute("SELECT autoembed.create_model('ours', 'function', 2, %s)", [f"{embedder}.ours"])
    documents.execute("SELECT autoembed.alter_pipeline('texts', model => 'ours')")
    if theft == "replaced":
        run(connect(user=embedder), embedder, "DROP FUNCTION {mallory}.ours", attack.replace("vectors", "ours"))
    else:
        documents.execute(f"ALTER FUNCTION {embedder}.ours OWNER TO {embedder}")
        run(connect(user=embedder), embedder, attack.replace("vectors", "ours"))

    fault = "had another owner, when the model was defined"
    try:
        documents.execute(call.encode())
    except psycopg.Error as error:
        assert fault in str(error)
    else:
        rests = documents.execute("SELECT reason FROM autoembed.model_rest WHERE needs_attention").fetchall()
        assert [fault in row.reason for row in rests] == [True]

    assert_nothing_gained(documents, embedder)
    documents.execute("SELECT autoembed.alter_model('ours')")
    with pytest.raises(psycopg.Error, match=f"I am {embedder}"):
        documents.execute("SELECT autoembed.embed('x', 'ours')")


EMBED_FUNCTION = "autoembed._embed_document_{hash}(text[])"


@pytest.mark.parametrize(
    ("statement", "refusal"),
    [
        (f"ALTER FUNCTION {EMBED_FUNCTION} SECURITY INVOKER", "cannot be altered"),
        (f"ALTER FUNCTION {EMBED_FUNCTION} RESET ALL", "cannot be altered"),
        (f"ALTER FUNCTION {EMBED_FUNCTION} OWNER TO postgres", "must be able to SET ROLE"),
    ],
)
def test_an_owner_cannot_change_the_function_that_calls_his(
    documents: Connection, embedder: str, connect: Connect, statement: str, refusal: str
) -> None:
    name = documents.execute("SELECT md5('his')").fetchone()
    assert name is not None

    with pytest.raises(psycopg.Error, match=refusal):
        connect(user=embedder).execute(statement.replace("{hash}", name[0]))


def test_one_that_its_owner_took_away_and_altered_is_not_called(
    documents: Connection, embedder: str, connect: Connect
) -> None:
    name = documents.execute("SELECT '_embed_document_' || md5('his')").fetchone()
    assert name is not None
    session = connect(user=embedder)
    session.execute(f"ALTER FUNCTION autoembed.{name[0]}(text[]) SET SCHEMA {embedder}")
    session.execute(f"ALTER FUNCTION {embedder}.{name[0]}(text[]) SECURITY INVOKER")

    with pytest.raises(psycopg.Error, match="permission denied for schema autoembed"):
        session.execute(f"ALTER FUNCTION {embedder}.{name[0]}(text[]) SET SCHEMA autoembed")
    with pytest.raises(psycopg.Error, match="SELECT autoembed.alter_model"):
        documents.execute("SELECT autoembed.embed('x', 'his')")


def test_a_model_is_nobodys_to_define_but_a_superusers(documents: Connection, embedder: str, connect: Connect) -> None:
    documents.execute("SELECT autoembed.grant_usage(%s)", [embedder])
    session = connect(user=embedder)

    for statement in (
        f"SELECT autoembed.create_model('more', 'function', 2, '{embedder}.vectors')",
        "SELECT autoembed._call_embedder('his', 'document', '{x}')",
        "SELECT autoembed._build_embedders('his')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE autoembed.model SET base_url = 'https://thief.example/v1'",
        "UPDATE autoembed.setting SET value = 'thief.example'",
        "DELETE FROM autoembed.model",
        "INSERT INTO autoembed.model (name, provider, model_id, dimensions) VALUES ('thief', 'fake', 'thief', 8)",
        "INSERT INTO autoembed.setting (name, value) VALUES ('http_hosts', 'thief.example')",
        """INSERT INTO autoembed.restored VALUES
            ('model', '{"name": "thief", "provider": "fake", "model_id": "thief", "dimensions": 8}')""",
    ],
)
def test_a_role_that_may_write_all_data_says_not_where_texts_and_keys_go(
    documents: Connection, role: Role, connect: Connect, statement: str
) -> None:
    thief = role("thief")
    documents.execute(f"GRANT pg_write_all_data TO {thief}")
    before = documents.execute("SELECT m FROM autoembed.model AS m ORDER BY 1").fetchall()
    settings = documents.execute("SELECT s FROM autoembed.setting AS s ORDER BY 1").fetchall()

    with suppress(psycopg.errors.InsufficientPrivilege):
        connect(user=thief).execute(statement.encode())

    assert documents.execute("SELECT m FROM autoembed.model AS m ORDER BY 1").fetchall() == before
    assert documents.execute("SELECT s FROM autoembed.setting AS s ORDER BY 1").fetchall() == settings
