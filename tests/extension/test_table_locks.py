"""A change of how a table is embedded stops nobody else who uses the table, whatever holds it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection
from waiting import wait_until

Connect = Callable[..., Connection]

READS = "SELECT count(*) FROM notes"
WRITES = "UPDATE notes SET body = body WHERE id = 1"
# The call, the statement that holds the table meanwhile, and the statement that others go on with.
CHANGES = {
    "enable in a new column": ("enable('notes', 'vector', content_columns => '{body}')", READS, READS),
    "enable beside the rows": ("enable('notes', content_columns => '{body}')", WRITES, WRITES),
    "alter_pipeline": ("alter_pipeline('notes', 'embedding', on_change => 'clear')", READS, READS),
    "alter_pipeline to beside": ("alter_pipeline('notes', 'embedding', storage => 'beside')", READS, READS),
    "disable": ("disable('notes')", READS, READS),
    "disable with drop": ("disable('notes', drop => true)", READS, READS),
}


class Call:
    """A statement in a session of its own, in a thread; error is what ended it, if anything did."""

    def __init__(self, session: Connection, statement: str) -> None:
        self.error: psycopg.Error | None = None
        self.pid = session.info.backend_pid
        self._session, self._statement = session, statement
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self._session.execute(self._statement.encode())
        except psycopg.Error as error:
            self.error = error


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, embedding halfvec(1536))")
    db.execute("INSERT INTO notes SELECT n, 'text ' || n FROM generate_series(1, 10) AS n")
    return db


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_stops_nobody_behind_a_long_transaction(notes: Connection, connect: Connect, case: str) -> None:
    change, holds, goes_on = CHANGES[case]
    if not change.startswith("enable"):
        notes.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    # Each statement of the neighbour has a fraction of the time that the change waits.
    holder, neighbour = connect(), connect(options="-c statement_timeout=2s")
    holder.execute("BEGIN")
    holder.execute(holds.replace("id = 1", "id = 2"))

    call = Call(connect(), f"SELECT autoembed.{change}")
    looks: list[int] = []

    def has_ended_meanwhile() -> bool:
        looks.append(neighbour.execute(goes_on).rowcount)
        return not call.thread.is_alive()

    wait_until(has_ended_meanwhile, 60)

    assert len(looks) > 1
    assert isinstance(call.error, psycopg.errors.LockNotAvailable), call.error
    assert call.error.diag.message_primary == "table public.notes is in use by another transaction"
    assert f"process {holder.info.backend_pid}" in (call.error.diag.message_detail or "")
    assert f"pg_terminate_backend({holder.info.backend_pid})" in (call.error.diag.message_hint or "")

    holder.rollback()
    notes.execute(f"SELECT autoembed.{change}".encode())


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_waits_for_a_transaction_that_ends_soon(notes: Connection, connect: Connect, case: str) -> None:
    change, holds, _ = CHANGES[case]
    if not change.startswith("enable"):
        notes.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}')")
    holder = connect()
    holder.execute("BEGIN")
    holder.execute(holds)
    call = Call(connect(), f"SELECT autoembed.{change}")
    waits = "SELECT FROM pg_stat_activity WHERE pid = %s AND wait_event IN ('relation', 'PgSleep')"
    wait_until(lambda: notes.execute(waits, [call.pid]).fetchall())

    holder.rollback()

    call.thread.join(20)
    assert not call.thread.is_alive()
    assert call.error is None


def test_vectors_beside_the_rows_are_attached_while_others_read(notes: Connection, connect: Connect) -> None:
    reader = connect()
    reader.execute("BEGIN")
    reader.execute(READS)
    with connect(options="-c statement_timeout=5s") as owner:
        owner.execute("SELECT autoembed.enable('notes', content_columns => '{body}')")
        owner.execute("SELECT autoembed.resync('notes')")
        owner.execute("SELECT autoembed.alter_pipeline('notes', content_template => 'a {body}')")
        owner.execute("SELECT autoembed.pause('notes'), autoembed.resume('notes')")
    reader.rollback()
