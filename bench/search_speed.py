"""How long search() takes, by mode, over the same vectors by SQL alone, with an HNSW index and a text index."""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterator

from bench.systems.autoembed import Autoembed
from harness import Connection, Server
from waiting import wait_until

QUERIES = 200
# The words of a language: few are in most texts, and most in few.
WORDS = 30_000
TITLE_WORDS, CONTENT_WORDS = 4, 60
QUERY_WORDS = (2, 3, 5, 9)
# Texts with the same words are near each other. An index knows that of real texts, and not of random vectors.
CREATE = r"""
CREATE FUNCTION bag_of_words(texts text[]) RETURNS vector[] LANGUAGE plpython3u AS $python$
import zlib
import numpy as np

known = GD.setdefault("bag_of_words", {})
vectors = []
for text in texts:
    vector = np.full(384, 1e-9)
    for word in text.split():
        if word not in known:
            known[word] = np.random.default_rng(zlib.crc32(word.encode())).standard_normal(384)
        vector += known[word]
    vectors.append("[" + ",".join("%.5f" % one for one in vector / np.linalg.norm(vector)) + "]")
return vectors
$python$;
SELECT autoembed.create_model('bag', 'function', 384, 'public.bag_of_words');
CREATE TABLE passages (id integer PRIMARY KEY, subject integer NOT NULL, title text NOT NULL, content text NOT NULL);
SELECT autoembed.enable(
    'passages', NULL, content_columns => '{title,content}', model => 'bag', chunking => 'none', text_config => 'english'
);
"""
INDEX = "CREATE INDEX ON passages_embeddings USING hnsw (embedding halfvec_cosine_ops)"
SETTINGS = "SET maintenance_work_mem = '4GB'; SET hnsw.ef_search = 100"
SQL_ALONE = """
SELECT p.* FROM passages AS p JOIN passages_embeddings AS e USING (id) ORDER BY e.embedding <=> %(vector)s::halfvec
LIMIT 10
"""
# What an application writes that embeds the text by autoembed.
SQL_AND_EMBED_QUERY = SQL_ALONE.replace(
    "%(vector)s::halfvec", "(SELECT autoembed.embed_query('passages', %(query)s))::halfvec"
)
SEARCH = "SELECT (s.hit).*, s.score FROM autoembed.search(NULL::passages, %(query)s{}) AS s"
FORMS = {
    "sql": SQL_ALONE,
    "embed_query": SQL_AND_EMBED_QUERY,
    "vector": SEARCH.format(", mode => 'vector'"),
    "text": SEARCH.format(", mode => 'text'"),
    "hybrid": SEARCH.format(""),
    "filtered": SEARCH.format(", condition => 'subject < 25'"),
}
# A role that does not own the table, as the sessions of most applications have.
READER = """
CREATE ROLE reader;
GRANT SELECT ON passages, passages_embeddings TO reader;
SELECT autoembed.grant_usage('reader');
"""
READER_FORMS = ("sql", "vector", "text", "hybrid")


def measure(server: Server, db: Connection, system: Autoembed, rows: int) -> dict[str, float]:
    system.create(server, db)
    db.execute(CREATE.encode())
    words = words_without_end(random.Random(1))
    with db.cursor().copy("COPY passages FROM STDIN") as copy:
        for number in range(rows):
            subject = number % 50
            copy.write_row((number, subject, text_of(words, TITLE_WORDS), text_of(words, CONTENT_WORDS)))
    began = time.monotonic()
    with system.running(server, db):
        embedded = "SELECT count(*) FROM passages_embeddings"
        wait_until(lambda: db.execute(embedded).fetchone() == (rows,), 600 + rows, pause_seconds=1)
        fill_seconds = time.monotonic() - began
        wait_until(lambda: _has_merged(db), 900, pause_seconds=1)
    db.execute("SELECT autoembed.unschedule()")
    db.execute(SETTINGS)
    began = time.monotonic()
    db.execute(INDEX)
    index_seconds = time.monotonic() - began
    db.execute("VACUUM ANALYZE")
    figures = {"fill_seconds": fill_seconds, "index_seconds": index_seconds}

    db.execute(READER)
    with server.connect() as reader:
        reader.execute("SET ROLE reader")
        reader.execute(SETTINGS)
        statements = {form: (db, statement) for form, statement in FORMS.items()}
        statements |= {f"reader_{form}": (reader, FORMS[form]) for form in READER_FORMS}
        seconds = _seconds(
            statements, [text_of(words, QUERY_WORDS[number % len(QUERY_WORDS)]) for number in range(QUERIES)]
        )
    for form, all_seconds in seconds.items():
        figures[f"{form}_seconds"] = statistics.median(all_seconds)
        figures[f"{form}_p95_seconds"] = statistics.quantiles(all_seconds, n=20)[-1]
    for form in seconds:
        alone = "reader_sql" if form.startswith("reader_") else "sql"
        figures[f"{form}_ratio"] = figures[f"{form}_seconds"] / figures[f"{alone}_seconds"]
        figures[f"{form}_p95_ratio"] = figures[f"{form}_p95_seconds"] / figures[f"{alone}_p95_seconds"]
    return figures


def _seconds(statements: dict[str, tuple[Connection, str]], queries: list[str]) -> dict[str, list[float]]:
    """How long each statement takes with each query."""
    seconds: dict[str, list[float]] = {form: [] for form in statements}
    # In turns, so that a busy moment meets all forms, and in any order, because the first of them finds fewer pages in
    # the processor's cache.
    chance = random.Random(2)
    for query in [*queries, *queries]:
        [(vector,)] = statements["sql"][0].execute("SELECT autoembed.embed_query('passages', %s)::text", [query])
        for form in chance.sample(list(statements), len(statements)):
            session, statement = statements[form]
            began = time.perf_counter()
            session.execute(statement.encode(), {"query": query, "vector": vector}).fetchall()
            seconds[form].append(time.perf_counter() - began)
    # The first round pays for caches.
    return {form: all_seconds[len(queries) :] for form, all_seconds in seconds.items()}


def _has_merged(db: Connection) -> bool:
    """Whether the lanes have merged the segments of the text index that they wrote."""
    return db.execute("SELECT FROM autoembed._segments_to_merge(true, 200000) WHERE segments IS NOT NULL").rowcount == 0


def words_without_end(chance: random.Random) -> Iterator[str]:
    """Words without end, the n-th of a list about as often as 1/n."""
    consonants, vowels = "bcdfghklmnprstvw", "aeiou"
    listed = [
        "".join(chance.choice(consonants) + chance.choice(vowels) for _ in range(chance.randint(2, 4)))
        for _ in range(WORDS)
    ]
    weights = list(itertools.accumulate(1 / (place + 10) for place in range(WORDS)))
    while True:
        yield from chance.choices(listed, cum_weights=weights, k=1000)


def text_of(words: Iterator[str], count: int) -> str:
    return " ".join(itertools.islice(words, count))
