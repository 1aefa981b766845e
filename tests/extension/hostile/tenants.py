"""Tenants of one database: hostile ones, and one whose rows are to stay fresh whatever the others do."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from autoembed.providers.fake import vector_of
from waiting import wait_until

if TYPE_CHECKING:
    # The bench attacks, too, and has no test containers.
    from harness import Connection

# On an idle machine a change has its vector within one second.
SOON_SECONDS = 10.0
# Longer than any write of a tenant's own row should take.
WRITE_TIMEOUT = "5s"
# The dimensions of the model "fast", which all tenants use unless a test says otherwise.
DIMENSIONS = 8

# A function that tries to gain rights, and notes the role that it ran as.
ATTACK = """
CREATE TABLE ran (who name);
CREATE FUNCTION attack() RETURNS text LANGUAGE plpgsql AS $attack$
DECLARE
    statement text;
BEGIN
    FOREACH statement IN ARRAY ARRAY['ALTER ROLE {me} SUPERUSER', 'INSERT INTO {me}.ran VALUES (current_user)'] LOOP
        BEGIN
            EXECUTE statement;
        EXCEPTION WHEN OTHERS THEN
            NULL;
        END;
    END LOOP;
    RETURN 'x';
END;
$attack$;
CREATE FUNCTION attack_of_trigger() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.attack(); RETURN NEW; END';
"""

# Leaves a cursor for the commit, which PostgreSQL reads to its end then, with the rights of the session.
CURSOR = (
    ATTACK
    + """
CREATE FUNCTION leave_cursor() RETURNS text LANGUAGE plpgsql AS $leave$
BEGIN
    EXECUTE 'DECLARE held CURSOR WITH HOLD FOR SELECT {me}.attack()';
    RETURN 'x';
EXCEPTION WHEN OTHERS THEN
    RETURN 'x';
END;
$leave$;
CREATE FUNCTION leave_cursor_of_trigger() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM {me}.leave_cursor(); RETURN NEW; END';
"""
)

NOTES = "CREATE TABLE notes (id int PRIMARY KEY, content text)"
ENABLE_COLUMNS = "SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}')"
ENABLE_FUNCTION = "SELECT autoembed.enable('notes', 'embedding', content_function => 'note_text')"


def content_function(body: str) -> str:
    """A content function of the table notes, of these PL/pgSQL statements; it gives the column."""
    return f"""CREATE OR REPLACE FUNCTION note_text(n notes) RETURNS text LANGUAGE plpgsql AS
                   $note$BEGIN {body} RETURN n.content; END$note$"""


def trigger(body: str, when: str = "BEFORE UPDATE") -> str:
    """A trigger of the table notes, for each row, of these PL/pgSQL statements."""
    return f"""CREATE FUNCTION act() RETURNS trigger LANGUAGE plpgsql AS $act$BEGIN {body} RETURN NEW; END$act$;
               CREATE TRIGGER act {when} ON notes FOR EACH ROW EXECUTE FUNCTION act()"""


@dataclass(frozen=True)
class Tenant:
    """A role that may attach tables, and owns a schema of its name, which its sessions search first."""

    name: str
    session: Connection
    enter: Callable[[], Connection]

    def run(self, *scripts: str) -> None:
        """Executes scripts; {me} is the role's name."""
        for script in scripts:
            self.session.execute(script.replace("{me}", self.name))


def stays_fresh(bob: Tenant, seconds: float = SOON_SECONDS) -> None:
    """Fails unless bob may change a row of his without waiting, and it has its vector soon."""
    word = uuid.uuid4().hex
    bob.session.execute("UPDATE letters SET content = %s WHERE id = 1", [word])
    wait_until(lambda: has_vector_of(bob.session, "letters", 1, word), seconds)


def has_vector_of(session: Connection, table: str, id: int, text: str) -> bool:
    row = session.execute(f"SELECT embedding::vector::real[] AS v FROM {table} WHERE id = %s", [id]).fetchone()
    return row is not None and row.v is not None and np.allclose(row.v, vector_of(text, DIMENSIONS), atol=1e-3)


def ran_as(db: Connection, mallory: Tenant) -> set[str]:
    return {row.who for row in db.execute(f"SELECT who FROM {mallory.name}.ran")}


def is_superuser(db: Connection, tenant: Tenant) -> bool:
    return bool(db.execute("SELECT rolsuper FROM pg_roles WHERE rolname = %s", [tenant.name]).fetchone() == (True,))


def assert_nothing_gained(db: Connection, mallory: Tenant) -> None:
    others = ran_as(db, mallory) - {mallory.name}
    assert not others, f"{mallory.name}'s code ran as {others}"
    assert not is_superuser(db, mallory), f"{mallory.name} has become a superuser"


def peak_megabytes(db: Connection, pid: int) -> int:
    """The most memory that a session has had, shared memory included."""
    row = db.execute(
        "SELECT substring(pg_read_file(%s) FROM 'VmHWM:\\s*(\\d+) kB')", [f"/proc/{pid}/status"]
    ).fetchone()
    assert row is not None
    return int(row[0]) // 1024


def waiting_of(db: Connection, tenant: Tenant) -> int:
    """How many messages of a tenant's tables are in the queue."""
    row = db.execute(
        """SELECT count(*) AS messages FROM pgmq.q_embedding_jobs AS q
           JOIN autoembed.pipeline AS p ON p.id::text = q.message ->> 'pipeline'
           JOIN pg_class AS c ON c.oid = p.table_id
           WHERE c.relowner = %s::regrole""",
        [tenant.name],
    ).fetchone()
    assert row is not None
    return int(row.messages)


def failures_of(db: Connection, tenant: Tenant) -> dict[str, str]:
    """The reasons of a tenant's failed rows, by key."""
    rows = db.execute(
        """SELECT f.key, f.reason FROM autoembed.failed AS f JOIN pg_class AS c ON c.oid = f.table_name::regclass
           WHERE c.relowner = %s::regrole""",
        [tenant.name],
    )
    return {row.key: row.reason for row in rows}


def make_due(db: Connection) -> None:
    """Lets what waits to be tried again be tried now. What a lane has claimed was read, and is left alone."""
    db.execute(
        """UPDATE pgmq.q_embedding_jobs AS q SET vt = clock_timestamp()
           FROM (SELECT msg_id FROM pgmq.q_embedding_jobs WHERE read_ct = 0 FOR UPDATE SKIP LOCKED) AS s
           WHERE q.msg_id = s.msg_id"""
    )
