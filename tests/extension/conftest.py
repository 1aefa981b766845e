"""A server for the session, a fresh database for each test, and the fake API beside it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from fake_api import FakeApi
from harness import GUIDE_TABLE, GUIDE_TRIGGERS, PASSWORD, Connection, Server, run_server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with ExitStack() as stack:
        server = run_server(stack, AUTOEMBED_LANES="0")
        with server.connect() as connection:
            # A lane keeps the Python modules compiled, for the sessions of all tests.
            connection.execute("CALL autoembed.work(0)")
        yield server


@pytest.fixture(scope="session")
def template(server: Server) -> Iterator[str]:
    """A database with the extension, to be cloned."""
    name = "autoembed_template"
    with server.database(name):
        with server.connect(name) as connection:
            connection.execute("CREATE EXTENSION autoembed CASCADE")
        yield name


@pytest.fixture
def dbname(server: Server, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with server.database(name, template):
        yield name


@pytest.fixture
def connect(server: Server, dbname: str) -> Iterator[Callable[..., Connection]]:
    """Opens further sessions in the test's database."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(server.connect(dbname, **options))


@pytest.fixture
def db(connect: Callable[..., Connection]) -> Connection:
    """A superuser's session, autocommit, in a fresh database with the extension."""
    return connect()


@pytest.fixture
def api(server: Server, db: Connection, dbname: str) -> Iterator[FakeApi]:
    """The fake API for this test alone; the default model text-embedding-3-small speaks to it."""
    api = server.fake_api(dbname)
    db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [api.base_url])
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    yield api
    # A test that failed may have left a lane waiting.
    api.release()


@pytest.fixture
def documents(db: Connection, api: FakeApi) -> Connection:
    """The guide's table, function and triggers, as the guide has them."""
    db.execute(GUIDE_TABLE.format(dimensions=1536))
    db.execute(GUIDE_TRIGGERS)
    return db


@pytest.fixture
def role(db: Connection, dbname: str) -> Iterator[Callable[[str], str]]:
    """Makes login roles, named after the test's database, and drops them with all they own."""
    made: list[str] = []

    def make(name: str) -> str:
        made.append(f"{name}_{dbname}")
        db.execute(f"CREATE ROLE {made[-1]} LOGIN PASSWORD '{PASSWORD}'")
        return made[-1]

    yield make
    for name in made:
        db.execute(f"DROP OWNED BY {name} CASCADE")
        db.execute(f"DROP ROLE {name}")
