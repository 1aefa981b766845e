"""Fixtures of the unit tests: a lane in memory, and for tests over HTTP the fake API, clients of it and a key."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import requests
from hypothesis import HealthCheck, settings

from autoembed.network import Network
from fake_api import FakeApi, Server
from unit.fakes import FakeDatabase, FakeProvider
from unit.lane import Lane

# The time of an example says more about the machine than about the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture
def lane(monkeypatch: pytest.MonkeyPatch) -> Lane:
    return Lane(monkeypatch)


@pytest.fixture
def database(lane: Lane) -> FakeDatabase:
    return lane.database


@pytest.fixture
def provider(lane: Lane) -> FakeProvider:
    return lane.provider


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def api(server: Server, request: pytest.FixtureRequest) -> Iterator[FakeApi]:
    """A tenant of the test's own."""
    api = server.api(sha256(request.node.name.encode()).hexdigest()[:16])
    yield api
    api.reset()


@pytest.fixture
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        session.trust_env = False
        session.headers["Authorization"] = "Bearer sk-right"
        yield session


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    network = Network(2)
    yield network
    network._connected().close()


@pytest.fixture
def key(tmp_path: Path) -> str:
    """Where a model finds its key."""
    (tmp_path / "key").write_text("sk-right\n")
    return f"file:{tmp_path / 'key'}"
