"""Usage: the requests, texts, tokens and cost of each model, by column."""

from __future__ import annotations

from typing import Any

import pytest

from fake_api import FakeApi
from harness import Connection, insert

MODEL = "text-embedding-3-small"
TODAY = "(clock_timestamp() AT TIME ZONE 'UTC')::date"
NOTE_TRIGGER = (
    "CREATE TABLE notes (id int PRIMARY KEY, content text, embedding halfvec(1536));"
    "CREATE FUNCTION note_text(n notes) RETURNS text LANGUAGE sql AS 'SELECT n.content';"
    "CREATE TRIGGER embed AFTER INSERT ON notes FOR EACH ROW"
    " EXECUTE FUNCTION autoembed.queue_embeddings('note_text', 'embedding')"
)


def usage(db: Connection) -> list[tuple[Any, ...]]:
    """Table, requests, inputs, tokens of each line."""
    return db.execute(
        "SELECT table_name::text, requests, inputs, tokens FROM autoembed.usage ORDER BY day, table_name::text"
    ).fetchall()


def process(db: Connection, arguments: str = "") -> None:
    db.execute(f"SELECT autoembed.process({arguments})")


def test_requests_inputs_and_tokens_are_counted_as_the_provider_does_and_cost_their_price(
    documents: Connection, api: FakeApi
) -> None:
    """If tokens were estimated, they would be more than the provider's."""
    documents.execute("SELECT autoembed.alter_model(%s, price_per_million_tokens => 0.5)", [MODEL])
    insert(documents, *[f"text {number}" for number in range(20)])
    process(documents, "batch_size => 5")

    counters = api.counters()
    [row] = documents.execute(f"SELECT *, day = {TODAY} AS today FROM autoembed.usage").fetchall()
    assert (row.today, row.model, row.table_name, row.embedding_column) == (True, MODEL, "documents", "embedding")
    assert (row.requests, row.inputs, row.tokens) == (4, 20, counters["tokens"])
    assert float(row.cost) == pytest.approx(counters["tokens"] * 0.5 / 1_000_000, abs=1e-6)


def test_a_built_in_model_has_its_price(documents: Connection, api: FakeApi) -> None:
    insert(documents, "text " * 1000)
    process(documents)

    [row] = documents.execute("SELECT tokens, cost FROM autoembed.usage").fetchall()
    assert float(row.cost) == pytest.approx(row.tokens * 0.02 / 1_000_000, abs=1e-6)
    assert row.cost > 0


def test_what_has_no_price_has_no_cost(documents: Connection, api: FakeApi) -> None:
    documents.execute("UPDATE autoembed.model SET price_per_million_tokens = NULL WHERE name = %s", [MODEL])
    insert(documents, "text")
    process(documents)

    assert documents.execute("SELECT cost FROM autoembed.usage").fetchall() == [(None,)]


def test_embed_counts_for_no_table(db: Connection, api: FakeApi) -> None:
    for text in ("a question", "another one", "another one"):
        db.execute("SELECT autoembed.embed(%s)", [text])

    # The third time it was known.
    assert usage(db) == [(None, 2, 2, api.counters()["tokens"])]


def test_a_request_with_texts_of_two_tables_is_one_request_whose_tokens_are_shared(
    documents: Connection, api: FakeApi
) -> None:
    documents.execute(NOTE_TRIGGER)
    documents.execute("INSERT INTO notes SELECT n, repeat('note ', 20) || n FROM generate_series(1, 3) AS n")
    insert(documents, "one")
    process(documents)

    assert api.counters()["requests"] == 1
    (first, *of_documents), (second, *of_notes) = usage(documents)
    assert (first, second) == ("documents", "notes")
    assert of_documents[0] + of_notes[0] == 1
    assert (of_documents[1], of_notes[1]) == (1, 3)
    # Each share is rounded down.
    assert 0 <= api.counters()["tokens"] - of_documents[2] - of_notes[2] <= 1
    assert of_notes[2] > 10 * of_documents[2]


def test_a_text_of_two_tables_is_the_first_ones(documents: Connection, api: FakeApi) -> None:
    documents.execute(NOTE_TRIGGER)
    insert(documents, "one")
    documents.execute("INSERT INTO notes SELECT 1, embedding_input(d) FROM documents AS d")
    process(documents)

    assert sum(inputs for _, _, inputs, _ in usage(documents)) == 1


def test_only_what_was_answered_with_vectors_counts(documents: Connection, api: FakeApi) -> None:
    """A failed try and a refused text cost nothing; what it takes to find the text does."""
    api.behave(faults=[{"status": 429}])
    insert(documents, "good")
    process(documents)
    assert usage(documents) == []

    api.behave(faults=[{"status": 400, "match": "bad", "times": "forever"}])
    documents.execute("SELECT autoembed.resume_model(%s)", [MODEL])
    insert(documents, "bad")
    process(documents)

    assert documents.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (1,)
    assert sum(row[1] for row in usage(documents)) == api.counters()["statuses"]["200"]
    assert sum(row[3] for row in usage(documents)) == api.counters()["tokens"]


@pytest.mark.parametrize("age", ["11 minutes", "1 day", "1 month"])
def test_old_requests_are_added_up_and_lost_from_no_sum(documents: Connection, api: FakeApi, age: str) -> None:
    for content in ("one", "two"):
        insert(documents, content)
        process(documents)
        documents.execute("UPDATE autoembed.usage_entry SET at = at - %s::interval", [age])
    insert(documents, "three")
    process(documents)

    rows = usage(documents)
    assert sum(row[1] for row in rows) == 3
    assert sum(row[3] for row in rows) == api.counters()["tokens"]
    days = "SELECT DISTINCT day FROM autoembed.usage_day"
    then = f"SELECT ((clock_timestamp() - interval '{age}') AT TIME ZONE 'UTC')::date"
    assert documents.execute(days).fetchall() == documents.execute(then).fetchall()
    assert documents.execute("SELECT sum(requests) FROM autoembed.usage_day").fetchone() == (2,)
    assert documents.execute("SELECT count(*) FROM autoembed.usage_entry").fetchone() == (1,)


def test_usage_of_a_table_outlives_it(documents: Connection, api: FakeApi) -> None:
    insert(documents, "one")
    process(documents)
    before = usage(documents)
    documents.execute("DROP TABLE documents CASCADE")

    process(documents)

    assert usage(documents) == [(None, *before[0][1:])]
