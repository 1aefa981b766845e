"""The one door to the network: posts a body, returns the answer, and can be aborted."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from autoembed import endpoints
from autoembed.errors import CameLate, FellOver, ProviderTrouble
from autoembed.flight import SLICE_SECONDS, ended_before_exit, signals_blocked

if TYPE_CHECKING:
    import requests

# A connection is given this long to be made, in seconds.
CONNECT_TIMEOUT_SECONDS = 10.0
# Hosts whose addresses are looked up at a time. Nothing ends a look-up, so its thread may outlive the requests.
MAX_LOOKUPS = 20
# Environment variables that name certificate authorities: those of requests, and that of OpenSSL.
CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")


@dataclass(frozen=True)
class HttpAnswer:
    """An HTTP answer; header names are lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes | bytearray


class Network:
    """Connections, kept from one request to the next. Threads may share them. abort() ends requests at once."""

    def __init__(self, max_connections: int) -> None:
        self._max_connections = max_connections
        self._session: requests.Session | None = None
        self._sockets: dict[int, socket.socket] = {}
        self._deadlines: dict[int, float] = {}
        self._stopped: dict[int, threading.Event] = {}
        self._lookups: dict[tuple[str, int], _Lookup] = {}
        self._thread = threading.local()
        self._lock = threading.Lock()

    def post(
        self,
        url: str,
        headers: Mapping[str, str],
        body: bytes,
        *,
        timeout_seconds: float,
        max_answer_bytes: int,
        ca_file: str | None = None,
        sent: Callable[[], None] = lambda: None,
        stopped: threading.Event | None = None,
    ) -> HttpAnswer:
        """The answer to a POST, whatever its status. Raises ProviderTrouble if it is late or too large.

        Redirects are not followed. Certificates are verified. Link-local addresses and metadata services are never
        called.
        ca_file: the certificate authorities to trust, in place of those of the environment and the system.
        sent: is called when only the answer is outstanding. stopped: has abort() end the request, once it is set.
        """
        # The import takes 0.2 to 0.3 s in a new backend, so it waits until there is something to send.
        import requests
        import urllib3

        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            self._deadlines[threading.get_ident()] = deadline
            self._stopped[threading.get_ident()] = stopped or threading.Event()
        timeouts = (min(CONNECT_TIMEOUT_SECONDS, timeout_seconds), timeout_seconds)
        self._thread.sent = sent
        try:
            with self._connected().post(
                url,
                data=body,
                # A compressed answer may be a thousand times larger than what was received.
                headers={**headers, "Accept-Encoding": "identity"},
                timeout=timeouts,
                verify=ca_file or next(filter(None, map(os.environ.get, CA_VARIABLES)), True),
                allow_redirects=False,
                stream=True,
                # Any value here keeps a .netrc of the server's user from replacing the key.
                auth=lambda request: request,
            ) as response:
                received = bytearray()
                plain = _decoder(response.headers.get("Content-Encoding", ""))
                # iter_content() would wait for a full chunk, past any deadline.
                while True:
                    chunk = response.raw.read1(1 << 16, decode_content=False)
                    # An answer that expire() has ended among its headers looks like one without a body.
                    if time.monotonic() > deadline:
                        raise CameLate(f"the provider's answer was not complete after {timeout_seconds:g} s")
                    if not chunk:
                        break
                    received += plain(chunk, max_answer_bytes + 1 - len(received))
                    if len(received) > max_answer_bytes:
                        raise ProviderTrouble(f"the provider's answer is larger than {max_answer_bytes >> 20} MiB")
                lower = {name.lower(): value for name, value in response.headers.items()}
                return HttpAnswer(response.status_code, lower, received)
        except requests.exceptions.SSLError as error:
            words = _words_of(_innermost(error))
            raise ProviderTrouble(f"no trusted connection to {_host(url)}: {words}", permanent=True) from error
        except (requests.exceptions.Timeout, urllib3.exceptions.TimeoutError) as error:
            raise CameLate(f"{_host(url)} did not answer within {timeout_seconds:g} s") from error
        except (
            requests.exceptions.InvalidURL,
            requests.exceptions.InvalidSchema,
            requests.exceptions.MissingSchema,
            UnicodeError,
        ) as error:
            raise ProviderTrouble(f"{url} is not a URL that can be called", permanent=True) from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, zlib.error) as error:
            if time.monotonic() > deadline:
                raise CameLate(f"{_host(url)} did not answer within {timeout_seconds:g} s") from error
            cause = _innermost(error)
            kind = FellOver if _is_of_connection(cause) else ProviderTrouble
            raise kind(f"no answer from {_host(url)}: {_words_of(cause)}") from error
        except OSError as error:
            # Nothing was sent: requests checks first that the file exists.
            raise ProviderTrouble(f"the certificate authorities cannot be read: {error}", permanent=True) from error
        finally:
            self._watch(None)
            with self._lock:
                del self._deadlines[threading.get_ident()], self._stopped[threading.get_ident()]

    def abort(self) -> None:
        """Ends the requests that are stopped; their threads see a broken connection.

        Others go on: an owner's code may call embed() while a lane has requests in flight.
        """
        self._end(lambda thread: thread in self._stopped and self._stopped[thread].is_set())

    def expire(self) -> None:
        """Ends the requests whose time is up, however slowly their answers trickle in."""
        now = time.monotonic()
        self._end(lambda thread: self._deadlines.get(thread, now) < now)

    def _end(self, is_chosen: Callable[[int], bool]) -> None:
        with self._lock:
            for thread, connection in self._sockets.items():
                if is_chosen(thread):
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)

    def _watch(self, connection: socket.socket | None) -> None:
        """Remembers the socket that this thread waits on. It is a copy: TLS takes the descriptor from the original."""
        with self._lock:
            before = self._sockets.pop(threading.get_ident(), None)
            if before is not None:
                before.close()
            if connection is not None:
                self._sockets[threading.get_ident()] = socket.socket(fileno=os.dup(connection.fileno()))

    def _addresses(self, host: str, port: int, seconds: float) -> list[Any]:
        """The addresses of a host. A request that is stopped, or has waited for so long, waits for them no longer."""
        stopped = self._stopped[threading.get_ident()]
        until = time.monotonic() + seconds
        lookup = None
        while not stopped.is_set() and time.monotonic() < until:
            lookup = lookup or self._lookup(host, port)
            if lookup is None:
                time.sleep(SLICE_SECONDS)
            elif lookup.has_ended(SLICE_SECONDS):
                return lookup.addresses()
        raise CameLate(f"the address of {host} was not found within {seconds:g} s")

    def _lookup(self, host: str, port: int) -> _Lookup | None:
        """The look-up of a host that is under way, or a new one; None: too many are under way."""
        with self._lock:
            self._lookups = {place: lookup for place, lookup in self._lookups.items() if not lookup.has_ended()}
            if (host, port) not in self._lookups and len(self._lookups) < MAX_LOOKUPS:
                self._lookups[host, port] = _Lookup(host, port)
            return self._lookups.get((host, port))

    def _connected(self) -> requests.Session:
        with self._lock:
            if self._session is None:
                self._session = _session(
                    self._max_connections, self._addresses, self._watch, lambda: self._thread.sent()
                )
            return self._session


class _Lookup:
    """Looks up the addresses of a host, in a thread of its own that has no socket of a request."""

    def __init__(self, host: str, port: int) -> None:
        self._place = host, port
        self._found: Future[list[Any]] = Future()
        self._thread = threading.Thread(target=self._run, name="autoembed look-up", daemon=True)
        try:
            with signals_blocked():
                self._thread.start()
        except RuntimeError as error:
            # The system has no thread left.
            self._found.set_exception(OSError(str(error)))

    def _run(self) -> None:
        with ended_before_exit(self):
            try:
                self._found.set_result(socket.getaddrinfo(*self._place, type=socket.SOCK_STREAM))
            except BaseException as error:
                self._found.set_exception(error)

    def has_ended(self, seconds: float = 0.0) -> bool:
        return bool(wait([self._found], seconds).done)

    def addresses(self) -> list[Any]:
        return self._found.result()

    def end(self, _seconds: float) -> bool:
        """Nothing ends it: a backend that leaves does not wait for it."""
        return not self._thread.is_alive()


def _session(
    max_connections: int,
    addresses: Callable[[str, int, float], list[Any]],
    watch: Callable[[socket.socket], None],
    sent: Callable[[], None],
) -> requests.Session:
    """A session that passes each socket to watch() before a thread waits on it, and calls sent() after each request.

    addresses: looks up a host, within so many seconds.
    """
    from http.cookiejar import DefaultCookiePolicy

    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Watched:
        def request(self, *args: Any, **kwargs: Any) -> Any:
            if self.sock is not None:  # type: ignore[attr-defined]
                watch(self.sock)  # type: ignore[attr-defined]
            return super().request(*args, **kwargs)  # type: ignore[misc]

        def getresponse(self) -> Any:
            sent()
            return super().getresponse()  # type: ignore[misc]

        def _new_conn(self) -> Any:
            return _connect(self._dns_host, self.port, self.timeout, self.socket_options, addresses, watch)  # type: ignore[attr-defined]

    class WatchedHTTPConnection(Watched, HTTPConnection):
        pass

    class WatchedHTTPSConnection(Watched, HTTPSConnection):
        pass

    class WatchedHTTPPool(HTTPConnectionPool):
        ConnectionCls = WatchedHTTPConnection

    class WatchedHTTPSPool(HTTPSConnectionPool):
        ConnectionCls = WatchedHTTPSConnection

    pools = {"http": WatchedHTTPPool, "https": WatchedHTTPSPool}

    class WatchedAdapter(HTTPAdapter):
        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = pools
            return manager

        def send(self, request: requests.PreparedRequest, *args: Any, **kwargs: Any) -> requests.Response:
            # Where a proxy resolves names, nothing more can be checked. For other names see _connect().
            host = urlsplit(str(request.url)).hostname or ""
            if endpoints.is_forbidden(host):
                raise _never_called(host, "a link-local address or a cloud's metadata service")
            return super().send(request, *args, **kwargs)

    class UnredirectedSession(requests.Session):
        def get_redirect_target(self, resp: requests.Response) -> str | None:
            # For a target, requests would read the whole body of the redirect, however large.
            return None

    session = UnredirectedSession()
    # All models share the session, and a cookie may tell of the account of another model's key.
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    adapter = WatchedAdapter(pool_maxsize=max_connections)
    session.mount("https://", adapter)
    session.mount("http://", adapter)
    return session


def _connect(
    host: str,
    port: int,
    timeout: Any,
    options: Any,
    addresses: Callable[[str, int, float], list[Any]],
    watch: Callable[[socket.socket], None],
) -> socket.socket:
    """A connected socket. watch() is given it before it connects, so that connecting can be aborted too.

    The name is resolved once: the address that is checked is the address that is connected to.
    """
    from urllib3.exceptions import ConnectTimeoutError, NameResolutionError, NewConnectionError

    try:
        known = addresses(host, port, timeout)
    except socket.gaierror as error:
        raise NameResolutionError(host, None, error) from error  # type: ignore[arg-type]
    failure: OSError = OSError("no address")
    allowed = [found for found in known if endpoints.may_connect(host, str(found[4][0]))]
    if known and not allowed:
        raise _never_called(host, str(known[0][4][0]))
    for family, kind, protocol, _, address in allowed:
        connection = socket.socket(family, kind, protocol)
        watch(connection)
        try:
            for option in options or ():
                connection.setsockopt(*option)
            connection.settimeout(timeout)
            connection.connect(address)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    if isinstance(failure, TimeoutError):
        raise ConnectTimeoutError(None, f"connection to {host} timed out") from failure
    raise NewConnectionError(None, str(failure)) from failure  # type: ignore[arg-type]


def _never_called(host: str, where: str) -> ProviderTrouble:
    return ProviderTrouble(f"{host} is at {where}, which is never called", permanent=True)


def _host(url: str) -> str:
    return url.split("://", 1)[-1].split("/", 1)[0].rsplit("@", 1)[-1]


def _innermost(error: BaseException) -> BaseException:
    """The reason of an error: requests wraps it three times over."""
    cause: BaseException = error
    while True:
        inner = getattr(cause, "reason", None) or cause.__cause__ or cause.__context__
        if not isinstance(inner, BaseException) or inner is cause:
            return cause
        cause = inner


def _is_of_connection(cause: BaseException) -> bool:
    from urllib3.exceptions import NewConnectionError

    return isinstance(cause, OSError | NewConnectionError)


def _words_of(cause: BaseException) -> str:
    """The reason in one line. Bytes of the answer are never quoted."""
    if _is_of_connection(cause):
        return " ".join(str(cause).split())[:200] or type(cause).__name__
    return f"what came is not a whole HTTP answer ({type(cause).__name__})"


def _decoder(encoding: str) -> Callable[[bytes, int], bytes]:
    """Makes plain bytes of the bytes of an answer, so many at most; it may have been compressed once all the same."""
    names = [name.strip().lower() for name in encoding.split(",") if name.strip()]
    if not names or names == ["identity"]:
        return lambda chunk, most: chunk
    if names not in (["gzip"], ["x-gzip"], ["deflate"]):
        raise ProviderTrouble("the provider's answer is compressed in a way that was not asked for", permanent=True)
    # Both zlib's and gzip's headers.
    decompressor = zlib.decompressobj(wbits=32 + zlib.MAX_WBITS)
    return lambda chunk, most: decompressor.decompress(chunk, max(1, most))
