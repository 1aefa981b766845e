"""Whatever an owner's code does, and whenever PostgreSQL runs it, it runs as the owner."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from extension.hostile.tenants import (
    ATTACK,
    CURSOR,
    ENABLE_COLUMNS,
    ENABLE_FUNCTION,
    NOTES,
    Tenant,
    assert_nothing_gained,
    content_function,
    has_vector_of,
    ran_as,
    stays_fresh,
    trigger,
    waiting_of,
)
from fake_api import FakeApi
from harness import Connection
from lanes import Lane
from waiting import wait_until

CURSOR_PLACES = {
    "trigger before": trigger("PERFORM {me}.leave_cursor();"),
    "trigger after": trigger("PERFORM {me}.leave_cursor();", "AFTER UPDATE"),
    "trigger of the statement": """
        CREATE TRIGGER leave AFTER UPDATE ON notes EXECUTE FUNCTION leave_cursor_of_trigger()""",
    "check": "ALTER TABLE notes ADD CHECK (leave_cursor() IS NOT NULL) NOT VALID",
    "content function": content_function("PERFORM {me}.leave_cursor();")
    + ";"
    + ENABLE_FUNCTION.replace("enable('notes'", "alter_pipeline('notes'"),
    "default of another table": """
        CREATE TABLE log (note text DEFAULT leave_cursor());
        """
    + trigger("INSERT INTO {me}.log DEFAULT VALUES;"),
    "trigger of a view": """
        CREATE VIEW log AS SELECT 1 AS id;
        CREATE TRIGGER leave INSTEAD OF INSERT ON log FOR EACH ROW EXECUTE FUNCTION leave_cursor_of_trigger();
        """
    + trigger("INSERT INTO {me}.log VALUES (1);"),
}


@pytest.mark.parametrize("place", CURSOR_PLACES)
def test_a_cursor_that_outlives_the_commit_reads_nothing_as_another_in_a_lane(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, place: str
) -> None:
    mallory.run(CURSOR, NOTES, ENABLE_COLUMNS, CURSOR_PLACES[place], "INSERT INTO notes VALUES (1, 'a note')")

    wait_until(lambda: has_vector_of(db, f"{mallory.name}.notes", 1, "a note"))
    stays_fresh(bob)

    assert_nothing_gained(db, mallory)


@pytest.mark.parametrize("place", ["trigger before", "check"])
def test_a_cursor_that_outlives_the_commit_reads_nothing_as_the_caller_of_process(
    db: Connection, mallory: Tenant, place: str
) -> None:
    mallory.run(CURSOR, NOTES, ENABLE_COLUMNS, CURSOR_PLACES[place], "INSERT INTO notes VALUES (1, 'a note')")

    db.execute("SELECT autoembed.process()")

    assert_nothing_gained(db, mallory)
    assert db.execute("SELECT name FROM pg_cursors WHERE is_holdable").fetchall() == []


def test_an_ordinary_cursor_of_an_owner_works(db: Connection, mallory: Tenant) -> None:
    mallory.run(
        NOTES,
        ENABLE_COLUMNS,
        "CREATE TABLE log (note text)",
        trigger("FOR NEW.content IN SELECT NEW.content LOOP INSERT INTO {me}.log VALUES (NEW.content); END LOOP;"),
        "INSERT INTO notes VALUES (1, 'a note')",
    )

    db.execute("SELECT autoembed.process()")

    assert has_vector_of(db, f"{mallory.name}.notes", 1, "a note")
    assert mallory.session.execute("SELECT note FROM log").fetchall() == [("a note",)]


# A row in "child" has the owner's code run when deferred constraints are checked.
DEFERRED = {
    "foreign key's cast": """
        CREATE TYPE kind AS ENUM ('1');
        CREATE FUNCTION kind_int(k kind) RETURNS int LANGUAGE plpgsql AS
            'BEGIN PERFORM {me}.leave_cursor(); RETURN 1; END';
        CREATE CAST (kind AS int) WITH FUNCTION kind_int AS IMPLICIT;
        CREATE TABLE parent (id int PRIMARY KEY);
        INSERT INTO parent VALUES (1);
        CREATE TABLE child (id kind REFERENCES parent DEFERRABLE INITIALLY DEFERRED);
        """
    + trigger("INSERT INTO {me}.child VALUES ('1');"),
    "foreign key's cast, deferred by the trigger": """
        CREATE TYPE kind AS ENUM ('1');
        CREATE FUNCTION kind_int(k kind) RETURNS int LANGUAGE plpgsql AS
            'BEGIN PERFORM {me}.leave_cursor(); RETURN 1; END';
        CREATE CAST (kind AS int) WITH FUNCTION kind_int AS IMPLICIT;
        CREATE TABLE parent (id int PRIMARY KEY);
        INSERT INTO parent VALUES (1);
        CREATE TABLE child (id kind REFERENCES parent DEFERRABLE);
        """
    + trigger("SET CONSTRAINTS ALL DEFERRED; INSERT INTO {me}.child VALUES ('1');"),
    "foreign key of a partition": """
        CREATE TYPE kind AS ENUM ('1');
        CREATE FUNCTION kind_int(k kind) RETURNS int LANGUAGE plpgsql AS
            'BEGIN PERFORM {me}.leave_cursor(); RETURN 1; END';
        CREATE CAST (kind AS int) WITH FUNCTION kind_int AS IMPLICIT;
        CREATE TABLE parent (id int PRIMARY KEY);
        INSERT INTO parent VALUES (1);
        CREATE TABLE child (id kind REFERENCES parent DEFERRABLE INITIALLY DEFERRED) PARTITION BY LIST (id);
        CREATE TABLE child_1 PARTITION OF child DEFAULT;
        """
    + trigger("INSERT INTO {me}.child VALUES ('1');"),
    "exclusion constraint's expression": """
        CREATE FUNCTION same(id int) RETURNS int LANGUAGE plpgsql IMMUTABLE AS
            'BEGIN PERFORM {me}.leave_cursor(); RETURN id; END';
        CREATE TABLE child (id int, EXCLUDE USING btree (same(id) WITH =) DEFERRABLE INITIALLY DEFERRED);
        INSERT INTO child VALUES (1);
        """
    + trigger("INSERT INTO {me}.child VALUES (1); DELETE FROM {me}.child WHERE ctid = '(0,1)';"),
}


@pytest.mark.parametrize("constraint", DEFERRED)
@pytest.mark.parametrize("door", ["lane", "process"])
def test_a_deferred_constraint_runs_nothing_as_another(
    request: pytest.FixtureRequest, db: Connection, mallory: Tenant, constraint: str, door: str
) -> None:
    mallory.run(CURSOR, NOTES, ENABLE_COLUMNS, DEFERRED[constraint], "INSERT INTO notes VALUES (1, 'a note')")

    if door == "lane":
        request.getfixturevalue("lane")
        wait_until(lambda: waiting_of(db, mallory) == 0)
    else:
        db.execute("SELECT autoembed.process()")

    assert_nothing_gained(db, mallory)


# Constraints and triggers that honest tables have.
HONEST = {
    "foreign key of the table": """
        CREATE TABLE author (id int PRIMARY KEY);
        INSERT INTO author VALUES (1);
        ALTER TABLE notes ADD author int DEFAULT 1 REFERENCES author DEFERRABLE INITIALLY DEFERRED""",
    "foreign key to the table": """
        CREATE TABLE remark (id int PRIMARY KEY, note int REFERENCES notes DEFERRABLE INITIALLY DEFERRED)""",
    "foreign key of what a trigger writes": """
        CREATE TABLE log (note int REFERENCES notes DEFERRABLE INITIALLY DEFERRED);
        """
    + trigger("INSERT INTO {me}.log VALUES (NEW.id);"),
    "unique constraint": "ALTER TABLE notes ADD UNIQUE (content) DEFERRABLE INITIALLY DEFERRED",
    "constraint trigger": """
        CREATE TABLE log (note int);
        CREATE FUNCTION log_it() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN INSERT INTO {me}.log VALUES (NEW.id); RETURN NULL; END';
        CREATE CONSTRAINT TRIGGER log_it AFTER UPDATE ON notes DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION log_it()""",
}


@pytest.mark.parametrize("constraint", HONEST)
def test_an_honest_deferred_constraint_keeps_no_row_from_its_vector(
    db: Connection, mallory: Tenant, lane: Lane, constraint: str
) -> None:
    mallory.run(NOTES, ENABLE_COLUMNS, HONEST[constraint], "INSERT INTO notes VALUES (1, 'a note')")

    wait_until(lambda: has_vector_of(db, f"{mallory.name}.notes", 1, "a note"))

    if "log" in HONEST[constraint]:
        assert mallory.session.execute("SELECT DISTINCT note FROM log").fetchall() == [(1,)]


# Changes of a table that a superuser has enabled, while its texts are with the provider.
GIFTS = {
    "given away": "ALTER TABLE gift OWNER TO {me}",
    "of a role that was a superuser": "ALTER ROLE {me} NOSUPERUSER",
}
TRAPS = {
    "trigger deferred by a trigger": """
        CREATE TABLE trap (id int);
        CREATE CONSTRAINT TRIGGER attack AFTER INSERT ON trap DEFERRABLE INITIALLY IMMEDIATE
            FOR EACH ROW EXECUTE FUNCTION attack_of_trigger();
        CREATE FUNCTION defer() RETURNS trigger LANGUAGE plpgsql AS
            'BEGIN SET CONSTRAINTS ALL DEFERRED; INSERT INTO {me}.trap VALUES (1); RETURN NEW; END';
        CREATE CONSTRAINT TRIGGER defer AFTER UPDATE ON gift DEFERRABLE INITIALLY DEFERRED
            FOR EACH ROW EXECUTE FUNCTION defer()""",
    "cursor": "CREATE TRIGGER leave BEFORE UPDATE ON gift FOR EACH ROW EXECUTE FUNCTION leave_cursor_of_trigger()",
}


@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.parametrize("gift", GIFTS)
def test_a_table_that_changes_hands_while_its_texts_are_away_gives_no_rights(
    db: Connection, mallory: Tenant, api: FakeApi, lane: Lane, gift: str, trap: str
) -> None:
    api.behave(hold=True)
    mallory.run(CURSOR)
    giver = "postgres"
    if gift != "given away":
        db.execute(f"ALTER ROLE {mallory.name} SUPERUSER")
        giver = mallory.name
    db.execute(f"""SET search_path = {mallory.name}, public;
                   CREATE TABLE gift (id int PRIMARY KEY, content text);
                   ALTER TABLE gift OWNER TO {giver};
                   SELECT autoembed.enable('gift', 'embedding', content_columns => '{{content}}', model => 'slow');
                   INSERT INTO gift VALUES (1, 'a gift')""")
    api.wait_for(held=1)

    db.execute(GIFTS[gift].replace("{me}", mallory.name))
    mallory.run(TRAPS[trap])
    api.release()
    wait_until(lambda: waiting_of(db, mallory) == 0)

    assert lane.error is None
    assert_nothing_gained(db, mallory)


# How mallory comes to be called a member of bob without any right of his.
EMPTY_MEMBERSHIPS = {
    "direct": "GRANT {bob} TO {mallory} WITH INHERIT FALSE, SET FALSE",
    "of a group": "GRANT {bob} TO {group} WITH INHERIT FALSE, SET FALSE; GRANT {group} TO {mallory}",
    "in a group": "GRANT {group} TO {mallory} WITH INHERIT FALSE, SET FALSE; GRANT {bob} TO {group}",
}


@pytest.mark.parametrize("membership", EMPTY_MEMBERSHIPS)
@pytest.mark.parametrize("place", ["{mallory}", "{bob}"])
def test_a_member_without_rights_cannot_put_a_function_in_the_place_of_anothers(
    db: Connection, role: Callable[[str], str], mallory: Tenant, bob: Tenant, membership: str, place: str
) -> None:
    def named(script: str) -> str:
        return script.replace("{mallory}", mallory.name).replace("{bob}", bob.name).replace("{group}", group)

    group = role("group")
    own = "CREATE FUNCTION {bob}.letter_text(l {bob}.letters) RETURNS text LANGUAGE sql AS 'SELECT l.content'"
    db.execute(named(EMPTY_MEMBERSHIPS[membership]))
    bob.run(named(own), "SELECT autoembed.alter_pipeline('letters', content_function => 'letter_text')")
    db.execute("SELECT autoembed.process()")
    mallory.run(ATTACK, "GRANT INSERT ON ran TO PUBLIC", f"GRANT USAGE ON SCHEMA {mallory.name} TO PUBLIC")
    bob.run(named("GRANT USAGE, CREATE ON SCHEMA {bob} TO {mallory}; DROP FUNCTION letter_text"))
    mallory.run(
        named(f"""CREATE FUNCTION {place}.letter_text(l {{bob}}.letters) RETURNS text LANGUAGE plpgsql AS
                      'BEGIN PERFORM {{mallory}}.attack(); RETURN ''mine''; END';
                  GRANT EXECUTE ON FUNCTION attack TO PUBLIC""")
    )
    bob.run("UPDATE letters SET content = 'changed'")

    db.execute("SELECT autoembed.process()")
    try:
        mallory.session.execute(named(f"DROP FUNCTION {place}.letter_text"))
        bob.run(named(own))
        db.execute("SELECT autoembed.process()")
    finally:
        assert ran_as(db, mallory) == set()

    assert has_vector_of(db, f"{bob.name}.letters", 1, "changed")


CALLS = {
    "preview": "SELECT * FROM autoembed.preview('{me}.notes', '1')",
    "estimate": "SELECT * FROM autoembed.estimate('{me}.notes')",
    "estimate with a function": "SELECT * FROM autoembed.estimate('{me}.notes', content_function => 'note_text')",
}
CODE_THAT_IS_READ = {
    "content function": content_function("PERFORM {me}.attack();"),
    "condition": """
        CREATE FUNCTION wanted(id int) RETURNS boolean LANGUAGE plpgsql AS
            'BEGIN PERFORM {me}.attack(); RETURN true; END';
        SELECT autoembed.alter_pipeline('notes', condition => 'wanted(id)')""",
    "policy": """
        CREATE FUNCTION wanted(id int) RETURNS boolean LANGUAGE plpgsql AS
            'BEGIN PERFORM {me}.attack(); RETURN true; END';
        ALTER TABLE notes ENABLE ROW LEVEL SECURITY;
        ALTER TABLE notes FORCE ROW LEVEL SECURITY;
        CREATE POLICY seen ON notes USING (true OR wanted(id));
        CREATE POLICY also ON notes AS RESTRICTIVE USING (wanted(id))""",
    "operator of the key": """
        CREATE DOMAIN word AS varchar;
        ALTER TABLE notes ALTER id TYPE varchar(9);
        CREATE FUNCTION equal(a varchar, b varchar) RETURNS boolean LANGUAGE plpgsql AS
            'BEGIN PERFORM {me}.attack(); RETURN a::text = b::text; END';
        CREATE OPERATOR = (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = equal)""",
    "domain of the key": """
        CREATE DOMAIN number AS int CHECK (attack() IS NOT NULL);
        ALTER TABLE notes ALTER id TYPE number""",
}


@pytest.mark.parametrize("code", CODE_THAT_IS_READ)
@pytest.mark.parametrize("call", CALLS)
def test_what_a_superuser_asks_about_anothers_table_runs_its_code_as_its_owner(
    db: Connection, mallory: Tenant, code: str, call: str
) -> None:
    mallory.run(
        ATTACK,
        NOTES,
        "INSERT INTO notes VALUES (1, 'a note')",
        content_function(""),
        ENABLE_FUNCTION,
        CODE_THAT_IS_READ[code],
        "TRUNCATE ran",
    )

    found = db.execute(CALLS[call].replace("{me}", mallory.name)).fetchall()

    assert len(found) == 1
    assert_nothing_gained(db, mallory)


ENABLE_BESIDE = "SELECT autoembed.enable('notes', content_columns => '{content}')"


def check_attacks(column: str) -> str:
    """A constraint that attacks when PostgreSQL checks it, of an embeddings table."""
    return f"""CREATE FUNCTION is_good(value anyelement) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
                   'BEGIN PERFORM {{me}}.attack(); RETURN true; END';
               ALTER TABLE notes_embeddings ADD CHECK ({{me}}.is_good({column}))"""


@pytest.mark.parametrize("by", ["the owner", "a superuser"])
def test_a_constraint_of_an_embeddings_table_runs_as_its_owner_when_the_key_gets_another_type(
    db: Connection, mallory: Tenant, lane: Lane, by: str
) -> None:
    mallory.run(ATTACK, NOTES, ENABLE_BESIDE, "INSERT INTO notes VALUES (1, 'a note')", check_attacks("id"))
    wait_until(lambda: db.execute(f"SELECT FROM {mallory.name}.notes_embeddings").fetchall() != [])

    session = mallory.session if by == "the owner" else db
    session.execute(f"ALTER TABLE {mallory.name}.notes ALTER id TYPE bigint")

    assert_nothing_gained(db, mallory)
    [column] = db.execute(
        "SELECT format_type(atttypid, NULL) AS type FROM pg_attribute"
        f" WHERE attrelid = '{mallory.name}.notes_embeddings'::regclass AND attname = 'id'"
    ).fetchall()
    assert column.type == "bigint"


@pytest.mark.parametrize("by", ["the owner", "a superuser"])
def test_a_trigger_of_an_embeddings_table_runs_as_its_owner_when_the_model_changes(
    db: Connection, mallory: Tenant, by: str
) -> None:
    db.execute("SELECT autoembed.create_model('wide', 'fake', 16)")
    mallory.run(
        ATTACK,
        NOTES,
        ENABLE_BESIDE,
        "CREATE TRIGGER attack BEFORE TRUNCATE ON notes_embeddings EXECUTE FUNCTION attack_of_trigger()",
    )

    session = mallory.session if by == "the owner" else db
    session.execute(f"SELECT autoembed.alter_pipeline('{mallory.name}.notes', model => 'wide')")

    assert ran_as(db, mallory) == {mallory.name}
    assert_nothing_gained(db, mallory)


# PostgreSQL prefers functions of exactly these types to its own, which take any type.
PREFERRED = """
GRANT INSERT ON ran TO PUBLIC;
GRANT USAGE ON SCHEMA {me} TO PUBLIC;
CREATE FUNCTION {theirs}.unnest(text[]) RETURNS SETOF text LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN QUERY SELECT pg_catalog.unnest($1); END';
CREATE FUNCTION {theirs}.cardinality(text[]) RETURNS int LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN pg_catalog.cardinality($1); END';
CREATE FUNCTION {theirs}.concat(oid, tid, xid) RETURNS text LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN pg_catalog.concat($1, $2, $3); END';
CREATE FUNCTION {theirs}.concat(text) RETURNS text LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN $1; END';
CREATE FUNCTION {theirs}.appended(text[], text) RETURNS text[] LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN pg_catalog.array_append($1, $2); END';
CREATE AGGREGATE {theirs}.array_agg(text) (SFUNC = {theirs}.appended, STYPE = text[]);
CREATE FUNCTION {theirs}.equal(text[], text[]) RETURNS boolean LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN $1 OPERATOR(pg_catalog.=) $2; END';
CREATE OPERATOR {theirs}.= (LEFTARG = text[], RIGHTARG = text[], FUNCTION = {theirs}.equal)
"""


@pytest.mark.parametrize("place", ["in the row", "beside it"])
def test_nobody_who_may_create_in_a_schema_runs_code_as_the_owners_of_its_tables(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, place: str
) -> None:
    bob.run(f"GRANT ALL ON SCHEMA {{me}} TO {mallory.name}")
    mallory.run(ATTACK, PREFERRED.replace("{theirs}", bob.name))
    column = ", embedding_column => 'embedding'" if place == "in the row" else ""
    bob.run(
        "CREATE TABLE diary (id int PRIMARY KEY, content text)",
        f"SELECT autoembed.enable('diary', content_columns => '{{content}}'{column})",
        "INSERT INTO diary VALUES (1, 'a page'), (2, 'another')",
        "SELECT autoembed.wait_until_fresh('diary'::regclass)",
        # The answer for another model than the present one.
        "DELETE FROM diary WHERE id = 1",
        "UPDATE diary SET content = 'changed'",
        "SELECT autoembed.wait_until_fresh('diary'::regclass)",
    )
    [pipeline] = db.execute("SELECT max(id) AS id FROM autoembed.pipeline").fetchall()
    columns = "'{}', " * (1 if place == "in the row" else 10)
    db.execute(f"SELECT FROM autoembed._write_{pipeline.id}('{{[2]}}', '{{x}}', 'another model', {columns}'{{}}')")

    assert ran_as(db, mallory) == set()


# PostgreSQL calls these functions of the owner when it plans any statement that reads the table.
PLANNED = {
    "expression of an index": "CREATE INDEX ON notes ((planned() || content))",
    "predicate of an index": "CREATE INDEX ON notes (content) WHERE planned() || content <> ''",
    "statistics": "CREATE STATISTICS planned ON (planned() || content) FROM notes",
}
CHANGES = {
    "type of the key": "ALTER TABLE notes ALTER id TYPE bigint",
    "another key": "ALTER TABLE notes ADD other int UNIQUE DEFAULT 1 NOT NULL, DROP CONSTRAINT notes_pkey",
    "another key and column": "ALTER TABLE notes DROP CONSTRAINT notes_pkey, ADD other int DEFAULT 1 PRIMARY KEY",
}


@pytest.mark.parametrize("planned", PLANNED)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("column", ["'embedding', ", ""], ids=["in the row", "beside it"])
def test_a_change_of_the_key_plans_nothing_as_another(
    db: Connection, mallory: Tenant, planned: str, change: str, column: str
) -> None:
    mallory.run(
        ATTACK,
        "CREATE FUNCTION planned() RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN {me}.attack(); END'",
        NOTES,
        f"SELECT autoembed.enable('notes', {column}content_columns => '{{content}}')",
        "INSERT INTO notes VALUES (1, 'a note')",
    )
    db.execute("SELECT autoembed.process()")
    mallory.run(PLANNED[planned])

    mallory.run(CHANGES[change])

    assert_nothing_gained(db, mallory)
    db.execute("SELECT autoembed.process()")
    assert waiting_of(db, mallory) == 0
    assert db.execute("SELECT sum(embedded) FROM autoembed.status").fetchone() == (1,)
    assert_nothing_gained(db, mallory)


# A column whose type checks what it reads, and a condition of the administrator's with a literal of it.
CHECKED = {
    "array of a domain": ("checked[]", "thing <> '{x}'"),
    "composite type": ("pair", "thing <> '(x)'::pair"),
    "range": ("span", "thing <> '[a,b]'"),
    "domain": ("checked", "thing <> 'x'"),
}


@pytest.mark.parametrize("type", CHECKED)
def test_a_literal_in_a_condition_is_read_as_the_owner(db: Connection, mallory: Tenant, type: str) -> None:
    column, condition = CHECKED[type]
    mallory.run(
        ATTACK,
        "CREATE DOMAIN checked AS text COLLATE \"C\" CHECK ({me}.attack() = 'x')",
        "CREATE TYPE pair AS (word checked)",
        "CREATE TYPE span AS RANGE (subtype = checked)",
        f"CREATE TABLE notes (id int PRIMARY KEY, content text, thing {column})",
        "DELETE FROM ran",
    )

    for statement in (
        "SELECT autoembed.enable(%s, content_columns => '{content}', condition => %s)",
        "SELECT autoembed.alter_pipeline(%s, condition => %s)",
        "SELECT autoembed.reembed(%s, condition => %s)",
        "SELECT autoembed.estimate(%s, condition => %s)",
    ):
        db.execute(statement.encode(), [f"{mallory.name}.notes", condition])

    assert_nothing_gained(db, mallory)


@pytest.mark.parametrize("first", ["nobody", "the owner"])
def test_a_match_function_that_a_superuser_makes_is_the_owners_and_runs_as_its_caller(
    db: Connection, mallory: Tenant, bob: Tenant, first: str
) -> None:
    make = f"SELECT autoembed.create_match_function('{mallory.name}.notes')"
    mallory.run(NOTES, ENABLE_COLUMNS, "INSERT INTO notes VALUES (1, 'a note')")
    mallory.run(f"GRANT USAGE ON SCHEMA {{me}} TO {bob.name}")
    db.execute("SELECT autoembed.process()")
    if first == "the owner":
        mallory.run(make)
    db.execute(make)

    made = "SELECT proowner::regrole::text, prosecdef FROM pg_proc WHERE proname = 'match_notes'"
    assert db.execute(made).fetchall() == [(mallory.name, False)]
    match = f"SELECT id FROM {mallory.name}.match_notes('[1,1,1,1,1,1,1,1]')"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        bob.session.execute(match)
    mallory.run(f"GRANT SELECT ON notes TO {bob.name}")
    assert bob.session.execute(match).fetchall() == [(1,)]


# What an administrator does about the table of a tenant. {table}: the table.
OF_ADMINISTRATORS = """
    SELECT autoembed.enable('{table}', content_columns => '{content}', condition => 'id > 0', text_config => 'english');
    CALL autoembed.work(run_seconds => 1);
    UPDATE autoembed.backfill SET served_at = NULL;
    CALL autoembed.work(run_seconds => 1, backfill => true);
    SELECT autoembed.process();
    SELECT autoembed.preview('{table}', '1');
    SELECT autoembed.estimate('{table}', content_columns => '{content}');
    SELECT autoembed.doctor();
    SELECT autoembed.resync('{table}');
    SELECT autoembed.reembed('{table}', condition => 'id < 5');
    SELECT autoembed.alter_pipeline('{table}', content_template => '{content} {id}');
    SELECT autoembed.alter_pipeline('{table}', storage => 'row');
    SELECT autoembed.alter_pipeline('{table}', storage => 'beside');
    SELECT autoembed.create_match_function('{table}');
    SELECT autoembed.alter_model('fast', dimensions => 16);
    SELECT autoembed.disable('{table}');
"""


def test_an_administrator_plans_nothing_of_an_owner(db: Connection, mallory: Tenant) -> None:
    mallory.run(
        ATTACK,
        "CREATE FUNCTION planned() RETURNS text LANGUAGE plpgsql IMMUTABLE AS 'BEGIN RETURN {me}.attack(); END'",
        NOTES,
        "INSERT INTO notes SELECT n, 'note ' || n FROM generate_series(1, 10) AS n",
        PLANNED["expression of an index"],
        PLANNED["statistics"],
    )
    table = f"{mallory.name}.notes"
    first, *rest = filter(None, map(str.strip, OF_ADMINISTRATORS.replace("{table}", table).split(";")))
    db.execute(first.encode())
    mallory.run(
        "CREATE INDEX ON notes_embeddings ((planned() || encode(digest, 'hex')))",
        "CREATE STATISTICS planned_beside ON (planned() || encode(digest, 'hex')) FROM notes_embeddings",
    )

    with db.transaction(force_rollback=True):
        db.execute(f"SELECT FROM {table}")
        assert ran_as(db, mallory) - {mallory.name}, "PostgreSQL calls no such functions any more"

    for statement in rest:
        db.execute(statement.encode())
        assert ran_as(db, mallory) <= {mallory.name}, statement

    assert_nothing_gained(db, mallory)


def test_the_owner_of_the_database_cannot_put_another_schema_in_the_place_of_pgvectors(
    db: Connection, dbname: str, mallory: Tenant
) -> None:
    """It owns the schema public. Types and operators in a new one of that name would run as each caller."""
    db.execute(f"ALTER DATABASE {dbname} OWNER TO {mallory.name}")
    try:
        with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="pgvector"):
            mallory.run("ALTER SCHEMA public RENAME TO old")
        mallory.run("CREATE SCHEMA mine", "ALTER SCHEMA mine RENAME TO own", "DROP SCHEMA own")
    finally:
        db.execute(f"ALTER DATABASE {dbname} OWNER TO CURRENT_USER")


# The function that bob's condition calls, in a schema where others may create functions, and what mallory puts in its
# place: when it is gone, or beside it.
REPLACED = {
    "the function is dropped": (
        "CREATE FUNCTION shared.wanted(id int) RETURNS boolean LANGUAGE sql RETURN id > 0",
        "shared.wanted(id)",
        "DROP FUNCTION shared.wanted",
        "CREATE FUNCTION shared.wanted(id int) RETURNS boolean LANGUAGE sql AS 'SELECT {me}.attack() IS NOT NULL'",
    ),
    "the function takes any type": (
        "CREATE FUNCTION shared.wanted(id anyelement) RETURNS boolean LANGUAGE sql AS 'SELECT id IS NOT NULL'",
        "shared.wanted(id)",
        None,
        "CREATE FUNCTION shared.wanted(id int) RETURNS boolean LANGUAGE sql AS 'SELECT {me}.attack() IS NOT NULL'",
    ),
    "the function has a default": (
        "CREATE FUNCTION shared.wanted(id int, low int DEFAULT 0) RETURNS boolean LANGUAGE sql RETURN id > low",
        "shared.wanted(id)",
        None,
        "CREATE FUNCTION shared.wanted(id int) RETURNS boolean LANGUAGE sql AS 'SELECT {me}.attack() IS NOT NULL'",
    ),
    "the function takes any number": (
        "CREATE FUNCTION shared.wanted(VARIADIC ids int[]) RETURNS boolean LANGUAGE sql RETURN ids[1] > 0",
        "shared.wanted(id)",
        None,
        "CREATE FUNCTION shared.wanted(id int) RETURNS boolean LANGUAGE sql AS 'SELECT {me}.attack() IS NOT NULL'",
    ),
    "the operator is dropped": (
        "CREATE FUNCTION shared.greater(a int, b int) RETURNS boolean LANGUAGE sql RETURN a > b;"
        "CREATE OPERATOR shared.>>> (FUNCTION = shared.greater, LEFTARG = int, RIGHTARG = int)",
        "id OPERATOR(shared.>>>) 0",
        "DROP OPERATOR shared.>>> (int, int)",
        "CREATE FUNCTION shared.mine(a int, b int) RETURNS boolean LANGUAGE sql AS 'SELECT {me}.attack() IS NOT NULL';"
        "CREATE OPERATOR shared.>>> (FUNCTION = shared.mine, LEFTARG = int, RIGHTARG = int)",
    ),
    "the domain is dropped": (
        "CREATE DOMAIN shared.number AS int",
        "id::shared.number > 0",
        "DROP DOMAIN shared.number",
        "CREATE FUNCTION shared.mine(a int) RETURNS boolean LANGUAGE sql AS 'SELECT {me}.attack() IS NOT NULL';"
        "CREATE DOMAIN shared.number AS int CHECK (shared.mine(VALUE))",
    ),
}


@pytest.mark.parametrize("event_triggers", ["on", "off"])
@pytest.mark.parametrize("place", REPLACED)
def test_what_takes_the_place_of_an_object_of_a_condition_does_not_run_as_the_owner(
    db: Connection, mallory: Tenant, bob: Tenant, place: str, event_triggers: str
) -> None:
    create, condition, drop, replace = REPLACED[place]
    db.execute("CREATE SCHEMA shared; GRANT USAGE ON SCHEMA shared TO PUBLIC")
    db.execute(f"GRANT CREATE ON SCHEMA shared TO {mallory.name}; {create}".encode())
    mallory.run(ATTACK, f"GRANT USAGE ON SCHEMA {mallory.name} TO PUBLIC; GRANT INSERT ON ran TO PUBLIC")
    bob.run("CREATE TABLE chosen (id int PRIMARY KEY, content text)")
    bob.session.execute(
        "SELECT autoembed.enable('chosen', content_columns => '{content}', condition => %s)", [condition]
    )
    bob.run("INSERT INTO chosen VALUES (1, 'one')")
    db.execute("SELECT autoembed.process()")
    assert bob.session.execute("SELECT FROM chosen_embeddings").rowcount == 1

    if drop:
        db.execute(drop.encode())
    db.execute(f"SET event_triggers = {event_triggers}; SET ROLE {mallory.name}")
    db.execute(replace.replace("{me}", mallory.name).encode())
    db.execute("RESET ROLE; RESET event_triggers")
    bob.run("UPDATE chosen SET content = 'two'")
    for _ in range(3):
        db.execute("SELECT autoembed.process()")
    bob.run("UPDATE chosen SET content = 'three'")

    assert ran_as(db, mallory) == set()
    [state] = db.execute("SELECT state, reason FROM autoembed.status WHERE table_name LIKE '%chosen'").fetchall()
    assert (state.state, mallory.name in state.reason) == ("stopped", True)

    bob.session.execute("SELECT autoembed.alter_pipeline('chosen', condition => 'id > 0')")
    for _ in range(3):
        db.execute("SELECT autoembed.process()")
    assert ran_as(db, mallory) == set()
    assert db.execute("SELECT state FROM autoembed.status WHERE table_name LIKE '%chosen'").fetchone() == ("idle",)


@pytest.mark.parametrize("place", REPLACED)
def test_nor_does_it_in_a_condition_of_a_backfill(db: Connection, mallory: Tenant, bob: Tenant, place: str) -> None:
    create, condition, drop, replace = REPLACED[place]
    db.execute("CREATE SCHEMA shared; GRANT USAGE ON SCHEMA shared TO PUBLIC")
    db.execute(f"GRANT CREATE ON SCHEMA shared TO {mallory.name}; {create}".encode())
    mallory.run(ATTACK, f"GRANT USAGE ON SCHEMA {mallory.name} TO PUBLIC; GRANT INSERT ON ran TO PUBLIC")
    bob.run("CREATE TABLE chosen (id int PRIMARY KEY, content text)")
    bob.run("SELECT autoembed.enable('chosen', content_columns => '{content}')", "INSERT INTO chosen VALUES (1, 'one')")
    for _ in range(3):
        db.execute("SELECT autoembed.process()")
    bob.session.execute("SELECT autoembed.reembed('chosen', condition => %s)", [condition])

    if drop:
        db.execute(drop.encode())
    mallory.run(replace)
    db.execute("SELECT autoembed.process()")
    bob.run("SELECT autoembed.retry_failed('chosen')")
    db.execute("SELECT autoembed.process()")

    assert ran_as(db, mallory) == set()
    [failed] = db.execute("SELECT reason FROM autoembed.failed WHERE table_name LIKE '%chosen'").fetchall()
    assert failed.reason.startswith("the condition on table ") and mallory.name in failed.reason
