"""How many of the nearest rows search() finds under filters and row level security, over an HNSW index.

A table of subjects, filled one after the other: half of the queries are of a subject, half of none. tune() has looked
at it before, with other queries of both kinds. A tenant owns one subject, and asks about the others.
"""

from __future__ import annotations

import statistics

import numpy as np

from bench.systems.autoembed import Autoembed
from harness import Connection, Server

ROWS = 20_000
SUBJECTS = 50
DIMENSIONS = 64
QUERIES = 30
FOUND = 10
# The filters that leave rows out, and the column of their figures.
FILTERS = {
    "none": "true",
    "half": "id % 2 = 0",
    "tenth": "id % 10 = 0",
    "hundredth": "id % 100 = 0",
    "subject": "subject = 7",
    "subject_tenth": "subject = 7 AND id % 10 = 0",
}
CREATE = f"""
SELECT autoembed.create_model('subjects', 'fake', {DIMENSIONS});
CREATE TABLE pages (id integer PRIMARY KEY, subject integer NOT NULL, body text NOT NULL);
SELECT autoembed.enable('pages', NULL, content_columns => '{{body}}', model => 'subjects', enqueue_existing => false);
ALTER TABLE pages DISABLE TRIGGER USER;
CREATE ROLE tenant;
GRANT SELECT ON pages TO tenant;
SELECT autoembed.grant_usage('tenant');
CREATE POLICY own ON pages TO tenant USING (subject = 7);
"""
INDEX = """
SET max_parallel_maintenance_workers = 0;
CREATE INDEX ON pages_embeddings USING hnsw (embedding halfvec_cosine_ops);
ANALYZE;
"""
SEARCH = "SELECT (s.hit).id FROM autoembed.search(NULL::pages, %s, %s, condition => %s) AS s"
EMBED = "SELECT autoembed.embed(%s, 'subjects')::real[]"


def measure(server: Server, db: Connection, system: Autoembed) -> dict[str, float]:
    system.create(server, db)
    db.execute(CREATE.encode())
    random = np.random.default_rng(1)
    subjects = np.repeat(np.arange(SUBJECTS), ROWS // SUBJECTS)
    vectors = np.stack([_embedded(db, f"subject {n}") for n in range(SUBJECTS)])[subjects]
    vectors = _unit(vectors + random.normal(scale=1.0 / DIMENSIONS**0.5, size=vectors.shape))
    with db.cursor().copy("COPY pages FROM STDIN") as copy:
        for number, subject in enumerate(subjects):
            copy.write_row((number, int(subject), "text"))
    with db.cursor().copy(
        "COPY pages_embeddings (id, chunk_number, chunk_start, chunk_end, digest, embedding) FROM STDIN"
    ) as copy:
        for number, vector in enumerate(vectors.astype(np.float32)):
            copy.write_row((number, 1, 0, 4, "\\x", str(vector.tolist())))
    db.execute(INDEX)
    queries = [f"subject {n}" if n % 2 else f"question {n}" for n in range(QUERIES)]
    # The stored vectors are of 16 bits.
    stored = db.execute("SELECT embedding::vector::real[] FROM pages_embeddings ORDER BY id")
    kept = _unit(np.array([vector for (vector,) in stored]))
    similarities = kept @ np.stack([_embedded(db, query) for query in queries]).T

    untuned = _figures(db, "untuned", "true", queries, similarities)["untuned_recall"]
    others = [f"subject {n}" if n % 2 else f"question {n}" for n in range(QUERIES, 2 * QUERIES)]
    tune = "SELECT ef_search FROM autoembed.tune('pages', queries => %s)"
    [(candidates,)] = db.execute(tune, [others]).fetchall()

    figures: dict[str, float] = {}
    for name, condition in FILTERS.items():
        figures |= _figures(db, name, condition, queries, similarities)
    db.execute("ALTER TABLE pages ENABLE ROW LEVEL SECURITY; SET ROLE tenant")
    figures |= _figures(db, "policy", "true", queries, similarities)
    db.execute("RESET ROLE")
    for kind in ("recall", "worst", "share_of_rows"):
        figures[kind] = min(value for name, value in figures.items() if name.endswith(f"_{kind}"))
    return {**figures, "untuned": untuned, "candidates": candidates}


def _figures(
    db: Connection, name: str, condition: str, queries: list[str], similarities: np.ndarray
) -> dict[str, float]:
    """The mean and the worst recall, and the least share of the rows that there are."""
    matching = [key for (key,) in db.execute(f"SELECT id FROM pages WHERE {condition} ORDER BY id".encode())]
    wanted = min(FOUND, len(matching))
    recall, rows = [], []
    for number, query in enumerate(queries):
        found = [key for (key,) in db.execute(SEARCH, [query, FOUND, condition])]
        ordered = np.sort(similarities[matching, number])[::-1]
        # A row that is as near as the last one is as good. Ties of rounded vectors differ in the last digits.
        recall.append(sum(similarities[key, number] >= ordered[wanted - 1] - 1e-6 for key in found) / wanted)
        rows.append(len(found) / wanted)
    return {
        f"{name}_recall": statistics.fmean(recall),
        f"{name}_worst": min(recall),
        f"{name}_share_of_rows": min(rows),
    }


def _embedded(db: Connection, text: str) -> np.ndarray:
    [(vector,)] = db.execute(EMBED, [text]).fetchall()
    return np.array(vector)


def _unit(vectors: np.ndarray) -> np.ndarray:
    unit: np.ndarray = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit
