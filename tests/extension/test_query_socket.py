"""Search texts that a lane embeds for other sessions: at a socket, for each session whose own rights allow it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from harness import Connection, Server, run_server
from lanes import Lane, running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]

SOCKET = "pg_stat_tmp/autoembed.1.socket"
LOADED = """
CREATE FUNCTION loaded() RETURNS text[] LANGUAGE plpython3u AS $$
    import sys
    heavy = {"numpy", "requests", "onnxruntime", "tokenizers", "json", "typing", "dataclasses", "ctypes", "email"}
    heavy |= {"autoembed.bm25", "autoembed.doors"}
    return sorted(heavy & sys.modules.keys())
$$
"""


def vector(session: Connection, text: str, model: str | None = None) -> str:
    row = session.execute("SELECT autoembed.embed(%s, %s)::text", [text, model]).fetchone()
    assert row is not None
    return str(row[0])


def makes_it_alone(session: Connection) -> bool:
    """Whether the session has a model of its own."""
    row = session.execute("SELECT loaded()").fetchone()
    assert row is not None
    return "onnxruntime" in row[0]


def wait_for_socket(db: Connection) -> None:
    wait_until(lambda: db.execute("SELECT FROM pg_stat_file(%s, true) AS f WHERE f.size = 0", [SOCKET]).rowcount)


@pytest.fixture
def session(db: Connection, connect: Connect) -> Callable[[], Connection]:
    """New sessions that tell what they have imported."""
    db.execute(LOADED)
    return connect


@pytest.fixture
def alone(db: Connection, session: Callable[[], Connection]) -> Callable[[str], str]:
    """The vectors that a session makes by itself. To be asked before a lane runs."""
    own = session()
    assert vector(own, "warm up")
    return lambda text: vector(own, text)


@pytest.fixture
def lane(db: Connection, connect: Connect, alone: object) -> Iterator[Lane]:
    with running_lanes(db, connect) as [lane]:
        wait_for_socket(db)
        # It has the model now.
        wait_until(lambda: not embeds_alone(connect))
        yield lane


def embeds_alone(connect: Connect) -> bool:
    """Whether a new session, on a machine that may be busy, gets its vector from nobody."""
    with connect() as session:
        vector(session, "a first question")
        return makes_it_alone(session)


def test_a_new_session_gets_its_vector_from_a_lane_and_imports_nothing_else(
    db: Connection, lane: Lane, session: Callable[[], Connection], alone: Callable[[str], str]
) -> None:
    db.execute("DELETE FROM autoembed.usage_entry")

    def of_lane() -> str | None:
        new = session()
        found = vector(new, "undo an accident")
        return None if makes_it_alone(new) else found

    assert wait_until(of_lane) == alone("undo an accident")
    usage = db.execute("SELECT DISTINCT model, table_name, tokens / inputs FROM autoembed.usage").fetchall()
    assert usage == [("all-MiniLM-L6-v2", None, 5)]


@pytest.mark.parametrize(
    ("mode", "needed"), [("vector", []), ("hybrid", ["numpy", "dataclasses", "ctypes", "autoembed.bm25"])]
)
def test_the_first_search_of_a_session_imports_little(
    db: Connection, lane: Lane, session: Callable[[], Connection], mode: str, needed: list[str]
) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}', text_config => 'english')")
    db.execute("INSERT INTO pages VALUES (1, 'undo an accident'), (2, 'cook a meal')")
    wait_until(lambda: db.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (2,))

    def imported() -> set[str] | None:
        new = session()
        found = new.execute("SELECT key FROM autoembed.search('pages', 'a mistake', mode => %s)", [mode]).fetchall()
        assert found[0] == ("[1]",)
        [(names,)] = new.execute("SELECT loaded()")
        # On a busy machine no lane may answer in time.
        return None if "onnxruntime" in names else set(names)

    assert wait_until(imported) == {"json", "typing", *needed}


def test_the_model_of_the_session_decides(
    db: Connection, lane: Lane, session: Callable[[], Connection], alone: Callable[[str], str]
) -> None:
    db.execute("SELECT autoembed.alter_model('all-MiniLM-L6-v2', options => '{\"query_prefix\": \"an \"}')")

    def of_lane() -> str | None:
        new = session()
        found = vector(new, "accident")
        return None if makes_it_alone(new) else found

    prefixed = wait_until(of_lane)
    db.execute("SELECT autoembed.alter_model('all-MiniLM-L6-v2', options => '{}')")

    assert prefixed == alone("an accident") != alone("accident")


def test_a_model_with_limits_is_asked_by_the_session_itself(
    db: Connection, lane: Lane, session: Callable[[], Connection]
) -> None:
    db.execute("SELECT autoembed.alter_model('all-MiniLM-L6-v2', daily_token_budget => 1000)")
    new = session()

    vector(new, "undo an accident")

    assert makes_it_alone(new)


@pytest.mark.parametrize("text", ["long " * 1000, "größer " * 700])
def test_a_long_text_is_embedded_by_the_session_itself(
    lane: Lane, session: Callable[[], Connection], alone: Callable[[str], str], text: str
) -> None:
    new = session()

    assert vector(new, text) == alone(text)
    assert makes_it_alone(new)


def test_errors_are_those_of_the_session(db: Connection, lane: Lane, session: Callable[[], Connection]) -> None:
    db.execute("SELECT autoembed.create_model('absent', 'local', 384, base_url => '/nowhere')")

    with pytest.raises(Exception, match="the model's file /nowhere/model.onnx does not exist on the server"):
        vector(session(), "words", "absent")
    with pytest.raises(Exception, match="a blank text has no embedding"):
        vector(session(), "  ")


def test_a_role_without_the_right_to_embed_gets_nothing(
    db: Connection, lane: Lane, connect: Connect, role: Callable[[str], str]
) -> None:
    reader = role("reader")
    with connect(user=reader) as session, pytest.raises(Exception, match="permission denied"):
        vector(session, "words")
    db.execute(f"GRANT USAGE ON SCHEMA autoembed TO {reader}")
    db.execute(f"GRANT EXECUTE ON FUNCTION autoembed.embed TO {reader}")

    def is_served() -> bool:
        with connect(user=reader) as session:
            vector(session, "words")
            return not makes_it_alone(session)

    wait_until(is_served)


@pytest.mark.parametrize("how", ["terminated", "stopped", "frozen"])
def test_without_a_lane_a_session_embeds_by_itself(
    db: Connection,
    server: Server,
    lane: Lane,
    session: Callable[[], Connection],
    alone: Callable[[str], str],
    how: str,
) -> None:
    if how == "terminated":
        db.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
        lane.join()
    elif how == "stopped":
        db.execute("UPDATE autoembed.lane SET stop = true")
        lane.join()
    else:
        _kill(server, lane, signal.SIGSTOP)
    new = session()
    try:
        assert vector(new, "undo an accident") == alone("undo an accident")
        assert makes_it_alone(new)
    finally:
        if how == "frozen":
            _kill(server, lane, signal.SIGCONT)
    if how != "frozen":
        assert db.execute("SELECT FROM pg_stat_file(%s, true) AS f WHERE f.size = 0", [SOCKET]).rowcount == 0


def _kill(server: Server, lane: Lane, how: signal.Signals) -> None:
    result = server.container.get_wrapped_container().exec_run(["kill", f"-{how.value}", str(lane.pid)])
    assert result.exit_code == 0


def test_a_crashed_server_leaves_a_socket_that_holds_up_nobody() -> None:
    with ExitStack() as stack:
        server = run_server(stack, on_disk=True, AUTOEMBED_LANES="0")
        with server.connect() as db:
            db.execute("CREATE EXTENSION IF NOT EXISTS autoembed CASCADE")
            db.execute(LOADED)
            lane = Lane(stack.enter_context(server.connect()))
            lane.wait_until_up(db)
            wait_for_socket(db)
        server.container.get_wrapped_container().kill("SIGKILL")
        lane.join()
        server.container.get_wrapped_container().start()
        server = server.restarted()
        with server.connect() as db:
            wait_for_socket(db)
            vector(db, "undo an accident")
            assert makes_it_alone(db)
            with running_lanes(db, lambda: stack.enter_context(server.connect())):
                wait_until(lambda: not embeds_alone(server.connect))


def test_one_lane_serves_all_databases(server: Server, lane: Lane, template: str, dbname: str) -> None:
    other = f"{dbname}_other"
    with server.database(other, template):
        with server.connect(other) as db:
            db.execute(LOADED)

        wait_until(lambda: not embeds_alone(lambda: server.connect(other)))


def test_another_lane_takes_over(db: Connection, connect: Connect, lane: Lane) -> None:
    second = Lane(connect())
    second.wait_until_up(db)
    db.execute("UPDATE autoembed.lane SET stop = true WHERE pid = %s", [lane.pid])
    lane.join()

    wait_until(lambda: not embeds_alone(connect))

    db.execute("UPDATE autoembed.lane SET stop = true")
    second.join()


def test_fifty_sessions_at_once_have_their_vectors(
    lane: Lane, session: Callable[[], Connection], alone: Callable[[str], str]
) -> None:
    sessions = [session() for _ in range(50)]
    found: dict[int, str] = {}
    ready = threading.Barrier(len(sessions))

    def ask(number: int) -> None:
        ready.wait()
        found[number] = vector(sessions[number], f"question {number}")

    threads = [threading.Thread(target=ask, args=[number]) for number in range(len(sessions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert found == {number: alone(f"question {number}") for number in range(len(sessions))}
    assert sum(map(makes_it_alone, sessions)) < len(sessions) / 2


def test_a_lane_that_answers_goes_on_with_its_rows(db: Connection, lane: Lane, connect: Connect) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    for number in range(5):
        db.execute("INSERT INTO pages SELECT %s * 10 + n, 'page ' || n FROM generate_series(1, 10) AS n", [number])
        with connect() as session:
            vector(session, f"question {number}")

    row = db.execute("SELECT autoembed.wait_until_fresh('pages', 60)").fetchone()

    assert row == (True,)
