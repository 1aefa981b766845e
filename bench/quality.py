"""How well search() answers the questions of the FAQs of Perl and Python, by mode, and how long it takes."""

from __future__ import annotations

import math
import statistics
import time

from bench import manuals
from bench.systems.autoembed import Autoembed
from harness import Connection, Server
from waiting import wait_until

MODES = ("vector", "text", "hybrid")
FOUND = 10
ENABLE = """
SELECT autoembed.enable('sections', NULL, content_columns => '{body}', chunking => 'none', text_config => 'english')
"""
FIRST = "SELECT key FROM autoembed.search('sections', %s, max_rows => %s, mode => %s) ORDER BY rank"


def measure(server: Server, db: Connection, system: Autoembed) -> dict[str, float]:
    manuals.fetch(server)
    sections, questions = manuals.sections()
    system.create(server, db)
    db.execute("CREATE TABLE sections (id integer PRIMARY KEY, body text NOT NULL)")
    with db.cursor().copy("COPY sections FROM STDIN") as copy:
        for row in enumerate(sections):
            copy.write_row(row)
    db.execute(ENABLE)
    with system.running(server, db):
        wait_until(lambda: db.execute("SELECT count(*) FROM sections_embeddings").fetchone() == (len(sections),), 7200)
    db.execute("ANALYZE")
    figures: dict[str, float] = {"sections": len(sections), "questions": len(questions)}
    # In turns, so that a busy moment meets all modes.
    gains: dict[str, list[float]] = {mode: [] for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for text, answer in questions:
        db.execute("SELECT autoembed.embed_query('sections', %s)", [text])
        for mode in MODES:
            began = time.perf_counter()
            keys = [key for (key,) in db.execute(FIRST, [text, FOUND, mode])]
            seconds[mode].append(time.perf_counter() - began)
            gains[mode].append(1 / math.log2(2 + keys.index(f"[{answer}]")) if f"[{answer}]" in keys else 0.0)
    for mode in MODES:
        figures[f"{mode}_ndcg"] = statistics.fmean(gains[mode])
        figures[f"{mode}_seconds"] = statistics.median(seconds[mode])
    figures["hybrid_ratio"] = figures["hybrid_seconds"] / figures["vector_seconds"]
    return figures
