"""The door to the network against a real server on loopback: what it reuses, refuses, and how it lets go."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from autoembed.errors import ProviderTrouble
from autoembed.network import Answer, Network
from fake_api import FakeApi, Server
from waiting import wait_until

BODY = b'{"model": "text-embedding-3-small", "input": ["a"]}'
HEADERS = {"Content-Type": "application/json", "Authorization": "Bearer sk-right"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def api(server: Server, request: pytest.FixtureRequest) -> Iterator[FakeApi]:
    api = server.api(sha256(request.node.name.encode()).hexdigest()[:16])
    yield api
    api.reset()


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    network = Network(4)
    yield network
    network._connected().close()


def post(network: Network, url: str, timeout_seconds: float = 5, headers: dict[str, str] | None = None) -> Answer:
    return network.post(
        f"{url}/embeddings",
        HEADERS if headers is None else headers,
        BODY,
        timeout_seconds=timeout_seconds,
        max_answer_bytes=2 << 20,
    )


def trouble(network: Network, url: str, timeout_seconds: float = 5) -> ProviderTrouble:
    with pytest.raises(ProviderTrouble) as caught:
        post(network, url, timeout_seconds)
    return caught.value


# --- answers -----------------------------------------------------------------------------------------


def test_an_answer_has_status_body_and_headers_in_lower_case(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"status": 429, "body": "slow down", "headers": {"Retry-After": "7", "X-Other": "Yes"}}])

    answer = post(network, api.base_url)

    assert (answer.status, answer.body) == (429, b"slow down")
    assert (answer.headers["retry-after"], answer.headers["x-other"]) == ("7", "Yes")


def test_body_and_headers_arrive_as_they_are(network: Network, api: FakeApi) -> None:
    assert post(network, api.base_url).status == 200

    [request] = api.log()
    assert request["texts"] == ["a"]
    assert request["key_sha256"] == sha256(b"sk-right").hexdigest()


def test_a_redirect_is_not_followed(network: Network, server: Server, api: FakeApi) -> None:
    elsewhere = server.api("elsewhere")
    api.behave(faults=[{"redirect": f"{elsewhere.base_url}/embeddings"}])

    assert post(network, api.base_url).status == 307
    assert elsewhere.log() == []


# --- connections -------------------------------------------------------------------------------------


def test_a_connection_is_kept_for_the_next_request(network: Network, api: FakeApi) -> None:
    for _ in range(5):
        post(network, api.base_url)

    assert api.counters()["connections"] == 1


def test_threads_share_as_many_connections_as_there_are_requests_at_a_time(network: Network, api: FakeApi) -> None:
    with ThreadPoolExecutor(4) as executor:
        for _ in range(3):
            api.behave(hold=True)
            answers = [executor.submit(post, network, api.base_url) for _ in range(4)]
            api.wait_for(held=4)
            api.release()
            assert [answer.result().status for answer in answers] == [200] * 4

    assert api.counters()["connections"] == 4


def test_a_connection_that_the_server_closed_meanwhile_is_made_anew(network: Network, api: FakeApi) -> None:
    port = api.listen()
    url = f"http://127.0.0.1:{port}/{api.tenant}/v1"
    assert post(network, url).status == 200
    api.refuse(port)
    assert api.listen(port) == port

    assert post(network, url).status == 200


# --- no answer ---------------------------------------------------------------------------------------


def test_no_answer_in_time_is_passing_trouble(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"hang": True}])
    started = time.monotonic()

    error = trouble(network, api.base_url, 0.3)

    assert time.monotonic() - started < 1.3
    assert not error.permanent
    assert str(error) == f"{api.base_url.split('/')[2]} did not answer within 0.3 s"


def test_a_refused_connection_is_passing_trouble(network: Network, api: FakeApi) -> None:
    port = api.listen()
    api.refuse(port)

    error = trouble(network, f"http://127.0.0.1:{port}/v1")

    assert not error.permanent
    assert str(error).startswith(f"no answer from 127.0.0.1:{port}: ")
    assert "refused" in str(error)


@pytest.mark.parametrize("fault", [{"close": True}, {"cut_off": True}, {"cut_off": 1}])
def test_an_answer_cut_off_is_passing_trouble(network: Network, api: FakeApi, fault: dict[str, int]) -> None:
    api.behave(faults=[fault])

    error = trouble(network, api.base_url)

    assert not error.permanent
    assert post(network, api.base_url).status == 200


def test_a_host_without_an_address_is_passing_trouble(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)

    error = trouble(network, "http://api.example/v1")

    assert not error.permanent
    assert str(error).startswith("no answer from api.example: ")
    assert "name resolution" in str(error)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "http://",
        "http:///v1",
        "ftp://host/v1",
        "http://127.0.0.1:99999/v1",
        "http://127.0.0.1:port/v1",
        "http://[::1/v1",
        "http://two words/v1",
        "http://a..b/v1",
        "http://" + "a" * 64 + ".example/v1",
    ],
)
def test_a_url_that_cannot_be_called_needs_somebody_to_act(network: Network, url: str) -> None:
    error = trouble(network, url)

    assert error.permanent


def test_a_certificate_that_does_not_verify_needs_somebody_to_act(network: Network, tmp_path: Path) -> None:
    cert, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-out", cert, "-keyout", key], check=True, capture_output=True)
    with Server(tls_cert=cert, tls_key=key) as server:
        error = trouble(network, server.api("tls").base_url)

    assert error.permanent
    assert "certificate" in str(error)


# --- bounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [{"big_body": 64 << 20}, {"gzip_body": 64 << 20}])
def test_a_body_beyond_the_limit_is_not_read_to_its_end(network: Network, api: FakeApi, fault: dict[str, int]) -> None:
    api.behave(faults=[fault])
    post(network, api.base_url.replace(api.tenant, "warm"))
    tracemalloc.start()
    try:
        error = trouble(network, api.base_url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert str(error) == "the provider's answer is larger than 2 MiB"
    assert not error.permanent
    assert peak < 24 << 20


def test_a_body_at_the_limit_is_read(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"big_body": 2 << 20}])

    assert len(post(network, api.base_url).body) == 2 << 20


def test_a_body_that_trickles_is_given_up_at_the_deadline(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"slow_body": 2}])
    started = time.monotonic()

    error = trouble(network, api.base_url, 0.5)

    assert not error.permanent
    assert time.monotonic() - started < 1.5


def test_a_slow_body_within_the_deadline_is_read(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"slow_body": 0.3}])

    assert post(network, api.base_url).status == 200


# --- letting go --------------------------------------------------------------------------------------


class Asking:
    """A post in a thread of its own, and how long it lasts after abort() is first called."""

    def __init__(self, network: Network, url: str) -> None:
        self.network = network
        self.outcome: object = None
        self.thread = threading.Thread(target=self._ask, args=(url,), daemon=True)
        self.thread.start()

    def _ask(self, url: str) -> None:
        try:
            self.outcome = post(self.network, url, 3)
        except BaseException as error:
            self.outcome = error

    def seconds_to_let_go(self) -> float:
        """As Flight has it: abort() again and again until the thread has ended."""
        started = time.monotonic()
        while self.thread.is_alive():
            self.network.abort()
            self.thread.join(0.05)
        return time.monotonic() - started


@pytest.mark.parametrize("fault", [{"hang": True}, {"slow_body": 5}])
def test_abort_ends_a_request_that_waits_for_its_answer(
    network: Network, api: FakeApi, fault: dict[str, float]
) -> None:
    api.behave(faults=[fault])
    asking = Asking(network, api.base_url)
    api.wait_for(in_flight=1)

    assert asking.seconds_to_let_go() < 0.5
    assert isinstance(asking.outcome, ProviderTrouble)
    api.wait_until_idle()


def test_abort_ends_a_request_on_a_kept_connection(network: Network, api: FakeApi) -> None:
    post(network, api.base_url)
    # This thread's last connection is another one.
    post(network, f"http://127.0.0.1:{api.listen()}/{api.tenant}/v1")
    api.behave(faults=[{"hang": True}])
    asking = Asking(network, api.base_url)
    api.wait_for(in_flight=1)

    assert asking.seconds_to_let_go() < 0.5
    assert isinstance(asking.outcome, ProviderTrouble)
    assert api.counters()["connections"] == 2


def test_abort_ends_the_requests_of_all_threads(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"hang": True, "times": "forever"}])
    asking = [Asking(network, api.base_url) for _ in range(4)]
    api.wait_for(in_flight=4)

    assert [one.seconds_to_let_go() < 0.5 for one in asking] == [True] * 4


def test_the_next_request_after_an_abort_is_answered(network: Network, api: FakeApi) -> None:
    post(network, api.base_url)
    network.abort()

    assert post(network, api.base_url).status == 200


def test_abort_without_requests_does_nothing(network: Network) -> None:
    network.abort()


@pytest.fixture
def deaf() -> Iterator[int]:
    """The port of a server that accepts no connection and whose queue is full, so that connecting hangs."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        while True:
            client = stack.enter_context(socket.socket())
            client.settimeout(0.1)
            try:
                client.connect(listener.getsockname())
            except TimeoutError:
                break
        yield listener.getsockname()[1]


@pytest.fixture
def mute() -> Iterator[tuple[int, Callable[[], bool]]]:
    """The port of a server that listens and never says a word, and whether somebody has spoken to it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        listener.setblocking(False)
        heard: list[socket.socket] = []

        def has_heard() -> bool:
            with contextlib.suppress(BlockingIOError):
                heard.append(stack.enter_context(listener.accept()[0]))
                heard[-1].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                return any(connection.recv(1, socket.MSG_PEEK) for connection in heard)
            return False

        yield listener.getsockname()[1], has_heard


def test_connecting_in_vain_ends_in_time(network: Network, deaf: int) -> None:
    started = time.monotonic()

    error = trouble(network, f"http://127.0.0.1:{deaf}", 0.4)

    assert not error.permanent
    assert time.monotonic() - started < 1.4


def test_abort_ends_a_request_that_hangs_in_connecting(network: Network, deaf: int) -> None:
    asking = Asking(network, f"http://127.0.0.1:{deaf}")
    wait_until(lambda: network._sockets)

    assert asking.seconds_to_let_go() < 0.5
    assert isinstance(asking.outcome, ProviderTrouble)


def test_abort_ends_a_request_that_hangs_in_the_tls_handshake(
    network: Network, mute: tuple[int, Callable[[], bool]]
) -> None:
    port, has_heard = mute
    asking = Asking(network, f"https://127.0.0.1:{port}")
    wait_until(has_heard)

    assert asking.seconds_to_let_go() < 1
    assert isinstance(asking.outcome, ProviderTrouble)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_abort_ends_a_request_that_hangs_at_a_proxy(
    network: Network, mute: tuple[int, Callable[[], bool]], monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    port, has_heard = mute
    monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "")
    asking = Asking(network, f"{scheme}://api.example")
    wait_until(has_heard)

    assert asking.seconds_to_let_go() < 1
    assert isinstance(asking.outcome, ProviderTrouble)


# --- secrets -----------------------------------------------------------------------------------------


@pytest.fixture
def netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A .netrc of the user that the server runs as."""
    for name in (".netrc", "_netrc"):
        (tmp_path / name).write_text("machine 127.0.0.1 login somebody password something\n")
        (tmp_path / name).chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))


def test_a_netrc_never_replaces_the_key(network: Network, api: FakeApi, netrc: None) -> None:
    assert post(network, api.base_url).status == 200

    assert api.log()[0]["key_sha256"] == sha256(b"sk-right").hexdigest()


def test_a_netrc_adds_no_authorization(network: Network, api: FakeApi, netrc: None) -> None:
    post(network, api.base_url, headers={})

    assert "Authorization" not in api.log()[0]["headers"]
