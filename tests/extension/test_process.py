"""process(): one pass in the caller's transaction, and what is common to all passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import psycopg
import pytest

from fake_api import FakeApi, embedding_of
from harness import Connection, assert_fresh, insert, stored, waiting, warnings_of


def process(db: Connection, **arguments: Any) -> dict[str, Any]:
    named = ", ".join(f"{name} => {value}" for name, value in arguments.items())
    row = db.execute(f"SELECT * FROM autoembed.process({named})").fetchone()
    assert row is not None
    counts: dict[str, Any] = row._asdict()
    return counts


def test_texts_travel_together_in_as_few_requests_as_batch_size_allows(documents: Connection, api: FakeApi) -> None:
    insert(documents, *[f"text {n}" for n in range(25)])

    counts = process(documents, batch_size=10)

    assert counts == {"read": 25, "completed": 25, "retried": 0, "failed": 0, "requests": 3, "failed_jobs": []}
    assert sorted(len(request["texts"]) for request in api.log()) == [5, 10, 10]
    assert_fresh(documents)


def test_requests_are_in_flight_side_by_side_up_to_max_requests(documents: Connection, api: FakeApi) -> None:
    """With one thread for all requests one is in flight at a time."""
    # The very first request of a model goes alone, as its answer may tell limits.
    documents.execute("SELECT autoembed.embed('a question')")
    api.behave(delay_seconds=0.3)
    insert(documents, *[f"text {n}" for n in range(30)])

    counts = process(documents, batch_size=10, max_requests=3)

    assert counts["requests"] == 3
    assert api.counters()["max_in_flight"] == 3
    assert_fresh(documents)


def test_a_change_that_comes_now_does_not_wait_behind_messages_of_many_rows(db: Connection, api: FakeApi) -> None:
    """If the oldest message may fill the whole of a small claim, nothing newer is taken until all of them are done."""
    db.execute("SELECT autoembed.set_default_model('text-embedding-3-small')")
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('pages', 'embedding', content_columns => '{body}')")
    db.execute("INSERT INTO pages SELECT n, 'old ' || n FROM generate_series(1, 500) AS n")
    db.execute("INSERT INTO pages VALUES (0, 'new')")

    db.execute("SELECT autoembed.process(batch_size => 100, max_requests => 1)")

    done = "SELECT count(*) FILTER (WHERE id = 0) AS new, count(*) AS rows FROM pages WHERE embedding IS NOT NULL"
    assert db.execute(done).fetchone() == (1, 100)


def test_the_reply_is_matched_by_index_not_by_order(documents: Connection, api: FakeApi) -> None:
    """If vectors are taken in the order of the answer, rows get each other's."""
    api.behave(faults=[{"shuffled": True, "times": "forever"}])
    insert(documents, "one", "two", "three")

    process(documents)

    assert_fresh(documents)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        # The probe's answer.
        ({"wrong_count": True}, "0 vectors for 1 texts"),
        ({"wrong_count": 1}, "2 vectors for 1 texts"),
        ({"wrong_dimensions": 8}, "the provider's vectors have 8 dimensions, the model is defined with 1536"),
        ({"not_json": True}, "not in the form of the OpenAI API"),
        ({"cut_off": True}, "no answer from 127.0.0.1"),
        ({"close": True}, "no answer from 127.0.0.1"),
        ({"invalid_base64": True}, "not in the form of the OpenAI API"),
        ({"redirect": "http://127.0.0.1:8000/elsewhere/v1/embeddings"}, "307, a redirect, which is not followed"),
        ({"status": 401}, "the provider answered 401"),
        ({"status": 404}, "the provider answered 404"),
        ({"status": 503}, "the provider answered 503"),
    ],
)
def test_a_wrong_answer_writes_nothing_and_keeps_the_jobs(
    documents: Connection, api: FakeApi, fault: dict[str, Any], error: str
) -> None:
    """Each check taken out fails its own case: count, dimensions, form, redirect, broken connection, status."""
    insert(documents, "one", "two", "three")
    api.behave(faults=[{**fault, "times": "forever"}])

    counts = process(documents)

    assert (counts["read"], counts["completed"], counts["retried"], counts["failed"]) == (3, 0, 3, 0)
    assert all(error in failed["error"] for failed in counts["failed_jobs"])
    assert stored(documents) == {1: None, 2: None, 3: None}
    api.behave(faults=[])
    documents.execute("SELECT autoembed.resume_model('text-embedding-3-small')")
    process(documents)
    assert_fresh(documents)


def test_a_pass_that_is_rolled_back_has_not_been(documents: Connection) -> None:
    insert(documents, "one")

    with documents.transaction(force_rollback=True):
        assert process(documents)["completed"] == 1

    assert stored(documents) == {1: None}
    assert documents.execute("SELECT read_ct FROM pgmq.q_embedding_jobs").fetchall() == [(0,)]
    process(documents)
    assert_fresh(documents)


def test_rows_inserted_in_the_same_transaction_are_embedded(documents: Connection) -> None:
    with documents.transaction():
        insert(documents, "one", "two")
        assert process(documents)["completed"] == 2

    assert_fresh(documents)


def test_a_deleted_row_settles(documents: Connection, api: FakeApi) -> None:
    """If a row that is gone is not settled when texts are read, its job is never completed."""
    insert(documents, "one", "two")
    documents.execute("DELETE FROM documents WHERE id = 1")

    counts = process(documents)

    assert (counts["read"], counts["completed"]) == (2, 2)
    assert api.texts() == ["# t\n\ntwo"]
    assert_fresh(documents)


def test_a_row_queued_many_times_is_sent_once(documents: Connection, api: FakeApi) -> None:
    """If each message is a job of its own, the row is read six times."""
    insert(documents, "one")
    for n in range(5):
        documents.execute("UPDATE documents SET content = %s", [f"version {n}"])

    counts = process(documents)

    assert counts["read"] == 1
    assert api.texts() == ["# t\n\nversion 4"]
    assert_fresh(documents)


def test_equal_texts_are_sent_once(documents: Connection, api: FakeApi) -> None:
    """If texts are packed by row, the same one is sent three times."""
    insert(documents, "same", "other", "same", "same")

    process(documents)

    assert sorted(api.texts()) == ["# t\n\nother", "# t\n\nsame"]
    assert_fresh(documents)


def test_an_unchanged_text_is_not_sent_again(documents: Connection, api: FakeApi) -> None:
    """Without the digests of what is embedded, the text is sent again."""
    insert(documents, "one")
    process(documents)
    documents.execute("DROP TRIGGER clear_document_embedding_on_update ON documents")
    with documents.transaction():
        documents.execute("UPDATE documents SET content = 'changed'")
        documents.execute("UPDATE documents SET content = 'one'")

    counts = process(documents)

    assert (counts["completed"], counts["requests"]) == (1, 0)
    assert_fresh(documents)


def test_an_update_that_changes_nothing_costs_nothing(documents: Connection) -> None:
    """If the trigger does not compare the rows, it queues a job."""
    insert(documents, "one")
    process(documents)

    documents.execute("UPDATE documents SET title = title")

    assert_fresh(documents)


@pytest.mark.parametrize("content", [None, "", "  \n\t"])
def test_a_row_without_a_text_gets_no_embedding_and_no_request(
    documents: Connection, api: FakeApi, content: str | None
) -> None:
    """If only NULL counts as no text, blanks are sent; if no NULL is written, the old vector stays."""
    documents.execute(
        "CREATE OR REPLACE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE sql IMMUTABLE"
        " AS 'SELECT nullif(doc.content, ''none'')'"
    )
    insert(documents, "one")
    process(documents)
    documents.execute("DROP TRIGGER clear_document_embedding_on_update ON documents")
    documents.execute("UPDATE documents SET content = coalesce(%s, 'none')", [content])

    counts = process(documents)

    assert (counts["completed"], counts["requests"]) == (1, 0)
    assert stored(documents) == {1: None}
    assert waiting(documents) == 0


def test_one_row_that_is_refused_does_not_hold_up_the_others(documents: Connection, api: FakeApi) -> None:
    """If a refused request is not split, all its rows fail."""
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    insert(documents, *[f"text {n}" for n in range(63)], "poison")

    counts = process(documents)

    assert (counts["completed"], counts["failed"]) == (63, 1)
    assert counts["requests"] <= 2 * 6 + 2
    [failure] = documents.execute("SELECT table_name, key, error_class, excerpt FROM autoembed.failed").fetchall()
    assert failure == ("documents", "[64]", "row", "# t\n\npoison")
    assert waiting(documents) == 0


POISON: list[dict[str, Any]] = [
    *({"status": status} for status in (401, 403, 404, 409, 451, 500, 502)),
    {"redirect": "http://127.0.0.1:9/elsewhere"},
    {"close": True},
    {"cut_off": True},
    {"hang": 2},
]


@pytest.mark.parametrize("fault", POISON, ids=str)
def test_one_row_whose_text_its_provider_cannot_answer_does_not_hold_up_the_others(
    documents: Connection, api: FakeApi, fault: dict[str, Any]
) -> None:
    api.behave(faults=[{**fault, "match": "poison", "times": "forever"}])
    insert(documents, *[f"text {n}" for n in range(31)], "poison")

    passes = 0
    while documents.execute("SELECT count(*) FROM documents WHERE embedding IS NULL").fetchone() != (1,):
        process(documents, timeout_milliseconds=500)
        documents.execute("UPDATE autoembed.model_rest SET until = clock_timestamp()")
        passes += 1
    assert passes <= 2
    while documents.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,):
        documents.execute("UPDATE autoembed.model_rest SET until = clock_timestamp()")
        documents.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
        process(documents, timeout_milliseconds=500)

    assert documents.execute("SELECT key, attempts FROM autoembed.failed").fetchall() == [("[32]", 5)]
    assert waiting(documents) == 0


def test_calls_learn_how_many_texts_a_slow_server_takes(documents: Connection, api: FakeApi, connect: Any) -> None:
    """If each call begins with a full request, none of its answers ever comes in time."""
    api.behave(delay_seconds_per_input=0.02)
    insert(documents, *[f"text {n}" for n in range(40)])

    for _ in range(6):
        # Each call is in a session of its own.
        connect().execute("SELECT autoembed.process(timeout_milliseconds => 400)")
        documents.execute("UPDATE autoembed.model_rest SET until = clock_timestamp()")

    assert_fresh(documents)


def test_a_text_that_fells_its_server_for_longer_than_a_pass_waits_is_found_and_the_others_are_embedded(
    documents: Connection, api: FakeApi
) -> None:
    """If each pass begins with the same rows, the server falls for ever, and nothing is embedded."""
    process(documents)
    documents.execute(
        "DO LANGUAGE plpython3u $$ from autoembed import outbox; outbox.RESTART_SECONDS = 0.1;"
        " outbox.RESTART_POLL_SECONDS = 0.02 $$"
    )
    api.behave(faults=[{"fall": 0.5, "match": "poison", "times": "forever"}])
    insert(documents, *[f"text {n}" for n in range(40)], "poison", *[f"text {n}" for n in range(41, 100)])

    def missing() -> list[int]:
        return [row.id for row in documents.execute("SELECT id FROM documents WHERE embedding IS NULL").fetchall()]

    while waiting(documents):
        documents.execute("UPDATE autoembed.model_rest SET until = clock_timestamp()")
        documents.execute("UPDATE pgmq.q_embedding_jobs SET vt = clock_timestamp()")
        process(documents)

    falls = sum(request["fault"] == "fall" for request in api.log())
    assert missing() == [41]
    assert documents.execute("SELECT key, attempts FROM autoembed.failed").fetchall() == [("[41]", 5)]
    assert falls <= 3 + 7 + 5


def test_a_model_that_refuses_everything_rests_and_fails_no_row(documents: Connection, api: FakeApi) -> None:
    """Without the probe every row fails; if jobs of a resting model are claimed, the second pass reads them."""
    api.behave(faults=[{"status": 400, "times": "forever"}])
    insert(documents, *[f"text {n}" for n in range(64)])

    counts = process(documents)

    assert (counts["failed"], counts["retried"]) == (0, 64)
    assert counts["requests"] <= 2
    assert documents.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (0,)
    with warnings_of(documents) as heard:
        assert process(documents)["read"] == 0
    assert any("documents.embedding is not being embedded" in warning for warning in heard)


def test_a_long_queue_of_one_table_does_not_hold_up_another(documents: Connection, api: FakeApi) -> None:
    """If a claim takes the oldest messages of all pipelines, the note waits for 50 documents."""
    documents.execute("CREATE TABLE notes (id int PRIMARY KEY, content text, embedding halfvec(1536))")
    documents.execute("CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.content'")
    documents.execute(
        "CREATE TRIGGER embed AFTER INSERT ON notes FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding')"
    )
    insert(documents, *[f"text {n}" for n in range(50)])
    documents.execute("INSERT INTO notes VALUES (1, 'a note')")

    counts = process(documents, batch_size=10, max_requests=1)

    assert counts["read"] <= 10
    assert documents.execute("SELECT embedding IS NOT NULL FROM notes").fetchone() == (True,)


def test_a_failed_row_leaves_the_list_when_it_is_changed_or_retried(documents: Connection, api: FakeApi) -> None:
    """If embedding a row does not strike it off the list, it stays there."""
    api.behave(faults=[{"status": 400, "match": "poison", "times": "forever"}])
    insert(documents, "poison", "more poison", "fine")
    process(documents)
    assert documents.execute("SELECT key FROM autoembed.failed ORDER BY key").fetchall() == [("[1]",), ("[2]",)]

    documents.execute("UPDATE documents SET content = 'antidote' WHERE id = 1")
    process(documents)
    assert documents.execute("SELECT key FROM autoembed.failed").fetchall() == [("[2]",)]

    api.behave()
    assert documents.execute("SELECT autoembed.retry_failed('documents', 'row')").fetchone() == (1,)
    process(documents)
    assert documents.execute("SELECT key FROM autoembed.failed").fetchall() == []
    assert_fresh(documents)


def test_a_constraint_that_refuses_one_vector_fails_that_row_alone(documents: Connection) -> None:
    """If a write that fails is not halved, all three rows fail; if its error is not caught, the pass raises."""
    documents.execute("ALTER TABLE documents ADD CONSTRAINT no_two CHECK (id <> 2 OR embedding IS NULL)")
    insert(documents, "one", "two", "three")

    counts = process(documents)

    assert (counts["completed"], counts["failed"]) == (2, 1)
    [failure] = documents.execute("SELECT key, reason FROM autoembed.failed").fetchall()
    assert failure.key == "[2]"
    assert 'violates check constraint "no_two"' in failure.reason


def test_a_trigger_that_changes_the_text_with_every_write_fails_the_row_and_leaves_no_stale_vector(
    documents: Connection, api: FakeApi
) -> None:
    """Without the look at what was written, the row keeps the vector of the text before, and nobody is told."""
    documents.execute("ALTER TABLE documents ADD COLUMN version integer DEFAULT 0")
    documents.execute(
        "CREATE FUNCTION count_version() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN IF NEW.id = 1 THEN NEW.version := OLD.version + 1; END IF; RETURN NEW; END $$"
    )
    documents.execute("CREATE TRIGGER version BEFORE UPDATE ON documents FOR EACH ROW EXECUTE FUNCTION count_version()")
    documents.execute(
        "CREATE OR REPLACE FUNCTION embedding_input(doc documents) RETURNS text LANGUAGE sql IMMUTABLE"
        " AS 'SELECT doc.content || doc.version'"
    )
    insert(documents, "counted", "steady")

    counts = process(documents)

    assert (counts["completed"], counts["failed"]) == (1, 1)
    assert stored(documents)[1] is None
    assert stored(documents)[2] is not None
    [failure] = documents.execute("SELECT key, reason FROM autoembed.failed").fetchall()
    assert failure.key == "[1]"
    assert "a trigger of the table changes the text" in failure.reason


def test_a_uuid_key_works(db: Connection, api: FakeApi) -> None:
    db.execute(
        "CREATE TABLE notes (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), content text, embedding vector(1536))"
    )
    db.execute("CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.content'")
    db.execute(
        "CREATE TRIGGER embed AFTER INSERT OR UPDATE ON notes FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding')"
    )
    db.execute("INSERT INTO notes (content) VALUES ('a note')")

    assert process(db)["completed"] == 1

    [row] = db.execute("SELECT embedding::real[] AS v FROM notes").fetchall()
    assert np.allclose(row.v, embedding_of("a note"), atol=1e-5)
    # The trigger has no column list, yet our own write queued nothing.
    assert waiting(db) == 0


def test_a_row_in_a_partition_is_found_through_the_root(db: Connection, api: FakeApi) -> None:
    db.execute("CREATE TABLE logs (id bigint, content text, embedding halfvec(1536)) PARTITION BY RANGE (id)")
    db.execute("CREATE TABLE logs_low PARTITION OF logs FOR VALUES FROM (0) TO (10)")
    db.execute("CREATE TABLE logs_high PARTITION OF logs FOR VALUES FROM (10) TO (20)")
    db.execute("CREATE FUNCTION log_text(l logs) RETURNS text LANGUAGE sql AS 'SELECT l.content'")
    db.execute(
        "CREATE TRIGGER embed AFTER INSERT OR UPDATE OF content ON logs FOR EACH ROW"
        " EXECUTE FUNCTION autoembed.queue_embeddings('log_text', 'embedding')"
    )
    db.execute("INSERT INTO logs VALUES (1, 'low'), (11, 'high')")

    assert process(db)["completed"] == 2

    for row in db.execute("SELECT content, embedding::vector::real[] AS v FROM logs"):
        assert np.allclose(row.v, embedding_of(row.content), atol=1e-3)


def test_a_session_without_rights_on_the_queue_can_write_the_table(
    documents: Connection, connect: Callable[..., Connection], role: Callable[[str], str]
) -> None:
    clerk = role("clerk")
    documents.execute(f"GRANT SELECT, INSERT, UPDATE ON documents TO {clerk}")
    with connect(user=clerk) as session:
        insert(session, "from a clerk")
        session.execute("UPDATE documents SET content = 'changed by a clerk'")

    assert process(documents)["completed"] == 1

    assert_fresh(documents)


def test_a_transaction_in_which_it_cannot_work_is_told_in_a_sentence(db: Connection, connect: Any) -> None:
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute("SELECT autoembed.enable('notes', content_columns => '{body}')")
    db.execute("INSERT INTO notes VALUES (1, 'one')")
    reader, late = connect(), connect()
    reader.execute("SET default_transaction_read_only = on")
    late.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; TABLE notes")
    process(db)

    for session, state, message in (
        (reader, "25006", "cannot execute SELECT FOR UPDATE in a read-only transaction"),
        (late, "40001", "could not serialize access due to concurrent"),
    ):
        with pytest.raises(psycopg.Error) as refusal:
            process(session)
        diagnosis = refusal.value.diag
        assert (refusal.value.sqlstate, bool(diagnosis.message_hint)) == (state, True)
        assert str(diagnosis.message_primary).startswith(message)
        assert "Traceback" not in str(diagnosis.context)


@pytest.mark.parametrize("name", ["batch_size", "max_requests", "timeout_milliseconds"])
@pytest.mark.parametrize("value", ["0", "NULL"])
def test_an_argument_below_one_is_an_error(db: Connection, name: str, value: str) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue, match=f"{name} must be from 1 to"):
        process(db, **{name: value})
