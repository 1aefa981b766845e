"""The first page of a search by meaning, which one function of the table finds and reads."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from harness import Connection

STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
KEYS = {
    "integer": ("id int PRIMARY KEY", "n"),
    "text": ("""id text COLLATE "C" PRIMARY KEY""", """'key "' || n || ''', {ä}'"""),
    "two columns": ("id int, part text, PRIMARY KEY (part, id)", "n / 2, (ARRAY['a', 'b'])[1 + n % 2]"),
    "uuid": ("id uuid PRIMARY KEY", "md5(n::text)::uuid"),
}
ROWS = 60


@pytest.fixture
def short(db: Connection) -> Connection:
    db.execute("SELECT autoembed.create_model('short', 'fake', 16), autoembed.set_default_model('short')")
    return db


def attach(db: Connection, column: str, key: str = "integer", more: str = "", rows: int = ROWS, alike: int = 3) -> None:
    """A table of texts, of which so many are alike."""
    columns, value = KEYS[key]
    db.execute(f'CREATE TABLE pages (gone int, {columns}, "the Body" text, number numeric)')
    db.execute("ALTER TABLE pages DROP COLUMN gone")
    db.execute(
        f"INSERT INTO pages SELECT {value}, (SELECT string_agg(concat_ws(' ', 'text', n / {alike}, m), '. ')"
        f" FROM generate_series(1, 1 + n / {alike} % 13) AS m), n / 7.0 FROM generate_series(1, {rows}) AS n"
    )
    db.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => ARRAY['the Body'] {more})")
    db.execute("SELECT autoembed.process()")


def index(db: Connection, column: str) -> None:
    """An index, and the size of a table where it is used."""
    table = "pages_embeddings" if column == "NULL" else "pages"
    db.execute(f"CREATE INDEX ON {table} USING hnsw (embedding halfvec_cosine_ops)")
    db.execute("UPDATE pg_class SET reltuples = 100000, relpages = 5000 WHERE relname IN ('pages', 'pages_embeddings')")


def found(db: Connection, more: str = "") -> list[Any]:
    query = f"SELECT * FROM autoembed.search(NULL::pages, 'text 7', mode => 'vector' {more})"
    return db.execute(query.encode()).fetchall()


def is_at_once(db: Connection, max_rows: int = 10) -> bool:
    page = (
        "SELECT vector FROM autoembed._search_page('pages', 'text 7', %s, 0, NULL, NULL, 'vector', 0.7, 0, false, NULL)"
    )
    return db.execute(page, [max_rows]).fetchall() != [(None,)]


@STORAGES
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("by_index", [False, True], ids=["comparison", "index"])
@pytest.mark.parametrize("chunking", ["none", "tokens"])
def test_it_is_the_page_of_a_search_in_steps(
    short: Connection, column: str, key: str, by_index: bool, chunking: str
) -> None:
    if chunking == "tokens" and column != "NULL":
        column, chunking = "'embedding'", "none"
    chunked = "" if chunking == "none" else ", chunking => 'tokens', chunk_size => 16"
    # An index has no order of rows that are as near.
    attach(short, column, key, chunked, alike=1 if by_index else 3)
    if by_index:
        index(short, column)
    assert is_at_once(short)
    assert not is_at_once(short, max_rows=20)

    in_steps = found(short, ", max_rows => 20")
    for max_rows, skip_rows in itertools.product((1, 3, 10), (0, 1, 7)):
        page = f", max_rows => {max_rows}, skip_rows => {skip_rows}"
        assert found(short, page) == in_steps[skip_rows : skip_rows + max_rows]
    # All pages of a list are in one order.
    pages = [found(short, f", max_rows => 5, skip_rows => {skip}") for skip in range(0, ROWS, 5)]
    assert [row.rank for row in itertools.chain(*pages)] == list(range(1, ROWS + 1))
    assert len({row.key for row in itertools.chain(*pages)}) == ROWS


@STORAGES
def test_all_rows_of_a_small_table_are_found_at_once(short: Connection, column: str) -> None:
    attach(short, column, rows=4)
    if column == "NULL":
        short.execute("UPDATE pages_embeddings SET embedding = array_fill(0, ARRAY[16])::real[]::halfvec WHERE id = 2")

    rows = found(short)

    assert rows == found(short, ", condition => 'true'")
    assert len(rows) == 4
    calls = "SELECT calls FROM autoembed.search_stats"
    assert short.execute(calls).fetchall() == [(2,)]


@STORAGES
def test_a_search_that_goes_on_in_steps_counts_once(short: Connection, column: str) -> None:
    attach(short, column, rows=4)

    assert found(short, ", skip_rows => 4") == []

    # It has asked for the vector twice, the second time in vain.
    counts = "SELECT calls, nothing_found, cache_hits FROM autoembed.search_stats"
    assert short.execute(counts).fetchall() == [(1, 1, 0)]


@STORAGES
def test_a_page_that_one_query_leaves_short_is_found_in_steps(short: Connection, column: str) -> None:
    attach(short, column, more=", chunking => 'none'" if column == "NULL" else "", alike=1)
    index(short, column)
    short.execute("SET session_replication_role = replica")
    if column == "NULL":
        # Only a lane will know that their embeddings belong to no row.
        nearest = "autoembed.search(NULL::pages, 'text 7', mode => 'vector', max_rows => 20, condition => 'true') AS s"
        short.execute(f"DELETE FROM pages WHERE id IN (SELECT (s.hit).id FROM {nearest})")
    else:
        short.execute("UPDATE pages SET embedding = NULL WHERE id > 12")
    short.execute("SET session_replication_role = origin")
    assert is_at_once(short)

    rows = found(short)

    assert rows == found(short, ", condition => 'true'")
    assert len(rows) == 10


def test_a_key_is_spelled_as_in_the_row(short: Connection) -> None:
    short.execute("CREATE TABLE pages (id numeric PRIMARY KEY, body text)")
    short.execute("INSERT INTO pages SELECT n, concat('text ', n) FROM generate_series(1, 20) AS n")
    short.execute("SELECT autoembed.enable('pages', content_columns => ARRAY['body'])")
    short.execute("SELECT autoembed.process()")
    # No trigger tells the embeddings that an equal number has other digits.
    short.execute("SET session_replication_role = replica")
    short.execute("UPDATE pages SET id = id::numeric(6, 2)")
    short.execute("SET session_replication_role = origin")
    assert is_at_once(short)

    rows = found(short)

    assert rows == found(short, ", condition => 'true'")
    assert all(row.key.endswith('.00"]') for row in rows)


@STORAGES
def test_types_of_a_schema_before_that_of_postgresql_are_not_taken(short: Connection, column: str) -> None:
    attach(short, column)
    rows = found(short)
    short.execute("CREATE SCHEMA other; CREATE DOMAIN other.text AS int; CREATE DOMAIN other.float8 AS int")
    short.execute("SET search_path = other, pg_catalog, public")

    assert found(short) == rows
    assert found(short, ", condition => 'true'") == rows


@STORAGES
@pytest.mark.parametrize(
    "change",
    [
        'ALTER TABLE pages RENAME COLUMN id TO "the ID"',
        'ALTER TABLE pages RENAME COLUMN "the Body" TO body',
        "ALTER TABLE pages ADD COLUMN more text DEFAULT 'more'",
        "ALTER TABLE pages DROP COLUMN number",
        "ALTER TABLE pages ALTER COLUMN number TYPE float8",
        'ALTER TABLE pages RENAME TO "Sheets %s {}"; ALTER TABLE "Sheets %s {}" RENAME TO pages',
        "CREATE SCHEMA elsewhere; ALTER TABLE pages SET SCHEMA elsewhere; SET search_path = public, elsewhere",
        "DROP SCHEMA IF EXISTS elsewhere; ALTER TABLE pages_embeddings RENAME TO vectors",
        "SELECT autoembed.alter_pipeline('pages', text_config => 'simple', condition => 'number > 2')",
    ],
)
def test_it_follows_a_change_of_the_table(short: Connection, column: str, change: str) -> None:
    attach(short, column)
    if column != "NULL":
        change = change.replace("ALTER TABLE pages_embeddings RENAME TO vectors", "VACUUM pages")
    assert len(found(short)) == 10

    for statement in change.split("; "):
        short.execute(statement.encode())

    assert is_at_once(short)
    rows = found(short)
    assert rows == found(short, ", condition => 'true'")
    assert len(rows) == 10


@STORAGES
def test_an_older_snapshot_outlasts_the_function(
    short: Connection, connect: Callable[..., Connection], column: str
) -> None:
    attach(short, column)
    other = connect()
    rows = found(other)
    other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    other.execute("SELECT FROM pg_class")
    short.execute("SELECT autoembed.disable('pages')")

    assert found(other) == rows
    assert found(other, ", condition => 'true'") == rows
    other.execute("COMMIT")


def test_a_search_that_is_about_to_call_the_function_finds_it(short: Connection) -> None:
    attach(short, "NULL")
    made = "SELECT oid FROM pg_proc WHERE proname ~ '^_nearest_rows_[0-9]+$'"
    before = short.execute(made).fetchall()
    body = "SELECT prosrc FROM pg_proc WHERE proname ~ '^_nearest_rows_[0-9]+$'"
    [(old,)] = short.execute(body).fetchall()

    short.execute("ALTER TABLE pages RENAME COLUMN number TO amount")

    assert short.execute(made).fetchall() == before
    assert short.execute(body).fetchall() != [(old,)]


@STORAGES
def test_a_table_that_it_suits_no_more_is_searched_in_steps(short: Connection, column: str) -> None:
    attach(short, column)
    before = found(short)
    assert is_at_once(short)

    short.execute("CREATE DOMAIN number AS int CHECK (VALUE > 0); ALTER TABLE pages ALTER COLUMN id TYPE number")

    assert not is_at_once(short)
    assert [row.key for row in found(short)] == [row.key for row in before]


def test_a_table_with_it_can_be_dropped(short: Connection) -> None:
    attach(short, "NULL")
    made = "SELECT count(*) FROM pg_proc WHERE proname ~ '^_nearest_rows_[0-9]+$'"
    assert short.execute(made).fetchone() == (1,)

    short.execute("DROP TABLE pages")
    short.execute("SELECT autoembed.process()")

    assert short.execute(made).fetchone() == (0,)


@pytest.mark.parametrize("way", ["policy", "column"])
def test_a_reader_without_all_rights_gets_what_a_search_in_steps_gives(
    short: Connection, role: Callable[[str], str], way: str
) -> None:
    attach(short, "NULL")
    reader = role("reader")
    short.execute(f"SELECT autoembed.grant_usage('{reader}'); GRANT SELECT ON pages TO {reader}")
    short.execute(f"SET ROLE {reader}")
    assert len(found(short)) == 10
    short.execute("RESET ROLE")
    if way == "policy":
        short.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
        short.execute(f"CREATE POLICY few ON pages TO {reader} USING (id < 4)")
    else:
        short.execute(f"REVOKE SELECT ON pages FROM {reader}; GRANT SELECT (id) ON pages TO {reader}")

    short.execute(f"SET ROLE {reader}")
    answers = []
    for more in ("", ", condition => 'true'"):
        try:
            answers.append([row.key for row in found(short, more)])
        except Exception as error:
            answers.append([type(error).__name__, str(error)])
    short.execute("RESET ROLE")

    assert answers[0] == answers[1]
    if way == "policy":
        assert sorted(answers[0]) == ["[1]", "[2]", "[3]"]
    else:
        assert answers[0][0] == "InsufficientPrivilege"
