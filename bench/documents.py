"""The table that every system embeds, and its texts: about 120 tokens each, English-like, the same in every run."""

from __future__ import annotations

import base64
import json
import random
import re
import urllib.request
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fake_api import FakeApi
from harness import Connection

MODEL = "text-embedding-3-small"
DIMENSIONS = 1536

TABLE = f"""
-- Rivals get a queue of their own.
DROP EXTENSION IF EXISTS autoembed CASCADE;
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE documents (
    id integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    title text NOT NULL,
    content text NOT NULL,
    embedding halfvec({DIMENSIONS}),
    created_at timestamptz DEFAULT now()
);
CREATE FUNCTION embedding_input(doc documents)
    RETURNS text
    LANGUAGE plpgsql
    IMMUTABLE
AS $plpgsql$
BEGIN
    RETURN '# ' || doc.title || E'\\n\\n' || doc.content;
END;
$plpgsql$;
CREATE TABLE source (id integer PRIMARY KEY, title text NOT NULL, content text NOT NULL);
"""
INDEX = "CREATE INDEX ON documents USING hnsw (embedding halfvec_cosine_ops)"

WORDS = re.findall(
    r"\w+",
    """
    a about after all an and answer archive as at backup batch because before between branch but by cache can change
    city cloud column commit copy cost country current data day each early engine every example fast field find first
    for forest from garden good great group hand has have history house if in index into is island it keep language
    large later learn letter light line list long machine many market measure memory message model month morning most
    mountain music must name never new night no north not note number of often old on one only open or order other
    page paper part people picture place plan point question queue quiet read reason record report result river road
    row same school search season second server short side small so some sound start stone story street system table
    test than that the their then there these they this time to town tree under until update use value vector very
    view village voice wait water way weather week when where which while wind winter with word work world write year
""",
)


def texts(count: int, first: int = 1) -> Iterator[tuple[int, str, str]]:
    """The number, title and content of so many rows; no two contents are the same."""
    for number in range(first, first + count):
        chosen = random.Random(number)
        sentences = (" ".join(chosen.choices(WORDS, k=chosen.randint(7, 13))) for _ in range(9))
        content = " ".join(sentence.capitalize() + "." for sentence in sentences)
        yield number, " ".join(chosen.choices(WORDS, k=4)).capitalize(), f"{content} ({number})"


def create(db: Connection, with_index: bool) -> None:
    db.execute(TABLE)
    if with_index:
        db.execute(INDEX)


def load(db: Connection, count: int, first: int = 1) -> None:
    """Texts for insert(), so that the time of an INSERT holds neither the network nor us."""
    with db.cursor().copy("COPY source FROM STDIN") as copy:
        for row in texts(count, first):
            copy.write_row(row)
    db.execute("ANALYZE source")


def insert(db: Connection, count: int, first: int = 1, table: str = "documents") -> None:
    """So many loaded texts in one statement."""
    db.execute(
        f"INSERT INTO {table} (title, content)"
        f" SELECT title, content FROM source WHERE id BETWEEN {first} AND {first + count - 1} ORDER BY id"
    )


def missing(db: Connection) -> int:
    [row] = db.execute("SELECT count(*) FROM documents WHERE embedding IS NULL")
    return int(row[0])


def vectors_of(api: FakeApi, inputs: list[str]) -> NDArray[np.float32]:
    """The fake API's vectors of these texts; asked without delay, beside the tenant that is measured."""
    body = json.dumps({"model": MODEL, "input": inputs, "encoding_format": "base64"}).encode()
    url = f"{api.control_url}/beside/v1/embeddings"
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-bench"}
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as reply:
        data = json.load(reply)["data"]
    raw = b"".join(base64.b64decode(item["embedding"]) for item in data)
    return np.frombuffer(raw, "<f4").reshape(len(inputs), DIMENSIONS)


def check(db: Connection, api: FakeApi, rows: int = 200) -> None:
    """Some rows have the vector of their own text, or the figures are worth nothing."""
    found = db.execute(
        "SELECT embedding_input(d), embedding::vector::text FROM documents AS d WHERE id IN"
        " (SELECT id FROM documents WHERE embedding IS NOT NULL ORDER BY md5(id::text) LIMIT %s)",
        [rows],
    ).fetchall()
    stored = np.array([json.loads(vector) for _, vector in found])
    if not np.allclose(stored, vectors_of(api, [text for text, _ in found]), atol=1e-3):
        raise ValueError("a row has the vector of another text")
