"""A name server that never answers: cancel, terminate, timeout and shutdown do not wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import psycopg
import pytest

from extension.test_interrupts import SOON_SECONDS, Call, threads_of
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, Connection, Server, insert, run_server, waiting
from waiting import wait_until

Connect = Callable[..., Connection]

# The C library asks each of these for 30 seconds: a minute in all.
RESOLV_CONF = "nameserver 127.0.0.1\\nnameserver 127.0.0.2\\noptions timeout:30 attempts:1\\n"
# Notes each question, and answers none.
NAME_SERVER = """
import socket
questions = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
questions.bind(("0.0.0.0", 53))
open("/tmp/asked", "w").close()
while True:
    question = questions.recv(1000)
    with open("/tmp/asked", "ab") as file:
        file.write(question)
"""
CALLS = {
    "process": "SELECT * FROM autoembed.process()",
    "embed": "SELECT autoembed.embed('a question')",
    "lane": "CALL autoembed.work(60)",
    "search": "SELECT * FROM autoembed.search(NULL::documents, 'a question')",
    "rerank": "SELECT * FROM autoembed.search(NULL::documents, 'answer', mode => 'text', rerank_model => 'reranker')",
}


def run(server: Server, *command: str, detach: bool = False) -> bytes:
    return server.container.get_wrapped_container().exec_run(list(command), user="root", detach=detach).output or b""


def hang_up_names(server: Server) -> None:
    """Has the container ask a name server that never answers."""
    run(server, "bash", "-c", f"printf '{RESOLV_CONF}' > /etc/resolv.conf; rm -f /tmp/asked")
    run(server, "python3", "-c", NAME_SERVER, detach=True)
    wait_until(lambda: b"asked" in run(server, "ls", "/tmp"))


def is_asked(server: Server, host: str) -> bool:
    return host.encode() in run(server, "cat", "/tmp/asked")


def begin(session: Connection, call: str, server: Server, host: str) -> Call:
    """A call in another thread, which has asked for the address of the host."""
    caller = Call(session, CALLS[call])
    wait_until(lambda: is_asked(server, host))
    return caller


@pytest.fixture(scope="session")
def mute_server(server: Server) -> Server:
    hang_up_names(server)
    return server


@pytest.fixture
def host(mute_server: Server, dbname: str) -> str:
    """The first part of the name of a host that is this test's own."""
    return dbname.replace("_", "-")


@pytest.fixture
def texts(db: Connection, host: str) -> Connection:
    """The table documents with a row that waits, whose model's host has no address."""
    db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [f"https://{host}.example/v1"])
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute(
        "SELECT autoembed.create_rerank_model('reranker', 'cohere', 'm', base_url => %s, timeout_seconds => 60)",
        [f"https://{host}.example"],
    )
    db.execute("CREATE TABLE documents (id int PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('documents', content_columns => '{content}', text_config => 'english')")
    db.execute("INSERT INTO documents VALUES (1, 'the answer')")
    return db


@pytest.mark.parametrize("call", CALLS)
def test_a_cancelled_call_does_not_wait_for_a_name_server(
    texts: Connection, connect: Connect, mute_server: Server, host: str, call: str
) -> None:
    session = connect()
    pid = session.info.backend_pid
    caller = begin(session, call, mute_server, host)

    cancelled_at = time.monotonic()
    texts.execute("SELECT pg_cancel_backend(%s)", [pid])
    caller.join(20)

    assert isinstance(caller.error, psycopg.errors.QueryCanceled)
    assert caller.ended_at - cancelled_at < SOON_SECONDS
    # The thread that still asks for the address is the only one, however often the call is made.
    session.execute("SET statement_timeout = '1s'")
    for _ in range(2):
        with pytest.raises(psycopg.errors.QueryCanceled):
            session.execute(CALLS["embed"])
    assert threads_of(mute_server, pid) == 2


@pytest.mark.parametrize("call", CALLS)
def test_a_terminated_backend_does_not_wait_for_a_name_server(
    texts: Connection, connect: Connect, mute_server: Server, host: str, call: str
) -> None:
    session = connect()
    pid = session.info.backend_pid
    caller = begin(session, call, mute_server, host)

    terminated_at = time.monotonic()
    texts.execute("SELECT pg_terminate_backend(%s)", [pid])
    wait_until(lambda: texts.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() == (0,))

    assert time.monotonic() - terminated_at < SOON_SECONDS
    caller.join(20)
    assert waiting(texts) == 1


def test_a_session_that_ends_does_not_wait_for_the_name_server_it_gave_up(texts: Connection, connect: Connect) -> None:
    session = connect()
    pid = session.info.backend_pid
    session.execute("SET statement_timeout = '1s'")
    with pytest.raises(psycopg.errors.QueryCanceled):
        session.execute(CALLS["embed"])

    closed_at = time.monotonic()
    session.close()
    wait_until(lambda: texts.execute("SELECT count(*) FROM pg_stat_activity WHERE pid = %s", [pid]).fetchone() == (0,))

    assert time.monotonic() - closed_at < SOON_SECONDS


def test_a_fast_shutdown_does_not_wait_for_a_name_server() -> None:
    with ExitStack() as stack:
        server = run_server(stack, on_disk=True, AUTOEMBED_LANES="1")
        hang_up_names(server)
        with server.connect() as db:
            db.execute(
                "SELECT autoembed.alter_model('text-embedding-3-small', base_url => 'https://shutdown.example/v1')"
            )
            db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
            db.execute(GUIDE_TABLE.format(dimensions=1536))
            db.execute(GUIDE_TRIGGERS)
            insert(db, "one")
            wait_until(lambda: is_asked(server, "shutdown"))

        container = server.container.get_wrapped_container()
        began_at = time.monotonic()
        container.stop(timeout=60)

        assert time.monotonic() - began_at < 2 * SOON_SECONDS
        container.reload()
        # The exit code of a server that was killed is another one.
        assert container.attrs["State"]["ExitCode"] == 0
