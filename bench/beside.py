"""What vectors beside the rows cost the application, and vectors in them, over a table without any."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

from bench import documents
from bench.systems.autoembed import Autoembed
from harness import Connection, Server
from waiting import wait_until

# The tables, where the vectors of each are, and how it is attached.
VECTORS = {"beside": ("beside_embeddings", ""), "in_rows": ("in_rows", "'embedding', ")}
TABLES = ["plain", *VECTORS]
UPDATED_ROWS = 1000
SINGLE_ROWS = 300
ROUNDS = 9


def measure(server: Server, db: Connection, system: Autoembed, fill_rows: int, rows: int) -> dict[str, float]:
    """fill_rows: those that are embedded without an index. rows: those that have an index while others are updated."""
    system.create(server, db)
    db.execute("ALTER TABLE documents DROP COLUMN embedding")
    for table in TABLES:
        db.execute(f"CREATE TABLE {table} (LIKE documents INCLUDING ALL)")
    for table, (_, column) in VECTORS.items():
        db.execute(f"SELECT autoembed.enable('{table}', {column}content_columns => '{{title,content}}')")
    documents.load(db, fill_rows)
    figures: dict[str, float] = {}
    with system.running(server, db):
        for table in VECTORS:
            # The first rows pay for connections and caches.
            _fill(db, table, rows)
            before = _size(db, table)
            figures[f"fill_{table}_rows_per_second"] = fill_rows / _fill(db, table, fill_rows)
            # The INSERT alone has made the rows as large once the vectors add nothing.
            figures[f"{table}_growth"] = _size(db, table) / (before + _size_of_insert(db, fill_rows)) - 1
        for table in TABLES:
            db.execute(f"TRUNCATE {table} RESTART IDENTITY")
            _fill(db, table, rows)
    for vectors_table, _ in VECTORS.values():
        db.execute(f"CREATE INDEX ON {vectors_table} USING hnsw (embedding halfvec_cosine_ops)")
    return {**figures, **_updates(db)}


def _fill(db: Connection, table: str, rows: int) -> float:
    """The seconds until so many more rows have their vectors."""
    vectors_table = VECTORS.get(table, ("", ""))[0]
    count = f"SELECT count(embedding) FROM {vectors_table}" if vectors_table else "SELECT 0"
    [(before,)] = db.execute(count)
    began = time.monotonic()
    documents.insert(db, rows, table=table)
    if vectors_table:
        wait_until(lambda: db.execute(count).fetchone() == (before + rows,), 60 + rows, pause_seconds=0.1)
    return time.monotonic() - began


def _size(db: Connection, table: str) -> int:
    [(size,)] = db.execute(f"SELECT pg_table_size('{table}')")
    return int(size)


def _size_of_insert(db: Connection, rows: int) -> int:
    before = _size(db, "plain")
    _fill(db, "plain", rows)
    return _size(db, "plain") - before


def _updates(db: Connection) -> dict[str, float]:
    """Each statement runs on all tables, one right after the other: the machine is as fast for each."""
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for number in range(1 + ROUNDS):
        for table in TABLES:
            db.execute(f"VACUUM {table}")
        tables = TABLES[number % len(TABLES) :] + TABLES[: number % len(TABLES)]
        for table in tables:
            began = time.perf_counter()
            db.execute(f"UPDATE {table} SET created_at = now() WHERE id <= {UPDATED_ROWS}")
            seconds["update", table].append(time.perf_counter() - began)
        single = dict.fromkeys(TABLES, 0.0)
        with db.transaction():
            for key in range(1, 1 + SINGLE_ROWS):
                for table in tables:
                    began = time.perf_counter()
                    db.execute(f"UPDATE {table} SET created_at = now() WHERE id = %s", [key], prepare=True)
                    single[table] += time.perf_counter() - began
        for table in TABLES:
            seconds["single", table].append(single[table])
    # The first round pays for caches.
    medians = {what: statistics.median(found[1:]) for what, found in seconds.items()}
    return {
        f"{what}_{table}_ratio": medians[what, table] / medians[what, "plain"]
        for what in ("update", "single")
        for table in VECTORS
    }
