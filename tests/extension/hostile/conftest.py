"""Fixtures of the hostile tests: tenants, a lane for all of them, and models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest

from extension.hostile.tenants import DIMENSIONS, WRITE_TIMEOUT, Tenant
from fake_api import FakeApi
from harness import Connection, Server
from lanes import Lane

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
        "SELECT autoembed.enable('letters', content_columns => '{content}')",
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
