"""Who may read the embeddings beside the rows: those who may read the rows, and nobody learns of hidden ones."""

from __future__ import annotations

import re
from collections.abc import Callable

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection

Role = Callable[[str], str]
Connect = Callable[..., Connection]


@pytest.fixture
def people(db: Connection, api: FakeApi) -> Connection:
    """An attached table with two rows and their embeddings beside them."""
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE people (email text PRIMARY KEY, diagnosis text, tenant text, note text)")
    db.execute("SELECT autoembed.enable('people', content_columns => '{diagnosis}')")
    db.execute("INSERT INTO people VALUES ('a@x.org', 'a broken arm', 'a'), ('b@x.org', 'a fever', 'b')")
    db.execute("SELECT autoembed.process()")
    return db


def may_read(db: Connection, role: str) -> bool:
    """Whether it may read the embeddings, and then the chunks, too."""
    [(embeddings, chunks)] = db.execute(
        "SELECT has_table_privilege(%(role)s, 'people_embeddings', 'SELECT') AS embeddings,"
        " has_table_privilege(%(role)s, 'people_chunks', 'SELECT') AS chunks",
        {"role": role},
    ).fetchall()
    assert embeddings == chunks
    return bool(embeddings)


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1 FROM people_embeddings WHERE email = 'a@x.org'",
        "SELECT 1 FROM people_embeddings WHERE email = 'nobody@x.org'",
        "SELECT 1 FROM people_embeddings WHERE email = 'a@x.org' AND chunk_end = 12",
        "LOCK TABLE people_embeddings IN ACCESS SHARE MODE",
        "CREATE VIEW mine AS SELECT email FROM people_embeddings; SELECT * FROM mine",
    ],
)
def test_a_role_without_a_right_to_the_table_learns_nothing_and_holds_nobody_up(
    people: Connection, role: Role, connect: Connect, statement: str
) -> None:
    stranger = role("stranger")
    people.execute(f"GRANT CREATE ON SCHEMA public TO {stranger}")

    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        connect(user=stranger).execute(f"BEGIN; {statement}".encode())


# What gives a role the right to read the text of people, and what takes it.
RIGHTS = {
    "to the table": ("GRANT SELECT ON people TO {reader}", "REVOKE SELECT ON people FROM {reader}"),
    "to all tables": (
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO {reader}",
        "REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {reader}",
    ),
    "to everybody": ("GRANT SELECT ON people TO PUBLIC", "REVOKE SELECT ON people FROM PUBLIC"),
    "to columns": (
        "GRANT SELECT (email, diagnosis) ON people TO {reader}",
        "REVOKE SELECT (diagnosis) ON people FROM {reader}",
    ),
    "to columns of two grants": (
        "GRANT SELECT (email) ON people TO PUBLIC; GRANT SELECT (diagnosis, note) ON people TO {reader}",
        "REVOKE SELECT (email) ON people FROM PUBLIC",
    ),
    "of a group": ("GRANT SELECT ON people TO {group}", "REVOKE {group} FROM {reader}"),
    "of a role that may grant it": (
        "GRANT SELECT ON people TO {group} WITH GRANT OPTION; SET ROLE {group}; GRANT SELECT ON people TO {reader};"
        " RESET ROLE",
        "REVOKE {group} FROM {reader}; REVOKE SELECT ON people FROM {group} CASCADE",
    ),
}


@pytest.mark.parametrize("right", RIGHTS)
def test_the_right_to_the_embeddings_follows_that_to_the_table(
    people: Connection, role: Role, connect: Connect, right: str
) -> None:
    reader, group = role("reader"), role("group")
    people.execute(f"GRANT {group} TO {reader}")
    given, taken = (statement.format(reader=reader, group=group) for statement in RIGHTS[right])
    assert not may_read(people, reader)

    people.execute(given)
    assert may_read(people, reader)
    read = "SELECT email, embedding IS NOT NULL FROM people_embeddings ORDER BY email"
    assert connect(user=reader).execute(read).fetchall() == [("a@x.org", True), ("b@x.org", True)]

    people.execute(taken)
    assert not may_read(people, reader)


def test_a_right_to_other_columns_is_none_to_the_embeddings(people: Connection, role: Role) -> None:
    reader = role("reader")
    people.execute(
        f"GRANT SELECT (email, note) ON people TO {reader}; GRANT INSERT, UPDATE, DELETE ON people TO {reader}"
    )
    assert not may_read(people, reader)


def test_a_table_that_is_attached_later_has_the_readers_that_it_had(
    people: Connection, role: Role, connect: Connect
) -> None:
    reader, writer = role("reader"), role("writer")
    people.execute("CREATE TABLE notes (id int PRIMARY KEY, body text); INSERT INTO notes VALUES (1, 'one')")
    people.execute(f"GRANT SELECT ON notes TO {reader}; GRANT INSERT ON notes TO {writer}")
    people.execute(
        f"SELECT autoembed.enable('notes', content_columns => '{{body}}'), autoembed.grant_usage('{reader}')"
    )
    people.execute("SELECT autoembed.process()")

    session = connect(user=reader)
    assert session.execute("SELECT key FROM autoembed.search('notes', 'one')").fetchall() == [("[1]",)]
    assert session.execute("SELECT chunk FROM notes_chunks").fetchall() == [("one",)]
    assert people.execute(
        "SELECT grantee, privilege_type FROM information_schema.role_table_grants"
        " WHERE table_name = 'notes_embeddings' AND grantee <> grantor"
    ).fetchall() == [(reader, "SELECT")]


def test_resync_gives_back_a_right_that_was_changed_without_event_triggers(people: Connection, role: Role) -> None:
    reader, stranger = role("reader"), role("stranger")
    people.execute(f"""
        SET event_triggers = off;
        GRANT SELECT ON people TO {reader};
        GRANT SELECT ON people_embeddings TO {stranger};
        RESET event_triggers;
        SELECT autoembed.resync('people');
    """)
    assert (may_read(people, reader), may_read(people, stranger)) == (True, False)


def test_an_embeddings_table_that_is_held_stops_no_grant_of_another_table(
    people: Connection, role: Role, connect: Connect
) -> None:
    reader = role("reader")
    people.execute(f"SET event_triggers = off; GRANT SELECT ON people TO {reader}; RESET event_triggers")
    people.execute("CREATE TABLE other (id int)")
    holder = connect()
    holder.execute("BEGIN; ALTER TABLE people_embeddings SET (fillfactor = 90)")

    connect(options="-c statement_timeout=20s").execute(f"GRANT SELECT ON other TO {reader}")

    assert people.execute("SELECT has_table_privilege(%s, 'other', 'SELECT') AS may", [reader]).fetchone() == (True,)
    holder.rollback()
    people.execute("SELECT autoembed.process()")
    assert may_read(people, reader)


def test_a_grant_compares_the_rights_to_its_own_tables_alone(people: Connection, role: Role) -> None:
    """With thousands of attached tables, the GRANTs of a restore would take hours."""
    reader, group = role("reader"), role("group")
    people.execute("CREATE TABLE other (id int PRIMARY KEY, note text)")
    people.execute("SELECT autoembed.enable('other', content_columns => '{note}')")
    people.execute(f"SET event_triggers = off; GRANT SELECT ON people TO {reader}; RESET event_triggers")
    for statement in (f"GRANT SELECT ON other TO {reader}", f"GRANT SELECT (id) ON other TO {group}"):
        people.execute(statement.encode())
        assert not may_read(people, reader)

    people.execute(f"REVOKE SELECT ON people_embeddings FROM {reader}")
    assert may_read(people, reader)


def test_many_rights_that_differ_are_given_at_once(people: Connection, role: Role) -> None:
    """Each GRANT of the event trigger fires it again."""
    reader = role("reader")
    for number in range(40):
        people.execute(f"CREATE TABLE t{number} (id int PRIMARY KEY, body text)")
        people.execute(f"SELECT autoembed.enable('t{number}', content_columns => '{{body}}')")
    people.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {reader}")
    assert people.execute(
        "SELECT bool_and(has_table_privilege(%s, p.embeddings_table, 'SELECT')) FROM autoembed.pipeline AS p", [reader]
    ).fetchall() == [(True,)]


def calls(session: Connection, statement: str) -> dict[str, int]:
    """How often a statement calls functions of the extension."""
    with session.transaction(force_rollback=True):
        session.execute("SET LOCAL track_functions = 'all'")
        session.execute(statement.encode())
        rows = session.execute("SELECT funcname, calls FROM pg_stat_xact_user_functions WHERE schemaname = 'autoembed'")
        return {row.funcname: row.calls for row in rows}


def test_a_grant_looks_once_at_rights_that_differ(people: Connection, role: Role) -> None:
    """Each of its own GRANTs fires the event trigger again. Somebody may hold one of the tables for a second each."""
    readers = [role(f"reader{number}") for number in range(5)]
    for number, reader in enumerate(readers):
        people.execute(f"CREATE TABLE t{number} (id int PRIMARY KEY, body text)")
        people.execute(f"SELECT autoembed.enable('t{number}', content_columns => '{{body}}')")
        people.execute(f"SET event_triggers = off; GRANT SELECT ON t{number} TO {reader}; RESET event_triggers")
    grant = f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {readers[0]}"

    assert calls(people, grant)["_unshared"] == 1

    people.execute(grant)
    assert may_read(people, readers[0])
    assert people.execute(
        "SELECT count(*) FROM pg_class AS c CROSS JOIN LATERAL aclexplode(c.relacl) AS a"
        " WHERE c.relname ~ '^t[0-9]_embeddings$' AND a.privilege_type = 'SELECT' AND a.grantee <> c.relowner"
    ).fetchone() == (9,)


def test_a_grant_waits_for_no_long_template_of_a_wide_table(people: Connection, role: Role) -> None:
    reader = role("reader")
    columns = ", ".join(f"c{number} int" for number in range(1000))
    people.execute(f"CREATE TABLE wide (id int PRIMARY KEY, body text, {columns})")
    people.execute("SELECT autoembed.enable('wide', content_template => '{body}' || repeat('{{', 1000))")
    people.execute(f"GRANT SELECT (id, body) ON wide TO {reader}; CREATE TABLE other (id int)")

    assert "_needed_columns" not in calls(people, f"GRANT SELECT ON other TO {reader}")
    assert calls(people, f"GRANT SELECT (c1) ON wide TO {reader}")["_needed_columns"] == 1


def test_a_grant_of_something_else_than_a_table_looks_at_no_table(people: Connection, role: Role) -> None:
    grant = f"GRANT USAGE ON SCHEMA public TO {role('reader')}"
    assert "_unshared" not in calls(people, grant)


def test_a_grant_within_the_statement_that_makes_a_schema_counts(people: Connection, role: Role) -> None:
    reader = role("reader")
    people.execute(f"CREATE SCHEMA other GRANT SELECT ON public.people TO {reader}")
    assert may_read(people, reader)


# The keys of rows, by the kind of the policy. The "=" of texts is leakproof, that of numbers is not.
HIDDEN = {"text": ("email", "'b@x.org'"), "numeric": ("id", "2")}


@pytest.mark.parametrize("key", HIDDEN)
@pytest.mark.parametrize("known", ["digest", "chunk_end"])
def test_the_plan_of_a_query_does_not_tell_which_text_a_hidden_row_has(
    people: Connection, role: Role, connect: Connect, key: str, known: str
) -> None:
    tenant = role("tenant")
    column, value = HIDDEN[key]
    if key == "numeric":
        people.execute("CREATE TABLE sick (id numeric PRIMARY KEY, diagnosis text, tenant text)")
        people.execute("SELECT autoembed.enable('sick', content_columns => '{diagnosis}')")
        people.execute("INSERT INTO sick VALUES (1, 'a broken arm', 'a'), (2, 'a fever', 'b')")
        people.execute("SELECT autoembed.process()")
    table = "people" if key == "text" else "sick"
    people.execute(f"""
        ALTER TABLE {table} ENABLE ROW LEVEL SECURITY;
        CREATE POLICY own ON {table} TO {tenant} USING (tenant = 'a');
        GRANT SELECT ON {table} TO {tenant};
    """)
    [(there, other)] = people.execute(
        f"SELECT quote_literal({known}::text), CASE '{known}' WHEN 'digest' THEN quote_literal('\\x00') ELSE '99' END"
        f" FROM {table}_embeddings WHERE {column} = {value}"
    ).fetchall()
    session = connect(user=tenant)

    plans = []
    for guess in (there, other):
        for row in (f"{column} = {value} AND ", ""):
            query = "EXPLAIN (ANALYZE, TIMING off, SUMMARY off, BUFFERS off, COSTS off)"
            lines = session.execute(f"{query} SELECT 1 FROM {table}_embeddings WHERE {row}{known} = {guess}").fetchall()
            plans.append([re.sub(r"'[^']*'|\d+\)", "", line) for [line] in lines])
    assert plans[:2] == plans[2:]
