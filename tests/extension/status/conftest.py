"""An enabled table, empty and sound."""

from __future__ import annotations

import pytest

from fake_api import FakeApi
from harness import Connection


@pytest.fixture
def notes(db: Connection, api: FakeApi) -> Connection:
    """A table that is enabled, sound and empty."""
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    db.execute(
        "SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}', enqueue_existing => false)"
    )
    return db
