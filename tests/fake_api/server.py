"""The HTTP server: ports, connections, the protocols' endpoints and the tests' own."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qsl, unquote, urlsplit

from fake_api.client import FakeApi
from fake_api.exchange import ClientGone, Exchange
from fake_api.protocol import Reply
from fake_api.protocols import PROTOCOLS
from fake_api.tenants import POLL_SECONDS, State, Tenant


class Handler(BaseHTTPRequestHandler):
    """One connection, request by request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # head and body leave in one packet
    server: Listener

    def setup(self) -> None:
        super().setup()
        self.state = self.server.owner.state
        self.tenants_seen: list[Tenant] = []

    def route(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, query = urlsplit(self.path).path, urlsplit(self.path).query
        tenant, slash, rest = path.removeprefix("/").partition("/")
        for protocol in PROTOCOLS:
            if self.command == "POST" and (match := protocol.path.fullmatch(slash + rest)):
                address = {name: unquote(part) for name, part in match.groupdict().items()} | dict(parse_qsl(query))
                self.provide(Exchange(self, protocol, self.state.tenant(tenant), body, address))
                return
        try:
            self.control(path.strip("/").split("/"), query, json.loads(body or b"{}"))
        except (ValueError, TypeError) as error:
            self.send(Reply(400, json.dumps({"error": str(error)}).encode()))

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = route

    def control(self, path: list[str], query: str, order: Any) -> None:
        status, answer = 200, dict[str, Any]()
        match self.command, path:
            case "GET", ["health"]:
                pass
            case "PUT" | "PATCH", ["control", tenant]:
                self.state.behave(tenant, order, amend=self.command == "PATCH")
            case "GET", ["control", tenant]:
                answer = self.state.look(tenant, with_log="only=counters" not in query)
            case "POST", ["control", tenant, "wait"]:
                answer = self.state.wait(tenant, **order)
            case "DELETE", ["control", tenant]:
                self.state.reset(tenant)
            case "PUT", ["ports", port]:
                answer = {"port": self.server.owner.listen(int(port), **order)}
            case "DELETE", ["ports", port]:
                self.server.owner.refuse(int(port))
            case _:
                status, answer = 404, {"error": {"message": f"Invalid URL ({self.command} {self.path})"}}
        self.send(Reply(status, json.dumps(answer).encode()))

    def provide(self, exchange: Exchange) -> None:
        try:
            reply = exchange.run()
            if reply is None:
                self.close_connection = True
            else:
                self.send(reply, exchange)
        except (ClientGone, OSError):
            self.close_connection = True
        finally:
            exchange.finish(None)

    def send(self, reply: Reply, exchange: Exchange | None = None) -> None:
        self.send_response(reply.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(reply.body))}
        if reply.pieces:
            headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
        for name, value in {**headers, **reply.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        pieces = reply.pieces or self._pieces(reply, exchange)
        last = b""
        for piece in pieces:
            self.wfile.write(last)
            last = b"%x\r\n%s\r\n" % (len(piece), piece) if reply.pieces else piece
        if exchange:
            exchange.finish(reply.status)
        self.wfile.write(last + (b"0\r\n\r\n" if reply.pieces else b""))
        self.wfile.flush()
        if reply.cut_off_at is not None:
            self.close_connection = True

    def _pieces(self, reply: Reply, exchange: Exchange | None) -> Iterator[bytes]:
        body = reply.body[: reply.cut_off_at]
        if not exchange or not reply.spread_seconds:
            yield body
            return
        steps = max(1, min(len(body), int(reply.spread_seconds / 0.05)))
        for step in range(steps):
            yield body[len(body) * step // steps : len(body) * (step + 1) // steps]
            self.wfile.flush()
            exchange.wait(reply.spread_seconds / steps)

    def handle_expect_100(self) -> bool:
        goes_on = super().handle_expect_100()
        self.wfile.flush()
        return goes_on

    def client_has_gone(self) -> bool:
        try:
            # the plain socket's recv: a TLS socket knows no peeking
            return not socket.socket.recv(self.connection, 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Listener(ThreadingMixIn, TCPServer):
    """One open port."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, owner: Server, port: int, context: ssl.SSLContext | None) -> None:
        self.owner, self.connections, self.lock = owner, set[socket.socket](), threading.Lock()
        super().__init__((owner.host, port), Handler)
        if context:
            # the handshake belongs to the connection's own thread: it may never end
            self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.thread = threading.Thread(target=self.serve_forever, args=(POLL_SECONDS,), daemon=True)
        self.thread.start()

    def get_request(self) -> tuple[Any, Any]:
        connection, address = super().get_request()
        with self.lock:
            self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        with self.lock:
            self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that goes is no news
            super().handle_error(request, client_address)

    def close(self) -> None:
        self.shutdown()
        self.server_close()
        with self.lock:
            connections = list(self.connections)
        for connection in connections:
            with contextlib.suppress(OSError):  # gone by itself
                socket.socket.shutdown(connection, socket.SHUT_RDWR)


class Server:
    """The fake API in this process, on one port and others opened later; all see the same tenants."""

    def __init__(
        self, host: str = "127.0.0.1", port: int = 0, tls_cert: str | None = None, tls_key: str | None = None
    ) -> None:
        self.host, self.state, self.listeners = host, State(), dict[int, Listener]()
        self.port = self.listen(port, tls_cert, tls_key)
        self.url = f"{'https' if tls_cert else 'http'}://{host}:{self.port}"

    def listen(self, port: int = 0, tls_cert: str | None = None, tls_key: str | None = None) -> int:
        """Open a port (0: any free one), with TLS if a certificate is given."""
        if port in self.listeners:
            return port
        context = None
        try:
            if tls_cert:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(tls_cert, tls_key)
            listener = Listener(self, port, context)
        except OSError as error:
            raise ValueError(f"cannot listen on port {port}: {error}") from error
        port = int(listener.server_address[1])
        self.listeners[port] = listener
        return port

    def refuse(self, port: int) -> None:
        """Close a port and its connections: from now on the operating system refuses."""
        if port == self.port:
            raise ValueError(f"port {port} is the server's own and stays open")
        if listener := self.listeners.pop(port, None):
            listener.close()

    def api(self, tenant: str) -> FakeApi:
        return FakeApi(self.url, f"{self.url}/{tenant}/v1", tenant)

    def close(self) -> None:
        for listener in self.listeners.values():
            listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
