"""preview, estimate, and the usage that comes of it: the text of a row, and the cost of a table."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import psycopg
import pytest

from extension.status.steps import MODEL, Connect, Role, add, one, process
from fake_api import FakeApi
from harness import Connection
from lanes import running_lanes


def preview(db: Connection, key: str, table: str = "notes") -> Any:
    return one(db, "SELECT * FROM autoembed.preview(%s::regclass, %s)", table, key)


def test_preview_says_how_each_row_stands(notes: Connection, api: FakeApi) -> None:
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    add(notes, 1, 2)
    add(notes, 3, 3, "poison")
    notes.execute("INSERT INTO notes VALUES (4, ' '), (5, NULL)")
    process(notes)
    notes.execute("ALTER TABLE notes DISABLE TRIGGER USER")
    add(notes, 6, 6)
    notes.execute("UPDATE notes SET content = 'other' WHERE id = 2")
    notes.execute("ALTER TABLE notes ENABLE TRIGGER USER")
    add(notes, 7, 7)
    before = api.counters()["requests"]

    states = {key: preview(notes, str(key)) for key in range(1, 8)}

    assert {key: row.state for key, row in states.items()} == {
        1: "fresh",
        2: "stale",
        3: "failed",
        4: "not wanted",
        5: "not wanted",
        6: "missing",
        7: "waiting",
    }
    assert [states[key].content for key in (1, 2, 5)] == ["note1", "other", ""]
    assert (states[1].tokens > 0, states[1].truncated, states[5].tokens) == (True, False, 0)
    assert api.counters()["requests"] == before
    notes.execute("UPDATE notes SET content = 'third' WHERE id = 2")
    assert preview(notes, "2").state == "waiting"
    process(notes)
    assert preview(notes, "[2]").state == "fresh"


def test_preview_says_whether_a_text_is_cut(notes: Connection) -> None:
    notes.execute("INSERT INTO notes VALUES (1, repeat(%s, 1000))", [PROSE])
    row = preview(notes, "1")
    assert row.truncated and row.tokens > 8191

    process(notes)

    assert preview(notes, "1").state == "fresh"
    assert one(notes, "SELECT truncated FROM autoembed.embedded").truncated


@pytest.mark.parametrize(
    ("key_type", "value", "key"),
    [
        ("uuid", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11"),
        ("text", "it's", "it's"),
        ("text", "[draft]", '["[draft]"]'),
        ("text", "7", "7"),
        ("numeric", "1.50", "1.50"),
        ("bigint", "9007199254740993", "9007199254740993"),
        ("timestamptz", "2026-01-01 00:00:00+00", "2026-01-01 00:00:00+00"),
    ],
)
def test_preview_finds_a_row_by_a_key_of_any_type(
    db: Connection, api: FakeApi, key_type: str, value: str, key: str
) -> None:
    db.execute("SET TimeZone = 'UTC'")
    db.execute(f"CREATE TABLE notes (id {key_type} PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}')")
    db.execute(f"INSERT INTO notes VALUES (%s::{key_type}, 'a text')", [value])
    assert preview(db, key).state == "waiting"

    process(db)

    assert preview(db, key).state == "fresh"


def test_preview_shows_what_row_level_security_lets_the_owner_see(
    notes: Connection, role: Role, connect: Connect
) -> None:
    owner = role("owner")
    notes.execute("SELECT autoembed.grant_usage(%s)", [owner])
    notes.execute("INSERT INTO notes VALUES (1, 'a secret'), (2, 'a note')")
    notes.execute(f"ALTER TABLE notes OWNER TO {owner}")
    notes.execute("ALTER TABLE notes ENABLE ROW LEVEL SECURITY; ALTER TABLE notes FORCE ROW LEVEL SECURITY")
    notes.execute("CREATE POLICY no_secrets ON notes USING (content <> 'a secret')")
    session = connect(user=owner)

    assert session.execute("SELECT * FROM autoembed.preview('notes', '1')").fetchall() == []
    assert preview(session, "2").content == "a note"
    # A superuser runs the owner's code with the owner's rights.
    assert notes.execute("SELECT * FROM autoembed.preview('notes', '1')").fetchall() == []


def test_preview_takes_a_composite_key_as_an_array(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE notes (site text, path text, n int, content text, PRIMARY KEY (site, path, n))")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_template => '# {path}\\n\\n{content}')")
    db.execute("""INSERT INTO notes VALUES ('a', 'it''s "x"', 1, 'one'), ('a', 'it''s "x"', 2, 'two')""")
    process(db)

    row = preview(db, '["a", "it\'s \\"x\\"", 2]')

    assert (row.content, row.state) == ('# it\'s "x"\n\ntwo', "fresh")
    assert db.execute("""SELECT * FROM autoembed.preview('notes', '["a", "b", 2]')""").fetchall() == []
    for wrong in ("a", '["a"]', '["a", "b", null]', '["a", "b", "c"]', '{"site": "a"}', "[1, 2"):
        with pytest.raises(psycopg.Error) as caught:
            preview(db, wrong)
        assert caught.value.sqlstate == "22023", wrong
        assert caught.value.diag.message_hint == "Its key is site, path, n, given as a JSON array."


@pytest.mark.parametrize(
    ("key_type", "key"),
    [("int", "a"), ("int", "99999999999"), ("int", "[draft]"), ("int", '["a"]'), ("uuid", "7"), ("text", "[1, 2]")],
)
def test_a_value_that_is_no_key_is_a_clean_error(db: Connection, api: FakeApi, key_type: str, key: str) -> None:
    db.execute(f"CREATE TABLE notes (id {key_type} PRIMARY KEY, content text)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}')")

    with pytest.raises(psycopg.Error) as caught:
        preview(db, key)

    assert caught.value.sqlstate == "22023"
    assert (caught.value.diag.message_primary, caught.value.diag.message_hint) == (
        f'"{key}" is not a valid key for table public.notes',
        "Its key is id.",
    )


def test_preview_reads_a_text_and_a_key_as_lanes_do(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE notes (id timestamptz PRIMARY KEY, at timestamptz)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{at}')")
    db.execute("INSERT INTO notes VALUES ('2026-01-01 00:00:00+00', '2026-01-02 00:00:00+00')")
    process(db)
    db.execute("SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German'")

    assert preview(db, "2026-01-01 00:00:00+00")[:4:3] == ("2026-01-02 00:00:00+00", "fresh")


@pytest.mark.parametrize(("columns", "key"), [("id", "[150000]"), ("site, id", '["a", 150000]')])
def test_preview_of_a_row_of_a_large_table_reads_a_few_pages(
    db: Connection, api: FakeApi, columns: str, key: str
) -> None:
    db.execute(f"CREATE TABLE notes (site text DEFAULT 'a', id int, content text, PRIMARY KEY ({columns}))")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}')")
    with db.transaction():
        db.execute("SET LOCAL session_replication_role = replica")
        db.execute("INSERT INTO notes (id, content) SELECT n, repeat('x', 100) FROM generate_series(1, 200000) AS n")
    db.execute("ANALYZE notes")
    preview(db, key)

    explain = "EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) SELECT * FROM autoembed.preview('notes', %s)"
    [[[explained]]] = psycopg.ClientCursor(db).execute(explain, [key]).fetchall()

    assert explained["Plan"]["Actual Rows"] == 1
    # Most of them of the catalog.
    pages = one(db, "SELECT pg_relation_size('notes') / 8192 AS n").n
    assert explained["Plan"]["Shared Hit Blocks"] + explained["Plan"]["Shared Read Blocks"] < 1500 < pages / 2


PROSE = "The index finds rows without reading the whole table, and vacuum removes what nobody needs. "
WAYS = {
    "columns": "content_columns => '{title,content}'",
    "template": "content_template => '# {title}\\n\\n{content}'",
    "function": "content_function => 'its_text'",
    "condition": "content_columns => '{title,content}', condition => 'id % 3 = 0'",
}


@pytest.fixture
def articles(db: Connection, api: FakeApi) -> Connection:
    """A table with 250 texts of prose, each of its own, and rows that have none; not enabled."""
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, title text, content text)")
    db.execute("CREATE FUNCTION its_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.title || n.content'")
    db.execute(
        "INSERT INTO notes SELECT n, 'Note ' || n, repeat(%s, 1 + n %% 5) FROM generate_series(1, 250) AS n", [PROSE]
    )
    db.execute("INSERT INTO notes SELECT n, NULL, NULL FROM generate_series(251, 270) AS n")
    db.execute(f"UPDATE autoembed.model SET price_per_million_tokens = 20, builtin = false WHERE name = '{MODEL}'")
    return db


@pytest.mark.parametrize("arguments", ["", ", chunk_size => 60, chunk_overlap => 10"], ids=["structure", "overlap"])
def test_an_estimate_of_long_texts_has_the_requests_that_lanes_make_to_a_local_model(
    db: Connection, connect: Connect, arguments: str
) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, content text)")
    for row in range(8):
        sections = [f"# Part {n} of {row}\n\n" + f"{row} {n} {PROSE}" * (1 + n % 4) for n in range(30)]
        db.execute("INSERT INTO notes VALUES (%s, %s)", [row, "\n\n".join(sections)])
    call = f"'notes', content_columns => '{{content}}', model => 'all-MiniLM-L6-v2'{arguments}"
    before = one(db, f"SELECT * FROM autoembed.estimate({call})")

    with running_lanes(db, connect):
        db.execute(f"SELECT autoembed.enable({call})".encode())
        db.execute("SELECT autoembed.wait_until_fresh('notes', 120)")

    sent = one(db, "SELECT sum(requests)::int AS requests, sum(tokens)::int AS tokens FROM autoembed.usage")
    assert 0.8 * sent.tokens <= before.tokens <= 1.3 * sent.tokens
    assert sent.requests / 3 <= before.requests <= 3 * sent.requests
    after = one(db, "SELECT * FROM autoembed.estimate('notes')")
    assert sent.requests / 3 <= after.requests <= 3 * sent.requests


def test_an_estimate_of_texts_that_are_cut_has_the_tokens_of_all_chunks(articles: Connection, api: FakeApi) -> None:
    articles.execute("INSERT INTO notes VALUES (1000, 'long', %s)", ["\n\n".join(f"{n} {PROSE}" for n in range(3000))])
    before = one(articles, "SELECT * FROM autoembed.estimate('notes', content_columns => '{title,content}')")
    articles.execute("SELECT autoembed.enable('notes', content_columns => '{title,content}')")
    assert one(articles, "SELECT * FROM autoembed.estimate('notes')") == before

    process(articles)

    sent = one(articles, "SELECT * FROM autoembed.usage")
    assert before.rows == 251
    assert sent.inputs > 350
    assert 0.8 * sent.tokens <= before.tokens <= 1.6 * sent.tokens
    assert 0.6 * sent.requests <= before.requests <= 1.6 * sent.requests


@pytest.mark.parametrize("way", WAYS)
def test_an_estimate_is_what_is_then_sent_and_itself_sends_nothing(
    articles: Connection, api: FakeApi, way: str
) -> None:
    before = one(articles, f"SELECT * FROM autoembed.estimate('notes', 'embedding', {WAYS[way]})")
    assert api.counters()["requests"] == 0
    assert articles.execute("TABLE autoembed.usage").fetchall() == []
    articles.execute(f"SELECT autoembed.enable('notes', 'embedding', {WAYS[way]})".encode())
    assert one(articles, "SELECT * FROM autoembed.estimate('notes')") == before

    process(articles)

    sent = one(articles, "SELECT * FROM autoembed.usage")
    assert (before.rows, before.requests) == (sent.inputs, sent.requests)
    assert (sent.inputs, sent.requests) == (api.counters()["inputs"], api.counters()["requests"])
    assert 0.8 * sent.tokens <= before.tokens <= 1.6 * sent.tokens
    assert float(before.cost) == pytest.approx(before.tokens * 20 / 1e6, abs=1e-4)
    assert float(sent.cost) == pytest.approx(sent.tokens * 20 / 1e6, abs=1e-6)
    assert before.duration is None
    after = one(articles, "SELECT * FROM autoembed.estimate('notes')")
    assert timedelta(0) < after.duration < timedelta(minutes=2)


def test_texts_that_are_cut_are_estimated_as_cut(articles: Connection) -> None:
    """Text beyond the model's limit is not sent and not paid for."""
    articles.execute("TRUNCATE notes")
    articles.execute("INSERT INTO notes SELECT n, n, repeat(%s, 2000) FROM generate_series(1, 3) AS n", [PROSE])
    articles.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{title,content}')")
    before = one(articles, "SELECT * FROM autoembed.estimate('notes')")

    process(articles)

    sent = one(articles, "SELECT * FROM autoembed.usage")
    assert before.requests == sent.requests
    assert 0.8 * sent.tokens <= before.tokens <= 1.6 * sent.tokens


def test_equal_texts_are_estimated_once(articles: Connection) -> None:
    articles.execute("UPDATE notes SET title = 'same', content = 'text' WHERE id <= 200")
    articles.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{title,content}')")
    before = one(articles, "SELECT * FROM autoembed.estimate('notes')")

    process(articles)

    sent = one(articles, "SELECT * FROM autoembed.usage")
    assert (before.rows, sent.inputs, before.requests) == (250, 51, sent.requests)
    assert 0.8 * sent.tokens <= before.tokens <= 1.6 * sent.tokens


def test_a_large_table_is_sampled_and_its_estimate_is_near(articles: Connection) -> None:
    articles.execute(
        "INSERT INTO notes SELECT n, 'Note ' || n, CASE WHEN n %% 4 > 0 THEN repeat(%s, 1 + n %% 2) END"
        " FROM generate_series(1001, 61000) AS n",
        [PROSE],
    )
    # ANALYZE counts rows twice that the session has not reported yet.
    articles.execute("SELECT pg_stat_force_next_flush()")
    articles.execute("ANALYZE notes")
    estimated = one(
        articles,
        "SELECT * FROM autoembed.estimate("
        "'notes', 'embedding', content_columns => '{title,content}', condition => 'id > 1000')",
    )
    # The true figures, had each text been looked at: requests packed from the next thousand rows.
    exact = one(
        articles,
        "SELECT sum(e.tokens)::bigint AS tokens, sum(e.requests)::bigint AS requests FROM ("
        " SELECT array_agg(concat_ws(E'\\n\\n', title, content) ORDER BY id) AS texts FROM notes WHERE id > 1000"
        " GROUP BY id / 1000) AS t, LATERAL autoembed._estimate_texts(t.texts, array_fill(''::text,"
        " ARRAY[cardinality(t.texts)]), NULL, 'none', NULL, 0) AS e",
    )
    some = one(
        articles, "SELECT * FROM autoembed.estimate('notes', content_columns => '{content}', condition => 'id > 1000')"
    )

    assert 0.8 * 60000 <= estimated.rows <= 1.2 * 60000
    assert 0.8 * exact.tokens <= estimated.tokens <= 1.2 * exact.tokens
    assert 0.8 * exact.requests <= estimated.requests <= 1.2 * exact.requests
    # A quarter of the rows has no content.
    assert 0.8 * 45000 <= some.rows <= 1.2 * 45000


def test_usage_counts_each_table_and_embed_by_itself(articles: Connection, api: FakeApi) -> None:
    articles.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{title,content}')")
    process(articles)
    articles.execute("SELECT autoembed.embed('a question') AS one, autoembed.embed('another') AS two")

    rows = articles.execute("SELECT * FROM autoembed.usage ORDER BY table_name NULLS FIRST").fetchall()

    assert [(r.model, r.table_name, r.embedding_column, r.requests, r.inputs) for r in rows] == [
        (MODEL, None, None, 2, 2),
        (MODEL, "notes", "embedding", 3, 250),
    ]
    assert sum(row.tokens for row in rows) == api.counters()["tokens"]
    assert {row.day for row in rows} == {one(articles, "SELECT (now() AT TIME ZONE 'UTC')::date AS day").day}
    articles.execute("UPDATE autoembed.usage_entry SET at = at - interval '11 minutes'")
    articles.execute("SELECT autoembed.process()")
    assert one(articles, "SELECT count(*) AS n FROM autoembed.usage_entry").n == 0
    total = "SELECT sum(requests) AS requests, sum(inputs) AS inputs, sum(tokens) AS tokens FROM autoembed.usage"
    assert one(articles, total) == (5, 252, sum(row.tokens for row in rows))
