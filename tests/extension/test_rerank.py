"""search(…, rerank_model => …): the best rows in the order of a rerank model, or as they were."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from fake_api import FakeApi, relevance_of
from harness import Connection, warnings_of
from waiting import wait_until

Connect = Callable[..., Connection]
Role = Callable[[str], str]

PROVIDERS = {
    "cohere": ("rerank-v3.5", ""),
    "voyage": ("rerank-2.5", "/voyage/v1"),
    "jina": ("jina-reranker-v2", "/v1"),
    "tei": ("any", "/tei"),
}
STORAGES = pytest.mark.parametrize("column", ["NULL", "'embedding'"], ids=["beside", "in the row"])
QUERY = "red apple pie"
# They have different numbers of the query's words, whatever their vectors are.
TEXTS = [f"text {n} {' '.join(QUERY.split()[: n % 4])}".strip() for n in range(40)]
DIMENSIONS = 32


@pytest.fixture
def pages(db: Connection, api: FakeApi) -> Connection:
    db.execute(
        "SELECT autoembed.create_model('short', 'openai', %s, model_id => 'text-embedding-3-small', base_url => %s,"
        " api_key => 'env:OPENAI_API_KEY')",
        [DIMENSIONS, api.base_url],
    )
    db.execute("SELECT autoembed.set_default_model('short')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    return db


def attach(db: Connection, column: str = "NULL", more: str = "") -> None:
    db.cursor().executemany("INSERT INTO pages (id, body) VALUES (%s, %s)", list(enumerate(TEXTS)))
    db.execute(f"SELECT autoembed.enable('pages', {column}, content_columns => '{{body}}' {more})")
    while db.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
        pass


def create(db: Connection, api: FakeApi, provider: str = "jina", more: str = "") -> None:
    model_id, path = PROVIDERS[provider]
    db.execute(
        f"SELECT autoembed.create_rerank_model('best', %s, %s, %s, api_key => 'env:OPENAI_API_KEY' {more})",
        [provider, model_id, api.root + path],
    )


def found(db: Connection, reranked: bool = True, words: str = QUERY, **options: Any) -> list[Any]:
    """The rows that a search finds: their ids and scores."""
    arguments = {"max_rows": 40, **({"rerank_model": "best"} if reranked else {}), **options}
    named = "".join(f", {name} => %({name})s" for name in arguments)
    return db.execute(
        f"SELECT (s.hit).id, s.score, s.rank FROM autoembed.search(NULL::pages, %(query)s{named}) AS s",
        {"query": words, **arguments},
    ).fetchall()


def ids(rows: list[Any]) -> list[int]:
    return [row.id for row in rows]


def share(text: str) -> float:
    return float(relevance_of(QUERY, text)[0])


def requests(api: FakeApi) -> list[dict[str, Any]]:
    return [request for request in api.log() if request["path"].endswith("/rerank")]


def expected(before: list[int], count: int = 32) -> list[int]:
    """The best of these ids in the order of the rerank model, equal ones as they were, and the rest behind them."""
    return sorted(before[:count], key=lambda key: -share(TEXTS[key])) + before[count:]


# --- the order ---------------------------------------------------------------------------------------


@STORAGES
@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_best_rows_come_in_the_order_of_the_model(
    pages: Connection, api: FakeApi, provider: str, column: str
) -> None:
    attach(pages, column)
    create(pages, api, provider)
    before = ids(found(pages, reranked=False))

    rows = found(pages)

    assert ids(rows) == expected(before) != before
    assert [row.rank for row in rows] == list(range(1, 41))
    assert [row.score for row in rows] == [share(TEXTS[row.id]) for row in rows[:32]] + [0.0] * 8
    [request] = requests(api)
    assert request["texts"] == [TEXTS[key] for key in before[:32]]


@pytest.mark.parametrize("mode", ["vector", "text", "hybrid"])
@STORAGES
def test_each_mode_is_reranked(pages: Connection, api: FakeApi, mode: str, column: str) -> None:
    attach(pages, column, ", text_config => 'simple'")
    create(pages, api)
    before = ids(found(pages, reranked=False, mode=mode))

    assert ids(found(pages, mode=mode)) == expected(before)


def test_the_pages_are_of_one_list_from_one_request(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api, more=", max_inputs_per_request => 10")
    before = ids(found(pages, reranked=False))

    in_pages = [row for skip in range(0, 42, 7) for row in found(pages, max_rows=7, skip_rows=skip)]

    assert ids(in_pages) == expected(before, 10)
    assert [row.rank for row in in_pages] == list(range(1, 41))
    assert len(requests(api)) == 1
    # A page behind the candidates needs no scores.
    found(pages, max_rows=7, skip_rows=10)
    assert len(requests(api)) == 1


def test_the_passage_is_sent_and_no_more_of_it_than_the_model_reads(pages: Connection, api: FakeApi) -> None:
    long = "\n\n".join(f"Paragraph {n}. " + "Words of no use. " * 30 for n in range(10))
    pages.execute("INSERT INTO pages VALUES (100, %s)", [long])
    attach(pages, more=", chunk_size => 100")
    create(pages, api, more=", max_tokens_per_input => 10")
    [(passage,)] = pages.execute("SELECT chunk FROM autoembed.search('pages', 'x', condition => 'id = 100')").fetchall()

    pages.execute("SELECT FROM autoembed.search('pages', 'x', condition => 'id = 100', rerank_model => 'best')")

    [request] = requests(api)
    [text] = request["texts"]
    assert passage.startswith(text)
    assert 10 < len(text) < len(passage)


def test_a_text_that_has_changed_is_sent_as_it_is_now(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api)
    pages.execute("UPDATE pages SET body = 'red apple pie of today' WHERE id = 4")

    assert ids(found(pages, condition="id IN (4, 5)")) == [4, 5]
    assert sorted(requests(api)[0]["texts"]) == sorted(["red apple pie of today", TEXTS[5]])


def test_rows_without_words_come_last(pages: Connection, api: FakeApi) -> None:
    attach(pages, "'embedding'")
    create(pages, api)
    pages.execute("ALTER TABLE pages DISABLE TRIGGER USER; UPDATE pages SET body = ' ' WHERE id IN (0, 3)")

    rows = found(pages, condition="id < 4")

    assert ids(rows)[:2] == [2, 1]
    assert [row.score for row in rows][2:] == [0.0, 0.0]
    assert len(requests(api)[0]["texts"]) == 2


@STORAGES
def test_rows_that_all_have_no_words_keep_their_order(pages: Connection, api: FakeApi, column: str) -> None:
    create(pages, api)
    attach(pages, column)
    before = found(pages, reranked=False, max_rows=5, skip_rows=2)
    pages.execute("UPDATE pages SET body = ' '")

    assert found(pages, max_rows=5, skip_rows=2) == before
    assert requests(api) == []


def test_scores_below_zero_are_above_those_of_the_rows_behind(pages: Connection) -> None:
    attach(pages)
    pages.execute("CREATE SCHEMA app")
    pages.execute(
        "CREATE FUNCTION app.logits(text, text[]) RETURNS double precision[] LANGUAGE sql"
        " RETURN ARRAY(SELECT -n FROM generate_series(1, cardinality($2)) AS n)"
    )
    pages.execute("SELECT autoembed.create_rerank_model('best', 'function', 'app.logits', max_inputs_per_request => 5)")
    before = ids(found(pages, reranked=False))

    rows = found(pages, max_rows=8)

    assert ids(rows) == before[:8]
    assert [row.score for row in rows] == [-1, -2, -3, -4, -5, -5, -5, -5]


def test_typed_rows_come_in_that_order_wherever_a_table_can_stand(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api)
    first = expected(ids(found(pages, reranked=False)))[:3]
    call = f"autoembed.search_rows(NULL::pages, '{QUERY}', max_rows => 3, rerank_model => 'best')"

    assert ids(pages.execute(f"SELECT id FROM {call}").fetchall()) == first
    pages.execute(f"CREATE VIEW best AS SELECT id FROM {call}")
    assert ids(pages.execute("TABLE best").fetchall()) == first
    pages.execute("SET default_transaction_read_only = on")
    assert ids(pages.execute("TABLE best").fetchall()) == first
    named = "SELECT key FROM autoembed.search('pages', %s, max_rows => 3, rerank_model => 'best')"
    assert [row.key for row in pages.execute(named, [QUERY])] == [f"[{key}]" for key in first]


def test_nothing_found_asks_nobody(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api)

    assert found(pages, condition="false") == found(pages, words=" ") == found(pages, max_rows=0) == []
    assert requests(api) == []


# --- without scores ----------------------------------------------------------------------------------

FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "status": ({"status": 503}, "the provider answered 503"),
    "key": ({"status": 401}, "the provider answered 401"),
    "hang": ({"hang": True}, "did not answer within"),
    # The answer may have begun in time.
    "slow": ({"slow_body": 60}, "0.5 s"),
    "close": ({"close": True}, "no answer from"),
    "nan": ({"nan": True}, "a score that is not a finite number"),
    "infinity": ({"infinity": True}, "a score that is not a finite number"),
    "too few": ({"wrong_count": -3}, "29 scores for 32 passages"),
    "too many": ({"wrong_count": 1000}, "1032 scores for 32 passages"),
    "twice": ({"duplicate_index": True}, "does not number its scores from 0 to 31, each once"),
    "no index": ({"missing_index": True}, "not in the form of the Jina API"),
    "gigantic": ({"big_body": 200 << 20}, "larger than 8 MiB"),
    "bomb": ({"gzip_body": 200 << 20}, "larger than 8 MiB"),
    "html": ({"not_json": True}, "not in the form of the Jina API"),
    "half a character": ({"status": 500, "body": '{"error": "\\ud800 \\u0000"}'}, "the provider answered 500"),
    "redirect": ({"redirect": "http://127.0.0.1:9/"}, "a redirect, which is not followed"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_without_scores_the_rows_keep_their_order_and_one_notice_says_why(
    pages: Connection, api: FakeApi, connect: Connect, fault: str
) -> None:
    attach(pages)
    create(pages, api, more=f", timeout_seconds => {0.5 if fault in ('hang', 'slow') else 30}")
    before = found(pages, reranked=False)
    order, reason = FAULTS[fault]
    api.amend(faults=[{**order, "times": "forever", "match": "text 7"}])
    session = connect()

    with warnings_of(session) as heard:
        rows = found(session)

    assert rows == before
    assert len(heard) == 1
    assert heard[0].startswith('the rows are not reranked, because model "best" gave no scores: ')
    assert reason in heard[0]
    assert "sk-test" not in heard[0]


def test_a_model_that_failed_is_asked_again(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api)
    before = ids(found(pages, reranked=False))
    api.amend(faults=[{"status": 503, "match": "text 7"}])

    assert ids(found(pages)) == before
    wait_until(lambda: ids(found(pages)) == expected(before))


def test_a_model_that_hangs_costs_a_session_little_time(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api, more=", timeout_seconds => 1.0")
    found(pages, reranked=False)
    api.amend(hold="text 7")
    with warnings_of(pages) as heard:
        found(pages)

        for _ in range(5):
            found(pages)

    assert len(requests(api)) == 1
    assert len(heard) == 6
    assert len(set(heard[1:])) == 1


def test_a_model_that_rests_tells_no_tenant_the_text_of_another(pages: Connection, role: Role) -> None:
    tenant_role = role("tenant")
    attach(pages)
    pages.execute(f"GRANT SELECT ON pages TO {tenant_role}; SELECT autoembed.grant_usage('{tenant_role}')")
    pages.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    pages.execute("CREATE POLICY own ON pages USING (id = current_setting('app.tenant')::int)")
    pages.execute("CREATE SCHEMA app")
    pages.execute(
        "CREATE FUNCTION app.strict(query text, passages text[]) RETURNS real[] LANGUAGE plpgsql AS $$"
        " BEGIN PERFORM pg_sleep(0.5); RAISE 'no score for %', passages; END $$"
    )
    pages.execute("SELECT autoembed.create_rerank_model('best', 'function', 'app.strict', timeout_seconds => 30)")
    pages.execute(f"SET ROLE {tenant_role}")

    with warnings_of(pages) as heard:
        for tenant in (7, 8):
            pages.execute(f"SET app.tenant = {tenant}")
            found(pages)
    pages.execute("RESET ROLE")

    assert 'no score for {"text 7' in heard[0]
    assert "gave no scores: it rests after an error: its provider is in trouble" in heard[1]
    assert "text 7" not in heard[1]


def test_a_cancel_ends_the_wait(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api, more=", timeout_seconds => 60")
    found(pages, reranked=False)
    api.amend(hold="text 7")
    pages.execute("SET statement_timeout = '1s'")

    began_at = time.monotonic()
    with pytest.raises(psycopg.errors.QueryCanceled):
        found(pages)

    assert time.monotonic() - began_at < 20


def test_a_spent_budget_is_a_reason(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api, more=", daily_token_budget => 10")
    before = ids(found(pages, reranked=False))
    assert ids(found(pages)) == expected(before)

    with warnings_of(pages) as heard:
        assert ids(found(pages, max_rows=20)) == expected(before)[:20]
        assert heard == []
        pages.execute("UPDATE pages SET body = 'today ' || body")
        found(pages)

    assert len(requests(api)) == 1
    assert "its budget of 10 tokens a day is used up" in heard[0]


def test_limits_hold_for_a_rerank_model(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api, more=", requests_per_minute => 1, timeout_seconds => 0.5")
    before = ids(found(pages, reranked=False))
    assert ids(found(pages)) == expected(before)

    with warnings_of(pages) as heard:
        assert ids(found(pages, condition="id > 0")) == [key for key in before if key > 0]

    assert "its limits allow no request for" in heard[0]
    assert len(requests(api)) == 1


def test_what_was_used_is_noted(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api, more=", price_per_million_tokens => 10")
    found(pages)
    found(pages, max_rows=5)

    [used] = pages.execute("SELECT * FROM autoembed.usage WHERE model = 'best'").fetchall()

    assert (used.requests, used.inputs, used.table_name) == (1, 32, None)
    assert used.tokens == api.counters()["tokens"] - sum(
        row.tokens for row in pages.execute("SELECT tokens FROM autoembed.usage WHERE model = 'short'")
    )
    assert used.cost > 0


# --- rights ------------------------------------------------------------------------------------------


def test_no_text_leaves_that_the_caller_may_not_read(
    pages: Connection, api: FakeApi, role: Role, connect: Connect
) -> None:
    attach(pages)
    create(pages, api)
    reader = role("reader")
    pages.execute(f"SELECT autoembed.grant_usage('{reader}'); GRANT SELECT ON pages TO {reader}")
    pages.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY")
    pages.execute(f"CREATE POLICY few ON pages TO {reader} USING (id < 5)")

    assert sorted(ids(found(connect(user=reader)))) == [0, 1, 2, 3, 4]
    assert sorted(requests(api)[0]["texts"]) == sorted(TEXTS[:5])


def test_a_row_that_is_wanted_no_more_is_sent_to_nobody(pages: Connection, api: FakeApi) -> None:
    pages.execute("ALTER TABLE pages ADD COLUMN secret boolean NOT NULL DEFAULT false")
    attach(pages, "NULL", ", condition => 'NOT secret'")
    create(pages, api)
    pages.execute("UPDATE pages SET secret = true, body = 'a secret' WHERE id = 3")

    found(pages)

    [request] = requests(api)
    assert not [text for text in request["texts"] if "secret" in text]


def test_who_may_not_embed_may_not_rerank(pages: Connection, api: FakeApi, role: Role, connect: Connect) -> None:
    attach(pages)
    create(pages, api)
    stranger = role("stranger")
    pages.execute(f"GRANT SELECT ON pages TO {stranger}; GRANT USAGE ON SCHEMA autoembed TO {stranger}")
    session = connect(user=stranger)

    for call in ("embed('x')", "_rerank('best', 'x', '{y}')", "search('pages', 'x', rerank_model => 'best')"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(f"SELECT autoembed.{call}".encode())
    assert requests(api) == []


def test_only_a_superuser_makes_a_rerank_model(pages: Connection, role: Role, connect: Connect) -> None:
    owner = role("owner")
    pages.execute(f"SELECT autoembed.grant_usage('{owner}')")
    session = connect(user=owner)

    for call in (
        "create_rerank_model('mine', 'jina')",
        "_scores('x', '{y}', 'best', '')",
        "_call_embedder('best', 'rerank', '{x}', 'y')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            session.execute(f"SELECT autoembed.{call}".encode())


# --- a function --------------------------------------------------------------------------------------

FUNCTION = """
CREATE SCHEMA IF NOT EXISTS app;
CREATE OR REPLACE FUNCTION app.relevance(query text, passages text[]) RETURNS {type} LANGUAGE plpgsql AS $$
BEGIN
    {body}
END $$
"""
RIGHT = "RETURN ARRAY(SELECT length(p) FROM unnest(passages) WITH ORDINALITY AS u(p, n) ORDER BY n);"


def define(db: Connection, body: str = RIGHT, type: str = "real[]") -> None:
    db.execute(FUNCTION.replace("{body}", body).replace("{type}", type))


@pytest.mark.parametrize("type", ["real[]", "double precision[]"])
def test_a_function_reranks(pages: Connection, type: str) -> None:
    attach(pages)
    define(pages, type=type)
    pages.execute("SELECT autoembed.create_rerank_model('best', 'function', 'app.relevance')")
    before = ids(found(pages, reranked=False))

    rows = found(pages)

    assert ids(rows)[:32] == sorted(before[:32], key=lambda key: -len(TEXTS[key]))
    assert rows[0].score == max(len(TEXTS[key]) for key in before[:32])
    # Another body is called again for the same query.
    define(pages, RIGHT.replace("length(p)", "-length(p)"), type)
    assert ids(found(pages)[:32]) == sorted(before[:32], key=lambda key: len(TEXTS[key]))
    pages.execute("SELECT autoembed.drop_model('best')")
    assert pages.execute("SELECT count(*) FROM pg_proc WHERE proname LIKE '\\_rerank\\_%%32'").fetchone() == (0,)


def test_a_timeout_of_the_statement_is_told_in_postgresqls_words(pages: Connection) -> None:
    attach(pages)
    define(pages, "PERFORM pg_sleep(60); RETURN NULL;")
    pages.execute("SELECT autoembed.create_rerank_model('best', 'function', 'app.relevance', timeout_seconds => 60)")
    pages.execute("SET statement_timeout = '500ms'")

    with pytest.raises(psycopg.errors.QueryCanceled) as refusal:
        found(pages)

    assert str(refusal.value.diag.message_primary).startswith("canceling statement due to")
    assert "Traceback" not in str(refusal.value.diag.context)


BODIES = {
    "an error": ("RAISE EXCEPTION 'out of order';", "out of order"),
    "NULL": ("RETURN NULL;", "returned 0 scores for 32 passages"),
    "nothing": ("RETURN '{}';", "returned 0 scores for 32 passages"),
    "too few": ("RETURN '{1}';", "returned 1 scores for 32 passages"),
    "too many": ("RETURN array_fill(1, ARRAY[1000000]);", "returned more scores for 32 passages"),
    "NaN": ("RETURN array_fill('NaN'::real, ARRAY[32]);", "a score that is not a finite number"),
    "infinity": ("RETURN array_fill('Infinity'::real, ARRAY[32]);", "a score that is not a finite number"),
    "a NULL": ("RETURN array_fill(NULL::real, ARRAY[32]);", "a score that is not a finite number"),
    "too long": ("PERFORM pg_sleep(60);", "was cancelled after"),
    "a cancel": ("RAISE EXCEPTION USING ERRCODE = 'query_canceled', MESSAGE = 'enough';", "enough"),
    "a transaction": ("COMMIT;", "invalid transaction termination"),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_function_that_gives_no_scores_leaves_the_order(pages: Connection, case: str) -> None:
    attach(pages)
    body, reason = BODIES[case]
    define(pages, body)
    pages.execute(
        "SELECT autoembed.create_rerank_model('best', 'function', 'app.relevance', timeout_seconds => %s)",
        [0.5 if case == "too long" else 30],
    )
    before = found(pages, reranked=False)

    with warnings_of(pages) as heard:
        assert found(pages) == before

    assert len(heard) == 1
    assert reason in heard[0]


def test_an_array_is_read_in_its_order_whatever_its_bounds(pages: Connection) -> None:
    attach(pages)
    define(pages, f"{RIGHT.replace('RETURN', 'passages :=')} RETURN ('[-3:28]=' || passages::text)::real[];")
    pages.execute("SELECT autoembed.create_rerank_model('best', 'function', 'app.relevance')")
    before = ids(found(pages, reranked=False))

    assert ids(found(pages))[:32] == sorted(before[:32], key=lambda key: -len(TEXTS[key]))


def test_a_function_runs_as_its_owner_and_leaves_nothing(pages: Connection, role: Role, connect: Connect) -> None:
    attach(pages)
    owner = role("owner")
    pages.execute(f"CREATE SCHEMA {owner} AUTHORIZATION {owner}")
    pages.execute(f"CREATE TABLE {owner}.seen (who text); ALTER TABLE {owner}.seen OWNER TO {owner}")
    session = connect(user=owner)
    session.execute(
        f"CREATE FUNCTION {owner}.relevance(query text, passages text[]) RETURNS real[] LANGUAGE plpgsql AS $$ BEGIN"
        f" INSERT INTO {owner}.seen VALUES (current_user); SET work_mem = '1MB'; PERFORM pg_advisory_lock(7);"
        " RETURN array_fill(length(current_user)::real, ARRAY[cardinality(passages)]); END $$"
    )
    pages.execute(f"SELECT autoembed.create_rerank_model('best', 'function', '{owner}.relevance')")
    work_mem = pages.execute("SHOW work_mem").fetchone()

    rows = found(pages)

    assert rows[0].score == len(owner)
    assert pages.execute(f"SELECT count(*) FROM {owner}.seen").fetchone() == (0,)
    assert pages.execute("SHOW work_mem").fetchone() == work_mem
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    assert pages.execute(held).fetchone() == (0,)


def test_another_owners_function_is_not_called(pages: Connection, role: Role) -> None:
    attach(pages)
    define(pages)
    pages.execute("SELECT autoembed.create_rerank_model('best', 'function', 'app.relevance')")
    pages.execute(f"ALTER FUNCTION app.relevance OWNER TO {role('other')}")

    with warnings_of(pages) as heard:
        found(pages)

    assert "had another owner, when the model was defined" in heard[0]


# --- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sqlstate", "message", "hint"),
    [
        (
            "search('pages', 'x', rerank_model => 'nosuch')",
            "42704",
            'model "nosuch" does not exist',
            "create_rerank_model()",
        ),
        (
            "search('pages', 'x', rerank_model => 'short')",
            "42809",
            'model "short" makes embeddings, and reranks nothing',
            "create_rerank_model()",
        ),
        ("search('pages', ' ', rerank_model => 'short')", "42809", "makes embeddings", "create_rerank_model()"),
        ("search('pages', 'x', rerank_model => '')", "42704", 'model "" does not exist', "create_rerank_model()"),
        ("embed('x', 'best')", "42809", 'model "best" reranks, and makes no embeddings', "create_model()"),
        ("set_default_model('best')", "42809", 'model "best" reranks', "create_model()"),
        ("alter_pipeline('pages', model => 'best')", "42809", 'model "best" reranks', "create_model()"),
        ("chunk_text('x', model => 'best')", "42809", 'model "best" reranks', "create_model()"),
        (
            "enable('pages', 'more', content_columns => '{body}', model => 'best')",
            "42809",
            'model "best" reranks',
            "create_model()",
        ),
        ("alter_model('best', dimensions => 5)", "42809", 'model "best" reranks, and has no dimensions', "Leave"),
        ("create_model('m', 'cohere', NULL)", "22004", 'model "m" needs dimensions', "create_rerank_model()"),
        ("create_model('m', 'jina', 5)", "22023", 'the provider "jina", which is not known', "create_rerank_model()"),
        ("create_rerank_model('m', 'openai')", "22023", 'the provider "openai", which reranks nothing', "cohere"),
        ("create_rerank_model('m', 'tei')", "22023", 'model "m" has no base_url', "/rerank"),
        ("create_rerank_model('m', 'cohere')", "22023", 'model "m" has no api_key', "env:NAME"),
        ("create_rerank_model('m', 'jina', api_key => 'sk-1234')", "22023", "api_key must say where", "env:NAME"),
        ("create_rerank_model('best', 'jina')", "42710", 'model "best" already exists', "alter_model"),
        ("create_rerank_model('m', 'function', 'app.texts')", "42804", "does not return real[]", "a score for each"),
        ("create_rerank_model('m', 'function', 'nosuch')", "22023", "a schema, a dot and a name", "double quotes"),
    ],
)
def test_a_mistake_is_one_sentence_with_a_hint(
    pages: Connection, api: FakeApi, call: str, sqlstate: str, message: str, hint: str
) -> None:
    attach(pages)
    create(pages, api)
    pages.execute("CREATE SCHEMA app")
    pages.execute("CREATE FUNCTION app.texts(text, text[]) RETURNS text[] LANGUAGE sql RETURN $2")

    with pytest.raises(psycopg.Error) as refusal:
        pages.execute(f"SELECT * FROM autoembed.{call}")

    assert refusal.value.sqlstate == sqlstate
    assert message in str(refusal.value.diag.message_primary)
    assert hint in str(refusal.value.diag.message_hint)
    assert "sk-1234" not in str(refusal.value)


def test_the_name_of_a_rerank_model_is_wrong_where_there_is_none(pages: Connection) -> None:
    attach(pages)

    with pytest.raises(psycopg.errors.UndefinedObject, match='rerank model "nosuch" does not exist') as refusal:
        found(pages, rerank_model="nosuch")

    assert refusal.value.diag.message_detail == "There is none yet."


@pytest.mark.parametrize(
    "content",
    ["content_function => 'its_text'", "content_columns => '{body}', condition => 'id > 0'"],
)
def test_texts_that_owners_code_tells_cannot_be_reranked(pages: Connection, api: FakeApi, content: str) -> None:
    pages.execute("CREATE FUNCTION its_text(p pages) RETURNS text LANGUAGE sql RETURN p.body")
    pages.execute("INSERT INTO pages VALUES (1, 'one')")
    pages.execute(f"SELECT autoembed.enable('pages', 'embedding', {content})")
    pages.execute("SELECT autoembed.process()")
    create(pages, api)

    with pytest.raises(psycopg.errors.FeatureNotSupported, match="because code of its owner tells their texts"):
        found(pages)
    assert requests(api) == []


def test_doctor_asks_each_rerank_model(pages: Connection, api: FakeApi) -> None:
    attach(pages)
    create(pages, api)
    pages.execute(
        "SELECT autoembed.create_rerank_model('gone', 'tei', base_url => %s, timeout_seconds => 1)",
        ["http://127.0.0.1:9"],
    )

    checks = {row.subject: row for row in pages.execute("SELECT * FROM autoembed.doctor()")}

    assert (checks["model best"].ok, checks["model best"].finding) == (True, "answers")
    assert not checks["model gone"].ok
    assert "no answer from 127.0.0.1" in checks["model gone"].finding
    assert "alter_model" in checks["model gone"].advice
