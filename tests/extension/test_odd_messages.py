"""Messages that no trigger writes, beside a healthy table: they end on the failed list and stop no lane, no view."""

from __future__ import annotations

import pytest

from fake_api import FakeApi
from harness import Connection

HUGE = "9" * 5000
DEEP = "[" * 3000 + "]" * 3000
MANY = ", ".join(f"[{n}]" for n in range(100_000, 130_000))
# N is the pipeline of the table pages.
MESSAGES = [
    "null",
    "5",
    '"text"',
    "[]",
    "{}",
    DEEP,
    HUGE,
    "1e400",
    '{"id": ' + HUGE + "}",
    '{"id": 1e400}',
    '{"id": ' + DEEP + "}",
    '{"id": 1, "schema": 5, "table": [], "contentFunction": {}, "embeddingColumn": true}',
    '{"id": 1, "schema": "public", "table": "pages", "contentFunction": "body", "embeddingColumn": "\\u00e9\\u2028"}',
    '{"pipeline": 99999999999, "keys": [[1]]}',
    '{"pipeline": 99999999999, "truncated": true}',
    '{"pipeline": 99999999999, "recorded_after": ""}',
    '{"pipeline": 2147483648, "keys": [[1]]}',
    '{"pipeline": 2147483647, "keys": [[1]]}',
    '{"pipeline": -1, "keys": [[1]]}',
    '{"pipeline": 0, "keys": [[1]]}',
    '{"pipeline": true, "keys": [[1]]}',
    '{"pipeline": true, "truncated": true}',
    '{"pipeline": 1.5, "keys": [[1]]}',
    '{"pipeline": 1e400, "keys": [[1]]}',
    '{"pipeline": [1], "keys": [[1]]}',
    '{"pipeline": "N", "keys": [[1]]}',
    '{"pipeline": N}',
    '{"pipeline": N, "keys": "x"}',
    '{"pipeline": N, "keys": null}',
    '{"pipeline": N, "keys": []}',
    '{"pipeline": N, "keys": {"1": 1}}',
    '{"pipeline": N, "keys": [1, "x", null, {}]}',
    '{"pipeline": N, "keys": [[]]}',
    '{"pipeline": N, "keys": [[1, 2]]}',
    '{"pipeline": N, "keys": [["x"], ["\\u0001"]]}',
    '{"pipeline": N, "keys": [[true], [1.5], [1e400]]}',
    '{"pipeline": N, "keys": [[' + HUGE + "]]}",
    '{"pipeline": N, "keys": ' + DEEP + "}",
    '{"pipeline": N, "keys": [[99999999999]], "moved": true, "replaced": true}',
    '{"pipeline": N, "keys": [["x"]], "moved": true}',
    '{"pipeline": N, "keys": [["x"]], "replaced": true}',
    '{"pipeline": N, "keys": [[1]], "attempts": 99999999999}',
    '{"pipeline": N, "keys": [[1], [2], ["x"]], "attempts": 99999999999}',
    '{"pipeline": N, "keys": [[1]], "attempts": true}',
    '{"pipeline": N, "keys": [[1]], "attempts": -1}',
    '{"pipeline": N, "keys": [[1]], "suspect": "yes", "unknown": ' + DEEP + "}",
    '{"pipeline": N, "truncated": "yes"}',
    '{"pipeline": N, "recorded_after": "x"}',
    '{"pipeline": N, "recorded_after": 5}',
    '{"pipeline": N, "keys": [' + MANY + "]}",
    '{"pipeline": N, "keys": [["' + "x" * 1_000_000 + '"]]}',
    '{"backfill": 5}',
    '{"backfill": {"pipeline_id": 99999999999}}',
    '{"backfill": {"pipeline_id": N, "force": "maybe"}}',
]


@pytest.fixture
def pages(db: Connection, api: FakeApi) -> Connection:
    for table in ("pages", "healthy"):
        db.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text)".encode())
        db.execute("SELECT autoembed.enable(%s, 'embedding', content_columns => '{body}')", [table])
        db.execute(f"INSERT INTO {table} SELECT n, '{table} ' || n FROM generate_series(1, 5) AS n".encode())
    return db


def send(db: Connection, messages: list[str]) -> None:
    [(number,)] = db.execute("SELECT id FROM autoembed.pipeline WHERE table_id = 'pages'::regclass").fetchall()
    for message in messages:
        sent = message.replace('": N', f'": {number}').replace('"N"', f'"{number}"')
        db.execute("SELECT pgmq.send('embedding_jobs', %s::jsonb)", [sent])


def test_odd_messages_beside_a_healthy_table_all_end(pages: Connection) -> None:
    """If one of them ends its pass, it does so in each pass of each lane, and nothing is embedded."""
    send(pages, MESSAGES)

    for _ in range(30):
        # Rows with a wrong key are tried five times.
        pages.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
        pages.execute("CALL autoembed.work(1)")
        if pages.execute("SELECT count(*) FROM pgmq.q_embedding_jobs").fetchone() == (0,):
            break

    assert pages.execute("SELECT left(message::text, 100) FROM pgmq.q_embedding_jobs").fetchall() == []
    for table in ("pages", "healthy"):
        unembedded = f"SELECT count(*) FROM {table} WHERE embedding IS NULL"
        assert pages.execute(unembedded.encode()).fetchone() == (0,)
    reasons = pages.execute("SELECT DISTINCT reason FROM autoembed.failed ORDER BY 1").fetchall()
    assert not [reason for (reason,) in reasons if "lanes ended" in reason]
    # All of them are the administrator's to try again, and fail alike.
    failures = "SELECT count(*) FROM autoembed.failed WHERE error_class = 'message'"
    before = pages.execute(failures).fetchone()
    pages.execute("SELECT autoembed.retry_failed(error_class => 'message')")
    pages.execute("CALL autoembed.work(1)")
    assert pages.execute(failures).fetchone() == before


def test_odd_messages_of_a_paused_table_break_no_view_and_no_function(pages: Connection) -> None:
    pages.execute("CALL autoembed.work(1)")
    pages.execute("SELECT autoembed.pause('pages')")
    send(pages, [message for message in MESSAGES if '"pipeline": N' in message or '"pipeline": "N"' in message])

    for view in ("status", "progress", "failed", "_row_state", "_job"):
        pages.execute(f"SELECT v::text FROM autoembed.{view} AS v".encode()).fetchall()
    assert pages.execute("SELECT state FROM autoembed.preview('pages', '3')").fetchone() == ("fresh",)
    pages.execute("SELECT * FROM autoembed.doctor()").fetchall()
    pages.execute("SELECT * FROM autoembed.estimate('pages')").fetchall()
    pages.execute("SELECT autoembed.resync('pages')")
    pages.execute("ALTER TABLE pages ALTER body TYPE varchar")
    pages.execute("SELECT autoembed.resume('pages')")
    pages.execute("SELECT autoembed.disable('pages')")
