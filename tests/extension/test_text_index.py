"""Search by words: the text index gives what BM25 gives, computed one text at a time, and shows nothing else."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from fake_api import FakeApi
from harness import Connection, rows_read, toast_table_of

STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
DIMENSIONS = 16
WORDS = [f"word{n}" for n in range(40)]


@pytest.fixture
def short(db: Connection, api: FakeApi) -> Connection:
    db.execute(
        "SELECT autoembed.create_model('short', 'openai', %s, model_id => 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [DIMENSIONS, api.base_url],
    )
    db.execute("SELECT autoembed.set_default_model('short')")
    return db


def attach(db: Connection, column: str, texts: list[str], config: str | None = "english", more: str = "") -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text, tenant int NOT NULL DEFAULT 0)")
    write(db, dict(enumerate(texts, 1)))
    enable = f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}', text_config => %s{more})"
    db.execute(enable.encode(), [config])
    db.execute("SELECT autoembed.process()")


def write(db: Connection, texts: dict[int, str]) -> None:
    db.cursor().executemany(
        "INSERT INTO pages (id, body, tenant) VALUES (%s, %s, %s) ON CONFLICT (id) DO UPDATE SET body = excluded.body",
        [(key, text, key % 5) for key, text in texts.items()],
    )


def embed(db: Connection) -> None:
    """Embeds and merges until nothing is left to do."""
    while True:
        before = segments(db)
        db.execute("SELECT autoembed.process()")
        waiting = db.execute("SELECT count(*) AS n FROM autoembed._job").fetchone()
        assert waiting is not None
        if not waiting.n and segments(db) == before:
            return


def segments(db: Connection) -> list[int]:
    return [row.id for row in db.execute("SELECT id FROM autoembed.text_segment ORDER BY id")]


def terms_of(db: Connection, text: str) -> Counter[str]:
    words = db.execute("SELECT lexeme, cardinality(positions) AS n FROM unnest(to_tsvector('english', %s))", [text])
    return Counter({row.lexeme: row.n for row in words})


def bm25(db: Connection, passages: list[tuple[int, str]], query: str) -> dict[int, float]:
    """The score of each row that matches: that of its best passage, by the formula as it stands in the books."""
    counts = [(key, terms_of(db, text)) for key, text in passages]
    mean = sum(terms.total() for _, terms in counts) / len(counts)
    scores: dict[int, float] = {}
    for key, terms in counts:
        score = 0.0
        for term, occurrences in terms_of(db, query).items():
            having = sum(term in others for _, others in counts)
            idf = math.log(1 + (len(counts) - having + 0.5) / (having + 0.5))
            frequency = terms[term]
            score += occurrences * idf * frequency * 2.2 / (frequency + 1.2 * (0.25 + 0.75 * terms.total() / mean))
        if score > 0:
            scores[key] = max(score, scores.get(key, 0.0))
    return scores


def passages_of(db: Connection, column: str) -> list[tuple[int, str]]:
    query = (
        "SELECT p.id, substr(p.body, e.chunk_start + 1, e.chunk_end - e.chunk_start) FROM pages AS p"
        " JOIN pages_embeddings AS e USING (id)"
        if column == "NULL"
        else "SELECT id, body FROM pages WHERE embedding IS NOT NULL"
    )
    return [(row[0], row[1]) for row in db.execute(query.encode())]


def found(db: Connection, query: str, **options: Any) -> dict[int, float]:
    named = "".join(f", {name} => %s" for name in options)
    rows = db.execute(
        f"SELECT (s.hit).id, s.score, s.text_score, s.rank"
        f" FROM autoembed.search(NULL::pages, %s, mode => 'text'{named}) AS s",
        [query, *options.values()],
    ).fetchall()
    assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
    assert [row.rank for row in rows] == list(range(1, len(rows) + 1))
    assert all(row.score == row.text_score for row in rows)
    return {row.id: row.score for row in rows}


def random_text(rng: random.Random) -> str:
    # A few words are common, most are rare.
    words = [WORDS[min(int(rng.expovariate(0.15)), len(WORDS) - 1)] for _ in range(rng.randint(1, 60))]
    return " ".join(words) + rng.choice(["", " the", ".", "\n\n# Title\n\nlast"])


@STORAGES
@pytest.mark.parametrize("seed", range(2))
def test_the_scores_are_those_of_bm25_whatever_came_before(
    short: Connection, role: Callable[[str], str], column: str, seed: int
) -> None:
    rng = random.Random(seed)
    reader = role("reader")
    short.execute(f"SELECT autoembed.grant_usage('{reader}')")
    chunks = ", chunk_size => 16" if column == "NULL" else ""
    attach(short, column, [random_text(rng) for _ in range(30)], more=chunks)
    short.execute(f"GRANT SELECT ON pages TO {reader}")

    for step in range(12):
        write(short, {rng.randint(1, 60): random_text(rng) for _ in range(rng.randint(1, 15))})
        for key in rng.sample(range(1, 61), rng.randint(0, 6)):
            short.execute("DELETE FROM pages WHERE id = %s", [key])
        if step == 4:
            short.execute("UPDATE pages SET id = id + 100 WHERE id % 7 = 0")
        if step == 8:
            short.execute("TRUNCATE pages")
            write(short, {key: random_text(rng) for key in range(20, 50)})
        embed(short)
        query = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        expected = bm25(short, passages_of(short, column), query)
        assert found(short, query, max_rows=1000) == pytest.approx(expected), (step, query)

        tenant = rng.randint(0, 4)
        of_tenant = {row.id for row in short.execute("SELECT id FROM pages WHERE tenant = %s", [tenant])}
        visible = {key: score for key, score in expected.items() if key in of_tenant}
        assert found(short, query, max_rows=1000, condition=f"tenant = {tenant}") == pytest.approx(visible)
        short.execute(
            f"ALTER TABLE pages ENABLE ROW LEVEL SECURITY; DROP POLICY IF EXISTS own ON pages;"
            f" CREATE POLICY own ON pages USING (tenant = {tenant}); SET ROLE {reader}"
        )
        seen = found(short, query, max_rows=1000)
        few = found(short, query, max_rows=3)
        short.execute("RESET ROLE")
        assert seen == pytest.approx(visible)
        assert len(few) == min(3, len(visible))
        assert list(few.values()) == pytest.approx(sorted(visible.values(), reverse=True)[:3])


@STORAGES
@pytest.mark.parametrize("seed", range(2))
def test_a_text_counts_at_once_whatever_came_before(
    short: Connection, role: Callable[[str], str], column: str, seed: int
) -> None:
    """Nothing that has changed is embedded before the search."""
    rng = random.Random(seed)
    reader = role("reader")
    short.execute(f"SELECT autoembed.grant_usage('{reader}')")
    more = ", chunking => 'none'" if column == "NULL" else ""
    attach(short, column, [random_text(rng) for _ in range(20)], more=more)
    short.execute(f"GRANT SELECT ON pages TO {reader}")

    for step in range(10):
        write(short, {rng.randint(1, 40): random_text(rng) for _ in range(rng.randint(1, 15))})
        for key in rng.sample(range(1, 41), rng.randint(0, 4)):
            short.execute("DELETE FROM pages WHERE id = %s", [key])
        short.execute("UPDATE pages SET tenant = %s WHERE id = %s", [rng.randint(0, 4), rng.randint(1, 40)])
        if step == 4:
            short.execute("UPDATE pages SET id = 41 - id WHERE id IN (3, 38)")
        if step == 7:
            # Until a lane has seen it, the words of emptied tables count for how rare a word is.
            short.execute("TRUNCATE pages")
            embed(short)
            write(short, {key: random_text(rng) for key in range(20, 30)})
        query = " ".join(rng.choices(WORDS, k=rng.randint(1, 6)))
        texts = [(row.id, row.body) for row in short.execute("SELECT id, body FROM pages")]
        expected = bm25(short, texts, query)
        assert found(short, query, max_rows=1000) == pytest.approx(expected), (step, query)
        hybrid = "SELECT (s.hit).id, s.text_score FROM autoembed.search(NULL::pages, %s, 1000, mode => 'hybrid') AS s"
        both = {row.id: row.text_score for row in short.execute(hybrid, [query])}
        assert {key: score for key, score in both.items() if score} == pytest.approx(expected), (step, query)

        short.execute(
            f"ALTER TABLE pages ENABLE ROW LEVEL SECURITY; DROP POLICY IF EXISTS own ON pages;"
            f" CREATE POLICY own ON pages USING (tenant < 2); SET ROLE {reader}"
        )
        seen = found(short, query, max_rows=1000, condition="id % 2 = 0")
        short.execute("RESET ROLE")
        assert set(seen) == {
            row.id
            for row in short.execute("SELECT id FROM pages WHERE tenant < 2 AND id % 2 = 0")
            if row.id in expected
        }
        if rng.random() < 0.5:
            embed(short)


@STORAGES
def test_the_words_behind_what_a_model_reads_are_found(short: Connection, column: str) -> None:
    more = ", chunking => 'none'" if column == "NULL" else ""
    attach(short, column, ["pear " * 20_000 + "apple"], more=more)
    embed(short)
    truncated = short.execute("SELECT bool_and(truncated) AS all FROM autoembed.embedded").fetchone()
    assert truncated == (True,)

    assert list(found(short, "apple")) == [1]


@STORAGES
def test_a_row_without_an_embedding_comes_with_its_score_by_words(short: Connection, column: str) -> None:
    attach(short, column, ["an apple", "a pear"])
    write(short, {3: "an apple more", 2: "a plum"})

    row = short.execute(
        "SELECT (s.hit).body, s.key, s.chunk, s.chunk_number, s.similarity, s.text_score > 0 AS matches"
        " FROM autoembed.search(NULL::pages, 'apple', mode => 'hybrid') AS s WHERE (s.hit).id = 3"
    ).fetchone()

    assert row == ("an apple more", "[3]", None, None, None, True)
    assert list(found(short, "plum")) == [2]
    assert found(short, "pear") == {}


@STORAGES
def test_of_rows_that_have_changed_the_text_alone_is_read(short: Connection, column: str) -> None:
    attach(short, column, ["an apple"] * 9)
    short.execute("ALTER TABLE pages ADD COLUMN long text; ALTER TABLE pages ALTER long SET STORAGE EXTERNAL")
    short.execute("UPDATE pages SET body = 'a pear', long = repeat('x', 3000)")
    toast = toast_table_of(short, "pages")

    assert rows_read(short, "SELECT * FROM autoembed.search('pages', 'plum', mode => 'text')", toast) == {toast: 0}


def test_a_row_that_the_model_refuses_is_found_by_its_words(short: Connection, api: FakeApi) -> None:
    attach(short, "NULL", ["an apple"])
    api.behave(faults=[{"status": 400, "match": "plum", "times": 1000}])
    write(short, {1: "a plum", 2: "a plum pie"})
    short.execute("SELECT autoembed.process()")
    assert short.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (2,)

    assert sorted(found(short, "plum")) == [1, 2]
    assert found(short, "apple") == {}


@STORAGES
def test_no_row_is_found_by_old_words_however_many_have_changed(short: Connection, column: str) -> None:
    """So many messages wait that a search does not read them all."""
    attach(short, column, ["an apple" for _ in range(1300)])
    embed(short)
    short.execute("SELECT autoembed.pause('pages')")
    short.execute("""
        DO $$ BEGIN FOR n IN 1..1250 LOOP
            UPDATE pages SET body = CASE WHEN n <= 5 THEN 'an apple again' ELSE 'a pear' END WHERE id = n;
        END LOOP; END $$
    """)

    assert set(found(short, "apple", max_rows=1300)) == {*range(1, 6), *range(1251, 1301)}
    assert set(found(short, "apple", max_rows=60)) == {*range(1, 6), *range(1251, 1301)}
    assert len(found(short, "pear", max_rows=50)) == 50


def test_the_text_of_a_function_is_found_once_a_lane_has_read_it(short: Connection) -> None:
    """The function is the owner's code, and would run with the rights of the caller."""
    short.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    short.execute("CREATE FUNCTION text_of(p pages) RETURNS text LANGUAGE sql RETURN p.body || ' fruit'")
    short.execute("SELECT autoembed.enable('pages', content_function => 'text_of', text_config => 'english')")
    short.execute("INSERT INTO pages VALUES (1, 'an apple')")
    assert found(short, "apple") == {}
    short.execute("SELECT autoembed.process()")
    assert list(found(short, "fruit")) == [1]

    short.execute("UPDATE pages SET body = 'a pear'")
    assert found(short, "apple") == {}


@STORAGES
def test_hybrid_weighs_both_scores_of_every_candidate(short: Connection, column: str) -> None:
    attach(short, column, [f"{'red ' * (n % 4)}apple number{n}" for n in range(60)])
    query = "red apple number7"
    words = found(short, query, max_rows=1000)
    meaning = {
        row.id: row.score
        for row in short.execute(
            "SELECT (s.hit).id, s.score FROM autoembed.search(NULL::pages, %s, 1000, mode => 'vector') AS s", [query]
        )
    }

    def share(scores: dict[int, float], key: int) -> float:
        of_all = [scores.get(other, 0.0) for other in meaning]
        return (scores.get(key, 0.0) - min(of_all)) / (max(of_all) - min(of_all))

    for weight in (0.0, 0.3, 0.7, 1.0):
        rows = short.execute(
            "SELECT (s.hit).id, s.score, s.similarity, s.text_score, s.chunk"
            " FROM autoembed.search(NULL::pages, %s, 1000, vector_weight => %s) AS s",
            [query, weight],
        ).fetchall()
        assert len(rows) == 60
        for row in rows:
            assert row.similarity == pytest.approx(meaning[row.id])
            assert row.text_score == pytest.approx(words.get(row.id, 0.0))
            expected = weight * share(meaning, row.id) + (1 - weight) * share(words, row.id)
            assert row.score == pytest.approx(expected)
        assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)
        assert (rows[0].chunk is None) == (column != "NULL")


@STORAGES
@pytest.mark.parametrize("mode", ["hybrid", "text"])
def test_pages_continue_each_other_beyond_the_candidates(short: Connection, column: str, mode: str) -> None:
    attach(short, column, [f"text {n} {'apple ' * (1 + n % 3) if n % 2 else ''}" for n in range(250)])
    search = "SELECT rank, key FROM autoembed.search('pages', 'apple', 40, skip_rows => %s, mode => %s)"

    pages = [short.execute(search, [skip, mode]).fetchall() for skip in range(0, 280, 40)]

    rows = [row for page in pages for row in page]
    assert [row.rank for row in rows] == list(range(1, (251 if mode == "hybrid" else 126)))
    assert len({row.key for row in rows}) == len(rows)


def test_pages_of_texts_in_many_chunks_continue_each_other(short: Connection) -> None:
    """The hundred nearest chunks are of few rows."""
    sentence = "This is the sentence number {} of some, and it is about {}."
    texts = [" ".join([sentence.format(n, "apples" * (n % 3) or "pears")] * 40) for n in range(60)]
    attach(short, "NULL", texts, more=", chunk_size => 16")
    embed(short)
    search = "SELECT key, score FROM autoembed.search('pages', 'apples', %s, skip_rows => %s)"

    rows = [row for skip in range(0, 70, 10) for row in short.execute(search, [10, skip])]

    assert len({row.key for row in rows}) == len(rows) == 60
    assert rows == short.execute(search, [60, 0]).fetchall()


@STORAGES
def test_pages_by_an_index_continue_each_other(short: Connection, column: str) -> None:
    attach(short, column, [f"text {n}" for n in range(2000)])
    embed(short)
    table = "pages" if column != "NULL" else "pages_embeddings"
    short.execute(f"CREATE INDEX ON {table} USING hnsw (embedding halfvec_cosine_ops)")
    short.execute("ANALYZE")
    # More rows than are compared one by one.
    short.execute("UPDATE pg_class SET reltuples = 1000000 WHERE relname IN ('pages', 'pages_embeddings')")
    for mode in ("vector", "hybrid"):
        search = f"SELECT key, score FROM autoembed.search('pages', 'question', 10, skip_rows => %s, mode => '{mode}')"
        rows = [row for skip in range(0, 600, 10) for row in short.execute(search, [skip])]

        assert len({row.key for row in rows}) == len(rows) == 600
        assert [row.score for row in rows] == sorted((row.score for row in rows), reverse=True)


def test_whatever_a_caller_asks_the_index_tells_nothing_of_hidden_rows(
    short: Connection, role: Callable[[str], str]
) -> None:
    attach(short, "NULL", ["public apple", "secret apple", "secret pear"])
    stranger = role("stranger")
    short.execute(f"SELECT autoembed.grant_usage('{stranger}')")
    matches = """
        SELECT unnest(coalesce(p.keys, ARRAY[p.errcode]))
        FROM autoembed._search_page('pages', 'apple secret', 10, 0, {}, NULL, 'text', 0.7, 0, false, NULL) AS p
    """
    # A condition is the caller's code, and runs with each row that it is asked about.
    short.execute(f"""
        CREATE TABLE seen (what text);
        GRANT ALL ON seen TO {stranger};
        CREATE FUNCTION note(what text) RETURNS boolean LANGUAGE plpgsql COST 0.0001 AS
        $$ BEGIN RAISE NOTICE 'seen %', what; RETURN true; END $$
    """)
    notices: list[str] = []
    short.add_notice_handler(lambda notice: notices.append(notice.message_primary or ""))

    def ask(query: str) -> list[Any] | str:
        short.execute(f"SET ROLE {stranger}")
        try:
            return sorted(row[0] for row in short.execute(query.encode()).fetchall())
        except psycopg.errors.InsufficientPrivilege:
            return "denied"
        except psycopg.Error as error:
            return [error.sqlstate]
        finally:
            short.execute("RESET ROLE")

    for table in ("text_document", "text_segment", "text_posting"):
        assert ask(f"SELECT 1 FROM autoembed.{table}") == "denied"
    assert ask(matches.format("NULL")) == ["42501"]
    short.execute(f"GRANT SELECT (id) ON pages TO {stranger}")
    assert ask(matches.format("NULL")) == ["42501"]
    # No answer tells which words the texts have.
    for word in ("apple", "nosuch", "secret"):
        for mode in ("text", "vector", "hybrid"):
            assert ask(f"SELECT key FROM autoembed.search('pages', '{word}', mode => '{mode}')") == "denied"
    short.execute(f"GRANT SELECT ON pages TO {stranger}")
    assert ask(matches.format("NULL")) == ["[1]", "[2]", "[3]"]
    short.execute(
        f"ALTER TABLE pages ENABLE ROW LEVEL SECURITY; CREATE POLICY one ON pages TO {stranger} USING (id = 1)"
    )
    notices.clear()
    for condition, answer in (
        ("note(body)", "[1]"),
        ("note(id::text)", "[1]"),
        # The candidates are a parameter of the query, and no condition can read it.
        ("note($1::text)", "42P02"),
        ("EXISTS (SELECT FROM unnest($1) AS k WHERE note(k))", "42P02"),
        ("true) OR note($1::text) OR (true", "42P02"),
    ):
        assert ask(matches.format(f"'{condition}'")) == [answer]
        assert ask(
            f"SELECT key FROM autoembed.search('pages', 'apple secret', mode => 'text', condition => '{condition}')"
        ) == [answer]
    assert notices
    assert not [notice for notice in notices if "2" in notice or "3" in notice or "secret" in notice]


@STORAGES
def test_a_text_index_can_be_added_changed_and_taken_away(short: Connection, api: FakeApi, column: str) -> None:
    attach(short, column, ["running apples", "the pear"], config=None)
    search = "SELECT key FROM autoembed.search('pages', %s, mode => 'text')"
    sent = len(api.log())
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState) as refusal:
        short.execute(search, ["apple"])
    assert "alter_pipeline" in str(refusal.value.diag.message_hint)

    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'english')")
    embed(short)
    assert short.execute(search, ["run apple"]).fetchall() == [("[1]",)]
    assert short.execute(search, ["the"]).fetchall() == []

    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'simple')")
    embed(short)
    assert short.execute(search, ["run apple"]).fetchall() == []
    assert short.execute(search, ["the"]).fetchall() == [("[2]",)]
    assert len(api.log()) == sent

    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => '')")
    left = "SELECT (SELECT count(*) FROM autoembed.text_document) + (SELECT count(*) FROM autoembed.text_posting)"
    assert short.execute(left).fetchone() == (0,)
    with pytest.raises(psycopg.errors.UndefinedObject):
        short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'nosuch')")

    short.execute("SELECT autoembed.alter_pipeline('pages', text_config => 'english')")
    embed(short)
    short.execute("SELECT autoembed.disable('pages')")
    short.execute("SELECT autoembed.process()")
    assert short.execute(left).fetchone() == (0,)


def test_a_configuration_of_the_user_has_its_schema_and_can_be_altered(short: Connection) -> None:
    short.execute("CREATE TEXT SEARCH CONFIGURATION public.mine (COPY = simple)")
    with pytest.raises(psycopg.errors.UndefinedObject) as refusal:
        attach(short, "NULL", [], config="mine")
    assert "with its schema" in str(refusal.value.diag.message_hint)
    short.execute("DROP TABLE pages")
    attach(short, "NULL", ["running dogs"], config="public.mine")
    write(short, {2: "the dogs are running"})
    assert sorted(found(short, "running")) == [1, 2]

    short.execute("ALTER TEXT SEARCH CONFIGURATION public.mine ALTER MAPPING FOR asciiword WITH english_stem")
    for config in ("", "public.mine"):
        short.execute("SELECT autoembed.alter_pipeline('pages', text_config => %s)", [config])
    # The text that waits counts at once.
    assert list(found(short, "run")) == [2]
    embed(short)
    assert sorted(found(short, "run")) == [1, 2]


def test_what_is_rolled_back_is_not_in_the_index(short: Connection) -> None:
    attach(short, "NULL", ["apple"])
    with short.transaction(force_rollback=True):
        write(short, {1: "pear", 2: "apple"})
        short.execute("SELECT autoembed.process()")
        assert list(found(short, "apple")) == [2]
    assert list(found(short, "apple")) == [1]
    assert found(short, "pear") == {}


def test_segments_are_merged_and_dead_texts_leave_them(short: Connection) -> None:
    attach(short, "NULL", [])
    for number in range(1, 31):
        write(short, {number: f"apple number{number}"})
        short.execute("SELECT autoembed.process()")
    assert len(segments(short)) <= 12
    assert len(found(short, "apple", max_rows=100)) == 30

    for text in ("pear", "plum", "cherry"):
        write(short, {key: f"{text} number{key}" for key in range(1, 101)})
        embed(short)
    dead = "SELECT count(*) FILTER (WHERE NOT is_live) AS dead, count(*) AS n FROM autoembed.text_document"
    row = short.execute(dead).fetchone()
    assert row is not None and row.dead <= 100 + 0.2 * row.n
    assert len(found(short, "cherry", max_rows=200)) == 100
    assert found(short, "apple pear plum") == {}
    terms = "SELECT count(*) FROM autoembed.text_posting WHERE term = 'appl'"
    assert short.execute(terms).fetchone() == (0,)


def test_a_lane_looks_up_texts_of_rows_and_does_not_read_all(short: Connection) -> None:
    texts, keys = 20_000, 300
    short.execute(
        "INSERT INTO autoembed.text_document (pipeline_id, key, chunk_number)"
        " SELECT 1, '[' || n || ']', 0 FROM generate_series(1, %s) AS n",
        [texts],
    )
    short.execute("ANALYZE autoembed.text_document")
    of_keys = f"ARRAY(SELECT '[' || 40 * n || ']' FROM generate_series(1, {keys}) AS n)"

    for statement in (f"SELECT autoembed._unindexed(1, {of_keys})", f"SELECT autoembed._drop_texts(1, {of_keys})"):
        assert rows_read(short, statement, "autoembed.text_document")["autoembed.text_document"] <= keys, statement


@pytest.mark.parametrize(
    ("counts", "merged"),
    [
        # Documents and postings of each segment. Ten of about one size are merged.
        ([(500, 9)] * 9, 0),
        ([(500, 9)] * 10, 10),
        ([(500, 9)] * 5 + [(5000, 9)] * 5, 0),
        # So are as many as fill a segment of the greatest size.
        ([(21_000, 9)] * 3, 0),
        ([(21_000, 9)] * 4, 3),
        ([(32_499, 9)] * 3, 2),
        ([(32_500, 9)] * 9, 0),
        ([(500, 90_000)] * 2, 0),
        ([(500, 90_000)] * 3, 2),
        ([(500, 100_000)] * 9, 0),
    ],
)
def test_segments_are_merged_that_are_many_or_fill_one(
    short: Connection, counts: list[tuple[int, int]], merged: int
) -> None:
    for documents, postings in counts:
        short.execute(
            "INSERT INTO autoembed.text_segment (pipeline_id, document_count, posting_count, documents, lengths)"
            " VALUES (1, %s, %s, '', '')",
            [documents, postings],
        )

    row = short.execute("SELECT coalesce(cardinality(segments), 0) FROM autoembed._segments_to_merge(true, 200000)")

    assert row.fetchone() == (merged,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("mode => 'words'", "mode must be hybrid, vector or text, not words"),
        ("mode => ''", "mode must be hybrid, vector or text, not an empty text"),
        ("vector_weight => 1.5", "vector_weight must be from 0 to 1, not 1.5"),
        ("vector_weight => NULL", "vector_weight must be from 0 to 1, not NULL"),
    ],
)
def test_what_makes_no_sense_is_refused(short: Connection, arguments: str, message: str) -> None:
    attach(short, "NULL", ["apple"])
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=message):
        short.execute(f"SELECT * FROM autoembed.search('pages', 'apple', {arguments})")


@pytest.mark.parametrize("query", ["the", "nosuchword", "!!", "' \\ : & | ! (", "apple" * 5000])
def test_any_words_are_a_query(short: Connection, query: str) -> None:
    attach(short, "NULL", ["apple", "pear"])
    assert found(short, query) == {}
    hybrid = "SELECT count(*) FROM autoembed.search('pages', %s, mode => 'hybrid')"
    assert short.execute(hybrid, [query[:1000]]).fetchone() == (2,)


def test_keys_of_any_type_are_found(short: Connection) -> None:
    short.execute("""
        CREATE TABLE notes (day date, "of whom" text, at timestamptz, body text, PRIMARY KEY (day, "of whom", at));
        INSERT INTO notes VALUES
            ('2026-01-02', 'x"y', '2026-01-02 03:04+05', 'apple'), ('2026-01-02', E'\\n', 'now', 'pear');
        INSERT INTO notes SELECT '2026-01-03', n, 'now', 'apple apple' FROM generate_series(1, 40) AS n;
        SELECT autoembed.enable('notes', NULL, content_columns => '{body}', text_config => 'english');
        SELECT autoembed.process();
        SET TimeZone = 'Asia/Tokyo'; SET DateStyle = 'German';
    """)
    for mode in ("text", "hybrid"):
        row = short.execute(
            "SELECT (s.hit).body, s.text_score FROM autoembed.search("
            "NULL::notes, 'apple', max_rows => 1, mode => %s, condition => 'day = ''2.1.2026''') AS s",
            [mode],
        ).fetchone()
        assert row is not None and row.body == "apple" and row.text_score > 0


def test_a_long_text_is_found_by_its_last_words(short: Connection) -> None:
    short.execute("SELECT autoembed.create_model('fake', 'fake', 16); SELECT autoembed.set_default_model('fake')")
    attach(short, "'embedding'", ["considerable " * 40_000 + "apple", "considerable"])
    embed(short)
    assert short.execute("SELECT reason FROM autoembed.failed").fetchall() == []
    assert list(found(short, "apple")) == [1]


GONE = {
    "extension": "DROP EXTENSION autoembed CASCADE; CREATE EXTENSION autoembed CASCADE",
    "pipeline": "SELECT autoembed.disable('pages', drop => true)",
    "table": "DROP TABLE pages",
}


@STORAGES
@pytest.mark.parametrize("gone", GONE)
def test_what_a_session_keeps_of_an_index_is_not_used_for_the_next_one(
    db: Connection, connect: Callable[..., Connection], column: str, gone: str
) -> None:
    searcher = connect()
    define = "SELECT autoembed.create_model('test', 'fake', 16), autoembed.set_default_model('test')"
    db.execute(define)
    attach(db, column, ["red apple", "green apple", "pear"])
    assert found(searcher, "apple").keys() == {1, 2}
    before = segments(db)

    for statement in GONE[gone].split("; "):
        db.execute(statement.encode())
    db.execute("DROP TABLE IF EXISTS pages, pages_embeddings CASCADE")
    if gone == "extension":
        db.execute(define)
    attach(db, column, ["pear", "a plum", "red apple", "apple and apple", "nothing of it"])

    if gone == "extension":
        assert segments(db) == before
    assert found(searcher, "apple") == pytest.approx(bm25(db, passages_of(db, column), "apple"))
    assert found(searcher, "pear").keys() == {1}
