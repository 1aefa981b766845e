"""Cancel, terminate, timeout and shutdown while a request is in flight: within a second, and nothing is lost."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import psycopg
import pytest

from fake_api import FakeApi
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection, Server, assert_fresh, insert, run_server, waiting
from waiting import wait_until

Connect = Callable[..., Connection]

# The promise is a second; the rest is for a busy machine. A request that is waited for to its end takes 30 seconds.
SOON_SECONDS = 10.0

CALLS = {
    "process": "SELECT * FROM autoembed.process()",
    "embed": "SELECT autoembed.embed('a question')",
    "work": "CALL autoembed.work(60)",
}


class Call(threading.Thread):
    """A statement in a session of its own; what ended it, and when."""

    def __init__(self, session: Connection, sql: str) -> None:
        super().__init__()
        self.session = session
        self.error: psycopg.Error | None = None
        self.ended_at = 0.0
        self._sql = sql
        self.start()

    def run(self) -> None:
        try:
            self.session.execute(self._sql)
        except psycopg.Error as error:
            self.error = error
        self.ended_at = time.monotonic()


def threads_of(server: Server, pid: int) -> int:
    """How many threads a backend has."""
    result = server.container.get_wrapped_container().exec_run(["ls", f"/proc/{pid}/task"])
    return len(result.output.split())


def threads_that_take_signals(server: Server, pid: int) -> int:
    """How many threads of a backend have SIGINT, which cancels, not blocked."""
    look = f"grep -h ^SigBlk /proc/{pid}/task/*/status"
    result = server.container.get_wrapped_container().exec_run(["bash", "-c", look])
    masks = [int(line.split()[1], 16) for line in result.output.decode().splitlines()]
    return sum(not mask & 1 << (signal.SIGINT - 1) for mask in masks)


@pytest.mark.parametrize("call", CALLS)
def test_a_cancelled_call_ends_at_once_and_its_session_lives_on(
    documents: Connection, api: FakeApi, connect: Connect, server: Server, call: str
) -> None:
    """Without a statement between slices of waiting the cancel is not noticed; without aborting, its thread runs on.

    If jobs are not released, they stay hidden; if signals are not blocked, a thread may take the cancel.
    """
    insert(documents, "one")
    api.behave(hold=True)
    session = connect()
    pid = session.info.backend_pid
    caller = Call(session, CALLS[call])
    api.wait_for(held=1)
    assert threads_of(server, pid) > 1
    assert threads_that_take_signals(server, pid) == 1

    cancelled_at = time.monotonic()
    documents.execute("SELECT pg_cancel_backend(%s)", [pid])
    caller.join(20)

    assert isinstance(caller.error, psycopg.errors.QueryCanceled)
    assert caller.ended_at - cancelled_at < SOON_SECONDS
    assert threads_of(server, pid) == 1
    api.behave()
    assert session.execute("SELECT autoembed.embed('another question') IS NOT NULL").fetchone() == (True,)
    # Not only kept: visible at once, as if it had never been read.
    assert session.execute("SELECT completed FROM autoembed.process()").fetchone() == (1,)
    assert_fresh(documents)
    assert documents.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (0,)


@pytest.mark.parametrize("call", CALLS)
def test_a_terminated_backend_is_gone_at_once_and_its_job_is_not_lost(
    documents: Connection, api: FakeApi, connect: Connect, call: str
) -> None:
    """Without a statement between slices of waiting the backend stays until the provider answers.

    If nobody frees the jobs of dead lanes, the one of work() stays hidden.
    """
    insert(documents, "one")
    api.behave(hold=True)
    session = connect()
    pid = session.info.backend_pid
    caller = Call(session, CALLS[call])
    api.wait_for(held=1)

    terminated_at = time.monotonic()
    documents.execute("SELECT pg_terminate_backend(%s)", [pid])
    wait_until(
        lambda: documents.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() == (0,)
    )

    assert time.monotonic() - terminated_at < SOON_SECONDS
    caller.join(20)
    assert waiting(documents) == 1
    api.behave()
    documents.execute("CALL autoembed.work(1)")
    assert_fresh(documents)


# Notes how many threads the backend has when it enters exit().
WATCH_EXIT = """
CREATE FUNCTION watch_exit() RETURNS void LANGUAGE plpython3u AS $$
    import ctypes, os

    def note(code, argument):
        with open(f"/tmp/threads_{os.getpid()}", "w") as file:
            file.write(str(len(os.listdir("/proc/self/task"))))

    GD["note"] = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(note)
    ctypes.CDLL(None).on_exit(GD["note"], None)
$$
"""


@pytest.mark.parametrize("call", CALLS)
def test_a_terminated_backend_ends_its_threads_before_it_exits(
    documents: Connection, api: FakeApi, connect: Connect, server: Server, call: str
) -> None:
    """exit() tears OpenSSL down; a thread that still uses it takes the server down with a segmentation fault."""
    documents.execute(WATCH_EXIT)
    insert(documents, "one")
    api.behave(hold=True)
    session = connect()
    session.execute("SELECT watch_exit()")
    pid = session.info.backend_pid
    caller = Call(session, CALLS[call])
    api.wait_for(held=1)

    documents.execute("SELECT pg_terminate_backend(%s)", [pid])
    caller.join(20)

    container = server.container.get_wrapped_container()
    threads = wait_until(lambda: container.exec_run(["cat", f"/tmp/threads_{pid}"], stderr=False).output)
    assert threads == b"1"


@pytest.mark.parametrize("call", CALLS)
def test_statement_timeout_holds(documents: Connection, api: FakeApi, connect: Connect, call: str) -> None:
    """Without a statement between slices of waiting, or without aborting, the call does not return."""
    insert(documents, "one")
    session = connect()
    # A session's first request loads modules, which may take longer than the timeout.
    session.execute("SELECT autoembed.embed('first')")
    api.behave(hold=True)
    sent = api.counters()["requests"]
    session.execute("SET statement_timeout = '2s'")

    began_at = time.monotonic()
    with pytest.raises(psycopg.errors.QueryCanceled, match="statement timeout"):
        session.execute(CALLS[call])

    assert time.monotonic() - began_at < 2 + SOON_SECONDS
    assert api.counters()["requests"] == sent + 1
    api.behave()
    session.execute("SET statement_timeout = 0")
    assert session.execute("SELECT completed FROM autoembed.process()").fetchone() == (1,)
    assert_fresh(documents)


def test_an_applications_cancel_leaves_its_transaction_to_itself(
    documents: Connection, api: FakeApi, connect: Connect
) -> None:
    """Without a statement between slices of waiting, or without aborting, the call does not return."""
    insert(documents, "one")
    session = connect()
    # A session's first request loads modules, which may take longer than the timeout.
    session.execute("SELECT autoembed.embed('first')")
    api.behave(hold=True)
    sent = api.counters()["requests"]
    with session.transaction():
        session.execute("SET LOCAL statement_timeout = '2s'")
        with pytest.raises(psycopg.errors.QueryCanceled), session.transaction():
            session.execute("SELECT autoembed.process()")
        assert api.counters()["requests"] == sent + 1
        assert session.execute("SELECT count(*) FROM documents").fetchone() == (1,)


def test_the_local_model_is_interruptible_too(db: Connection, connect: Connect, server: Server) -> None:
    """Without a statement between slices of waiting, or without telling the model to stop, it runs to its end."""
    db.execute(GUIDE_TABLE.format(dimensions=384))
    db.execute(GUIDE_TRIGGERS)
    db.execute(
        "INSERT INTO documents (title, content)"
        " SELECT n, repeat('many words ', 200) || n FROM generate_series(1, 3000) AS n"
    )
    session = connect()
    pid = session.info.backend_pid
    caller = Call(session, "CALL autoembed.work(60, batch_size => 1000)")
    wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.lane WHERE message_ids <> '{}'").fetchone() == (1,))

    cancelled_at = time.monotonic()
    db.execute("SELECT pg_cancel_backend(%s)", [pid])
    caller.join(30)

    assert isinstance(caller.error, psycopg.errors.QueryCanceled)
    assert caller.ended_at - cancelled_at < SOON_SECONDS
    assert waiting(db) == 3000
    assert db.execute("SELECT count(*) FROM pgmq.q_embedding_jobs WHERE vt > clock_timestamp()").fetchone() == (0,)


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A container for this test alone, to be stopped and killed."""
    with ExitStack() as stack:
        yield run_server(stack, on_disk=True, AUTOEMBED_LANES="1")


def test_a_fast_shutdown_does_not_wait_for_a_request_and_loses_no_job(own_server: Server) -> None:
    """Without a statement between slices of waiting the server waits for the provider.

    If nobody frees the jobs of dead lanes, the row stays without a vector.
    """
    api = own_server.fake_api("shutdown")
    api.behave(hold=True)
    with own_server.connect() as db:
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
        db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
        db.execute(GUIDE_TABLE.format(dimensions=1536))
        db.execute(GUIDE_TRIGGERS)
        insert(db, "one")
        api.wait_for(held=1)

    container = own_server.container.get_wrapped_container()
    began_at = time.monotonic()
    # `docker stop` does the same: the image's stop signal asks for a fast shutdown.
    container.stop(timeout=30)
    assert time.monotonic() - began_at < 2 * SOON_SECONDS
    container.start()

    own_server = own_server.restarted()
    with own_server.connect() as db:
        api = own_server.fake_api("shutdown")
        wait_until(lambda: waiting(db) == 0, 30)
        assert_fresh(db)
