"""The server's log has one line when rows are given up, and one when a provider is back."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from fake_api import FakeApi
from harness import Connection, Server
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]


def lines_with(server: Server, words: str) -> list[str]:
    log = "".join(part.decode() for part in server.container.get_logs())
    return [line for line in log.splitlines() if words in line]


@pytest.fixture
def table(db: Connection, api: FakeApi, dbname: str) -> str:
    """A table whose name is in no other test's lines."""
    db.execute(f"CREATE TABLE notes_{dbname} (id int PRIMARY KEY, body text)")
    db.execute(f"SELECT autoembed.enable('notes_{dbname}', 'embedding', content_columns => '{{body}}')")
    return f"notes_{dbname}"


def embedded(db: Connection, table: str) -> int:
    row = db.execute(f"SELECT count(embedding) FROM {table}").fetchone()
    assert row is not None
    return int(row[0])


def test_one_line_tells_how_many_rows_were_given_up_and_none_of_their_text(
    db: Connection, api: FakeApi, connect: Connect, server: Server, table: str
) -> None:
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    db.execute(f"INSERT INTO {table} SELECT n, 'fine ' || n FROM generate_series(1, 20) AS n")
    db.execute(f"INSERT INTO {table} VALUES (21, 'my poison')")
    with running_lanes(db, connect):
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.failure").fetchone() == (1,), 20)
        wait_until(lambda: embedded(db, table) == 20, 20)
    found = lines_with(server, table)
    assert [line.partition("LOG:")[2].strip() for line in found] == [
        f"autoembed gave up 1 row of public.{table}.embedding: the model refuses the text"
    ]


def test_an_outage_has_a_line_when_it_begins_and_one_when_it_is_over(
    db: Connection, api: FakeApi, connect: Connect, server: Server, table: str, dbname: str
) -> None:
    model = f"model_{dbname}"
    db.execute(
        "SELECT autoembed.create_model(%s, provider => 'openai', model_id => 'text-embedding-3-small',"
        " dimensions => 1536, base_url => %s, api_key => 'env:OPENAI_API_KEY')",
        [model, api.base_url],
    )
    db.execute("SELECT autoembed.alter_pipeline(%s, model => %s)", [table, model])
    api.behave(faults=[{"status": 503, "times": "forever"}])
    with running_lanes(db, connect, lanes=2):
        db.execute(f"INSERT INTO {table} SELECT n, 'text ' || n FROM generate_series(1, 20) AS n")
        wait_until(lambda: api.counters()["requests"] >= 3, 20)
        api.behave()
        wait_until(lambda: embedded(db, table) == 20, 60)
    assert len(lines_with(server, f"{table}.embedding is not being embedded")) == 1
    assert len(lines_with(server, f'model "{model}" is in use again')) == 1


def test_lanes_that_begin_again_repeat_no_line(
    db: Connection, api: FakeApi, connect: Connect, server: Server, table: str, dbname: str
) -> None:
    """pg_cron begins each lane again every five minutes, also while a table waits for somebody."""
    db.execute(f"INSERT INTO {table} VALUES (1, 'one')")
    db.execute(f"ALTER TABLE {table} RENAME COLUMN body TO text; ALTER TABLE {table} DROP COLUMN text")
    db.execute(f"CREATE TABLE other_{dbname} (id int PRIMARY KEY, body text)")
    db.execute(f"SELECT autoembed.enable('other_{dbname}', 'embedding', content_columns => '{{body}}')")
    db.execute(f"INSERT INTO other_{dbname} VALUES (1, 'two')")
    api.behave(faults=[{"status": 401, "times": "forever"}])
    lane = connect()
    lane.execute("CALL autoembed.work(run_seconds => 1)")
    api.wait_for(requests=1)
    before = len(lines_with(server, dbname))

    for _ in range(3):
        lane.execute("CALL autoembed.work(run_seconds => 1)")

    assert lines_with(server, dbname)[before:] == []
