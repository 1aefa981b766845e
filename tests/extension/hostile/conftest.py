"""Fixtures of the hostile tests: tenants, a lane for all of them, and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from psycopg.types.json import Jsonb

from extension.hostile import raw_api
from extension.hostile.tenants import DIMENSIONS, WRITE_TIMEOUT, Tenant
from fake_api import FakeApi
from harness import Connection, Server, put_file
from lanes import Lane
from waiting import wait_until

MakeTenant = Callable[[str], Tenant]


@pytest.fixture
def tenant(server: Server, db: Connection, dbname: str, role: Callable[[str], str]) -> Iterator[MakeTenant]:
    """Makes tenants. What their sessions left open is rolled back at the end."""
    db.execute("SELECT autoembed.create_model('fast', 'fake', %s)", [DIMENSIONS])
    db.execute("SELECT autoembed.set_default_model('fast')")
    with ExitStack() as sessions:

        def make(name: str) -> Tenant:
            me = role(name)
            db.execute(f"CREATE SCHEMA {me} AUTHORIZATION {me}")
            db.execute("SELECT autoembed.grant_usage(%s)", [me])

            def enter() -> Connection:
                return sessions.enter_context(closing(server.connect(dbname, user=me)))

            return Tenant(me, enter(), enter)

        yield make


@pytest.fixture
def mallory(tenant: MakeTenant) -> Tenant:
    return tenant("mallory")


@pytest.fixture
def bob(tenant: MakeTenant) -> Tenant:
    """A tenant with one row, which has no vector yet; see stays_fresh()."""
    bob = tenant("bob")
    bob.run(
        f"SET statement_timeout = '{WRITE_TIMEOUT}'",
        "CREATE TABLE letters (id int PRIMARY KEY, content text)",
        "SELECT autoembed.enable('letters', 'embedding', content_columns => '{content}')",
        "INSERT INTO letters VALUES (1, 'a letter')",
    )
    return bob


@pytest.fixture
def nobody(server: Server, dbname: str, role: Callable[[str], str]) -> Iterator[Connection]:
    """The session of a role that was granted nothing."""
    with closing(server.connect(dbname, user=role("nobody"))) as session:
        yield session


@pytest.fixture
def lane(db: Connection, tenant: MakeTenant, connect: Callable[..., Connection]) -> Iterator[Lane]:
    """A superuser's lane, as the image has them."""
    lane = Lane(connect())
    try:
        lane.wait_until_up(db)
        yield lane
    finally:
        # However stuck it is.
        db.execute("SELECT pg_terminate_backend(%s)", [lane.pid])
        lane.join(60)


@pytest.fixture
def start_lane(request: pytest.FixtureRequest, tenant: MakeTenant) -> Callable[[], Lane]:
    """Starts a lane when there is something for it to meet."""
    return lambda: request.getfixturevalue("lane")


@pytest.fixture
def api(server: Server, db: Connection, dbname: str) -> Iterator[FakeApi]:
    """The fake API for this test alone; the model "slow" speaks to it."""
    api = server.fake_api(dbname)
    db.execute(
        "SELECT autoembed.create_model('slow', 'openai', 8, model_id => 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [api.base_url],
    )
    yield api
    api.release()


@pytest.fixture(scope="session")
def raw_url(server: Server) -> str:
    """Where the database finds raw_api.py."""
    container = server.container.get_wrapped_container()
    put_file(server.container, Path(raw_api.__file__), "/tmp")
    container.exec_run(["python3", "/tmp/raw_api.py"], detach=True)
    knock = f"import socket; socket.create_connection(('127.0.0.1', {raw_api.PORT}))"
    wait_until(lambda: container.exec_run(["python3", "-c", knock]).exit_code == 0)
    return f"http://127.0.0.1:{raw_api.PORT}"


@pytest.fixture
def raw_model(db: Connection, raw_url: str) -> Callable[..., None]:
    """Makes a model whose provider is a case of raw_api.py."""

    def make(name: str, case: str, options: dict[str, Any] | None = None, **definition: Any) -> None:
        given = {"base_url": f"{raw_url}/{case}", "options": Jsonb(options or {}), **definition}
        arguments = ", ".join(f"{argument} => %({argument})s" for argument in given)
        call = f"SELECT autoembed.create_model(%(name)s, 'openai', {raw_api.DIMENSIONS}, {arguments})"
        db.execute(call.encode(), {"name": name, **given})

    return make
