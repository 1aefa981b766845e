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


@pytest.mark.parametrize("words", [1, 2000], ids=["short", "in the TOAST table"])
@pytest.mark.parametrize(
    ("change", "fails"),
    [
        ("NEW.title := NEW.title || '!'", True),
        ("NEW.body := NEW.body || '!'", True),
        ("NEW.body := left(NEW.body || '!', -1)", False),
        ("NEW.other := NEW.other + 1", False),
    ],
)
def test_a_trigger_that_changes_a_column_of_the_text_with_the_write_fails_the_row(
    db: Connection, api: FakeApi, words: int, change: str, fails: bool
) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, title text, body text, other int DEFAULT 0)")
    db.execute("SELECT autoembed.enable('pages', 'embedding', content_columns => '{title,body}')")
    db.execute(
        f"CREATE FUNCTION change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {change}; RETURN NEW; END $$;"
        "CREATE TRIGGER change BEFORE UPDATE ON pages FOR EACH ROW EXECUTE FUNCTION change()"
    )
    text = f"SELECT string_agg(md5(n::text), ' ') FROM generate_series(1, {words}) AS n"
    db.execute(f"INSERT INTO pages SELECT 1, 'title', ({text})")

    while db.execute("SELECT FROM pgmq.q_embedding_jobs").fetchall():
        db.execute("UPDATE pgmq.q_embedding_jobs SET vt = now()")
        db.execute("SELECT autoembed.process()")

    assert db.execute("SELECT embedding IS NULL FROM pages").fetchone() == (fails,)
    reasons = [row.reason for row in db.execute("SELECT reason FROM autoembed.failed").fetchall()]
    assert len(reasons) == fails
    assert all("a trigger of the table changes the text" in reason for reason in reasons)


def test_a_row_of_which_another_column_changes_meanwhile_gets_the_vector_of_its_text(
    db: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, other int)")
    for column in ("", "'embedding', "):
        db.execute(f"SELECT autoembed.enable('pages', {column}content_columns => '{{body}}')")
    api.behave(hold="a page")
    with running_lanes(db, connect):
        db.execute("INSERT INTO pages VALUES (1, 'a page')")
        api.wait_for(held=1)
        db.execute("UPDATE pages SET other = 1")
        api.behave()
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.embedded").fetchone() == (2,))

    assert db.execute("SELECT embedding IS NULL FROM pages").fetchone() == (False,)
    assert db.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (1,)
    assert api.texts() == ["a page"]
