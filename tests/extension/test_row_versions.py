"""The write of a vector is an UPDATE of the owner's row: how triggers and ORMs that count changes live with it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_api import FakeApi
from harness import Connection
from lanes import running_lanes
from waiting import wait_until

TABLES = (Path(__file__).resolve().parents[2] / "docs/tables.md").read_text(encoding="utf-8")
[GUARD] = re.findall(r"^```sql\n(ALTER TABLE pages ADD COLUMN updated_at.*?)^```$", TABLES, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("embedded_by", ["lane", "process"])
def test_the_guard_of_the_readme_counts_the_applications_changes_alone(
    db: Connection, api: FakeApi, connect: Callable[..., Connection], embedded_by: str
) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', 'embedding', content_columns => '{body}')")
    db.execute(GUARD)
    db.execute("INSERT INTO pages VALUES (1, 'first')")

    def embed() -> None:
        if embedded_by == "process":
            db.execute("SELECT autoembed.process()")
        else:
            with running_lanes(db, connect):
                wait_until(lambda: db.execute("SELECT autoembed.wait_until_fresh('pages')").fetchone() == (True,))

    def row() -> Any:
        return db.execute("SELECT version, updated_at, xmin::text, embedding FROM pages").fetchone()

    before = row()
    embed()
    embedded = row()
    assert embedded.embedding is not None
    assert embedded.xmin != before.xmin
    assert (embedded.version, embedded.updated_at) == (1, before.updated_at)

    db.execute("UPDATE pages SET body = 'second'")
    changed = row()
    embed()

    assert row().embedding != embedded.embedding
    assert changed.updated_at > embedded.updated_at
    assert (row().version, row().updated_at) == (2, changed.updated_at)
