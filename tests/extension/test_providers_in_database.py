"""Models that are SQL functions, and models that are fakes: tables, lanes and searches with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from harness import Connection, is_settled, waiting, warnings_of
from lanes import Lane, running_lanes, stop_lanes
from waiting import wait_until

Connect = Callable[..., Connection]
Doors = pytest.mark.parametrize("door", ["process", "work"])

# Three numbers that follow from each text. {guard}: what goes before.
FUNCTION = """
CREATE SCHEMA IF NOT EXISTS app;
CREATE OR REPLACE FUNCTION app.embed_texts(texts text[]) RETURNS vector[] LANGUAGE plpgsql AS $$
BEGIN
    {guard}
    RETURN ARRAY(SELECT ARRAY[length(t.text), ascii(t.text), 1]::vector
                 FROM unnest(texts) WITH ORDINALITY AS t(text, n) ORDER BY t.n);
END $$
"""
POISON = "IF strpos(array_to_string(texts, ' '), 'poison') > 0 THEN {statement} END IF;"


def define(db: Connection, guard: str = "") -> None:
    db.execute(FUNCTION.replace("{guard}", guard))


@pytest.fixture
def mine(db: Connection) -> Connection:
    """A database with the model "mine", a function that embeds all texts."""
    define(db)
    db.execute("SELECT autoembed.create_model('mine', 'function', 3, 'app.embed_texts')")
    return db


def attach(db: Connection, model: str, *texts: str) -> None:
    """A table of these texts, embedded by the model, all waiting."""
    db.execute("CREATE TABLE notes (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, content text)")
    db.execute("SELECT autoembed.enable('notes', 'embedding', content_columns => '{content}', model => %s)", [model])
    for text in texts:
        db.execute("INSERT INTO notes (content) VALUES (%s)", [text])


def run(db: Connection, connect: Connect, door: str) -> None:
    if door == "process":
        while db.execute("SELECT read FROM autoembed.process()").fetchone() != (0,):
            pass
    else:
        with running_lanes(db, connect):
            wait_until(lambda: is_settled(db))


def embedded(db: Connection) -> dict[str, Any]:
    return dict(db.execute("SELECT content, embedding::vector::real[] FROM notes").fetchall())


def failed(db: Connection) -> list[tuple[Any, ...]]:
    return db.execute("SELECT excerpt, reason FROM autoembed.failed ORDER BY excerpt").fetchall()


def rest(db: Connection) -> Any:
    return db.execute("SELECT needs_attention, reason FROM autoembed.model_rest").fetchone()


def test_a_session_keeps_no_vector_of_a_function_that_was_replaced(mine: Connection) -> None:
    before = one(mine, "SELECT autoembed.embed('a text', 'mine')")
    assert one(mine, "SELECT autoembed.embed('a text', 'mine')") == before

    define(mine, "RETURN array_fill('[0,0,1]'::vector, ARRAY[cardinality(texts)]);")

    assert one(mine, "SELECT autoembed.embed('a text', 'mine')") == "[0,0,1]" != before


def one(db: Connection, sql: str) -> Any:
    row = db.execute(sql.encode()).fetchone()
    assert row is not None
    return row[0]


def wrappers(db: Connection) -> int:
    return int(one(db, "SELECT count(*) FROM pg_proc WHERE proname ~ '^_embed_(document|query)_'"))


# --- a function --------------------------------------------------------------------------------------


@Doors
def test_a_table_is_embedded_by_an_sql_function(mine: Connection, connect: Connect, door: str) -> None:
    attach(mine, "mine", "one", "three", "one")

    run(mine, connect, door)

    assert embedded(mine) == {"one": [3, 111, 1], "three": [5, 116, 1]}
    nearest = "SELECT content FROM notes ORDER BY embedding <=> autoembed.embed('three', 'mine') LIMIT 1"
    assert one(mine, nearest) == "three"
    assert one(mine, "SELECT ok FROM autoembed.doctor() WHERE subject = 'model mine'") is True


def test_a_lane_goes_on_with_what_comes_and_commits_as_it_goes(mine: Connection, connect: Connect) -> None:
    mine.execute("SELECT autoembed.alter_model('mine', max_inputs_per_request => 10)")
    attach(mine, "mine")
    with running_lanes(mine, connect):
        mine.execute("INSERT INTO notes (content) SELECT 'text ' || n FROM generate_series(1, 500) AS n")
        wait_until(lambda: is_settled(mine))
        mine.execute("UPDATE notes SET content = 'changed' WHERE id = 1")
        wait_until(lambda: is_settled(mine))

    assert one(mine, "SELECT count(*) FROM notes WHERE (embedding::vector::real[])[1] = length(content)") == 500


@pytest.mark.parametrize("limits", ["", ", max_requests_in_flight => 2"], ids=["without slots", "with slots"])
def test_a_function_that_refuses_some_texts_and_is_slow_with_others_holds_up_no_pass(
    mine: Connection, limits: str
) -> None:
    """If the request that asks whether it takes others at all is lost, the pass waits for its answer for ever."""
    slow = "IF strpos(array_to_string(texts, ' '), 'slow') > 0 THEN PERFORM pg_sleep(0.3 * cardinality(texts)); END IF;"
    define(mine, POISON.replace("{statement}", "RAISE 'not these words';") + slow)
    mine.execute(f"SELECT autoembed.alter_model('mine', timeout_seconds => 1{limits})")
    attach(mine, "mine", "first")
    mine.execute("SELECT autoembed.process()")
    mine.execute("INSERT INTO notes (content) SELECT 'poison ' || n FROM generate_series(1, 5) AS n")
    mine.execute("INSERT INTO notes (content) SELECT 'slow ' || n FROM generate_series(1, 5) AS n")

    mine.execute("SELECT autoembed.process(batch_size => 5, max_requests => 2)")

    assert one(mine, "SELECT count(*) FROM notes WHERE embedding IS NOT NULL") == 6
    assert one(mine, "SELECT count(*) FROM autoembed.failed") == 5
    assert one(mine, "SELECT count(*) FROM autoembed.slot WHERE pid IS NOT NULL") == 0
    assert is_settled(mine)


def test_halfvecs_do_as_well(db: Connection) -> None:
    db.execute(
        "CREATE FUNCTION public.halves(texts text[]) RETURNS halfvec[] LANGUAGE sql"
        " RETURN ARRAY(SELECT ARRAY[length(t), 0.5]::halfvec FROM unnest(texts) AS t)"
    )
    db.execute("SELECT autoembed.create_model('halves', 'function', 2, 'public.halves')")

    assert one(db, "SELECT autoembed.embed('seven..', 'halves')::text") == "[7,0.5]"


def test_queries_go_to_the_query_function(mine: Connection) -> None:
    mine.execute(
        "CREATE FUNCTION app.embed_queries(texts text[]) RETURNS vector[] LANGUAGE sql"
        " RETURN array_fill('[9,9,9]'::vector, ARRAY[cardinality(texts)])"
    )
    mine.execute("""SELECT autoembed.alter_model('mine', options => '{"query_function": "app.embed_queries"}')""")
    attach(mine, "mine", "one")

    mine.execute("SELECT autoembed.process()")

    assert embedded(mine) == {"one": [3, 111, 1]}
    assert one(mine, "SELECT autoembed.embed('one', 'mine')::text") == "[9,9,9]"
    assert wrappers(mine) == 2
    mine.execute("SELECT autoembed.alter_model('mine', options => '{}')")
    assert one(mine, "SELECT autoembed.embed('one', 'mine')::text") == "[3,111,1]"
    assert wrappers(mine) == 1


def test_names_that_need_quotes_work(db: Connection) -> None:
    db.execute('CREATE SCHEMA "My ""Schema"""')
    db.execute(
        'CREATE FUNCTION "My ""Schema"""."Its; DROP %I $1"(text[]) RETURNS vector[] LANGUAGE sql'
        " RETURN ARRAY['[1,2]'::vector]"
    )
    db.execute(
        "SELECT autoembed.create_model('it''s \"mine\"', 'function', 2, %s)", ['"My ""Schema"""."Its; DROP %I $1"']
    )

    assert one(db, "SELECT autoembed.embed('x', 'it''s \"mine\"')::text") == "[1,2]"


@Doors
@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("RAISE EXCEPTION 'not these words';", "not these words"),
        ("RAISE EXCEPTION 'not these words' USING ERRCODE = 'query_canceled';", "not these words"),
        ("RAISE EXCEPTION 'not these words' USING ERRCODE = 'admin_shutdown';", "not these words"),
        ("PERFORM 1 / 0;", "division by zero"),
        ("RETURN NULL;", "the function returned 0 vectors for 1 texts"),
        ("RETURN '{}';", "the function returned 0 vectors for 1 texts"),
        (
            "RETURN array_fill(NULL::vector, ARRAY[cardinality(texts)]);",
            "the function returned NULL in place of a vector",
        ),
    ],
)
def test_a_text_that_the_function_cannot_take_fails_alone(
    mine: Connection, connect: Connect, statement: str, reason: str, door: str
) -> None:
    define(mine, POISON.replace("{statement}", statement))
    attach(mine, "mine", "one", "two", "a poison", "four", "five")

    run(mine, connect, door)

    assert failed(mine) == [("a poison", reason)]
    assert [text for text, vector in embedded(mine).items() if vector is None] == ["a poison"]
    with pytest.raises(psycopg.errors.ExternalRoutineException, match=reason):
        mine.execute("SELECT autoembed.embed('poison', 'mine')")


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        ("RAISE EXCEPTION 'no model loaded';", "every request is refused: no model loaded"),
        ("RETURN ARRAY['[1]'::vector, '[1]'::vector];", "every request is refused: the function returned 2 vectors"),
        ("PERFORM app.nowhere();", "every request is refused: function app.nowhere"),
        (
            "RETURN array_fill('[1,2]'::vector, ARRAY[cardinality(texts)]);",
            "vectors have 2 dimensions, the model is defined with 3",
        ),
    ],
)
def test_a_function_that_takes_no_text_needs_attention_and_no_row_fails(
    mine: Connection, guard: str, reason: str
) -> None:
    define(mine, guard)
    attach(mine, "mine", "one", "two", "three")

    mine.execute("SELECT autoembed.process()")

    assert failed(mine) == []
    assert waiting(mine) == 3
    assert rest(mine).needs_attention
    assert reason in rest(mine).reason
    define(mine)
    mine.execute("SELECT autoembed.resume_model('mine')")
    mine.execute("SELECT autoembed.process()")
    assert waiting(mine) == 0


@pytest.mark.parametrize("errcode", ["serialization_failure", "lock_not_available", "connection_failure", "08P01"])
def test_an_error_that_passes_rests_the_model_and_fails_no_row(mine: Connection, errcode: str) -> None:
    define(mine, f"RAISE EXCEPTION 'not now' USING ERRCODE = '{errcode}';")
    attach(mine, "mine", "one", "two")

    row = mine.execute("SELECT completed, retried, failed, requests FROM autoembed.process()").fetchone()

    assert row == (0, 2, 0, 1)
    assert rest(mine) == (False, "not now")
    define(mine)
    mine.execute("SELECT autoembed.resume_model('mine')")
    mine.execute("SELECT autoembed.process()")
    assert embedded(mine) == {"one": [3, 111, 1], "two": [3, 116, 1]}


@pytest.mark.parametrize("call", ["SELECT autoembed.process()", "SELECT autoembed.embed('x', 'mine')"])
def test_a_timeout_ends_a_function_and_is_the_sessions_error(mine: Connection, call: str) -> None:
    define(mine, "PERFORM pg_sleep(60);")
    attach(mine, "mine", "one")
    mine.execute("SET statement_timeout = '500ms'")

    with pytest.raises(psycopg.errors.QueryCanceled):
        mine.execute(call)

    assert (waiting(mine), failed(mine), rest(mine)) == (1, [], None)


def test_a_cancelled_lane_gives_the_rows_of_its_function_back(mine: Connection, connect: Connect) -> None:
    define(mine, "PERFORM pg_sleep(60);")
    attach(mine, "mine", "one", "two")
    lane = Lane(connect())
    try:
        asleep = "SELECT count(*) FROM pg_stat_activity WHERE pid = %s AND wait_event = 'PgSleep'"
        # Between two looks at the queue it sleeps in Python.
        wait_until(lambda: mine.execute(asleep, [lane.pid]).fetchone() == (1,))
        mine.execute("SELECT pg_cancel_backend(%s)", [lane.pid])
        lane.join()
    finally:
        stop_lanes(mine)

    # The cancel may have come out of the function. The lane ends in good order, and the model rests.
    assert lane.error is None
    assert mine.execute("SELECT DISTINCT read_ct, vt <= clock_timestamp() FROM pgmq.q_embedding_jobs").fetchall() == [
        (0, True)
    ]
    assert failed(mine) == []
    assert "canceling statement due to user request" in str(rest(mine))


def test_what_the_function_does_besides_is_undone(mine: Connection) -> None:
    mine.execute("CREATE TABLE app.calls (at timestamptz)")
    define(mine, "INSERT INTO app.calls VALUES (now()); SET work_mem = '77MB';")

    assert one(mine, "SELECT autoembed.embed('x', 'mine')::text") == "[1,120,1]"

    assert one(mine, "SELECT count(*) FROM app.calls") == 0
    assert one(mine, "SELECT current_setting('work_mem') <> '77MB' AND to_regclass('left_over') IS NULL")


OTHERS = """
CREATE SCHEMA app;
CREATE FUNCTION app.of_one(content text) RETURNS vector LANGUAGE sql RETURN NULL::vector;
CREATE FUNCTION app.texts(texts text[]) RETURNS text[] LANGUAGE sql RETURN NULL::text[];
CREATE FUNCTION app.rows(texts text[]) RETURNS SETOF vector LANGUAGE sql AS 'SELECT NULL::vector';
CREATE PROCEDURE app.procedure(texts text[]) LANGUAGE sql AS '';
CREATE FUNCTION app.right(texts text[]) RETURNS vector[] LANGUAGE sql RETURN NULL::vector[];
"""


@pytest.mark.parametrize(
    ("arguments", "error", "sqlstate"),
    [
        ("'right'", 'names the function "right", which has to be a schema, a dot and a name', "22023"),
        ("'app.right(text[])'", r'names the function "app.right\(text\[\]\)", which has to be', "22023"),
        ("'a.b.c'", 'names the function "a.b.c", which has to be', "22023"),
        ("NULL", 'names the function "m", which has to be', "22023"),
        ("'app.of_one'", r"there is no function app.of_one\(text\[\]\)", "42883"),
        ("'app.texts'", r"function app.texts\(text\[\]\) does not return vector\[\] or halfvec\[\]", "42804"),
        ("'app.rows'", r"function app.rows\(text\[\]\) does not return", "42804"),
        ("'app.procedure'", r"function app.procedure\(text\[\]\) does not return", "42804"),
        ("'app.right', base_url => 'https://h'", "takes no base_url", "22023"),
        ("'app.right', api_key => 'env:KEY'", "takes no api_key", "22023"),
        ("""'app.right', options => '{"function": "x"}'""", "the option function, which", "22023"),
        ("""'app.right', options => '{"query_function": 5}'""", "option query_function .* is not a text", "22023"),
        ("""'app.right', options => '{"query_function": "right"}'""", 'names the function "right"', "22023"),
        ("""'app.right', options => '{"query_function": "app.texts"}'""", "app.texts.* does not return", "42804"),
    ],
)
def test_a_wrong_definition_of_a_function_model_is_one_clear_error(
    db: Connection, arguments: str, error: str, sqlstate: str
) -> None:
    db.execute(OTHERS)

    with pytest.raises(psycopg.Error, match=error) as caught:
        db.execute(f"SELECT autoembed.create_model('m', 'function', 3, {arguments})")

    assert caught.value.sqlstate == sqlstate
    assert one(db, "SELECT count(*) FROM autoembed.model WHERE name = 'm'") == 0
    assert wrappers(db) == 0


def test_a_function_that_is_not_there_yet_is_a_warning_and_used_once_it_is_confirmed(db: Connection) -> None:
    db.execute("CREATE SCHEMA app")
    with warnings_of(db) as heard:
        db.execute("SELECT autoembed.create_model('mine', 'function', 3, 'app.embed_texts')")
    assert heard == [
        'model "mine" cannot be used yet: there is no function app.embed_texts(text[])'
        " Create it; then SELECT autoembed.alter_model('mine')."
    ]
    attach(db, "mine", "one")
    db.execute("SELECT autoembed.process()")
    assert rest(db) == (True, "there is no function app.embed_texts(text[])")

    define(db)
    with pytest.raises(psycopg.Error, match=r"was not there, .* SELECT autoembed.alter_model\('mine'\) takes it"):
        db.execute("SELECT autoembed.embed('x', 'mine')")
    db.execute("SELECT autoembed.alter_model('mine')")

    assert one(db, "SELECT autoembed.embed('x', 'mine')::text") == "[1,120,1]"
    db.execute("SELECT autoembed.process()")
    assert embedded(db) == {"one": [3, 111, 1]}


@pytest.mark.parametrize(
    "end",
    ["drop_model('mine')", "alter_model('mine', provider => 'fake', options => '{}')"],
    ids=["dropped", "another"],
)
def test_what_was_made_for_a_function_model_goes_with_it(mine: Connection, end: str) -> None:
    assert wrappers(mine) == 1

    mine.execute(f"SELECT autoembed.{end}".encode())

    assert wrappers(mine) == 0
    mine.execute("DROP SCHEMA app CASCADE")


# --- a fake ------------------------------------------------------------------------------------------


def create_fake(db: Connection, options: str = "{}") -> None:
    db.execute("SELECT autoembed.create_model('test', 'fake', 8, options => %s)", [options])


@Doors
def test_a_table_is_embedded_by_a_fake_and_a_search_finds_the_row_that_says_it(
    db: Connection, connect: Connect, door: str
) -> None:
    create_fake(db)
    attach(db, "test", "one", "two", "three")

    run(db, connect, door)

    for text in ("one", "two", "three"):
        found = db.execute(
            "SELECT content, embedding <=> autoembed.embed(%s, 'test') AS distance FROM notes ORDER BY 2 LIMIT 1",
            [text],
        ).fetchone()
        assert found is not None
        assert (found.content, round(found.distance, 4)) == (text, 0)
    assert one(db, "SELECT tokens > 0 FROM autoembed.usage WHERE model = 'test'") is True


@Doors
def test_a_text_with_a_fault_fails_alone_and_comes_back_when_the_fault_ends(
    db: Connection, connect: Connect, door: str
) -> None:
    create_fake(db, '{"faults": [{"match": "poison", "status": 400, "message": "not these words"}]}')
    attach(db, "test", "one", "a poison", "three")

    run(db, connect, door)

    assert failed(db) == [("a poison", "the provider answered 400: not these words")]
    assert sum(vector is None for vector in embedded(db).values()) == 1
    db.execute("SELECT autoembed.alter_model('test', options => '{}')")
    db.execute("SELECT autoembed.retry_failed('notes')")
    run(db, connect, door)
    assert failed(db) == []
    assert None not in embedded(db).values()


@pytest.mark.parametrize(("status", "needs_attention"), [(401, True), (403, True), (429, False), (503, False)])
def test_a_fault_of_every_request_rests_the_model_until_it_ends(
    db: Connection, status: int, needs_attention: bool
) -> None:
    create_fake(db, f'{{"faults": [{{"status": {status}, "message": "no", "retry_after_seconds": 600}}]}}')
    attach(db, "test", "one")

    db.execute("SELECT autoembed.process()")

    assert rest(db) == (needs_attention, f"the provider answered {status}: no")
    asked = "SELECT until > clock_timestamp() + interval '9 minutes' FROM autoembed.model_rest"
    assert one(db, asked) is not needs_attention
    db.execute("SELECT autoembed.alter_model('test', options => '{}')")
    assert one(db, "SELECT completed FROM autoembed.process()") == 1


@pytest.mark.parametrize("call", ["SELECT autoembed.process()", "SELECT autoembed.embed('x', 'test')"])
def test_a_delay_ends_with_the_statement(db: Connection, call: str) -> None:
    create_fake(db, '{"delay_seconds": 50}')
    attach(db, "test", "one")
    db.execute("SET statement_timeout = '500ms'")

    with pytest.raises(psycopg.errors.QueryCanceled):
        db.execute(call)

    assert one(db, "SELECT clock_timestamp() - statement_timestamp() < interval '10 s'")
    assert waiting(db) == 1


def test_a_delay_beyond_the_timeout_is_no_answer(db: Connection) -> None:
    create_fake(db, '{"delay_seconds": 50}')
    attach(db, "test", "one")

    db.execute("SELECT autoembed.process(timeout_milliseconds => 200)")

    assert rest(db) == (False, "the fake provider did not answer within 0.2 s")


def test_a_wrong_option_of_a_fake_is_one_clear_error(db: Connection) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match='option faults of model "test" has a fault without'):
        create_fake(db, '{"faults": [{"match": "x"}]}')


@Doors
def test_vectors_of_all_lengths_are_written_whether_they_fit_in_a_page_or_not(
    db: Connection, connect: Connect, door: str
) -> None:
    """A row of 8,160 bytes fits in a page: one that does not is refused where nothing may be moved out of it."""
    kinds = [f"vector({n})" for n in (1, 1990, *range(2015, 2040), 3072, 16000)]
    kinds += [f"halfvec({n})" for n in (1, 3072, *range(4030, 4080, 2), 8192, 16000)]
    for number, kind in enumerate(kinds):
        dimensions = kind.partition("(")[2][:-1]
        db.execute(f"SELECT autoembed.create_model('fake {number}', 'fake', {dimensions})")
        db.execute(f"CREATE TABLE notes_{number} (id int PRIMARY KEY, content text, embedding {kind})")
        db.execute(
            f"SELECT autoembed.enable('notes_{number}', 'embedding', content_columns => '{{content}}',"
            f" model => 'fake {number}')"
        )
        db.execute(f"INSERT INTO notes_{number} VALUES (1, 'one'), (2, 'two')")

    run(db, connect, door)

    for number, kind in enumerate(kinds):
        [(is_right,)] = db.execute(
            f"SELECT bool_and(embedding = autoembed.embed(content, 'fake {number}')::{kind}) FROM notes_{number}"
        )
        assert is_right, kind
