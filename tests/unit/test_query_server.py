"""A lane that embeds search texts of other sessions: who is answered, who is told to do it alone, and in what order."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from autoembed import query_client, query_server
from autoembed.query_client import MAX_QUESTION_BYTES, Answer, Question, ask
from autoembed.query_server import QueryServer
from waiting import wait_until


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine may be silent for longer than a session waits."""
    monkeypatch.setattr(query_client, "SILENCE_SECONDS", 5.0)


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    # A path of a socket has 107 bytes at most.
    before = Path.cwd()
    os.chdir(tmp_path)
    yield "socket"
    os.chdir(before)


def nothing() -> None:
    pass


def question(text: str = "words", asker: str = "a", folder: str = "/models/m") -> Question:
    return Question(asker, folder, 256, text)


def literals(asked: Sequence[Question]) -> list[Answer]:
    return [Answer(f"[{len(one.text)}]", 3) for one in asked]


def answered(address: str, asked: Question) -> str | None:
    answer = ask(asked, nothing, address)
    return None if answer is None else answer.literal


class Model:
    """Embeds when it is let go on."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.stopped = False
        self.calls: list[list[str]] = []

    def embed(self, asked: Sequence[Question]) -> list[Answer]:
        self.calls.append([one.text for one in asked])
        self.goes_on.wait(10)
        if self.stopped:
            raise RuntimeError("stopped")
        return literals(asked)

    def stop(self) -> None:
        self.stopped = True
        self.goes_on.set()

    @property
    def texts(self) -> list[str]:
        return [text for call in self.calls for text in call]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def server(address: str, model: Model) -> Iterator[QueryServer]:
    with QueryServer(model.embed, model.stop, address) as server:
        server.offer()
        yield server


@contextlib.contextmanager
def asking(address: str, *questions: Question) -> Iterator[list[Callable[[], str | None]]]:
    """Sessions that ask one after the other and wait. Gives their answers."""
    with ThreadPoolExecutor(len(questions)) as sessions:
        yield [sessions.submit(answered, address, one).result for one in questions]


def test_a_question_comes_back_as_it_was_sent() -> None:
    asked = Question("role none", "/models/größe", 512, "ein Wort\n\tund 字")

    assert vars(Question.unpacked(asked.packed())) == vars(asked)


@pytest.mark.parametrize("data", [b"", b"a\0b\0c", b"a\0b\0c\0d", b"a\0b\x001\0d\0e", b"\xff\0b\x001\0d"])
def test_what_is_no_question_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        Question.unpacked(data)


def test_an_answer_is_the_embedding_and_its_tokens(address: str) -> None:
    with QueryServer(literals, nothing, address) as server:
        server.offer()

        answer = ask(question("four"), nothing, address)

    assert answer is not None
    assert (answer.literal, answer.tokens) == ("[4]", 3)


def test_nobody_answers_where_nobody_serves(address: str) -> None:
    assert answered(address, question()) is None


def test_nobody_else_may_connect(server: QueryServer, address: str) -> None:
    assert stat.S_IMODE(Path(address).stat().st_mode) == 0o600
    assert stat.S_IMODE(Path(f"{address}.lock").stat().st_mode) == 0o600


def test_a_socket_of_another_user_is_not_asked(
    server: QueryServer, model: Model, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_client, "is_own_peer", lambda _: False)

    assert answered(address, question()) is None
    assert model.texts == []


def test_the_socket_of_a_dead_lane_gives_nothing_and_is_replaced(address: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(address)
    assert answered(address, question()) is None

    with QueryServer(literals, nothing, address) as server:
        server.offer()
        assert answered(address, question()) == "[5]"


def test_one_lane_serves_and_another_takes_over_when_it_ends(address: str) -> None:
    with QueryServer(lambda _: [Answer("[1]", 1)], nothing, address) as first:
        second = QueryServer(lambda _: [Answer("[2]", 1)], nothing, address)
        for server in (first, second):
            server.offer()
        assert answered(address, question()) == "[1]"
    assert not Path(address).exists()

    second.offer()

    assert answered(address, question()) == "[2]"
    assert second.end()
    second.offer()
    assert answered(address, question()) is None


def test_a_folder_that_cannot_be_written_has_no_server(address: str) -> None:
    with QueryServer(literals, nothing, f"nowhere/{address}") as server:
        server.offer()

        assert answered(f"nowhere/{address}", question()) is None


@pytest.mark.parametrize("refusal", [None, MemoryError("too large"), ValueError("no model")])
def test_a_question_that_the_lane_cannot_answer_is_refused_and_the_next_is_answered(
    address: str, refusal: Exception | None
) -> None:
    def embed(asked: Sequence[Question]) -> list[Answer] | None:
        if asked[0].text == "good":
            return literals(asked)
        if refusal is not None:
            raise refusal
        return None

    with QueryServer(embed, nothing, address) as server:
        server.offer()

        assert answered(address, question("bad")) is None
        assert answered(address, question("good")) == "[4]"


def test_a_question_that_is_too_long_is_not_asked(server: QueryServer, model: Model, address: str) -> None:
    assert answered(address, question("x" * MAX_QUESTION_BYTES)) is None
    with contextlib.closing(_connected(address)) as session:
        session.send(question("x" * MAX_QUESTION_BYTES).packed())
        assert session.recv(10) == query_client.REFUSED

    assert model.texts == []


def test_a_session_waits_longer_than_a_silence_while_it_is_told_to(
    server: QueryServer, model: Model, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_client, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(query_client, "LONGEST_WAIT_SECONDS", 60.0)
    waits = []

    def wait() -> None:
        waits.append(time.monotonic())
        if waits[-1] - waits[0] > 1.2:
            model.goes_on.set()

    answer = ask(question("one"), wait, address)

    assert answer is not None
    assert answer.literal == "[3]"


def test_a_session_does_not_wait_for_ever(server: QueryServer, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_client, "LONGEST_WAIT_SECONDS", 0.1)

    assert answered(address, question()) is None


def test_a_lane_that_is_silent_is_given_up(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_client, "SILENCE_SECONDS", 0.01)
    with contextlib.closing(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)) as silent:
        silent.bind(address)
        silent.listen()

        assert answered(address, question()) is None


def test_a_busy_machine_has_a_session_wait_longer(
    server: QueryServer, model: Model, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_client, "SILENCE_SECONDS", 0.01)
    monkeypatch.setattr(query_client, "crowd", lambda: 1000.0)
    monkeypatch.setattr(query_server, "WAIT_SECONDS", 60.0)
    waits: list[None] = []

    def wait() -> None:
        waits.append(None)
        if len(waits) == 4:
            model.goes_on.set()

    answer = ask(question("one"), wait, address)

    assert answer is not None


def test_the_crowd_on_a_machine_is_one_for_each_core_at_least() -> None:
    assert query_client.crowd() >= 1


def test_a_cancel_while_a_session_waits_comes_out(server: QueryServer, address: str) -> None:
    class Cancelled(Exception):
        pass

    def cancel() -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        ask(question(), cancel, address)


def test_askers_take_turns(server: QueryServer, model: Model, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(query_server, "MAX_TOGETHER", 1)
    greedy = [question(f"greedy {n}", "greedy") for n in range(4)]
    with asking(address, *greedy) as answers:
        wait_until(lambda: len(server) == 3)
        with asking(address, question("modest", "modest")) as [modest]:
            wait_until(lambda: len(server) == 4)
            model.goes_on.set()
            assert modest() == "[6]"
        assert [answer() for answer in answers] == ["[8]"] * 4

    assert model.texts.index("modest") < 3


def test_questions_to_one_model_are_embedded_together(server: QueryServer, model: Model, address: str) -> None:
    others = [question(text, folder=folder) for text, folder in [("b", "1"), ("c", "1"), ("d", "2")]]
    with asking(address, question("a", folder="1")) as [first]:
        wait_until(lambda: model.calls == [["a"]])
        with contextlib.ExitStack() as stack:
            answers = []
            for waiting, one in enumerate(others, 1):
                answers += stack.enter_context(asking(address, one))
                wait_until(lambda waiting=waiting: len(server) == waiting)  # type: ignore[misc]
            model.goes_on.set()
            assert [answer() for answer in (first, *answers)] == ["[1]"] * 4

    assert model.calls == [["a"], ["b", "c"], ["d"]]


def test_an_asker_has_a_share_of_the_places(
    server: QueryServer, model: Model, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_server, "MAX_WAITING_OF_ASKER", 2)
    with asking(address, question("1", "greedy")) as [first]:
        wait_until(lambda: model.calls)
        with asking(address, question("2", "greedy"), question("3", "greedy")) as others:
            wait_until(lambda: len(server) == 2)

            assert answered(address, question("one more", "greedy")) is None
            with asking(address, question("modest", "modest")) as [modest]:
                wait_until(lambda: len(server) == 3)
                model.goes_on.set()
                assert modest() == "[6]"
            assert [answer() for answer in (first, *others)] == ["[1]", "[1]", "[1]"]


def test_sessions_that_ask_nothing_hold_up_nobody(
    server: QueryServer, model: Model, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(query_server, "QUESTION_SECONDS", 0.1)
    model.goes_on.set()
    with contextlib.ExitStack() as stack:
        silent = [
            stack.enter_context(contextlib.closing(_connected(address))) for _ in range(query_server.MAX_SILENT + 5)
        ]
        # Those that are too many, or silent for too long, are left.
        assert {session.recv(10) for session in silent} == {b""}

        assert answered(address, question()) == "[5]"


def test_what_is_no_question_holds_up_nobody(server: QueryServer, model: Model, address: str) -> None:
    model.goes_on.set()
    with contextlib.closing(_connected(address)) as session:
        session.send(b"what")
        assert session.recv(10) == query_client.REFUSED

    assert answered(address, question()) == "[5]"


def test_the_question_of_a_session_that_is_gone_is_not_embedded(
    server: QueryServer, model: Model, address: str
) -> None:
    with asking(address, question("first")) as [first]:
        wait_until(lambda: model.texts == ["first"])
        with contextlib.closing(_connected(address)) as session:
            session.send(question("second").packed())
            wait_until(lambda: len(server) == 1)
        wait_until(lambda: len(server) == 0)
        model.goes_on.set()
        assert first() == "[5]"

    assert answered(address, question("third")) == "[5]"
    assert model.texts == ["first", "third"]


def test_an_end_stops_what_is_under_way_and_leaves_nothing(server: QueryServer, model: Model, address: str) -> None:
    with asking(address, question("first")) as [first]:
        wait_until(lambda: model.calls)
        with asking(address, question("second")) as [second]:
            wait_until(lambda: len(server) == 1)

            assert server.end()

            assert (first(), second()) == (None, None)
    assert not Path(address).exists()


def test_its_threads_receive_no_signal(server: QueryServer) -> None:
    threads = [thread for thread in threading.enumerate() if thread.name == query_server.THREADS]
    assert len(threads) == 2
    for thread in threads:
        mask = int(
            next(
                line.split()[1]
                for line in Path(f"/proc/self/task/{thread.native_id}/status").read_text().splitlines()
                if line.startswith("SigBlk")
            ),
            16,
        )
        assert mask & 1 << (signal.SIGINT - 1)


def _connected(address: str) -> socket.socket:
    session = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    session.connect(address)
    session.settimeout(10)
    return session
