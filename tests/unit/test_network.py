"""The door to the network against a real server on loopback: what it reuses, refuses, and how it lets go."""

from __future__ import annotations

import contextlib
import itertools
import socket
import socketserver
import subprocess
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from autoembed import network as network_module
from autoembed.errors import ProviderTrouble
from autoembed.network import HttpAnswer, Network
from fake_api import FakeApi, Server
from waiting import soon, wait_until

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


def post(
    network: Network,
    url: str,
    timeout_seconds: float = 5,
    headers: dict[str, str] | None = None,
    ca_file: str | None = None,
    sent: Callable[[], None] = lambda: None,
    stopped: threading.Event | None = None,
) -> HttpAnswer:
    return network.post(
        f"{url}/embeddings",
        HEADERS if headers is None else headers,
        BODY,
        timeout_seconds=timeout_seconds,
        max_answer_bytes=2 << 20,
        ca_file=ca_file,
        sent=sent,
        stopped=stopped,
    )


def trouble(network: Network, url: str, timeout_seconds: float = 5, ca_file: str | None = None) -> ProviderTrouble:
    with pytest.raises(ProviderTrouble) as caught:
        post(network, url, timeout_seconds, ca_file=ca_file)
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


def test_a_request_is_said_to_be_sent_when_only_the_answer_is_outstanding(network: Network, api: FakeApi) -> None:
    sent = threading.Event()
    api.behave(hold=True)
    with ThreadPoolExecutor(1) as executor:
        answer = executor.submit(post, network, api.base_url, sent=sent.set)
        assert sent.wait(5)
        api.wait_for(held=1)
        assert not answer.done()
        api.behave(hold=False)
        assert answer.result(5).status == 200


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

    error = trouble(network, api.base_url, 0.3)

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


# --- certificates ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ca_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate of a private authority; beside it the one of a server at 127.0.0.1 that it has signed."""
    folder = tmp_path_factory.mktemp("ca")
    new = "openssl req -newkey rsa:2048 -nodes"
    for command in (
        f"{new} -x509 -subj /CN=authority -out ca.pem -keyout ca.key",
        f"{new} -subj /CN=server -out server.csr -keyout server.key",
        "openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -extfile san -out server.pem",
    ):
        (folder / "san").write_text("subjectAltName = IP:127.0.0.1, DNS:embeddings.example\n")
        subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder / "ca.pem"


@pytest.fixture(scope="module")
def tls_server(ca_file: Path) -> Iterator[Server]:
    with Server(tls_cert=str(ca_file.with_name("server.pem")), tls_key=str(ca_file.with_name("server.key"))) as server:
        yield server


@pytest.fixture
def tls_url(tls_server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
    return tls_server.api("tls").base_url


def test_a_certificate_that_nobody_knows_needs_somebody_to_act(network: Network, tls_url: str) -> None:
    error = trouble(network, tls_url)

    assert error.permanent
    assert "certificate" in str(error)


def test_a_private_authority_is_trusted_where_it_is_given_and_nowhere_else(
    network: Network, tls_url: str, ca_file: Path
) -> None:
    assert trouble(network, tls_url).permanent
    # The failed check says nothing of this model.
    assert post(network, tls_url, ca_file=str(ca_file)).status == 200

    # Not by the connection that is kept, either.
    assert trouble(network, tls_url).permanent


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_the_servers_environment_may_name_the_authorities(
    network: Network, tls_url: str, ca_file: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(ca_file))

    assert post(network, tls_url).status == 200


def test_a_certificate_for_another_host_is_refused(network: Network, tls_url: str, ca_file: Path) -> None:
    error = trouble(network, tls_url.replace("127.0.0.1", "localhost"), ca_file=str(ca_file))

    assert error.permanent
    assert "localhost" in str(error)


def test_a_file_of_authorities_that_is_not_there_needs_somebody_to_act(network: Network, tls_url: str) -> None:
    error = trouble(network, tls_url, ca_file="/nowhere/ca.pem")

    assert error.permanent
    assert "/nowhere/ca.pem" in str(error)


def test_a_file_without_authorities_needs_somebody_to_act(network: Network, tls_url: str, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing of use")

    error = trouble(network, tls_url, ca_file=str(tmp_path / "ca.pem"))

    assert error.permanent
    assert "certificate verify failed" not in str(error)


# --- proxies -----------------------------------------------------------------------------------------


class Proxy(socketserver.ThreadingTCPServer):
    """Joins each client that says CONNECT to one port of this machine, and notes where it wanted to go."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        super().__init__(("127.0.0.1", 0), _Joining)
        self.port = port
        self.wanted: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Joining(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        self.server.wanted.append(self.rfile.readline().decode().rsplit(" ", 1)[0])
        while self.rfile.readline().strip():
            pass
        with socket.create_connection(("127.0.0.1", self.server.port)) as other:
            self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
            back = threading.Thread(target=self._pass_on, args=(other, self.connection))
            back.start()
            self._pass_on(self.connection, other)
            back.join()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while piece := source.recv(1 << 16):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def proxy(tls_server: Server) -> Iterator[Proxy]:
    with Proxy(tls_server.port) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        yield proxy
        proxy.shutdown()
        thread.join()


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
def test_a_proxy_joins_us_with_a_host_whose_certificate_is_verified_as_ever(
    network: Network, proxy: Proxy, tls_url: str, ca_file: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, proxy.url)
    monkeypatch.setenv("no_proxy", "")

    assert post(network, "https://embeddings.example/tls/v1", ca_file=str(ca_file)).status == 200
    assert trouble(network, "https://other.example/tls/v1", ca_file=str(ca_file)).permanent

    assert proxy.wanted == ["CONNECT embeddings.example:443", "CONNECT other.example:443"]


def test_no_proxy_names_the_hosts_that_are_called_without_one(
    network: Network, proxy: Proxy, tls_url: str, ca_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("no_proxy", raising=False)

    assert post(network, tls_url, ca_file=str(ca_file)).status == 200

    assert proxy.wanted == []


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


class Raw(socketserver.ThreadingTCPServer):
    """Answers every request with these pieces, one after the other, and closes the connection, if that is not kept."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Saying)
        self.pieces: Iterable[bytes] = ()
        self.heard: list[bytes] = []
        self.pause_seconds = 0.0
        self.keeps_connections = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Saying(socketserver.StreamRequestHandler):
    server: Raw

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while self._answer() and self.server.keeps_connections:
                pass

    def _answer(self) -> bool:
        """Answers a request. Returns False if there is none."""
        begun = len(self.server.heard)
        while line := self.rfile.readline().strip():
            self.server.heard.append(line)
        self.rfile.read(len(BODY))
        for piece in self.server.pieces:
            self.wfile.write(piece)
            # The pause is that of the server in the test, between the pieces of its answer.
            time.sleep(self.server.pause_seconds)
        return len(self.server.heard) > begun


@pytest.fixture
def raw() -> Iterator[Raw]:
    with Raw() as raw:
        thread = threading.Thread(target=raw.serve_forever, args=(0.01,))
        thread.start()
        yield raw
        raw.shutdown()
        thread.join()


def compressed(text: bytes, wbits: int) -> bytes:
    compressor = zlib.compressobj(wbits=wbits)
    return compressor.compress(text) + compressor.flush()


GZIP, DEFLATE = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS


def test_no_compressed_answer_is_asked_for(network: Network, raw: Raw) -> None:
    raw.pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"]

    assert post(network, raw.url, headers={**HEADERS, "Accept-Encoding": "gzip"}).body == b"{}"

    assert [line for line in raw.heard if line.lower().startswith(b"accept-encoding")] == [b"Accept-Encoding: identity"]


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        (b"", b"an answer" * 1000),
        (b"identity", b"an answer" * 1000),
        (b"gzip", compressed(b"an answer" * 1000, GZIP)),
        (b" GZIP ", compressed(b"an answer" * 1000, GZIP)),
        (b"x-gzip", compressed(b"an answer" * 1000, GZIP)),
        (b"deflate", compressed(b"an answer" * 1000, DEFLATE)),
    ],
)
def test_an_answer_that_is_compressed_all_the_same_is_read(
    network: Network, raw: Raw, encoding: bytes, body: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (encoding, len(body))
    raw.pieces = [head, body[:10], body[10:]]

    assert post(network, raw.url).body == b"an answer" * 1000


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip, identity", "compress"])
def test_an_answer_that_is_compressed_in_another_way_needs_somebody_to_act(
    network: Network, raw: Raw, encoding: str
) -> None:
    raw.pieces = [f"HTTP/1.1 200 OK\r\nContent-Encoding: {encoding}\r\n\r\n{{}}".encode()]

    error = trouble(network, raw.url)

    assert error.permanent
    assert str(error) == "the provider's answer is compressed in a way that was not asked for"


@pytest.mark.parametrize(
    "answer",
    [
        b"my text\r\n\r\n",
        b"HTTP/1.1 my text\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nmy text\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n99\r\nmy text",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\nmy text",
        b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\n\r\nmy text",
        b"HTTP/1.1 200 OK\r\nX: " + b"my text " * 10_000 + b"\r\n\r\n",
        b"",
    ],
)
def test_no_bytes_of_a_broken_answer_are_in_an_error(network: Network, raw: Raw, answer: bytes) -> None:
    """It may repeat the texts, or the key."""
    raw.pieces = [answer]

    error = trouble(network, raw.url)

    assert str(error).startswith(f"no answer from {raw.url.removeprefix('http://')}: ")
    assert "my text" not in str(error)
    assert not error.permanent


def test_the_body_of_a_redirect_is_bounded_too(network: Network, raw: Raw) -> None:
    raw.pieces = [b"HTTP/1.1 307 Temporary Redirect\r\nLocation: /elsewhere\r\n\r\n", *[bytes(1 << 20)] * 64]
    tracemalloc.start()
    try:
        error = trouble(network, raw.url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert str(error) == "the provider's answer is larger than 2 MiB"
    assert peak < 24 << 20


@pytest.mark.parametrize(
    "head", [b"", b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"]
)
def test_a_request_whose_answer_trickles_ends_when_its_time_is_up(network: Network, raw: Raw, head: bytes) -> None:
    """Each byte begins the wait of a socket again."""
    raw.pieces = itertools.chain([head], itertools.repeat(b"1"))
    raw.pause_seconds = 0.02
    asking = Asking(network, raw.url, 0.4)
    assert not soon(asking.has_expired, 0.2)

    wait_until(asking.has_expired, 2)

    assert isinstance(asking.outcome, ProviderTrouble)
    assert not asking.outcome.permanent
    assert "0.4 s" in str(asking.outcome)


def test_only_the_requests_whose_time_is_up_are_ended(network: Network, api: FakeApi) -> None:
    api.behave(hold=True)
    short, long = Asking(network, api.base_url, 0.3), Asking(network, api.base_url, 20)
    api.wait_for(held=2)

    wait_until(short.has_expired, 2)
    assert long.thread.is_alive()
    api.release()
    long.thread.join(5)

    assert isinstance(short.outcome, ProviderTrouble)
    assert isinstance(long.outcome, HttpAnswer)


def test_a_body_at_the_limit_is_read(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"big_body": 2 << 20}])

    assert len(post(network, api.base_url).body) == 2 << 20


def test_a_body_that_trickles_is_given_up_at_the_deadline(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"slow_body": 60}])
    asking = Asking(network, api.base_url, 0.5)

    wait_until(asking.has_ended)

    assert isinstance(asking.outcome, ProviderTrouble)
    assert not asking.outcome.permanent


def test_a_slow_body_within_the_deadline_is_read(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"slow_body": 0.3}])

    assert post(network, api.base_url).status == 200


# --- letting go --------------------------------------------------------------------------------------


class Asking:
    """A post in a thread of its own, which by itself lasts longer than tests wait."""

    def __init__(self, network: Network, url: str, timeout_seconds: float = 60) -> None:
        self.network = network
        self.outcome: object = None
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self._ask, args=(url, timeout_seconds), daemon=True)
        self.thread.start()

    def _ask(self, url: str, timeout_seconds: float) -> None:
        try:
            self.outcome = post(self.network, url, timeout_seconds, stopped=self.stopped)
        except BaseException as error:
            self.outcome = error

    def has_ended(self) -> bool:
        return not self.thread.is_alive()

    def has_expired(self) -> bool:
        self.network.expire()
        return self.has_ended()

    def lets_go(self) -> bool:
        """Calls abort(), like Flight again and again. Returns whether the thread has ended."""
        self.stopped.set()
        self.network.abort()
        return self.has_ended()


@pytest.mark.parametrize("fault", [{"hang": True}, {"slow_body": 60}])
def test_abort_ends_a_request_that_waits_for_its_answer(
    network: Network, api: FakeApi, fault: dict[str, float]
) -> None:
    api.behave(faults=[fault])
    asking = Asking(network, api.base_url)
    api.wait_for(in_flight=1)

    wait_until(asking.lets_go)
    assert isinstance(asking.outcome, ProviderTrouble)
    api.wait_until_idle()


def test_abort_ends_a_request_on_a_kept_connection(network: Network, api: FakeApi) -> None:
    post(network, api.base_url)
    # This thread's last connection is another one.
    post(network, f"http://127.0.0.1:{api.listen()}/{api.tenant}/v1")
    api.behave(faults=[{"hang": True}])
    asking = Asking(network, api.base_url)
    api.wait_for(in_flight=1)

    wait_until(asking.lets_go)
    assert isinstance(asking.outcome, ProviderTrouble)
    assert api.counters()["connections"] == 2


def test_abort_ends_the_requests_of_all_threads(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"hang": True, "times": "forever"}])
    asking = [Asking(network, api.base_url) for _ in range(4)]
    api.wait_for(in_flight=4)

    for one in asking:
        wait_until(one.lets_go)
        assert isinstance(one.outcome, ProviderTrouble)


def test_abort_ends_no_request_that_is_not_stopped(network: Network, api: FakeApi) -> None:
    api.behave(hold=True)
    others, own = Asking(network, api.base_url), Asking(network, api.base_url)
    api.wait_for(in_flight=2)

    wait_until(own.lets_go)
    api.release()
    others.thread.join()
    assert isinstance(others.outcome, HttpAnswer)


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
    asking = Asking(network, f"http://127.0.0.1:{deaf}", 0.4)

    wait_until(asking.has_ended)

    assert isinstance(asking.outcome, ProviderTrouble)
    assert not asking.outcome.permanent


def test_abort_ends_a_request_that_hangs_in_connecting(network: Network, deaf: int) -> None:
    asking = Asking(network, f"http://127.0.0.1:{deaf}")
    # The state of a connection that is being made is 02.
    wait_until(lambda: f":{deaf:04X} 02 " in Path("/proc/net/tcp").read_text())

    wait_until(asking.lets_go)
    assert isinstance(asking.outcome, ProviderTrouble)


def test_abort_ends_a_request_that_hangs_in_the_tls_handshake(
    network: Network, mute: tuple[int, Callable[[], bool]]
) -> None:
    port, has_heard = mute
    asking = Asking(network, f"https://127.0.0.1:{port}")
    wait_until(has_heard)

    wait_until(asking.lets_go)
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

    wait_until(asking.lets_go)
    assert isinstance(asking.outcome, ProviderTrouble)


class MuteNames:
    """A resolver that answers nobody before it is told to. asked: the hosts that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.answers = threading.Event()
        self._real = socket.getaddrinfo

    def getaddrinfo(self, host: str, *rest: object, **options: object) -> object:
        if options.get("flags") == socket.AI_NUMERICHOST:
            return self._real(host, *rest, **options)  # type: ignore[arg-type]
        self.asked.append(host)
        self.answers.wait()
        raise socket.gaierror(-3, "Temporary failure in name resolution")


@pytest.fixture
def mute_names(monkeypatch: pytest.MonkeyPatch) -> Iterator[MuteNames]:
    names = MuteNames()
    monkeypatch.setattr(socket, "getaddrinfo", names.getaddrinfo)
    yield names
    names.answers.set()


def test_abort_ends_a_request_that_waits_for_a_name_server(network: Network, mute_names: MuteNames) -> None:
    asking = Asking(network, "http://api.example", 60)
    wait_until(lambda: mute_names.asked)

    asking.stopped.set()

    wait_until(asking.has_ended)
    assert isinstance(asking.outcome, ProviderTrouble)
    assert not mute_names.answers.is_set()


def test_a_request_waits_for_a_name_server_no_longer_than_it_has_time(network: Network, mute_names: MuteNames) -> None:
    asking = Asking(network, "http://api.example", 0.2)

    wait_until(asking.has_ended)

    assert str(asking.outcome) == "the address of api.example was not found within 0.2 s"
    assert isinstance(asking.outcome, ProviderTrouble)
    assert not asking.outcome.permanent


def test_requests_to_a_host_wait_for_one_look_up_whoever_gave_it_up_before(
    network: Network, mute_names: MuteNames
) -> None:
    """Each request that is given up leaves a thread behind: a session that asks again and again has one."""
    for _ in range(3):
        asking = [Asking(network, "http://api.example", 0.1) for _ in range(2)]
        wait_until(lambda asking=asking: all(one.has_ended() for one in asking))  # type: ignore[misc]
    last = Asking(network, "http://api.example", 60)
    assert mute_names.asked == ["api.example"]

    mute_names.answers.set()
    wait_until(last.has_ended)

    assert "name resolution" in str(last.outcome)


def test_so_many_hosts_are_looked_up_at_a_time_and_further_ones_in_turn(
    network: Network, mute_names: MuteNames, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network_module, "MAX_LOOKUPS", 2)
    asking = [Asking(network, f"http://{number}.example", 60) for number in range(4)]
    wait_until(lambda: len(mute_names.asked) == 2)
    late = [one for number, one in enumerate(asking) if f"{number}.example" not in mute_names.asked]
    late[0].stopped.set()
    wait_until(late[0].has_ended)
    assert len(mute_names.asked) == 2

    mute_names.answers.set()
    wait_until(lambda: all(one.has_ended() for one in asking))

    assert len(mute_names.asked) == 3
    assert "name resolution" in str(late[1].outcome)


def test_a_system_without_another_thread_is_passing_trouble(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)

    error = trouble(network, "http://api.example")

    assert str(error) == "no answer from api.example: can't start new thread"
    assert not error.permanent


# --- endpoints ---------------------------------------------------------------------------------------


def resolving(monkeypatch: pytest.MonkeyPatch, *addresses: tuple[str, int]) -> list[str]:
    """Has every name lead to these addresses; returns the list of names that are asked for."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def answer(host: str, *rest: object, **options: object) -> object:
        if options.get("flags") == socket.AI_NUMERICHOST:
            return real(host, *rest, **options)  # type: ignore[arg-type]
        asked.append(host)
        return [
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address, port in addresses
        ]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return asked


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Where sockets were connected to; nothing leaves this machine."""
    attempts: list[object] = []

    def connect(self: socket.socket, address: object) -> None:
        attempts.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", connect)
    return attempts


@pytest.mark.parametrize("address", ["169.254.169.254", "100.100.100.200", "fe80::1", "::ffff:169.254.169.254"])
def test_a_name_that_leads_to_a_metadata_service_is_not_connected_to(
    network: Network, monkeypatch: pytest.MonkeyPatch, connected: list[object], address: str
) -> None:
    resolving(monkeypatch, (address, 443))

    error = trouble(network, "https://api.example/v1")

    assert connected == []
    assert error.permanent
    assert str(error) == f"api.example is at {address}, which is never called"


def test_a_name_is_resolved_once_and_only_the_addresses_that_were_judged_are_connected_to(
    network: Network, monkeypatch: pytest.MonkeyPatch, connected: list[object]
) -> None:
    asked = resolving(monkeypatch, ("169.254.169.254", 80), ("203.0.113.5", 80), ("203.0.113.6", 80))

    assert not trouble(network, "http://api.example/v1").permanent

    assert asked == ["api.example"]
    assert connected == [("203.0.113.5", 80), ("203.0.113.6", 80)]


def test_a_name_for_this_machine_that_leads_elsewhere_is_not_connected_to(
    network: Network, monkeypatch: pytest.MonkeyPatch, connected: list[object]
) -> None:
    resolving(monkeypatch, ("203.0.113.5", 80))

    error = trouble(network, "http://tei.localhost/v1")

    assert connected == []
    assert error.permanent


@pytest.mark.parametrize("host", ["169.254.169.254", "2852039166", "metadata.google.internal"])
def test_a_proxy_is_not_asked_for_a_metadata_service(
    network: Network, monkeypatch: pytest.MonkeyPatch, connected: list[object], host: str
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")

    error = trouble(network, f"http://{host}/v1")

    assert connected == []
    assert error.permanent
    assert "which is never called" in str(error)


# --- nothing goes from one model to another ----------------------------------------------------------


OTHER_HEADERS = {**HEADERS, "Authorization": "Bearer sk-other"}
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n"


def test_no_cookie_of_an_answer_goes_with_another_request(network: Network, raw: Raw) -> None:
    """It would tell a server of the account of another key."""
    raw.keeps_connections = True
    raw.pieces = [OK + b"Set-Cookie: account=of-right; Path=/\r\nSet-Cookie2: a=b; Version=1\r\n\r\n{}"]
    for headers in (HEADERS, OTHER_HEADERS):
        assert post(network, raw.url, headers=headers).status == 200

    assert [line for line in raw.heard if line.lower().startswith(b"cookie")] == []


def test_each_request_has_the_key_of_its_own_model_on_a_kept_connection(network: Network, api: FakeApi) -> None:
    for headers in (HEADERS, OTHER_HEADERS, {}):
        post(network, api.base_url, headers=headers)

    assert api.counters()["connections"] == 1
    keys = [sha256(key).hexdigest() for key in (b"sk-right", b"sk-other")]
    assert [request["key_sha256"] for request in api.log()] == [*keys, None]


def test_what_follows_an_answer_is_no_answer_to_the_next_request(network: Network, raw: Raw) -> None:
    """A server may send two answers to one request: the second one would be for another key."""
    raw.keeps_connections = True
    raw.pieces = [OK + b"\r\n{}" + OK + b"X-Of: the first\r\n\r\n[]"]

    for headers in (HEADERS, OTHER_HEADERS):
        answer = post(network, raw.url, headers=headers)
        assert (answer.body, "x-of" in answer.headers) == (b"{}", False)


def test_a_request_is_sent_once_whatever_becomes_of_it(network: Network, raw: Raw) -> None:
    for pieces in ([], [b"HTTP/1.1 503 Busy\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"]):
        raw.heard = []
        raw.pieces = pieces
        with contextlib.suppress(ProviderTrouble):
            post(network, raw.url)

        assert sum(line.startswith(b"POST") for line in raw.heard) == 1


def test_a_connection_whose_answer_was_not_read_to_its_end_is_not_used_again(network: Network, api: FakeApi) -> None:
    api.behave(faults=[{"big_body": 64 << 20}])
    trouble(network, api.base_url)

    assert post(network, api.base_url, headers=OTHER_HEADERS).status != 500
    assert api.counters()["connections"] == 2


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
