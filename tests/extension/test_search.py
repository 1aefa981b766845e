"""search(): the nearest rows, all of them, in the caller's rights, from one request."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, rows_read

STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
MODEL = "short"
DIMENSIONS = 32


@pytest.fixture
def short(db: Connection, api: FakeApi) -> Connection:
    """The default model gives short vectors, so that many of them are soon compared and indexed."""
    db.execute(
        "SELECT autoembed.create_model(%s, 'openai', %s, model_id => 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [MODEL, DIMENSIONS, api.base_url],
    )
    db.execute("SELECT autoembed.set_default_model(%s)", [MODEL])
    return db


def attach(db: Connection, column: str, texts: list[str]) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, tenant int NOT NULL DEFAULT 0)")
    db.cursor().executemany("INSERT INTO pages (id, body) VALUES (%s, %s)", list(enumerate(texts, 1)))
    db.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}')")
    db.execute("SELECT autoembed.process()")


def vector_of(text: str) -> Any:
    return embedding_of(text, DIMENSIONS)


def nearest(texts: list[str], query: str) -> list[int]:
    """The keys of texts, the nearest first."""
    return [int(n) + 1 for n in np.argsort([-np.dot(vector_of(text), vector_of(query)) for text in texts])]


@STORAGES
def test_the_nearest_rows_come_first_with_their_scores_from_one_request(
    short: Connection, api: FakeApi, column: str
) -> None:
    texts = [f"text {n}" for n in range(50)]
    attach(short, column, texts)
    before = len(api.log())

    found = short.execute(
        "SELECT s.rank, (s.hit).id, (s.hit).body, s.key, s.score FROM autoembed.search(NULL::pages, 'question') AS s"
    ).fetchall()

    assert [row.id for row in found] == nearest(texts, "question")[:10]
    assert [row.rank for row in found] == list(range(1, 11))
    assert [row.key for row in found] == [f"[{row.id}]" for row in found]
    for row in found:
        assert row.score == pytest.approx(float(np.dot(vector_of(row.body), vector_of("question"))), abs=2e-3)
    assert len(api.log()) == before + 1


def test_the_row_type_of_an_embeddings_table_is_refused(short: Connection) -> None:
    attach(short, "NULL", ["one"])

    for call in ("search", "search_rows"):
        with pytest.raises(psycopg.errors.DatatypeMismatch, match="holds embeddings of table public.pages") as refused:
            short.execute(f"SELECT * FROM autoembed.{call}(NULL::pages_embeddings, 'one')")
        assert "NULL::public.pages" in str(refused.value.diag.message_hint)
    assert short.execute("SELECT key FROM autoembed.search('pages_embeddings', 'one')").fetchall() == [("[1]",)]


@STORAGES
def test_pages_continue_each_other(short: Connection, column: str) -> None:
    texts = [f"text {n}" for n in range(25)]
    attach(short, column, texts)

    pages = [
        short.execute(
            "SELECT rank, key FROM autoembed.search('pages', 'question', max_rows => 10, skip_rows => %s)", [skip]
        ).fetchall()
        for skip in (0, 10, 20, 30)
    ]

    assert [row.rank for page in pages for row in page] == list(range(1, 26))
    assert [row.key for page in pages for row in page] == [f"[{n}]" for n in nearest(texts, "question")]


@STORAGES
@pytest.mark.parametrize("mode", ["vector", "hybrid", "text"])
def test_pages_continue_each_other_where_all_rows_are_as_near(short: Connection, column: str, mode: str) -> None:
    attach(short, column, ["the same text"] * 300)
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'english')")
    short.execute("SELECT autoembed.process()")
    search = "SELECT key FROM autoembed.search('pages', 'text', 40, skip_rows => %s, mode => %s)"

    keys = [row.key for skip in range(0, 320, 40) for row in short.execute(search, [skip, mode])]

    assert len(keys) == len(set(keys)) == 300


# Names of the tables in the queries of a search, too.
@pytest.mark.parametrize("name", ["pages", "t", "s", "e", "h", "body", "Odd %s {{id}}"])
@pytest.mark.parametrize("parts", ["", " PARTITION BY RANGE (id)"], ids=["one table", "partitions"])
@STORAGES
def test_a_condition_may_name_its_table(short: Connection, column: str, parts: str, name: str) -> None:
    table = '"' + name + '"'
    short.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, body text){parts}".encode())
    short.execute("CREATE TABLE read_by (page int)")
    if parts:
        short.execute(f"CREATE TABLE low PARTITION OF {table} FOR VALUES FROM (0) TO (100)".encode())
    short.execute(f"INSERT INTO {table} SELECT n, 'word' || n || ' word' FROM generate_series(1, 30) AS n".encode())
    short.execute("INSERT INTO read_by VALUES (7), (9)")
    short.execute(
        f"SELECT autoembed.enable('{table}', {column}, content_columns => '{{body}}', text_config => 'simple')".encode()
    )
    while short.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass
    conditions = {
        f"{table}.id IN (7, 9)": [7, 9],
        f"public.{table}.id = 7": [7],
        f"EXISTS (SELECT FROM read_by WHERE read_by.page = {table}.id)": [7, 9],
        f"{table}.tableoid > 0 AND id < 3": [1, 2],
    }
    for condition, keys in conditions.items():
        for mode in ("vector", "text", "hybrid"):
            found = short.execute(
                "SELECT key FROM autoembed.search(%s::regclass, 'word', condition => %s, mode => %s)",
                [table, condition, mode],
            )
            assert sorted(row.key for row in found) == [f"[{key}]" for key in keys], (condition, mode)
    short.execute("SELECT autoembed.create_match_function(%s, name => 'match')", [table])
    found = short.execute("""SELECT id FROM match(autoembed.embed('word'), filter => '{"id": 7}')""")
    assert [row.id for row in found] == [7]


@pytest.mark.parametrize("condition", ["", " \n"])
@pytest.mark.parametrize("mode", ["vector", "hybrid"])
def test_a_blank_condition_is_none(short: Connection, mode: str, condition: str) -> None:
    attach(short, "NULL", ["one", "two"])
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'english')")
    search = "SELECT key FROM autoembed.search('pages', 'one', condition => %s, mode => %s)"

    assert {row.key for row in short.execute(search, [condition, mode])} == {"[1]", "[2]"}


@STORAGES
@pytest.mark.parametrize(
    "index",
    [
        "hnsw (embedding halfvec_cosine_ops) WHERE {key} > 90",
        "hnsw (embedding halfvec_ip_ops)",
        "hnsw (embedding halfvec_l2_ops)",
        "ivfflat (embedding halfvec_cosine_ops) WITH (lists = 20)",
    ],
)
def test_an_index_that_finds_not_all_of_the_nearest_rows_serves_no_search(
    short: Connection, column: str, index: str
) -> None:
    attach(short, column, ["the same text"] * 50 + [f"text {n}" for n in range(50)])
    table = "pages_embeddings" if column == "NULL" else "pages"
    short.execute(f"CREATE INDEX odd ON {table} USING {index.format(key='id')}")
    # The number of rows from which a search uses an index.
    short.execute("UPDATE pg_class SET reltuples = 20000 WHERE relname IN ('pages', 'pages_embeddings')")
    search = "SELECT key FROM autoembed.search('pages', 'the same text', 10, skip_rows => %s)"

    pages = [[row.key for row in short.execute(search, [skip])] for skip in range(0, 100, 10)]

    assert len({key for page in pages for key in page}) == 100
    checks = short.execute("SELECT ok, finding, advice FROM autoembed.doctor() WHERE subject LIKE 'index of %'")
    [check] = checks.fetchall()
    assert not check.ok and "searches cannot use public.odd: they need HNSW" in check.finding
    assert "USING hnsw (embedding" in check.advice


def test_a_page_behind_all_rows_is_empty(short: Connection) -> None:
    attach(short, "NULL", ["a text"])
    search = "SELECT key FROM autoembed.search('pages', 'question', max_rows => %s, skip_rows => %s)"

    assert short.execute(search, [2147483647, 0]).fetchall() == [("[1]",)]
    assert short.execute(search, [2147483647, 2147483647]).fetchall() == []


@STORAGES
def test_a_condition_is_read_as_in_where(short: Connection, column: str) -> None:
    attach(short, column, [f"text {n}" for n in range(20)])
    search = "SELECT (s.hit).id FROM autoembed.search(NULL::pages, 'question', condition => %s) AS s ORDER BY 1"

    assert short.execute(search, ["id <= 3 -- the first"]).fetchall() == [(1,), (2,), (3,)]
    assert short.execute(search, ["id = 1 OR body = 'text 4'"]).fetchall() == [(1,), (5,)]
    assert short.execute(search, ["false"]).fetchall() == []


@STORAGES
@pytest.mark.parametrize("mode", ["vector", "hybrid", "text"])
@pytest.mark.parametrize(
    ("condition", "sqlstate", "problem"),
    [
        ("nosuch > 1", "42703", 'column "nosuch" does not exist'),
        ("id >", "42601", 'syntax error at or near ")"'),
        ("$1 IS NULL", "42P02", "there is no parameter $1"),
        ("id = 'x'", "22P02", 'invalid input syntax for type integer: "x"'),
    ],
)
def test_a_mistake_in_a_condition_is_one_sentence(
    short: Connection, column: str, mode: str, condition: str, sqlstate: str, problem: str
) -> None:
    attach(short, column, [])
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple')")

    with pytest.raises(psycopg.Error) as refusal:
        short.execute(
            "SELECT * FROM autoembed.search(NULL::pages, 'question', condition => %s, mode => %s)", [condition, mode]
        )

    assert refusal.value.sqlstate == sqlstate
    assert refusal.value.diag.message_primary == f"the condition of the search cannot be used: {problem}"
    assert refusal.value.diag.message_hint == "It is what would stand behind WHERE, with columns of table pages."
    assert "SELECT FROM" not in str(refusal.value.diag.context)


@pytest.mark.parametrize(
    ("call", "sqlstate", "message"),
    [
        (
            "search_rows('pages'::text, 'words')",
            "42804",
            "search_rows() needs a row of a table, not a value of type text",
        ),
        (
            "search_rows('pg_class'::regclass, 'words')",
            "42804",
            "search_rows() needs a row of a table, not a value of type regclass",
        ),
        *(
            (
                f"search_rows({value}, 'words')",
                "42804",
                f"search_rows() needs a row of a table, not a value of type {type}",
            )
            for value, type in [("1", "integer"), ("NULL::jsonb", "jsonb"), ("NULL::pg_class[]", "pg_class[]")]
        ),
        ("search(NULL::regclass, 'words')", "22004", "table_name must not be NULL"),
        ("search(NULL, 'words')", "22004", "table_name must not be NULL"),
        ("embed_query(NULL, 'words')", "22004", "table_name must not be NULL"),
    ],
)
def test_what_is_no_table_is_told(short: Connection, call: str, sqlstate: str, message: str) -> None:
    with pytest.raises(psycopg.Error) as refusal:
        short.execute(f"SELECT * FROM autoembed.{call}".encode())
    assert refusal.value.sqlstate == sqlstate
    assert refusal.value.diag.message_primary == message


@STORAGES
def test_an_error_while_the_condition_is_evaluated_is_postgresqls_own(short: Connection, column: str) -> None:
    attach(short, column, ["text"])
    with pytest.raises(psycopg.errors.DivisionByZero) as refusal:
        short.execute("SELECT * FROM autoembed.search(NULL::pages, 'question', condition => '1 / (id - 1) = 1')")
    assert refusal.value.diag.message_primary == "division by zero"


@STORAGES
def test_a_search_can_stand_wherever_a_table_can(short: Connection, column: str) -> None:
    texts = [f"text {n}" for n in range(20)]
    attach(short, column, texts)
    expected = [(n,) for n in nearest(texts, "question")[:3]]
    call = "autoembed.search_rows(NULL::pages, 'question', max_rows => 3)"

    assert short.execute(f"SELECT id FROM {call}").fetchall() == expected
    assert short.execute(f"WITH s AS (SELECT * FROM {call}) SELECT id FROM s").fetchall() == expected
    joined = f"SELECT p.id FROM {call} AS s JOIN pages AS p USING (id) ORDER BY p.id"
    assert short.execute(joined).fetchall() == sorted(expected)
    short.execute(f"CREATE VIEW found AS SELECT id FROM {call}")
    assert short.execute("TABLE found").fetchall() == expected
    short.execute("PREPARE found (text) AS SELECT id FROM autoembed.search_rows(NULL::pages, $1, 3)")
    for _ in range(7):
        assert short.execute("EXECUTE found ('question')").fetchall() == expected
    short.execute(
        "CREATE FUNCTION find(words text) RETURNS SETOF pages LANGUAGE sql STABLE AS"
        " $$ SELECT * FROM autoembed.search_rows(NULL::pages, words, 3) $$"
    )
    assert short.execute("SELECT id FROM find('question')").fetchall() == expected


@STORAGES
def test_own_sql_has_the_vector_of_the_tables_model(short: Connection, api: FakeApi, column: str) -> None:
    """Another model is the default by now."""
    texts = [f"text {n}" for n in range(20)]
    short.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    short.cursor().executemany("INSERT INTO pages VALUES (%s, %s)", list(enumerate(texts, 1)))
    short.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}', model => '{MODEL}')")
    short.execute("SELECT autoembed.process()")
    short.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    before = len(api.log())

    found = short.execute(
        f"SELECT id FROM {'pages_embeddings' if column == 'NULL' else 'pages'}"
        " ORDER BY embedding <=> (SELECT autoembed.embed_query('pages', 'question')) LIMIT 5"
    ).fetchall()

    assert [row.id for row in found] == nearest(texts, "question")[:5]
    assert len(api.log()) == before + 1


def test_the_passage_is_shown_as_long_as_the_text_is_the_same(short: Connection) -> None:
    attach(short, "NULL", ["one", "two"])
    passages = (
        "SELECT (s.hit).id, s.chunk, s.chunk_start, s.chunk_end FROM autoembed.search(NULL::pages, 'x') AS s ORDER BY 1"
    )
    assert short.execute(passages).fetchall() == [(1, "one", 0, 3), (2, "two", 0, 3)]

    short.execute("UPDATE pages SET body = 'other' WHERE id = 1")

    assert short.execute(passages).fetchall() == [(1, None, 0, 3), (2, "two", 0, 3)]


# Conditions and policies that leave most rows, a few thousand, a few, one, and those that are far from the question.
FILTERS = [
    (None, None),
    ("tenant < 800", None),
    ("tenant < 500", None),
    ("tenant = 7", None),
    ("tenant = 7 AND id < 2000", None),
    ("id = 1", None),
    ("tenant = -1", None),
    (None, "tenant = 7"),
    ("id < 7000", "tenant < 900"),
]


@STORAGES
def test_an_index_leaves_out_no_row_that_matches(short: Connection, role: Callable[[str], str], column: str) -> None:
    application = role("application")
    short.execute(f"SELECT autoembed.grant_usage('{application}')")
    attach(short, column, [])
    short.execute(f"GRANT SELECT ON pages TO {application}")
    random = np.random.default_rng(7)
    vectors = random.normal(size=(8000, DIMENSIONS)).astype(np.float32)
    tenants = random.integers(0, 1000, len(vectors))
    question = np.asarray(vector_of("question"), np.float32)
    vectors[tenants == 7] -= 20 * question
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    short.execute(f"CREATE TABLE given (id int PRIMARY KEY, tenant int, embedding halfvec({DIMENSIONS}))")
    with short.cursor().copy("COPY given FROM STDIN") as copy:
        for number, (tenant, vector) in enumerate(zip(tenants, vectors, strict=True), 1):
            copy.write_row((number, int(tenant), str(vector.tolist())))
    short.execute("ALTER TABLE pages DISABLE TRIGGER USER")
    if column == "NULL":
        table = "pages_embeddings"
        short.execute("INSERT INTO pages SELECT id, 'text', tenant FROM given")
        short.execute("INSERT INTO pages_embeddings SELECT id, 1, 0, 4, '', embedding FROM given")
    else:
        table = "pages"
        short.execute("INSERT INTO pages SELECT id, 'text', tenant, embedding FROM given")
    short.execute("SET max_parallel_maintenance_workers = 0")
    short.execute(f"CREATE INDEX ON {table} USING hnsw (embedding halfvec_cosine_ops)")
    short.execute("ANALYZE")
    short.execute("SELECT autoembed.create_match_function('pages')")
    similarities = vectors @ question

    for condition, policy in FILTERS:
        short.execute("DROP POLICY IF EXISTS own ON pages; ALTER TABLE pages DISABLE ROW LEVEL SECURITY")
        if policy is not None:
            short.execute(f"CREATE POLICY own ON pages USING ({policy}); ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
        matching = [
            row.id for row in short.execute(f"SELECT id FROM pages WHERE ({condition or True}) AND ({policy or True})")
        ]
        expected = sorted(matching, key=lambda key: -similarities[key - 1])[:10]
        short.execute(f"SET ROLE {application}")
        found = short.execute(
            "SELECT (s.hit).id, s.score FROM autoembed.search(NULL::pages, 'question', condition => %s) AS s",
            [condition],
        ).fetchall()
        allowed = [row.id for row in short.execute("SELECT id FROM pages")]
        of_tenant = [key for key in allowed if tenants[key - 1] == 7]
        matches = {
            fields: short.execute(
                "SELECT id, similarity FROM match_pages(%s::vector, filter => %s)", [str(question.tolist()), fields]
            ).fetchall()
            for fields in ("{}", '{"tenant": 7}')
        }
        short.execute("RESET ROLE")

        for fields, keys in (("{}", allowed), ('{"tenant": 7}', of_tenant)):
            wanted = sorted(keys, key=lambda key: -similarities[key - 1])[:10]
            assert len(matches[fields]) == len(wanted), (fields, policy)
            assert [row.similarity for row in matches[fields]] == sorted(
                (row.similarity for row in matches[fields]), reverse=True
            )
            assert len({row.id for row in matches[fields]} & set(wanted)) >= 0.9 * len(wanted), (fields, policy)
        assert len(found) == len(expected), (condition, policy)
        assert [row.score for row in found] == sorted((row.score for row in found), reverse=True)
        assert len({row.id for row in found} & set(expected)) >= 0.9 * len(expected), (condition, policy)


KEYS = {
    "integer": ("id int PRIMARY KEY", "n"),
    "text": ("id text PRIMARY KEY", "'key ' || n"),
    "uuid": ("id uuid PRIMARY KEY", "md5(n::text)::uuid"),
    "domain": ("id posint PRIMARY KEY", "n"),
    "two columns": ("part text, id bigint, PRIMARY KEY (part, id)", "'a', n"),
}


@STORAGES
def test_a_rare_word_and_a_condition_without_an_index_do_not_read_the_table(short: Connection, column: str) -> None:
    short.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, filler text DEFAULT repeat('x', 1000))")
    short.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}', text_config => 'simple')")
    rows, rare = 4000, 50
    short.execute(
        f"INSERT INTO pages SELECT n, CASE WHEN n <= {rare} THEN 'rare ' ELSE '' END || 'common ' || n % 50"
        f" FROM generate_series(1, {rows}) AS n"
    )
    while short.execute("SELECT FROM pgmq.q_embedding_jobs").fetchall():
        short.execute("SELECT autoembed.process()")
    short.execute("ANALYZE")
    search = "SELECT * FROM autoembed.search('pages', 'rare', mode => 'text', condition => 'length(filler) = 7')"

    # The planner takes 20 rows for those that match.
    assert rows_read(short, search, "pages")["pages"] <= 3 * rare


@STORAGES
def test_rows_of_tables_that_inherit_are_not_found(short: Connection, column: str) -> None:
    """They are not embedded, and their keys may be those of rows of the table."""
    attach(short, column, ["an apple", "a pear"])
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple'); SELECT autoembed.process()")
    short.execute("SELECT autoembed.create_match_function('pages')")
    short.execute("CREATE TABLE drafts () INHERITS (pages); INSERT INTO drafts VALUES (1, 'an apple draft')")

    expected = [(1, "an apple"), (2, "a pear")]
    for search, condition in {"vector": "NULL", "hybrid": "'id < 9'"}.items():
        found = f"autoembed.search(NULL::pages, 'apple', mode => '{search}', condition => {condition}) AS s"
        rows = short.execute(f"SELECT (s.hit).id, (s.hit).body FROM {found}".encode()).fetchall()
        assert sorted(rows) == expected, search
    matched = short.execute("SELECT id, body FROM match_pages(%s::vector)", [str(vector_of("apple").tolist())])
    assert sorted(matched.fetchall()) == expected


@STORAGES
def test_rows_of_many_partitions_are_looked_up_one_by_one(short: Connection, column: str) -> None:
    """PostgreSQL takes a look-up by key for one in each partition."""
    # PostgreSQL rightly reads a partition of a few pages as a whole.
    short.execute(
        "CREATE TABLE pages (id int, part int, body text, filler text DEFAULT repeat('x', 400), PRIMARY KEY (id, part))"
        " PARTITION BY LIST (part)"
    )
    parts, rows, few = 30, 6000, 400
    for part in range(parts):
        short.execute(f"CREATE TABLE pages_{part} PARTITION OF pages FOR VALUES IN ({part})")
    short.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}', text_config => 'simple')")
    short.execute(
        f"INSERT INTO pages SELECT n, n % {parts}, CASE WHEN n % 600 = 7 THEN 'rare ' ELSE 'common ' END || n % 50"
        f" FROM generate_series(1, {rows}) AS n"
    )
    while short.execute("SELECT FROM pgmq.q_embedding_jobs").fetchall():
        short.execute("SELECT autoembed.process()")
    vectors = "pages_embeddings" if column == "NULL" else "pages"
    short.execute(f"CREATE INDEX ON {vectors} USING hnsw (embedding halfvec_cosine_ops)")
    short.execute("ANALYZE; SELECT autoembed.create_match_function('pages')")
    partitions = [f"pages_{part}" for part in range(parts)]
    vector = vector_of("common 1").tolist()

    searches = {
        "text": "autoembed.search('pages', 'rare', mode => 'text')",
        "condition": "autoembed.search('pages', 'rare', mode => 'text', condition => 'id > 0')",
        "vector": "autoembed.search(NULL::pages, 'rare', mode => 'vector')",
        "hybrid": "autoembed.search('pages', 'rare 7')",
        "match": f"match_pages('{vector}')",
    }
    counts = {
        form: rows_read(short, f"SELECT * FROM {search}", vectors, *partitions) for form, search in searches.items()
    }

    assert all(sum(read[part] for part in partitions) < few for read in counts.values()), counts
    # Hybrid search looks up so many that the small table of embeddings is rightly read as a whole.
    assert counts["vector"][vectors] < few > counts["match"][vectors], counts


@STORAGES
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("reads_by_policy", [False, True], ids=["all rows", "some rows"])
def test_a_reader_finds_rows_by_their_keys_and_not_by_reading_all(
    short: Connection, role: Callable[[str], str], column: str, key: str, reads_by_policy: bool
) -> None:
    """A policy counts before a comparison that might tell what it hides. No index serves such a comparison."""
    rows, few = 400, 60
    columns, value = KEYS[key]
    short.execute("CREATE DOMAIN posint AS int CHECK (VALUE > 0)")
    short.execute(f"CREATE TABLE pages ({columns}, body text, tenant int NOT NULL DEFAULT 0)")
    short.execute(
        f"INSERT INTO pages SELECT {value}, CASE WHEN n % 100 = 7 THEN 'rare ' ELSE 'common ' END || n"
        f" FROM generate_series(1, {rows}) AS n"
    )
    short.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}', text_config => 'simple')")
    short.execute("SELECT autoembed.process()")
    short.execute("UPDATE pages SET body = body || ' again' WHERE body IN ('rare 107', 'common 108')")
    reader = role("reader")
    short.execute(f"SELECT autoembed.grant_usage('{reader}'); GRANT SELECT ON pages TO {reader}")
    if reads_by_policy:
        short.execute(
            f"ALTER TABLE pages ENABLE ROW LEVEL SECURITY; CREATE POLICY own ON pages TO {reader}"
            " USING (tenant = coalesce(nullif(current_setting('app.tenant', true), ''), '0')::int)"
        )
    # Else the planner rightly reads a small table as a whole.
    short.execute("ANALYZE; SET enable_seqscan = off")
    tables = ["pages", "pages_embeddings"] if column == "NULL" else ["pages"]

    short.execute(f"SET ROLE {reader}")
    counts = {
        form: rows_read(short, f"SELECT * FROM autoembed.search(NULL::pages, 'rare', {arguments})", *tables)
        for form, arguments in {
            "text": "mode => 'text'",
            "condition": "mode => 'text', condition => 'tenant = 0'",
            "vector": "mode => 'vector', condition => 'true'",
            "hybrid": "mode => 'hybrid'",
        }.items()
    }
    short.execute("RESET ROLE")

    for table in tables:
        assert counts["text"][table] < few, counts
        assert counts["condition"][table] < few, counts
        # Both compare the query to all rows. Hybrid search looks up its candidates in the text index, not here.
        assert counts["hybrid"][table] < counts["vector"][table] + few, counts


def test_who_may_not_read_a_row_finds_neither_it_nor_its_embedding(
    short: Connection, role: Callable[[str], str]
) -> None:
    attach(short, "NULL", ["one", "two", "three"])
    stranger = role("stranger")
    short.execute(f"SELECT autoembed.grant_usage('{stranger}')")
    both = (
        "SELECT id FROM pages_embeddings ORDER BY id",
        "SELECT key FROM autoembed.search('pages', 'x') ORDER BY key",
    )

    def seen() -> list[Any]:
        found: list[Any] = []
        for query in both:
            short.execute(f"SET ROLE {stranger}")
            try:
                found.append([row[0] for row in short.execute(query.encode()).fetchall()])
            except psycopg.errors.InsufficientPrivilege:
                found.append("denied")
            short.execute("RESET ROLE")
        return found

    assert seen() == ["denied", "denied"]
    # The text is made of the column body.
    short.execute(f"GRANT SELECT (id) ON pages TO {stranger}")
    assert seen() == ["denied", "denied"]
    short.execute(f"GRANT SELECT ON pages TO {stranger}")
    assert seen() == [[1, 2, 3], ["[1]", "[2]", "[3]"]]
    short.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    assert seen() == [[], []]
    short.execute(f"CREATE POLICY two ON pages TO {stranger} USING (id = 2)")
    assert seen() == [[2], ["[2]"]]


def test_hybrid_search_compares_all_rows_once_where_no_more_match(short: Connection) -> None:
    attach(short, "'embedding'", [f"text {n}" for n in range(30)])
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple')")
    short.execute("SELECT autoembed.process()")
    search = "SELECT * FROM autoembed.search(NULL::pages, 'text', 40, mode => '{}', condition => 'id % 3 = 0')"

    read = {mode: rows_read(short, search.format(mode), "pages")["pages"] for mode in ("vector", "text", "hybrid")}

    # Each of the others reads the rows of the page once, too.
    assert read["hybrid"] < read["vector"] + read["text"], read
    assert len(short.execute(search.format("hybrid").encode()).fetchall()) == 10


def test_a_reader_of_all_rows_is_not_asked_for_each_of_them(short: Connection, role: Callable[[str], str]) -> None:
    attach(short, "NULL", ["one", "two", "three"])
    reader = role("reader")
    [(function,)] = short.execute("SELECT oid FROM pg_proc WHERE proname LIKE '\\_may\\_read\\__'")
    short.execute("SET track_functions = 'all'")

    def seen() -> tuple[int, int]:
        """How many embeddings the reader sees, and for how many rows that is asked."""
        with short.transaction(force_rollback=True):
            short.execute(f"SET LOCAL ROLE {reader}")
            calls = "SELECT coalesce(pg_stat_get_xact_function_calls(%s), 0)"
            [(before,)] = short.execute(calls, [function])
            [(count,)] = short.execute("SELECT count(*) FROM pages_embeddings")
            [(after,)] = short.execute(calls, [function])
        return count, after - before

    short.execute(f"GRANT SELECT ON pages TO {reader}")
    assert seen() == (3, 0)
    short.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    assert seen() == (0, 3)
    short.execute(f"CREATE POLICY two ON pages TO {reader} USING (id = 2)")
    assert seen() == (1, 3)
    short.execute(f"ALTER ROLE {reader} BYPASSRLS")
    assert seen() == (3, 0)
    # The text is made of the column body.
    short.execute(f"ALTER ROLE {reader} NOBYPASSRLS; ALTER TABLE pages DISABLE ROW LEVEL SECURITY")
    short.execute(f"REVOKE SELECT ON pages FROM {reader}; GRANT SELECT (id, body) ON pages TO {reader}")
    assert seen() == (3, 3)
    short.execute("ALTER TABLE pages RENAME TO sheets; ALTER TABLE sheets ADD COLUMN more text")
    assert seen() == (3, 3)
    short.execute(f"GRANT SELECT ON sheets TO {reader}")
    assert seen() == (3, 0)


@pytest.mark.parametrize(
    ("key_type", "key", "columns"),
    [
        ("numeric", "n", "id"),
        ("numeric", "n", "id, tenant"),
        ("label", "n::text::label", "tenant, id"),
        ("int[]", "ARRAY[n]", "id"),
        ("numrange", "numrange(n, n + 1)", "id"),
        ("citext", "n::text", "id"),
    ],
)
def test_a_reader_whose_rows_are_hidden_reads_a_table_a_few_times_whatever_type_its_key_has(
    short: Connection,
    role: Callable[[str], str],
    connect: Callable[..., Connection],
    key_type: str,
    key: str,
    columns: str,
) -> None:
    reader, rows = role("reader"), 200
    short.execute("CREATE EXTENSION IF NOT EXISTS citext")
    short.execute(f"CREATE TYPE label AS ENUM ({', '.join(repr(str(n)) for n in range(1, rows + 1))})")
    short.execute(
        f"CREATE TABLE pages (id {key_type}, tenant int, n int, shown bool, body text, PRIMARY KEY ({columns}))"
    )
    short.execute(f"INSERT INTO pages SELECT {key}, 1, n, n % 2 = 0, 'text ' || n FROM generate_series(1, {rows}) AS n")
    short.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    short.execute("SELECT autoembed.process()")
    short.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY; CREATE POLICY shown ON pages USING (shown)")
    short.execute(f"GRANT SELECT ON pages TO {reader}; SELECT autoembed.grant_usage('{reader}')")
    short.execute("ANALYZE pages, pages_embeddings")
    texts = [f"text {n}" for n in range(1, rows + 1)]
    session = connect(user=reader)

    def found() -> list[int]:
        search = "SELECT (s.hit).n FROM autoembed.search(NULL::pages, 'question') AS s"
        return [row[0] for row in session.execute(search)]

    assert found() == [n for n in nearest(texts, "question") if n % 2 == 0][:10]
    assert session.execute("SELECT count(*) FROM pages_embeddings").fetchone() == (rows / 2,)
    read = rows_read(session, "SELECT FROM autoembed.search(NULL::pages, 'question')", "pages", "pages_embeddings")
    assert max(read.values()) < 20 * rows


def test_the_embeddings_stay_hidden_when_the_key_gets_another_type(
    short: Connection, role: Callable[[str], str], connect: Callable[..., Connection]
) -> None:
    attach(short, "NULL", ["one", "two", "three"])
    reader = role("reader")
    short.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY; CREATE POLICY two ON pages USING (body = 'two')")
    short.execute(f"GRANT SELECT ON pages TO {reader}; SELECT autoembed.grant_usage('{reader}')")
    session = connect(user=reader)

    for key_type in ("numeric", "bigint", "numeric(9, 2)", "numeric", "int", "text"):
        short.execute(f"ALTER TABLE pages ALTER id TYPE {key_type} USING id::{key_type}")
        short.execute("SELECT autoembed.process()")

        assert session.execute("SELECT id::numeric::int FROM pages_embeddings").fetchall() == [(2,)]
        [(body,)] = session.execute("SELECT (s.hit).body FROM autoembed.search(NULL::pages, 'question') AS s")
        assert body == "two"


@pytest.mark.parametrize(
    "key_type",
    [
        *("int", "varchar(20)", "char(3)", "numeric(9, 2)", "timestamptz(3)", "varchar(5)[]", "citext"),
        *("label", "word", "pair", "checked_pair"),
    ],
)
def test_what_uses_the_embeddings_stays_when_functions_are_made_again(short: Connection, key_type: str) -> None:
    short.execute("CREATE TYPE label AS ENUM ('a'); CREATE DOMAIN word AS varchar(20); CREATE EXTENSION citext")
    short.execute("CREATE TYPE pair AS (a int, b text); CREATE DOMAIN checked_pair AS pair CHECK ((VALUE).a > 0)")
    short.execute(f"CREATE TABLE pages (id {key_type} PRIMARY KEY, body text)")
    short.execute("SELECT autoembed.enable('pages', content_columns => '{body}')")
    short.execute("CREATE VIEW mine AS SELECT chunk FROM pages_chunks")
    policy = "SELECT oid FROM pg_policy WHERE polname = 'autoembed_readers'"
    before = short.execute(policy).fetchall()

    short.execute("ALTER TABLE pages RENAME body TO words")

    assert short.execute(policy).fetchall() == before
    assert short.execute("SELECT chunk FROM mine").fetchall() == []


def change_of_names(db: Connection, column: str) -> None:
    db.execute("ALTER TABLE pages RENAME COLUMN id TO number")
    db.execute("ALTER TABLE pages RENAME COLUMN body TO words")
    db.execute("ALTER TABLE pages RENAME TO sheets")
    if column == "NULL":
        db.execute("ALTER TABLE pages_embeddings RENAME TO vectors")
    db.execute("CREATE SCHEMA moved")
    db.execute("ALTER TABLE sheets SET SCHEMA moved")
    db.execute("ALTER SCHEMA moved RENAME TO gone")
    db.execute("ALTER TABLE gone.sheets SET SCHEMA public")
    db.execute("ALTER TABLE sheets RENAME TO pages")
    db.execute("ALTER TABLE pages RENAME COLUMN number TO id")
    db.execute("ALTER TABLE pages RENAME COLUMN words TO body")


def other_types(db: Connection, column: str) -> None:
    db.execute("ALTER TABLE pages ALTER COLUMN body TYPE varchar")
    if column != "NULL":
        db.execute("ALTER TABLE pages ALTER COLUMN id TYPE bigint")
        db.execute("UPDATE pages SET id = 5000000000 WHERE id = 8")
        db.execute("SELECT autoembed.process()")
        db.execute("UPDATE pages SET id = 8 WHERE id = 5000000000")


def another_index(db: Connection, column: str) -> None:
    table = "pages_embeddings" if column == "NULL" else "pages"
    db.execute(f"CREATE INDEX near ON {table} USING hnsw (embedding halfvec_cosine_ops)")


CHANGES = [change_of_names, other_types, another_index]


@STORAGES
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("isolation", ["read committed", "repeatable read"])
def test_what_a_session_knows_of_a_table_does_not_outlive_a_change(
    short: Connection, connect: Callable[..., Connection], column: str, change: Callable[..., None], isolation: str
) -> None:
    texts = [f"text {n}" for n in range(20)]
    attach(short, column, texts)
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple')")
    short.execute("SELECT autoembed.process()")
    other = connect()
    other.execute(f"SET default_transaction_isolation = '{isolation}'")
    forms = [
        f"SELECT (s.hit).id FROM autoembed.search(NULL::pages, 'text 7', mode => '{mode}', max_rows => {rows}) AS s"
        for mode, rows in (("vector", 10), ("vector", 20), ("text", 20), ("hybrid", 20))
    ]
    before = [other.execute(form.encode()).fetchall() for form in forms]
    assert [len(found) for found in before] == [10, 20, 20, 20]

    change(short, column)

    for _ in range(2):
        assert [sorted(other.execute(form.encode()).fetchall()) for form in forms] == [sorted(one) for one in before]


def test_a_session_that_has_searched_shows_each_column_after_a_change_of_columns(
    short: Connection, connect: Callable[..., Connection]
) -> None:
    short.execute("CREATE TABLE notes (id integer PRIMARY KEY, old text, a text, body text)")
    short.execute("INSERT INTO notes VALUES (1, 'o', 'a', 'one'), (2, 'o', 'a', 'two')")
    short.execute("SELECT autoembed.enable('notes', content_columns => '{body}'), autoembed.process()")
    other = connect()
    other.prepare_threshold = None
    search = "SELECT * FROM autoembed.search_rows(NULL::notes, 'two')"

    for change in (
        "ALTER TABLE notes DROP COLUMN old",
        "ALTER TABLE notes ADD COLUMN b text DEFAULT 'b'",
        "ALTER TABLE notes ALTER COLUMN a TYPE varchar(9)",
        "ALTER TABLE notes RENAME COLUMN a TO c; ALTER TABLE notes DROP COLUMN b",
    ):
        other.execute(search)
        short.execute(change.encode())
        assert sorted(other.execute(search).fetchall()) == short.execute("TABLE notes ORDER BY id").fetchall(), change


@STORAGES
def test_what_an_older_snapshot_shows_of_a_table_is_not_kept(
    short: Connection, connect: Callable[..., Connection], column: str
) -> None:
    attach(short, column, ["one", "two"])
    other = connect()
    search = "SELECT key FROM autoembed.search('pages', 'x', condition => 'true') ORDER BY key"
    at_once = "SELECT key FROM autoembed.search('pages', 'x') ORDER BY key"
    assert other.execute(search).fetchall() == [("[1]",), ("[2]",)]
    other.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    other.execute("SELECT count(*) FROM autoembed.pipeline")

    short.execute("ALTER TABLE pages RENAME COLUMN id TO number")

    # A function has the newest names.
    assert other.execute(at_once).fetchall() == [("[1]",), ("[2]",)]
    with pytest.raises(psycopg.errors.UndefinedColumn):
        other.execute(search)
    other.execute("ROLLBACK")
    for again in (search, at_once):
        assert other.execute(again).fetchall() == [("[1]",), ("[2]",)]


@STORAGES
def test_what_is_rolled_back_is_not_kept(short: Connection, column: str) -> None:
    attach(short, column, ["one", "two"])
    search = "SELECT key FROM autoembed.search('pages', 'x') ORDER BY key"
    for _ in range(2):
        assert short.execute(search).fetchall() == [("[1]",), ("[2]",)]
        short.execute("BEGIN; ALTER TABLE pages RENAME COLUMN id TO number")
        assert short.execute(search).fetchall() == [("[1]",), ("[2]",)]
        short.execute("ROLLBACK")
    assert short.execute(search).fetchall() == [("[1]",), ("[2]",)]


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_a_right_that_is_revoked_is_gone_in_a_session_that_has_searched(
    short: Connection, connect: Callable[..., Connection], role: Callable[[str], str], mode: str
) -> None:
    attach(short, "NULL", ["one", "two"])
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple')")
    short.execute("SELECT autoembed.process()")
    reader = role("reader")
    short.execute(f"SELECT autoembed.grant_usage('{reader}')")
    short.execute(f"GRANT SELECT ON pages TO {reader}")
    other = connect()
    other.execute(f"SET ROLE {reader}")
    search = f"SELECT key FROM autoembed.search('pages', 'one two', mode => '{mode}') ORDER BY key".encode()
    assert other.execute(search).fetchall() == [("[1]",), ("[2]",)]

    short.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    assert other.execute(search).fetchall() == []
    short.execute(f"CREATE POLICY two ON pages TO {reader} USING (id = 2)")
    assert other.execute(search).fetchall() == [("[2]",)]
    short.execute(f"REVOKE SELECT ON pages FROM {reader}; GRANT SELECT (id) ON pages TO {reader}")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        other.execute(search)


@pytest.mark.parametrize(
    ("call", "sqlstate", "message"),
    [
        ("search('pg_class', 'x')", "42704", "table pg_class is not attached to autoembed"),
        ("search('nosuch', 'x')", "42P01", 'relation "nosuch" does not exist'),
        ("search(NULL::pages, 'x', embedding_column => 'e')", "42704", 'column "e" of table public.pages'),
        ("search('pages', 'x', max_rows => -1)", "22023", "max_rows"),
        ("search('pages', 'x', skip_rows => -1)", "22023", "skip_rows"),
        ("embed_query('pg_class', 'x')", "42704", "table pg_class is not attached to autoembed"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_a_reason(
    short: Connection, call: str, sqlstate: str, message: str
) -> None:
    attach(short, "NULL", ["one"])

    with pytest.raises(psycopg.Error) as refusal:
        short.execute(f"SELECT * FROM autoembed.{call}")

    assert refusal.value.sqlstate == sqlstate
    assert message in str(refusal.value)


def test_a_condition_that_ends_the_query_tells_no_words_of_hidden_rows(
    short: Connection, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    attach(short, "'embedding'", ["apple", "pear", "secret"])
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple')")
    short.execute("SELECT autoembed.process()")
    reader = role("reader")
    short.execute(f"SELECT autoembed.grant_usage('{reader}')")
    short.execute(f"GRANT SELECT ON pages TO {reader}; ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    short.execute(f"CREATE POLICY one ON pages TO {reader} USING (id = 1)")
    other = connect()
    other.execute(f"SET ROLE {reader}")
    # The first query that has the condition is asked for a plan.
    other.execute("CREATE TEMP SEQUENCE calls")
    other.execute(
        """CREATE FUNCTION pg_temp.answer() RETURNS text LANGUAGE sql AS $$
            SELECT CASE nextval('calls') WHEN 1 THEN '[{"Plan": {"Plan Rows": 1, "Total Cost": 1}}]' ELSE '[3]' END
        $$"""
    )
    answer = "; SELECT pg_temp.answer() AS key, 0.5::float8 AS distance, 1 AS number FROM"
    vector = f"array_fill(1::real, '{{{DIMENSIONS}}}')::halfvec AS embedding"
    # None fits all queries of a search: a condition stands in one bracket or in two.
    conditions = (
        f"true){answer} (SELECT 1 AS id, {vector}) AS t WHERE (true",
        f"true)) AS t{answer} (SELECT 1 AS id, {vector} WHERE (true",
    )

    for word, condition in itertools.product(("secret", "pear"), conditions):
        other.execute("ALTER SEQUENCE calls RESTART")
        page = other.execute(
            "SELECT keys, text_scores, errcode"
            " FROM autoembed._search_page('pages', %s, 10, 0, %s, NULL, 'hybrid', 0.5, 0, false, NULL)",
            [word, condition],
        ).fetchone()
        assert page == (None, None, "42601")


@STORAGES
@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
def test_a_condition_may_name_a_partition(short: Connection, column: str, mode: str) -> None:
    short.execute("CREATE TABLE parts (id int PRIMARY KEY, body text) PARTITION BY RANGE (id)")
    short.execute("CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (10)")
    short.execute("CREATE TABLE high PARTITION OF parts FOR VALUES FROM (10) TO (20)")
    short.execute(f"SELECT autoembed.enable('parts', {column}, content_columns => '{{body}}', text_config => 'simple')")
    short.execute("INSERT INTO parts VALUES (1, 'one'), (11, 'one')")
    while short.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass

    found = short.execute(
        "SELECT key FROM autoembed.search('parts', 'one', mode => %s, condition => 'tableoid = ''high''::regclass')",
        [mode],
    )

    assert found.fetchall() == [("[11]",)]


@pytest.mark.parametrize(
    ("call", "advice"),
    [
        ("'pages', 'x', embedding_column => 'e'", "Name one of them: embedding_column => 'pages_embeddings'."),
        ("NULL::pages_view, 'x'", "A view cannot be attached. Search the table that it reads."),
        ("NULL::low, 'x'", "It is a part of table public.parts. Search that one."),
        ("NULL::single, 'x'", "Attach it: SELECT autoembed.enable('public.single', ...)."),
    ],
)
def test_who_searches_what_is_not_attached_is_told_what_to_search(short: Connection, call: str, advice: str) -> None:
    attach(short, "NULL", ["one"])
    short.execute("CREATE VIEW pages_view AS SELECT * FROM pages; CREATE TABLE single (id int PRIMARY KEY, body text)")
    short.execute("CREATE TABLE parts (LIKE single, PRIMARY KEY (id)) PARTITION BY RANGE (id)")
    short.execute("CREATE TABLE low PARTITION OF parts FOR VALUES FROM (0) TO (100)")
    short.execute("SELECT autoembed.enable('parts', content_columns => '{body}')")

    with pytest.raises(psycopg.errors.UndefinedObject) as refusal:
        short.execute(f"SELECT * FROM autoembed.search({call})")

    assert refusal.value.diag.message_hint == advice


def test_of_several_embeddings_one_must_be_named(short: Connection) -> None:
    attach(short, "NULL", ["one"])
    short.execute("SELECT autoembed.enable('pages', 'body_embedding', content_columns => '{body}')")
    short.execute("SELECT autoembed.process()")

    with pytest.raises(psycopg.errors.AmbiguousColumn) as refusal:
        short.execute("SELECT * FROM autoembed.search('pages', 'x')")
    assert "pages_embeddings" in str(refusal.value.diag.message_hint)

    search = "SELECT key FROM autoembed.search({}, 'x')"
    assert short.execute(search.format("'pages_embeddings'")).fetchall() == [("[1]",)]
    named = "SELECT key FROM autoembed.search('pages', 'x', embedding_column => 'body_embedding')"
    assert short.execute(named).fetchall() == [("[1]",)]


def test_another_model_takes_over_in_the_transaction_that_detaches_the_first(short: Connection) -> None:
    attach(short, "NULL", ["one", "two"])
    short.execute("SELECT autoembed.create_model('candidate', 'fake', 64)")
    short.execute(
        "SELECT autoembed.enable('pages', content_columns => '{body}', model => 'candidate',"
        " embeddings_table => 'pages_candidate')"
    )
    short.execute("SELECT autoembed.process()")

    def dimensions_of_query(embedding_column: str | None = None) -> int:
        query = "SELECT vector_dims(autoembed.embed_query('pages', 'x', %s)) AS dimensions"
        [row] = short.execute(query, [embedding_column]).fetchall()
        return int(row.dimensions)

    def found() -> list[str]:
        return [row.body for row in short.execute("SELECT body FROM autoembed.search_rows(NULL::pages, 'two')")]

    assert dimensions_of_query() == dimensions_of_query("pages_embeddings") != 64
    assert dimensions_of_query("pages_candidate") == 64
    assert found() == ["two", "one"]

    with short.transaction():
        short.execute("SELECT autoembed.disable('pages_embeddings', drop => true)")
        assert (dimensions_of_query(), found()) == (64, ["two", "one"])
    assert (dimensions_of_query(), found()) == (64, ["two", "one"])


@pytest.mark.parametrize("words", [None, "", " \n"])
def test_nothing_is_found_for_no_words(short: Connection, api: FakeApi, words: str | None) -> None:
    attach(short, "NULL", ["one"])
    before = len(api.log())

    assert short.execute("SELECT * FROM autoembed.search(NULL::pages, %s)", [words]).fetchall() == []
    assert len(api.log()) == before


@pytest.mark.parametrize("name", ["pages", "pages_embeddings"])
def test_the_number_of_attached_tables_makes_no_search_slower(short: Connection, name: str) -> None:
    attach(short, "NULL", ["one", "two"])
    search = f"SELECT key FROM autoembed.search('{name}', 'one', mode => 'vector')"

    def blocks() -> int:
        """Those that a search reads in a session that has planned its queries."""
        short.execute(search.encode())
        [(plan,)] = short.execute(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {search}".encode())
        return int(plan[0]["Plan"]["Shared Hit Blocks"])

    before = blocks()
    # Rows of tables that are gone.
    short.execute("SET session_replication_role = replica")
    short.execute(
        "INSERT INTO autoembed.pipeline (table_id, embeddings_table, embedding_column, key_columns, content_columns)"
        " SELECT 4000000000 + n, 4100000000 + n, 'embedding', '{id}', '{body}' FROM generate_series(1, 10000) AS n"
    )
    short.execute("SET session_replication_role = origin")
    short.execute("ANALYZE autoembed.pipeline")

    assert blocks() < before + 20


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@pytest.mark.parametrize("condition", ["NULL", "'id > 0'"])
def test_a_search_leaves_the_settings_of_its_caller(short: Connection, mode: str, condition: str) -> None:
    attach(short, "NULL", ["one", "two"])
    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple'); SELECT autoembed.process()")
    short.execute("CREATE INDEX ON pages_embeddings USING hnsw (embedding halfvec_cosine_ops)")
    short.execute("UPDATE pg_class SET reltuples = 100000 WHERE relname = 'pages'")
    short.execute("UPDATE autoembed.pipeline SET ef_search = 300")
    given = {"debug_print_plan": "on", "hnsw.ef_search": "77", "hnsw.iterative_scan": "relaxed_order"}

    with short.transaction():
        for name, value in given.items():
            short.execute(f"SET LOCAL {name} = {value}")
        search = f"SELECT FROM autoembed.search('pages', 'one', mode => '{mode}', condition => {condition})"
        assert short.execute(search.encode()).rowcount > 0
        left = {name: short.execute(f"SHOW {name}").fetchall() for name in given}

    assert left == {name: [(value,)] for name, value in given.items()}


# Keys whose texts depend on settings of the session, made of a number.
SPELLED_KEYS = {
    "float8": "n / 3.0",
    "float4": "n / 3.0",
    "float8[]": "ARRAY[n / 3.0, n]",
    "date": "date '2026-01-01' + n",
    "timestamp": "timestamp '2026-01-01 23:59:58.75' + n * interval '1 day'",
    "timestamptz": "timestamptz '2026-01-01 23:59:58.75+00' + n * interval '1 day'",
    "timetz": "timetz '03:04:05+05:30' + n * interval '1 second'",
    "interval": "n * interval '-1 month 2 days -03:04:05.6'",
    "bytea": "decode('5c2700' || lpad(to_hex(n), 2, '0'), 'hex')",
    "tstzrange": "tstzrange(timestamptz '2026-01-01' + n * interval '1 day', NULL)",
    "moment": "(timestamptz '2026-01-01' + n * interval '1 day', n / 3.0)::moment",
    "far": "n / 3.0",
}
OUTPUT_SETTINGS = [
    "SET extra_float_digits = 0; SET DateStyle = 'SQL, DMY'; SET TimeZone = 'Asia/Kolkata';"
    " SET IntervalStyle = 'sql_standard'; SET bytea_output = 'escape'",
    "SET extra_float_digits = -15; SET DateStyle = 'German'; SET TimeZone = 'America/New_York';"
    " SET IntervalStyle = 'iso_8601'; SET bytea_output = 'escape'",
    "SET extra_float_digits = 3; SET DateStyle = 'Postgres, MDY'; SET TimeZone = 'Asia/Kolkata';"
    " SET IntervalStyle = 'postgres_verbose'",
]


@pytest.mark.parametrize("options", ["", ", chunk_prefix => '{share}'"], ids=["", "prefix"])
def test_no_setting_of_a_session_hides_a_passage(short: Connection, options: str) -> None:
    short.execute("CREATE TABLE notes (id int PRIMARY KEY, body text, at timestamptz, share float8)")
    short.execute(
        "INSERT INTO notes SELECT n, 'text ' || n, now() + n * interval '1 day', n / 3.0 FROM generate_series(1, 9) n"
    )
    short.execute(f"SELECT autoembed.enable('notes', content_template => '{{body}}, {{at}}'{options})".encode())
    short.execute("SELECT autoembed.process()")
    short.execute("CREATE INDEX ON notes_embeddings USING hnsw (embedding halfvec_cosine_ops)")

    def passages() -> list[Any]:
        found = []
        for arguments in ("", ", condition => 'id > 0'", ", mode => 'vector', skip_rows => 1"):
            search = f"SELECT key, chunk FROM autoembed.search('notes', 'text 3'{arguments}) ORDER BY key"
            found.append(short.execute(search.encode()).fetchall())
        return [*found, short.execute("SELECT chunk FROM notes_chunks ORDER BY id").fetchall()]

    expected = passages()
    assert [len(found) for found in expected] == [9, 9, 8, 9]
    assert all(found[-1] for found in sum(expected, []))
    for settings in OUTPUT_SETTINGS:
        short.execute(settings.encode())
        assert passages() == expected, settings


@STORAGES
def test_no_setting_of_a_session_hides_a_row_or_its_words(short: Connection, column: str) -> None:
    fruits = ["apple", "pear", "plum", "apple pear", "apple apple plum"]
    # The words of a row tell it from the others, and so do its scores.
    text = f"((ARRAY{fruits})[1 + n % {len(fruits)}]) || repeat(' word', n) || ' text' || n"
    short.execute("CREATE TYPE moment AS (at timestamptz, share float8); CREATE DOMAIN far AS float8")
    tables = {"int": "n", **SPELLED_KEYS}
    for number, (key_type, value) in enumerate(tables.items()):
        short.execute(f"CREATE TABLE keys{number} (k {key_type}, n int, body text, PRIMARY KEY (k))")
        short.execute(f"INSERT INTO keys{number} SELECT {value}, n, {text} FROM generate_series(1, 30) AS n".encode())
        short.execute(
            f"SELECT autoembed.enable('keys{number}', {column}, content_columns => '{{body}}', text_config => 'simple')"
        )
        short.execute(f"SELECT autoembed.create_match_function('keys{number}')")
    while short.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass

    def answers(table: str, mode: str, condition: str | None) -> tuple[list[tuple[Any, ...]], list[str]]:
        rows = short.execute(
            "SELECT p.page, s.rank, (s.hit).n, s.similarity::numeric(9, 7), s.text_score::numeric(9, 7), s.key"
            " FROM unnest('{0,10,20}'::int[]) AS p(page), autoembed.search("
            f"NULL::{table}, 'apple text3', 10, p.page, %s, mode => %s) AS s",
            [condition, mode],
        ).fetchall()
        return [row[:-1] for row in rows], [row.key for row in rows]

    expected = {
        (mode, condition): answers("keys0", mode, condition)[0]
        for mode in ("vector", "text", "hybrid")
        for condition in (None, "n % 2 = 0")
    }
    assert [len(found) for found in expected.values()] == [30, 15, 18, 9, 30, 15]
    spellings: dict[tuple[str, str, str | None], list[str]] = {}
    for settings in OUTPUT_SETTINGS:
        short.execute(settings)
        for number, key_type in list(enumerate(tables))[1:]:
            for (mode, condition), rows in expected.items():
                found, keys = answers(f"keys{number}", mode, condition)
                assert found == rows, (settings, key_type, mode, condition)
                assert spellings.setdefault((key_type, mode, condition), keys) == keys, (settings, key_type, mode)
            match = f"SELECT n FROM match_keys{number}(autoembed.embed('apple text3'), 30)"
            assert [row.n for row in short.execute(match)] == [row[2] for row in expected["vector", None]], key_type
