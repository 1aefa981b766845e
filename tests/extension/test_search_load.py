"""Many sessions search while rows change: each search is complete, and finds what was committed before it began."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable

from fake_api import FakeApi
from harness import Connection
from lanes import running_lanes
from waiting import wait_until

SESSIONS = 50
SEARCHES_OF_A_SESSION = 2
# More rows than are compared one by one.
ROWS = 6000
ROWS_OF_A_CHANGE = 50
CHANGES_PER_SECOND = 10

CHANGE = """
WITH updated AS (
    UPDATE pages SET body = %(body)s WHERE id IN (SELECT id FROM pages WHERE body LIKE 'old%%' LIMIT %(rows)s / 2)
    RETURNING id
)
INSERT INTO pages (body) SELECT %(body)s FROM generate_series(1, %(rows)s - (SELECT count(*) FROM updated))
"""
WAITING = "SELECT FROM autoembed._job AS j HAVING sum(j.rows) > 500"
FOUND = "SELECT rank, (s.hit).body FROM autoembed.search(NULL::pages, %s, {}) AS s ORDER BY rank"
BY_WORDS = FOUND.format(f"max_rows => {2 * ROWS_OF_A_CHANGE}, mode => 'text'").encode()
BY_BOTH = FOUND.format("mode => 'hybrid'").encode()


def test_fifty_sessions_find_all_that_is_committed_while_rows_change(
    db: Connection, api: FakeApi, connect: Callable[..., Connection]
) -> None:
    db.execute(
        "SELECT autoembed.create_model('short', 'openai', 16, model_id => 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [api.base_url],
    )
    db.execute("CREATE TABLE pages (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, body text NOT NULL)")
    db.execute("INSERT INTO pages (body) SELECT 'old page ' || n FROM generate_series(1, %s) AS n", [ROWS])
    db.execute(
        "SELECT autoembed.enable('pages', content_columns => '{body}', model => 'short', text_config => 'english')"
    )
    committed: list[int] = []
    wrong: list[str] = []
    is_over = threading.Event()
    writer, sessions = connect(), [connect() for _ in range(SESSIONS)]

    def change() -> None:
        for number in itertools.count(1):
            began = time.monotonic()
            # A search reads up to a thousand rows that wait. On a busy machine, lanes write fewer than change.
            while writer.execute(WAITING).rowcount and not is_over.wait(0.05):
                pass
            writer.execute(CHANGE, {"body": f"page change{number}", "rows": ROWS_OF_A_CHANGE})
            committed.append(number)
            if is_over.wait(max(0.0, began + 1 / CHANGES_PER_SECOND - time.monotonic())):
                return

    def search(session: Connection) -> None:
        try:
            for _ in range(SEARCHES_OF_A_SESSION):
                number = committed[-1]
                by_words = session.execute(BY_WORDS, [f"change{number}"]).fetchall()
                by_both = session.execute(BY_BOTH, [f"page change{number}"]).fetchall()
                if [body for _, body in by_words] != [f"page change{number}"] * ROWS_OF_A_CHANGE:
                    wrong.append(f"change {number}: {len(by_words)} rows by words")
                if [rank for rank, _ in by_both] != list(range(1, 11)):
                    wrong.append(f"change {number}: {len(by_both)} rows by both")
        except Exception as error:
            wrong.append(repr(error))

    with running_lanes(db, connect):
        assert db.execute("SELECT autoembed.wait_until_fresh('pages', 120)").fetchone() == (True,)
        db.execute("CREATE INDEX ON pages_embeddings USING hnsw (embedding halfvec_cosine_ops)")
        db.execute("ANALYZE")
        threads = [threading.Thread(target=change), *(threading.Thread(target=search, args=[one]) for one in sessions)]
        threads[0].start()
        wait_until(lambda: committed)
        for thread in threads[1:]:
            thread.start()
        for thread in threads[1:]:
            thread.join()
        is_over.set()
        threads[0].join()
    # The first lane may have come to the end of its time.
    with running_lanes(db, connect):
        assert db.execute("SELECT autoembed.wait_until_fresh('pages', 120)").fetchone() == (True,)

    assert wrong == []
    assert len(committed) > 1
    assert db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
