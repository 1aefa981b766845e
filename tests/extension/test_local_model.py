"""The local model of the image: its vectors against the original's, and what is said when its files are damaged."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from harness import Connection, Server

Array = np.ndarray[Any, np.dtype[Any]]

REFERENCE = json.loads((Path(__file__).parent.parent / "data" / "minilm_reference.json").read_text(encoding="utf-8"))
# The vectors of the original model, made by tests/data/make_minilm_reference.py.
VECTORS = {
    item["text"]: np.frombuffer(base64.b64decode(item["vector"]), "<f4").astype(float) for item in REFERENCE["texts"]
}
MODEL_FOLDER = "/usr/local/share/autoembed/models/all-MiniLM-L6-v2"
DAMAGED_FOLDER = "/var/tmp/damaged-model"

NOTES = """
CREATE TABLE notes (id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY, content text, embedding vector(384));
CREATE FUNCTION content_of(note notes) RETURNS text LANGUAGE sql IMMUTABLE RETURN note.content;
CREATE TRIGGER embed AFTER INSERT ON notes
    FOR EACH ROW EXECUTE FUNCTION autoembed.queue_embeddings('content_of', 'embedding');
"""


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def embedded(db: Connection, text: str) -> Array:
    row = db.execute("SELECT autoembed.embed(%s)::real[]", [text]).fetchone()
    assert row is not None
    return np.array(row[0])


def processed(db: Connection, texts: list[str], batch_size: int) -> tuple[int, list[Array]]:
    """The number of requests that process() made of new rows with these texts, and their vectors."""
    db.execute("TRUNCATE notes")
    db.cursor().executemany("INSERT INTO notes (content) VALUES (%s)", [(text,) for text in texts])
    counts = db.execute("SELECT * FROM autoembed.process(%s, 100)", [batch_size]).fetchone()
    assert counts is not None
    assert (counts.completed, counts.failed_jobs) == (len(texts), [])
    rows = db.execute("SELECT embedding::real[] FROM notes ORDER BY id").fetchall()
    return counts.requests, [np.array(row[0]) for row in rows]


def test_each_reference_text_has_the_original_models_vector(db: Connection) -> None:
    cosines = {text: cosine(embedded(db, text), vector) for text, vector in VECTORS.items()}

    assert len(cosines) == 20
    assert {text: value for text, value in cosines.items() if not value >= 0.999} == {}


def test_a_text_has_the_same_vector_alone_and_in_a_batch_of_mixed_lengths(db: Connection) -> None:
    db.execute(NOTES)
    texts = [*VECTORS, *("database " * length for length in range(1, 60))]

    alone_requests, alone = processed(db, texts, batch_size=1)
    together_requests, together = processed(db, texts, batch_size=len(texts))

    assert (alone_requests, together_requests) == (len(texts), 1)
    cosines = {text: cosine(a, b) for text, a, b in zip(texts, alone, together, strict=True)}
    assert {text: value for text, value in cosines.items() if not value >= 0.99999} == {}


def test_a_longer_text_is_cut_after_256_tokens(db: Connection) -> None:
    db.execute(NOTES)
    # "database" is one token, and the model adds one at either end.
    fits, full = "database " * 253, "database " * 254

    _, vectors = processed(db, [fits + "rain", fits + "fire", full + "rain", full + "fire" * 100_000], batch_size=4)

    assert cosine(vectors[0], vectors[1]) < 0.99999
    assert cosine(vectors[2], vectors[3]) >= 0.99999


@pytest.mark.parametrize("where", ["embedding_column => 'embedding'", "chunking => 'none'"])
def test_a_text_that_the_model_has_cut_is_told_or_refused(db: Connection, where: str) -> None:
    db.execute("CREATE TABLE pages (id int PRIMARY KEY, body text)")
    db.execute(f"SELECT autoembed.enable('pages', content_columns => '{{body}}', {where})")
    db.execute("INSERT INTO pages VALUES (1, repeat('database ', 254)), (2, repeat('database ', 255))")
    preview = "SELECT tokens, truncated FROM autoembed.preview('pages', %s)"

    db.execute("SELECT autoembed.process()")

    assert [db.execute(preview, [key]).fetchone() for key in ("1", "2")] == [(256, False), (257, True)]
    assert db.execute("SELECT key, truncated FROM autoembed.embedded ORDER BY key").fetchall() == [
        ("[1]", False),
        ("[2]", True),
    ]
    assert db.execute("SELECT inputs, tokens FROM autoembed.usage").fetchall() == [(2, 512)]

    db.execute("SELECT autoembed.alter_pipeline('pages', truncate => false), autoembed.reembed('pages')")
    db.execute("SELECT autoembed.process()")

    assert db.execute("SELECT key, reason FROM autoembed.failed").fetchall() == [
        ("[2]", "the text has more than the 256 tokens that the model takes")
    ]


@pytest.fixture
def damage(server: Server) -> Iterator[Callable[[str], None]]:
    """Copies the model's folder to DAMAGED_FOLDER and runs a command there."""

    def run(command: str) -> None:
        script = f"cp -r {MODEL_FOLDER} {DAMAGED_FOLDER} && cd {DAMAGED_FOLDER} && {command}"
        result = server.container.exec(["sh", "-c", script])
        assert result.exit_code == 0, result.output

    yield run
    server.container.exec(["rm", "-r", DAMAGED_FOLDER])


@pytest.mark.parametrize(
    ("command", "file", "trouble"),
    [
        ("rm model.onnx", "model.onnx", "does not exist on the server"),
        ("rm tokenizer.json", "tokenizer.json", "does not exist on the server"),
        ("rm model.onnx.data", "model.onnx", "cannot be loaded"),
        ("truncate --size=10K model.onnx", "model.onnx", "cannot be loaded"),
        ("truncate --size=10K tokenizer.json", "tokenizer.json", "cannot be loaded"),
        ("truncate --size=10K model.onnx.data", "model.onnx", "cannot be loaded"),
        ("chmod go= model.onnx.data", "model.onnx", "cannot be loaded"),
    ],
)
def test_a_damaged_model_is_one_error_that_names_the_file(
    db: Connection, damage: Callable[[str], None], command: str, file: str, trouble: str
) -> None:
    damage(command)
    db.execute("SELECT autoembed.create_model('damaged', 'local', 384, base_url => %s)", [DAMAGED_FOLDER])

    with pytest.raises(psycopg.errors.ExternalRoutineException) as caught:
        db.execute("SELECT autoembed.embed('x', 'damaged')")

    message = caught.value.diag.message_primary or ""
    assert 'model "damaged" gave no embedding: ' in message
    assert f"{DAMAGED_FOLDER}/{file} {trouble}" in message
    assert "\n" not in message
    assert cosine(embedded(db, "database"), VECTORS["database"]) >= 0.999
