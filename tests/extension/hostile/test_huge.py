"""Huge or slow keys, positions of scans, words and text indexes of a tenant hold up nobody else."""

from __future__ import annotations

import psycopg
import pytest

from extension.hostile.tenants import Tenant, stays_fresh, waiting_of
from harness import Connection
from lanes import Lane
from waiting import wait_until

# Keys that PostgreSQL compresses into its index, and that have a megabyte as JSON.
KEYS = {
    "control characters": "text PRIMARY KEY, content text); INSERT INTO notes SELECT repeat(chr(1), 200000) || n",
    "bytes": "bytea PRIMARY KEY, content text); INSERT INTO notes SELECT convert_to(repeat('x', 230000) || n, 'UTF8')",
}
ROWS = "FROM generate_series(1, 150) AS n"
ENABLE = "SELECT autoembed.enable('notes', content_columns => '{content}', text_config => 'english')"


@pytest.mark.parametrize("way", ["scan", "triggers"])
@pytest.mark.parametrize("key", KEYS)
def test_huge_keys_hold_up_nobody(db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, key: str, way: str) -> None:
    table, rows = f"CREATE TABLE notes (id {KEYS[key]}, 'a note' {ROWS}".split("; ")
    mallory.run(*([table, rows, ENABLE] if way == "scan" else [table, ENABLE, rows]))

    for _ in range(3):
        stays_fresh(bob)

    assert lane.error is None
    sizes = "SELECT max(octet_length(message::text)) AS size FROM pgmq.q_embedding_jobs"
    row = db.execute(sizes).fetchone()
    assert row is not None and (row.size or 0) < 3_000_000


def test_a_huge_position_of_a_scan_ends_that_scan(mallory: Tenant, bob: Tenant, db: Connection, lane: Lane) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
    mallory.run(
        "BEGIN",
        "INSERT INTO autoembed.backfill (pipeline_id) SELECT id FROM autoembed.pipeline",
        """UPDATE autoembed.backfill SET position = '["' || repeat('x', 300000000) || '"]'""",
        "COMMIT",
    )

    wait_until(lambda: db.execute("SELECT FROM autoembed.backfill").rowcount == 0, 30)

    stays_fresh(bob)
    assert lane.error is None
    row = db.execute("SELECT octet_length(message::text) AS size FROM autoembed.failure").fetchone()
    assert row is not None and row.size < 10_000


# Figures that the owner writes into the record of a scan, and that no sum or time can hold.
FIGURES = {
    "most rows": "rows_queued = 9223372036854775807",
    "fewest rows": "rows_queued = -9223372036854775808",
    "a row since long ago": "rows_queued = 1, started_at = '4713-01-02 BC'",
    "a row since ever": "rows_queued = 1, started_at = '-infinity'",
    "a row in the end": "rows_queued = -1, started_at = 'infinity'",
    "a long problem": "index_problem = repeat('x', 300000000), rows_queued = 9223372036854775807",
}


@pytest.mark.parametrize("figures", FIGURES)
def test_no_figures_of_a_scan_end_a_lane_or_hide_the_state_of_others(
    mallory: Tenant, bob: Tenant, db: Connection, lane: Lane, figures: str
) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
    mallory.run("INSERT INTO notes SELECT n, 'a note' FROM generate_series(1, 1000) AS n")
    wait_until(lambda: waiting_of(db, mallory) == 0)
    mallory.run(
        "SELECT autoembed.pause('notes'); SELECT autoembed.reembed('notes')",
        f"UPDATE autoembed.backfill SET {FIGURES[figures]}",
    )

    for reader in (db, mallory.session):
        shown = reader.execute("SELECT octet_length(s::text) AS size FROM autoembed.status AS s").fetchall()
        assert shown and max(row.size for row in shown) < 10_000
        assert reader.execute("SELECT FROM autoembed.doctor()").rowcount > 0

    mallory.run("SELECT autoembed.resume('notes')")
    wait_until(lambda: lane.error or db.execute("SELECT FROM autoembed.backfill").rowcount == 0, 30)
    stays_fresh(bob)
    assert lane.error is None


# PostgreSQL's parser goes over these again and again. Each is 30,000 characters.
SLOW_TEXTS = {"one word": "repeat('a_', 15000)", "comments": "repeat('<!-- ', 6000)", "tags": "repeat('<? ', 10000)"}


@pytest.mark.parametrize("text", SLOW_TEXTS)
def test_a_text_whose_words_take_long_holds_up_nobody(
    db: Connection, mallory: Tenant, bob: Tenant, lane: Lane, text: str
) -> None:
    mallory.run(
        "CREATE TABLE notes (id int PRIMARY KEY, content text)",
        ENABLE,
        f"INSERT INTO notes SELECT n, 'walrus ' || {SLOW_TEXTS[text]} FROM generate_series(1, 20) AS n",
    )

    for _ in range(3):
        stays_fresh(bob)

    wait_until(lambda: waiting_of(db, mallory) == 0, 60)
    assert lane.error is None
    found = "SELECT count(*) FROM autoembed.search('notes', 'walrus', max_rows => 30, mode => 'text')"
    assert mallory.session.execute(found).fetchone() == (20,)


def test_a_merge_of_text_indexes_is_small(db: Connection, mallory: Tenant) -> None:
    """One tenant's segments have a million postings. Those of others are merged, too, and not by lanes for changes."""
    segment = """INSERT INTO autoembed.text_segment (pipeline_id, document_count, posting_count, documents, lengths)
                 SELECT %s, 1, %s, '', '' FROM generate_series(1, 12)"""
    merge = "SELECT cardinality(segments) AS count, (SELECT sum(p) FROM unnest(postings) AS p) AS postings"
    db.execute(segment, [1, 90_000])
    row = db.execute(f"{merge} FROM autoembed._segments_to_merge(true, 200000)").fetchone()
    assert row == (2, 180_000)

    db.execute("UPDATE autoembed.text_segment SET posting_count = 150000")
    assert db.execute(f"{merge} FROM autoembed._segments_to_merge(true, 200000)").fetchone() == (None, None)
    db.execute(segment, [2, 10])
    assert db.execute(f"{merge} FROM autoembed._segments_to_merge(true, 200000)").fetchone() == (12, 120)
    db.execute(
        "INSERT INTO autoembed.lane (pid, backend_start, backfill)"
        " SELECT pid, backend_start, true FROM pg_stat_activity WHERE pid = pg_backend_pid()"
    )
    assert db.execute(f"{merge} FROM autoembed._segments_to_merge(false, 200000)").fetchone() == (None, None)


# Definitions that lanes would look at for seconds in each pass: what an owner writes, and by enable().
MANY = "(SELECT jsonb_object_agg(n, 'a column') FROM generate_series(1, 9999) AS n)"
OBJECTS = (
    '(SELECT jsonb_object_agg(\'x\' || n, \'{{"name": "=", "type": "operator"}}\'::jsonb)'
    " FROM generate_series(1, {}) AS n)"
)
LONG = {
    "template": "content_columns = NULL, content_template = repeat('{content}', 100000)",
    "prefix": "chunk_prefix = repeat('{content}', 100000)",
    "function that cuts": "chunking = 'function', chunk_function = repeat('x', 10000)",
    "text search configuration": "text_config = repeat('x', 10000)",
    "columns": "content_columns = array_fill('content'::name, ARRAY[20000])",
    "condition": "condition = repeat('id > 0 AND ', 100000) || 'true'",
    "columns of the condition": f"condition_columns = {MANY}",
    "objects of the condition": f"condition_objects = {MANY}",
    "number of objects of the condition": f"condition_objects = {OBJECTS.format(201)}",
}
LONG_ARGUMENTS = {
    "content_template": "repeat('{content}', 100000)",
    "chunk_prefix": "repeat('{content}', 100000)",
    "condition": "repeat('id > 0 AND ', 100000) || 'true'",
}


@pytest.mark.parametrize("part", LONG)
def test_a_definition_that_is_too_long_is_refused(mallory: Tenant, part: str) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)

    with pytest.raises(psycopg.errors.CheckViolation):
        mallory.run("UPDATE autoembed.pipeline SET " + LONG[part])


@pytest.mark.parametrize("objects", ["'5'", "'[]'", MANY, OBJECTS.format(201)])
def test_odd_objects_of_the_condition_of_a_backfill_are_refused(mallory: Tenant, objects: str) -> None:
    """One that a lane cannot read would end each lane, and the backfills of all tenants."""
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)

    with pytest.raises(psycopg.errors.IntegrityError):
        mallory.run(
            "INSERT INTO autoembed.backfill (pipeline_id, condition, condition_objects)"
            f" SELECT id, 'true', {objects} FROM autoembed.pipeline"
        )


def test_objects_of_a_condition_that_have_one_name_are_looked_up_once(db: Connection, mallory: Tenant) -> None:
    """A lane does so in each claim."""
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
    mallory.run(f"UPDATE autoembed.pipeline SET condition_objects = {OBJECTS.format(200)}")

    with db.transaction():
        db.execute("SET LOCAL track_functions = 'all'")
        db.execute("SELECT autoembed._condition_objects(p.table_id, p.condition_objects) FROM autoembed.pipeline AS p")
        calls = db.execute("SELECT calls FROM pg_stat_xact_user_functions WHERE funcname = '_objects_named'").fetchall()

    assert calls == [(1,)]


def test_a_condition_of_too_many_functions_is_an_error_that_says_so(mallory: Tenant) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
    for n in range(201):
        mallory.run(f"CREATE FUNCTION f{n}(id int) RETURNS boolean LANGUAGE sql AS 'SELECT true'")
    condition = " AND ".join(f"f{n}(id)" for n in range(201))

    with pytest.raises(psycopg.errors.ProgramLimitExceeded, match="uses 201 functions, .* may use 200"):
        mallory.run(f"SELECT autoembed.alter_pipeline('notes', condition => '{condition}')")


@pytest.mark.parametrize("argument", LONG_ARGUMENTS)
def test_an_argument_that_is_too_long_is_named(mallory: Tenant, argument: str) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
    own = "content_columns => NULL, " if argument == "content_template" else ""

    with pytest.raises(psycopg.errors.ProgramLimitExceeded, match=argument):
        mallory.run(f"SELECT autoembed.alter_pipeline('notes', {own}{argument} => {LONG_ARGUMENTS[argument]})")


def test_passages_beyond_those_of_a_search_are_not_reranked(db: Connection, mallory: Tenant) -> None:
    db.execute("SELECT autoembed.create_rerank_model('rerank', 'jina', 'a model', 'http://127.0.0.1:9')")

    with pytest.raises(psycopg.errors.ProgramLimitExceeded):
        mallory.run("SELECT autoembed._rerank('rerank', 'a question', array_fill('a word'::text, ARRAY[1000000]))")


# The records that lanes keep of so many rows of the last pipeline.
RECORDS = """
    INSERT INTO autoembed.embedded (pipeline_id, key, digest, truncated)
    SELECT p.id, '[' || n || ']', '', false FROM autoembed.pipeline AS p, generate_series(1, {rows}) AS n;
    INSERT INTO autoembed.text_document (pipeline_id, key, chunk_number)
    SELECT p.id, '[' || n || ']', 1 FROM autoembed.pipeline AS p, generate_series(1, {rows}) AS n
"""
LEFT = """SELECT (SELECT count(*) FROM autoembed.embedded WHERE key <> '[0]')
                 + (SELECT count(*) FROM autoembed.text_document WHERE key <> '[0]' AND is_live) AS left"""


def test_the_records_of_a_large_table_that_is_truncated_are_forgotten_in_parts(db: Connection, mallory: Tenant) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
    db.execute(RECORDS.format(rows=12_000))
    mallory.run("TRUNCATE notes; INSERT INTO notes VALUES (0, 'new')")

    left = [24_000]
    while left[-1]:
        db.execute("SELECT autoembed.process()")
        left += [row.left for row in db.execute(LEFT)]

    assert left == [24_000, 14_000, 4_000, 0]
    assert waiting_of(db, mallory) == 0
    # Another part forgets nothing of a row that is there.
    assert db.execute("SELECT key FROM autoembed.embedded").fetchall() == [("[0]",)]
    assert db.execute("SELECT key FROM autoembed.text_document WHERE is_live").fetchall() == [("[0]",)]


def test_the_records_of_a_large_table_that_is_dropped_are_forgotten_in_parts(db: Connection, mallory: Tenant) -> None:
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
    db.execute(RECORDS.format(rows=100_000))
    mallory.run("DROP TABLE notes")

    left = [200_000]
    while left[-1]:
        db.execute("SELECT autoembed._clean_up()")
        left += [row.left for row in db.execute(LEFT)]

    assert len(left) > 3
    while db.execute("SELECT FROM autoembed.pipeline").rowcount:
        db.execute("SELECT autoembed._clean_up()")
    assert db.execute("SELECT FROM autoembed.text_document").rowcount == 0
    mallory.run("CREATE TABLE notes (id int PRIMARY KEY, content text)", ENABLE)
