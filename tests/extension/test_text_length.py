"""A server that refuses a text for its length: the text is cut, and what it takes is remembered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fake_api import FakeApi
from harness import Connection, Server
from lanes import running_lanes
from waiting import wait_until

Connect = Callable[..., Connection]
# Its end makes the fake server refuse it, and is gone when it is cut.
LONG = "a long text about databases and numbers " * 100 + "the end of {}"
SERVERS = {
    "Text Embeddings Inference": (413, {"error": "Input validation error: `inputs` must have less than 200 tokens"}),
    "vLLM": (400, {"message": "This model's maximum context length is 200 tokens. However, you requested 903 tokens"}),
    "llama.cpp": (500, {"error": {"message": "input is too large to process. increase the physical batch size"}}),
}


@pytest.fixture
def model(db: Connection, api: FakeApi, dbname: str) -> str:
    name = f"model_{dbname}"
    db.execute(
        "SELECT autoembed.create_model(%s, provider => 'openai', model_id => 'text-embedding-3-small',"
        " dimensions => 1536, base_url => %s, api_key => 'env:OPENAI_API_KEY')",
        [name, api.base_url],
    )
    return name


def refuse(api: FakeApi, server: str) -> None:
    status, body = SERVERS[server]
    fault: dict[str, Any] = {"status": status, "body": body, "match": "the end of", "times": "forever"}
    api.behave(faults=[fault])


@pytest.mark.parametrize("where", ["in the row", "beside"])
@pytest.mark.parametrize("kind", SERVERS)
def test_a_text_that_is_too_long_is_cut_and_embedded(
    db: Connection, api: FakeApi, connect: Connect, server: Server, model: str, kind: str, where: str
) -> None:
    refuse(api, kind)
    place = "'embedding', " if where == "in the row" else "chunking => 'none', "
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute(f"SELECT autoembed.enable('notes', {place}content_columns => '{{body}}', model => '{model}')")
    with running_lanes(db, connect):
        db.execute("INSERT INTO notes SELECT n, 'short ' || n FROM generate_series(1, 40) AS n")
        db.execute("INSERT INTO notes VALUES (41, %s), (42, %s)", [LONG.format("one"), LONG.format("two")])
        db.execute("SELECT autoembed.wait_until_fresh('notes', 40)")
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.embedded").fetchone() == (42,), 20)
        before = api.counters()["requests"]
        db.execute("INSERT INTO notes VALUES (43, %s)", [LONG.format("three")])
        assert db.execute("SELECT autoembed.wait_until_fresh('notes', 20)").fetchone() == (True,)
        # It is known by now how much the server takes.
        assert api.counters()["requests"] == before + 1

    assert db.execute("SELECT count(*) FROM autoembed.failure").fetchone() == (0,)
    cut = "SELECT array_agg(key ORDER BY key) AS keys FROM autoembed.embedded WHERE truncated"
    assert [row.keys for row in db.execute(cut)] == [["[41]", "[42]", "[43]"]]
    [told] = db.execute("SELECT finding FROM autoembed.doctor() WHERE subject = 'model ' || %s", [model]).fetchall()
    assert "it refused a longer text, so texts are cut at about" in told.finding
    log = "".join(part.decode() for part in server.container.get_logs())
    assert log.count(f'autoembed cuts texts for model "{model}" at about') == 1

    db.execute(f"SELECT autoembed.alter_model('{model}', max_tokens_per_input => 4000)")
    assert db.execute("SELECT count(*) FROM autoembed.model_limit WHERE model = %s", [model]).fetchone() == (0,)


def test_chunks_that_are_too_long_become_shorter_ones(
    db: Connection, api: FakeApi, connect: Connect, model: str
) -> None:
    """The end of the text is embedded, too."""
    # A chunk that ends in it is refused if it is long, as all of its words are in it.
    api.behave(
        faults=[
            {
                "status": 413,
                "match": ("a long text about databases and numbers " * 40).strip(),
                "times": "forever",
            }
        ]
    )
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute(f"SELECT autoembed.enable('notes', content_columns => '{{body}}', model => '{model}')")
    db.execute("INSERT INTO notes VALUES (1, %s)", [LONG.format("one")])
    with running_lanes(db, connect):
        assert db.execute("SELECT autoembed.wait_until_fresh('notes', 40)").fetchone() == (True,)

    [chunks] = db.execute("SELECT count(*) AS number, max(chunk_end) AS last FROM notes_embeddings").fetchall()
    assert chunks.number > 1
    assert chunks.last == len(LONG.format("one"))


def test_a_text_that_must_not_be_cut_fails_with_the_servers_reason(
    db: Connection, api: FakeApi, connect: Connect, model: str
) -> None:
    refuse(api, "vLLM")
    db.execute("CREATE TABLE notes (id int PRIMARY KEY, body text)")
    db.execute(
        "SELECT autoembed.enable('notes', 'embedding', content_columns => '{body}', truncate => false, model => %s)",
        [model],
    )
    db.execute("INSERT INTO notes VALUES (1, 'short'), (2, %s)", [LONG.format("one")])
    with running_lanes(db, connect):
        wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.failed").fetchone() == (1,), 40)

    [failed] = db.execute("SELECT key, reason FROM autoembed.failed").fetchall()
    assert failed.key == "[2]"
    assert "maximum context length is 200 tokens" in failed.reason
    assert db.execute("SELECT count(embedding) FROM notes").fetchone() == (1,)
