"""How search() by words does beside an index of pg_textsearch in the same server: time, and the rows that it finds.

Both are asked for the ten best rows of the same table, with all columns and the score.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from bench import manuals
from bench.search_speed import text_of, words_without_end
from bench.systems import pg_textsearch
from bench.systems.autoembed import Autoembed
from harness import Connection, Server
from waiting import wait_until

FOUND = 10
PASSAGE_WORDS, QUESTION_WORDS, FEW_WORDS = 64, 9, 3
RANDOM_QUERIES = 200
# The formula's usual parameters, which both have.
K1, B = 1.2, 0.75
UPKEEP_ROWS, UPKEEP_BATCHES = 1000, 30
# The inputs of a request: all of a batch, and the default.
INPUTS = {"upkeep_seconds": UPKEEP_ROWS, "upkeep_seconds_by_default": 100}

# Vectors are there because no row is in the text index without one.
CREATE = "CREATE EXTENSION pg_textsearch; SELECT autoembed.create_model('no_meaning', 'fake', 2)"
TABLE = "CREATE TABLE {table} (id integer PRIMARY KEY, content text NOT NULL)"
ENABLE = """
SELECT autoembed.enable(
    '{table}', NULL, content_columns => '{{content}}', model => 'no_meaning', chunking => 'none',
    text_config => {config}
)
"""
INDEX = "CREATE INDEX {table}_bm25 ON {table} USING bm25 (content) WITH (text_config = 'english')"
FORMS = {
    "index": """
SELECT p.*, p.content <@> to_bm25query(%(query)s, '{table}_bm25') AS score FROM {table} AS p
ORDER BY p.content <@> to_bm25query(%(query)s, '{table}_bm25') LIMIT 10
""",
    "text": "SELECT (s.hit).*, s.score FROM autoembed.search(NULL::{table}, %(query)s, mode => 'text') AS s",
}
LENGTHS = """
SELECT coalesce(sum(cardinality(w.positions)), 0)::int
FROM {table} AS p LEFT JOIN LATERAL unnest(to_tsvector('english', p.content)) AS w ON true GROUP BY p.id ORDER BY p.id
"""
POSTINGS = """
SELECT w.lexeme, array_agg(p.id) AS rows, array_agg(cardinality(w.positions)) AS counts
FROM {table} AS p, unnest(to_tsvector('english', p.content)) AS w WHERE w.lexeme = ANY (%s) GROUP BY 1
"""
TERMS = "SELECT lexeme, cardinality(positions) FROM unnest(to_tsvector('english', %s))"


def measure(server: Server, db: Connection, system: Autoembed, rows: int) -> dict[str, float]:
    pg_textsearch.install(server, db)
    manuals.fetch(server)
    with closing(server.connect()) as again:
        system.create(server, again)
        again.execute(CREATE)
        figures = {figure: _upkeep_seconds(again, inputs) for figure, inputs in INPUTS.items()}
        passages = manuals.passages()
        chance = random.Random(1)
        questions = [question for question, _ in manuals.sections()[1]]
        few = [" ".join(chance.sample(chance.choice(passages).split(), FEW_WORDS)) for _ in range(RANDOM_QUERIES)]
        figures |= _compared(server, again, system, "manuals", passages, {"questions": questions, "words": few})
        words = words_without_end(chance)
        passages = [text_of(words, PASSAGE_WORDS) for _ in range(rows)]
        questions, few = (
            [text_of(words, count) for _ in range(RANDOM_QUERIES)] for count in (QUESTION_WORDS, FEW_WORDS)
        )
        figures |= _compared(server, again, system, "random", passages, {"questions": questions, "words": few})
    for kind in ("questions", "words"):
        figures[f"{kind}_ratio"] = max(figures[f"{table}_{kind}_ratio"] for table in ("manuals", "random"))
    for form in FORMS:
        figures[f"same_by_{form}"] = min(value for name, value in figures.items() if name.endswith(f"_same_by_{form}"))
    return figures


def _compared(
    server: Server, db: Connection, system: Autoembed, table: str, passages: list[str], queries: dict[str, list[str]]
) -> dict[str, float]:
    db.execute(TABLE.format(table=table).encode())
    with db.cursor().copy(f"COPY {table} FROM STDIN".encode()) as copy:
        for row in enumerate(passages):
            copy.write_row(row)
    db.execute(ENABLE.format(table=table, config="'english'").encode())
    with system.running(server, db):
        count = f"SELECT count(*) FROM {table}_embeddings".encode()
        wait_until(lambda: db.execute(count).fetchone() == (len(passages),), 600 + len(passages), pause_seconds=1)
    db.execute("SELECT autoembed.unschedule()")
    wait_until(lambda: db.execute("SELECT count(*) FROM autoembed.lane").fetchone() == (0,), 60)
    _merge(db)
    db.execute(INDEX.format(table=table).encode())
    db.execute("VACUUM ANALYZE")
    exact = Exact.of(db, table, [query for some in queries.values() for query in some])
    figures: dict[str, float] = {f"{table}_rows": len(passages)}
    for kind, some in queries.items():
        # The first round pays for caches. In turns, so that a busy moment meets both, and in any order.
        seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        cpu_seconds: dict[str, list[float]] = {form: [] for form in FORMS}
        places: dict[str, list[bool]] = {form: [] for form in FORMS}
        chance = random.Random(2)
        for query in [*some, *some]:
            best = exact.best(query)
            for form in chance.sample(list(FORMS), len(FORMS)):
                statement = FORMS[form].format(table=table).encode()
                used = _cpu_seconds(db)
                began = time.perf_counter()
                found = db.execute(statement, {"query": query}).fetchall()
                seconds[form].append(time.perf_counter() - began)
                cpu_seconds[form].append(_cpu_seconds(db) - used)
                places[form] += best.places([row.id for row in found])
        for form in FORMS:
            counted = seconds[form][len(some) :]
            figures[f"{table}_{kind}_{form}_seconds"] = statistics.median(counted)
            figures[f"{table}_{kind}_{form}_cpu_seconds"] = statistics.median(cpu_seconds[form][len(some) :])
            figures[f"{table}_{kind}_{form}_p95_seconds"] = statistics.quantiles(counted, n=20)[-1]
            figures[f"{table}_{kind}_same_by_{form}"] = statistics.fmean(places[form])
        for figure in ("seconds", "p95_seconds", "cpu_seconds"):
            of_text, of_index = (figures[f"{table}_{kind}_{form}_{figure}"] for form in ("text", "index"))
            figures[f"{table}_{kind}_{figure.replace('seconds', 'ratio')}"] = of_text / of_index
    return figures


def _merge(db: Connection) -> None:
    """Merge the segments of the text index until there are few, as lanes do that have nothing else to do."""
    segments = "SELECT array_agg(id ORDER BY id) FROM autoembed.text_segment"
    before = None
    while before != (before := db.execute(segments).fetchone()):
        db.execute("SELECT autoembed.process()")


def _upkeep_seconds(db: Connection, inputs: int) -> float:
    """CPU of the session that embeds, for the text index alone, a row: over a table without one.

    Both tables get the same rows, a batch each in turns. Merging is counted.
    """
    words = words_without_end(random.Random(3))
    used: dict[str, float] = {}
    for table, config in ((f"bare_{inputs}", "NULL"), (f"indexed_{inputs}", "'english'")):
        used[table] = 0.0
        db.execute(TABLE.format(table=table).encode())
        db.execute(ENABLE.format(table=table, config=config).encode())
    tables = list(used)
    # The first batches pay for caches.
    for number in range(-2, UPKEEP_BATCHES):
        texts = [text_of(words, PASSAGE_WORDS) for _ in range(UPKEEP_ROWS)]
        tables.reverse()
        for table in tables:
            insert = f"INSERT INTO {table} SELECT %s + n, text FROM unnest(%s::text[]) WITH ORDINALITY AS t(text, n)"
            db.execute(insert.encode(), [number * UPKEEP_ROWS, texts])
            before = _cpu_seconds(db)
            while db.execute("SELECT read FROM autoembed.process(%s)", [inputs]).fetchone() != (0,):
                pass
            if number >= 0:
                used[table] += _cpu_seconds(db) - before
    return (used[f"indexed_{inputs}"] - used[f"bare_{inputs}"]) / (UPKEEP_ROWS * UPKEEP_BATCHES)


def _cpu_seconds(db: Connection) -> float:
    """Of the session's process, by the scheduler."""
    [(schedstat,)] = db.execute("SELECT pg_read_file('/proc/self/schedstat')")
    return int(schedstat.split()[0]) / 1e9


@dataclass(frozen=True)
class Best:
    """The scores of all rows, and the best of them."""

    scores: np.ndarray

    def places(self, found: Sequence[int]) -> list[bool]:
        """Whether the row at each place is the best one there, or has the same score."""
        wanted = np.sort(self.scores)[::-1][:FOUND]
        wanted = wanted[wanted > 0]
        scores = np.zeros(len(wanted))
        scores[: len(found)] = self.scores[list(found)][: len(wanted)]
        # Sums in single precision differ in the last digits.
        return [bool(one) for one in np.isclose(scores, wanted, rtol=1e-5)]


@dataclass(frozen=True)
class Exact:
    """BM25 by the book, from the words that PostgreSQL tells."""

    terms: dict[str, dict[str, int]]
    postings: dict[str, tuple[np.ndarray, np.ndarray]]
    norms: np.ndarray

    @classmethod
    def of(cls, db: Connection, table: str, queries: list[str]) -> Exact:
        terms = {query: dict(db.execute(TERMS, [query]).fetchall()) for query in queries}
        lengths = np.array([length for (length,) in db.execute(LENGTHS.format(table=table).encode())], float)
        listed = list({term for some in terms.values() for term in some})
        postings = db.execute(POSTINGS.format(table=table).encode(), [listed])
        return cls(
            terms,
            {term: (np.array(rows), np.array(counts, float)) for term, rows, counts in postings},
            K1 * (1 - B + B * lengths / lengths.mean()),
        )

    def best(self, query: str) -> Best:
        scores = np.zeros(len(self.norms))
        for term, occurrences in self.terms[query].items():
            if term in self.postings:
                rows, counts = self.postings[term]
                idf = np.log(1 + (len(scores) - len(rows) + 0.5) / (len(rows) + 0.5))
                scores[rows] += occurrences * idf * counts * (K1 + 1) / (counts + self.norms[rows])
        return Best(scores)
