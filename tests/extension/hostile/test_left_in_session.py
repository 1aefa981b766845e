"""An owner's code leaves nothing in the session that runs it, takes nothing from it, and does not end it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from extension.hostile.tenants import (
    ATTACK,
    ENABLE_COLUMNS,
    ENABLE_FUNCTION,
    NOTES,
    Tenant,
    assert_nothing_gained,
    content_function,
    has_vector_of,
    stays_fresh,
    trigger,
)
from harness import Connection
from lanes import Lane

# A model whose function is mallory's. {act}: what it does besides.
EMBEDDER = """
CREATE FUNCTION vectors(texts text[]) RETURNS public.vector[] LANGUAGE plpgsql AS $function$
BEGIN
    {act}
    RETURN array_fill('[1,0,0,0,0,0,0,1]'::public.vector, ARRAY[cardinality(texts)]);
END $function$;
"""
PLACES = pytest.mark.parametrize("place", ["content function", "trigger", "embedder"])


def place_code(db: Connection, mallory: Tenant, place: str, act: str) -> None:
    """Has mallory's statements run in the next pass; what they raise is swallowed."""
    act = f"BEGIN {act} EXCEPTION WHEN OTHERS THEN NULL; END;"
    mallory.run(NOTES)
    if place == "content function":
        mallory.run(content_function(act), ENABLE_FUNCTION)
    elif place == "trigger":
        mallory.run(ENABLE_COLUMNS, trigger(act))
    else:
        mallory.run(EMBEDDER.replace("{act}", act))
        db.execute("SELECT autoembed.create_model('its', 'function', 8, %s)", [f"{mallory.name}.vectors"])
        mallory.run(ENABLE_COLUMNS.replace("'{content}'", "'{content}', model => 'its'"))
    mallory.run("INSERT INTO notes VALUES (1, 'a note')")


def embedded(db: Connection, mallory: Tenant) -> bool:
    return db.execute(f"SELECT embedding IS NOT NULL FROM {mallory.name}.notes").fetchall() == [(True,)]


# Statements of an owner's, and a query whose answer they would change.
LEFT: dict[str, tuple[str, str]] = {
    "a setting of an application's": (
        "PERFORM set_config('app.tenant', 'mallory', false);",
        "SELECT current_setting('app.tenant')",
    ),
    "a new setting": (
        "PERFORM set_config('app.new', 'mallory', false);",
        "SELECT coalesce(current_setting('app.new', true), '')",
    ),
    "a setting of PostgreSQL's": (
        "SET work_mem = '1MB'; SET search_path = {me}; SET TIME ZONE 'Asia/Tokyo';"
        " SET default_transaction_read_only = on;",
        "SELECT name, setting FROM pg_settings WHERE name IN ('work_mem', 'search_path', 'TimeZone',"
        " 'default_transaction_read_only') ORDER BY name",
    ),
    "a prepared statement": (
        "EXECUTE 'PREPARE planted AS SELECT {me}.attack()'; EXECUTE 'DEALLOCATE known';",
        "SELECT name, statement FROM pg_prepared_statements WHERE NOT from_sql OR name IN ('known', 'planted')",
    ),
    "a temporary table": (
        "CREATE TEMPORARY TABLE documents (id int);",
        "SELECT 'documents'::regclass::oid",
    ),
    "a channel listened to": ("LISTEN mallory;", "SELECT pg_listening_channels()"),
    "a channel no longer listened to": ("UNLISTEN *;", "SELECT pg_listening_channels()"),
    "a cursor": ("EXECUTE 'DECLARE held CURSOR WITH HOLD FOR SELECT {me}.attack()';", "SELECT name FROM pg_cursors"),
}


@PLACES
@pytest.mark.parametrize("what", LEFT)
def test_a_callers_session_is_as_it_was(db: Connection, mallory: Tenant, what: str, place: str) -> None:
    act, query = LEFT[what]
    mallory.run(ATTACK)
    place_code(db, mallory, place, act)
    db.execute("SET app.tenant = 'alice'; LISTEN alice; CREATE TABLE documents (id int)")
    db.execute("PREPARE known AS SELECT 1")
    before = db.execute(query).fetchall()

    db.execute("SELECT autoembed.process()")

    assert db.execute(query).fetchall() == before
    assert embedded(db, mallory)
    assert_nothing_gained(db, mallory)


@PLACES
@pytest.mark.parametrize("act", ["PERFORM pg_advisory_lock(4711);", "PERFORM pg_advisory_unlock_all();"])
def test_a_caller_has_the_advisory_locks_that_it_had(db: Connection, mallory: Tenant, act: str, place: str) -> None:
    place_code(db, mallory, place, act)
    db.execute("SELECT pg_advisory_lock(99)")

    db.execute("SELECT autoembed.process()")

    held = "SELECT objid FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    assert db.execute(held).fetchall() == [(99,)]


@PLACES
def test_another_tenants_code_sees_no_setting_that_was_made(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, place: str
) -> None:
    bob.run(
        "CREATE TABLE audit (tenant text)",
        """CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS
               $$BEGIN INSERT INTO audit VALUES (current_setting('app.tenant', true)); RETURN NEW; END$$""",
        f"ALTER FUNCTION note SET search_path = {bob.name}",
        "CREATE TRIGGER note BEFORE UPDATE ON letters FOR EACH ROW EXECUTE FUNCTION note()",
    )
    place_code(db, mallory, place, "PERFORM set_config('app.tenant', 'mallory', false);")

    for _ in range(2):
        stays_fresh(bob)

    assert embedded(db, mallory)
    assert {row.tenant or "" for row in bob.session.execute("SELECT tenant FROM audit")} == {""}


@PLACES
def test_a_cursor_of_the_caller_is_not_read(db: Connection, mallory: Tenant, place: str) -> None:
    """Its rows would come with the rights of the caller."""
    mallory.run("CREATE SEQUENCE fetched")
    place_code(
        db,
        mallory,
        place,
        """DECLARE secret text; secrets refcursor := 'secrets';
           BEGIN FETCH secrets INTO secret; PERFORM nextval('{me}.fetched') WHERE secret IS NOT NULL; END;""",
    )
    db.execute("CREATE TABLE secret AS SELECT 'a secret' AS secret")
    with db.transaction():
        db.execute("DECLARE secrets CURSOR FOR SELECT secret FROM public.secret")

        db.execute("SELECT autoembed.process()")

        assert db.execute("FETCH ALL FROM secrets").fetchall() == [("a secret",)]
    # A sequence keeps what a rollback undoes.
    assert db.execute(f"SELECT is_called FROM {mallory.name}.fetched").fetchone() == (False,)


def test_constraints_that_the_caller_has_deferred_stay_deferred(db: Connection, bob: Tenant) -> None:
    db.execute("CREATE TABLE parent (id int PRIMARY KEY)")
    db.execute("CREATE TABLE child (parent int REFERENCES parent DEFERRABLE INITIALLY DEFERRED)")
    # One that makes a difference to how bob's rows are written.
    bob.run("ALTER TABLE letters ADD UNIQUE (content) DEFERRABLE")

    with db.transaction():
        db.execute("INSERT INTO child VALUES (1)")
        db.execute("SELECT autoembed.process()")
        db.execute("INSERT INTO parent VALUES (1)")

    assert has_vector_of(db, f"{bob.name}.letters", 1, "a letter")


# Settings that any role may make, and that end the session at once, or when the next error is raised.
FATAL = {
    "transaction_timeout": "SET transaction_timeout = '1ms'; PERFORM count(*) FROM generate_series(1, 100000);",
    "transaction_timeout by set_config": """
        PERFORM set_config('transaction_timeout', '1ms', true); PERFORM count(*) FROM generate_series(1, 100000);""",
    "transaction_timeout of a function": """
        CREATE OR REPLACE FUNCTION {me}.slow() RETURNS bigint LANGUAGE sql SET transaction_timeout = '1ms' AS
            'SELECT count(*) FROM generate_series(1, 100000)';
        PERFORM {me}.slow();""",
    "idle_in_transaction_session_timeout": "SET idle_in_transaction_session_timeout = '1ms';",
    "exit_on_error": "SET exit_on_error = on; PERFORM 1 / 0;",
    "exit_on_error by set_config": "PERFORM set_config('exit_on_error', 'on', true); RAISE 'the end';",
}


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        *((setting, "content function") for setting in FATAL),
        *(
            (setting, place)
            for setting in ("transaction_timeout", "exit_on_error")
            for place in ("trigger", "embedder")
        ),
    ],
)
def test_an_owners_code_ends_no_lane(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, setting: str, place: str
) -> None:
    place_code(db, mallory, place, FATAL[setting])

    stays_fresh(bob)

    assert lane.error is None


@pytest.mark.parametrize("setting", FATAL)
@pytest.mark.parametrize("call", ["SELECT autoembed.process()", "SELECT autoembed.embed('a question', 'its')"])
def test_an_owners_code_ends_no_session_of_a_caller(
    db: Connection, mallory: Tenant, connect: Callable[..., Connection], setting: str, call: str
) -> None:
    place_code(db, mallory, "embedder", FATAL[setting])

    with connect() as caller, caller.transaction():
        assert len(caller.execute(call.encode()).fetchall()) == 1
        assert caller.execute("SELECT 1").fetchone() == (1,)


# A change of bob's row, and the definition of his table.
CHANGES = {
    "the text, of a table with a condition": ("content = 'another letter'", ", condition => 'id > 0'"),
    "the vector": ("embedding = '[9,9,9,9,9,9,9,9]'", ""),
    "the vector, of a table with a condition": ("embedding = '[9,9,9,9,9,9,9,9]'", ", condition => 'id > 0'"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_owners_code_passes_for_no_lane_that_writes_another_table(
    db: Connection, mallory: Tenant, bob: Tenant, change: str
) -> None:
    """No trigger fires the code of a constraint, so bob's triggers are the first ones there."""
    changed, more = CHANGES[change]
    bob.run(
        "CREATE TABLE mail (id int PRIMARY KEY, content text)",
        f"SELECT autoembed.enable('mail', 'embedding', content_columns => '{{content}}' {more})",
        "INSERT INTO mail VALUES (1, 'a letter')",
        f"GRANT USAGE ON SCHEMA {bob.name} TO {mallory.name}",
        f"GRANT SELECT, UPDATE ON mail TO {mallory.name}",
    )
    db.execute("SELECT autoembed.process()")
    mallory.run(
        NOTES,
        ENABLE_COLUMNS,
        f"""CREATE FUNCTION act() RETURNS boolean LANGUAGE plpgsql AS $act$
            BEGIN
                IF session_user <> '{{me}}' THEN
                    BEGIN
                        PERFORM set_config('autoembed.writing', '{bob.name}.mail'::regclass::oid::text, true);
                        PERFORM set_config('autoembed.written_pipeline', (
                            SELECT substring(t.tgname FROM '[0-9]+') FROM pg_trigger AS t
                            WHERE t.tgrelid = '{bob.name}.mail'::regclass LIMIT 1
                        ), true);
                    EXCEPTION WHEN insufficient_privilege THEN NULL;
                    END;
                    PERFORM set_config('autoembed.writing', '{bob.name}.mail'::regclass::oid::text, true);
                    UPDATE {bob.name}.mail SET {changed} WHERE id = 1;
                END IF;
                RETURN true;
            END $act$""",
        "ALTER TABLE notes ADD CHECK (content IS NULL OR embedding IS NULL OR act())",
        "INSERT INTO notes VALUES (1, 'a note')",
    )

    db.execute("SELECT autoembed.process()")
    assert embedded(db, mallory)
    [(text,)] = db.execute(f"SELECT content FROM {bob.name}.mail").fetchall()
    assert ("another" in text) == changed.startswith("content")
    db.execute("SELECT autoembed.process()")

    assert has_vector_of(bob.session, "mail", 1, text)
