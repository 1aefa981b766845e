"""A table of three documents, in a transaction that is rolled back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from extension.pipelines.documents import TABLE
from fake_api import FakeApi
from harness import Connection, Server

DATABASE = "enable"


@pytest.fixture(scope="session")
def enabled(server: Server, template: str) -> Iterator[Connection]:
    """A database for all tests that need no second session."""
    with server.database(DATABASE, template), server.connect(DATABASE) as db:
        url = server.fake_api(DATABASE).base_url
        db.execute("SELECT autoembed.alter_model('text-embedding-3-small', base_url => %s)", [url])
        for name, dimensions in (("small", 256), ("large", 1536), ("huge", 3072), ("giant", 4096)):
            db.execute(
                "SELECT autoembed.create_model(%s, 'openai', %s, model_id => 'text-embedding-3-large', base_url => %s,"
                " api_key => 'env:OPENAI_API_KEY')",
                [name, dimensions, url],
            )
        db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
        yield db


@pytest.fixture
def api(server: Server) -> FakeApi:
    api = server.fake_api(DATABASE)
    api.reset()
    return api


@pytest.fixture
def db(enabled: Connection, api: FakeApi) -> Iterator[Connection]:
    """A session with the table documents of three rows, in a transaction that is rolled back."""
    with enabled.transaction(force_rollback=True):
        enabled.execute(TABLE)
        yield enabled
