"""The report: results.json with every figure, a README.md with the medians, and a chart of the drains."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure

from bench.results import Result, Results
from bench.targets import TARGETS
from extension.hostile.attacks import ATTACKS

# In the order of tables and chart.
LABELS = {
    "autoembed": "autoembed, defaults",
    "autoembed-best": "autoembed, 2 lanes",
    "autoembed-local": "autoembed, local model",
    "guide": "the guide, defaults",
    "guide-best": "the guide at its best",
    "pgai": "pgai, defaults",
    "pgai-best": "pgai at its best",
    "limit-1": "the limit of 1 connection",
    "limit-2": "the limit of 2 connections",
    "chunks-autoembed": "autoembed",
    "chunks-semantic": "semantic-text-splitter, Markdown",
    "chunks-pgai": "pgai, defaults",
    "chunks-fixed": "256 tokens each",
    **{name: attack.label for name, attack in ATTACKS.items()},
}
LINES = {
    "autoembed": {"color": "tab:blue", "linestyle": "--"},
    "autoembed-best": {"color": "tab:blue", "linestyle": "-"},
    "guide": {"color": "tab:orange", "linestyle": "--"},
    "guide-best": {"color": "tab:orange", "linestyle": "-"},
    "pgai": {"color": "tab:green", "linestyle": "--"},
    "pgai-best": {"color": "tab:green", "linestyle": "-"},
    "limit-1": {"color": "grey", "linestyle": ":"},
    "limit-2": {"color": "grey", "linestyle": "-."},
}
Columns = dict[str, tuple[str, float]]

DRAIN: Columns = {
    "rows/s": ("rows_per_second", 1),
    "requests": ("requests", 1),
    "inputs per request": ("inputs_per_request", 1),
    "most in flight": ("most_in_flight", 1),
    "CPU s, Postgres": ("postgres_cpu_seconds", 1),
    "CPU s, worker": ("worker_cpu_seconds", 1),
    "CPU s, all else": ("other_cpu_seconds", 1),
    "WAL, MB": ("wal_bytes", 1e-6),
    "private MB": ("private_bytes", 1e-6),
    "INSERT, ms": ("insert_seconds", 1000),
}
FRESHNESS: Columns = {"rows": ("inserted", 1), "p50, ms": ("p50_seconds", 1000), "p99, ms": ("p99_seconds", 1000)}
NEIGHBOURS: Columns = {
    "alone: p50, ms": ("alone_p50_seconds", 1000),
    "p99": ("alone_p99_seconds", 1000),
    "worst": ("alone_worst_seconds", 1000),
    "beside it: p50, ms": ("p50_seconds", 1000),
    "p99, ms": ("p99_seconds", 1000),
    "worst, ms": ("worst_seconds", 1000),
    "rows": ("inserted", 1),
    "lanes lost": ("lanes_lost", 1),
}
COST: Columns = {
    "INSERT of many rows, ×": ("insert_ratio", 1),
    "its ms": ("insert_seconds", 1000),
    "single-row INSERTs, ×": ("insert_single_ratio", 1),
    "UPDATE of other columns, all rows, ×": ("update_other_ratio", 1),
    "row by row, ×": ("update_other_single_ratio", 1),
}
BESIDE: Columns = {
    "UPDATE of another column, 1,000 rows, ×": ("update_beside_ratio", 1),
    "vectors in the rows": ("update_in_rows_ratio", 1),
    "row by row, ×": ("single_beside_ratio", 1),
    "in the rows": ("single_in_rows_ratio", 1),
    "rows/s without an index": ("fill_beside_rows_per_second", 1),
    "rows/s in the rows": ("fill_in_rows_rows_per_second", 1),
    "the table grows, %": ("beside_growth", 100),
    "the table in the rows, %": ("in_rows_growth", 100),
}
BACKFILL: Columns = {
    "rows/s": ("rows_per_second", 1),
    "at the end × at the start": ("end_over_start", 1),
    "inputs per row": ("inputs_per_row", 1),
    "enable(), ms": ("enable_seconds", 1000),
    "private MB, first rows": ("early_private_bytes", 1e-6),
    "private MB, most": ("private_bytes", 1e-6),
    "queue, MB at most": ("queue_bytes", 1e-6),
    "CPU of the idle lane then, %": ("idle_lane_cpu_percent", 1),
}
LOCAL: Columns = {
    "rows/s": ("rows_per_second", 1),
    "rows/s of a bare loop": ("bare_rows_per_second", 1),
    "×": ("ratio", 1),
    "private MB": ("private_bytes", 1e-6),
}
SEARCH: Columns = {
    "a text, ms": ("first_seconds", 1000),
    "the same again, ms": ("again_seconds", 1000),
    "private MB": ("private_bytes", 1e-6),
}
CHUNKS: Columns = {
    "chunks": ("chunks", 1),
    "MRR@10": ("reciprocal_rank", 1),
    "answer in 2,000 characters": ("answer_share", 1),
    "right document first": ("right_document", 1),
    "MB/s": ("megabytes_per_second", 1),
}
EDITS: Columns = {
    "a word changed, %": ("new_after_word_percent", 1),
    "a sentence added, %": ("new_after_sentence_percent", 1),
    "a paragraph added, %": ("new_after_paragraph_percent", 1),
    "a paragraph deleted, %": ("new_after_deletion_percent", 1),
}
QUALITY: Columns = {
    "nDCG@10 by vector": ("vector_ndcg", 1),
    "by text": ("text_ndcg", 1),
    "hybrid": ("hybrid_ndcg", 1),
    "vector, ms": ("vector_seconds", 1000),
    "text, ms": ("text_seconds", 1000),
    "hybrid, ms": ("hybrid_seconds", 1000),
    "hybrid × vector": ("hybrid_ratio", 1),
}
RECALL: Columns = {
    "no filter, before tune()": ("untuned", 1),
    "after": ("none_recall", 1),
    "ef_search": ("candidates", 1),
    "50 % of the rows": ("half_recall", 1),
    "10 %": ("tenth_recall", 1),
    "1 %": ("hundredth_recall", 1),
    "a subject": ("subject_recall", 1),
    "10 % of it": ("subject_tenth_recall", 1),
    "a policy": ("policy_recall", 1),
    "worst query": ("worst", 1),
    "rows × those that match": ("share_of_rows", 1),
}
SEARCH_SPEED: Columns = {
    "SQL alone, p50, ms": ("sql_seconds", 1000),
    "by vector, ×": ("vector_ratio", 1),
    "by text, ×": ("text_ratio", 1),
    "hybrid, ×": ("hybrid_ratio", 1),
    "hybrid, half of the rows, ×": ("filtered_ratio", 1),
    "a reader by vector, ×": ("reader_vector_ratio", 1),
    "a reader, hybrid, ×": ("reader_hybrid_ratio", 1),
    "SQL alone, p95, ms": ("sql_p95_seconds", 1000),
    "by vector, × of it": ("vector_p95_ratio", 1),
    "hybrid, × of it": ("hybrid_p95_ratio", 1),
}
TEXT_LEG: Columns = {
    f"{about}: {what}": (f"{queries}_{figure}", factor)
    for queries, about in {
        "manuals_questions": "manuals, questions",
        "manuals_words": "three words",
        "random_questions": "random texts, nine words",
        "random_words": "three of these",
    }.items()
    for what, figure, factor in (
        ("pg_textsearch, ms", "index_seconds", 1000),
        ("search(), ×", "ratio", 1),
        ("in CPU, ×", "cpu_ratio", 1),
    )
}
TEXT_PLACES: Columns = {
    "the exact ten by search(), %": ("same_by_text", 100),
    "by pg_textsearch, %": ("same_by_index", 100),
    "upkeep of a text, ms of CPU, 1,000 inputs per request": ("upkeep_seconds", 1000),
    "100 inputs": ("upkeep_seconds_by_default", 1000),
}
IDLE: Columns = {
    "CPU of the server, %": ("postgres_cpu_percent", 1),
    "of a lane, %": ("lane_cpu_percent", 1),
    "of a rival's worker, %": ("worker_cpu_percent", 1),
    "WAL, bytes": ("wal_bytes", 1),
    "rows written": ("rows_written", 1),
    "growth of tables and log, bytes": ("growth_bytes", 1),
    "private MB": ("private_bytes", 1e-6),
}
# Heading, scenario, and the columns: each a figure, with the factor to the column's unit.
TABLES: list[tuple[str, str, Columns]] = [
    ("Drain with an HNSW index: {rows} rows", "drain", DRAIN),
    ("Drain without index: {rows_without_index} rows", "drain-no-index", DRAIN),
    ("Backfill: enable() on a table of {backfill_rows} rows", "backfill", BACKFILL),
    ("The local model, without a network", "local-model", LOCAL),
    ("A session that calls embed()", "search", SEARCH),
    ("Chunks, found by the questions of the FAQs of Perl and Python", "chunking", CHUNKS),
    ("Chunks that are new after an edit of a text of 44 kB", "chunking", EDITS),
    ("search(): questions of FAQs, among 1,020 sections of the manuals of Perl and Python", "quality", QUALITY),
    ("search(): recall@10 of 20,000 rows with an HNSW index, by the filter", "recall", RECALL),
    ("search(): {search_rows} rows with both indexes, over SQL alone by vector", "search-speed", SEARCH_SPEED),
    ("search() by words beside an index of pg_textsearch", "text-leg", TEXT_LEG),
    ("The text index: places in a list of ten that BM25 gives, and upkeep", "text-leg", TEXT_PLACES),
    ("Freshness: single INSERTs, nothing else to do", "fresh-idle", FRESHNESS),
    ("Freshness: 50 rows/s", "fresh-steady", FRESHNESS),
    ("Freshness: during a backfill of {backfill_rows} rows", "fresh-backfill", FRESHNESS),
    ("Freshness: behind an INSERT of {backfill_rows} rows", "fresh-backlog", FRESHNESS),
    ("Freshness: a tenant beside a hostile one", "neighbours", NEIGHBOURS),
    ("Cost to the application", "cost", COST),
    ("Vectors beside the rows, and in them, with an HNSW index: × a plain table", "beside", BESIDE),
    ("Nothing to do", "idle", IDLE),
]

ABOUT = """# Bench

`make bench` wrote this. A drain is one INSERT of rows of about 120 tokens, until the last has its vector of
1,536 dimensions; the fake API takes {request_ms:g} ms per request and {input_ms:g} ms per input. Each measurement has
a fresh server; each figure is the median of {runs} of them.

- The time of autoembed runs from the INSERT's COMMIT, that of a rival from its first request: the rival's start, or
  the wait for its next tick, is not counted. Every system has embedded a row before, but for pgai's defaults, which
  look every five minutes.
- The limit: the same vectors, ready, written by UPDATEs of 100 rows with binary parameters.
- Freshness is from COMMIT to the vector visible, less the API's time for one input; ∞: no vector {grace} s after the
  last INSERT. During a backfill, {backfill_rows} older rows wait.
- Beside a hostile tenant, another inserts two rows a second, first alone, then while the attack goes on. Both have the
  same lane and model, unless the attack is a model of its own.
- search() is compared with SQL alone for the same nearest rows, whose vector is known, with the same `ef_search`.
- search() by words is compared with an index of pg_textsearch on the same table, for PostgreSQL 17. A place in a list
  of ten counts as that of BM25 if the row there has the score that belongs there.
- Cost is over the same table without triggers, in turns: {cost_rows} rows in one statement, 2,000 singly.
- Chunks are found by the local model. A chunk is right if the shorter of it and the answer lies half within the other.
  The questions are taken out of the texts; an answer longer than 2,000 characters counts as 2,000.
- Private memory is that of the largest process. "All else" is the fake API, the bench, and neighbours on the machine.
"""


def read(folder: Path, but: tuple[Sequence[str], Sequence[str]]) -> Results:
    """The figures that a report has, without those of these scenarios and systems."""
    found = json.loads((folder / "results.json").read_text())["results"]
    scenarios, systems = but
    for one in found:
        # JSON has no ∞.
        one["figures"] = {name: math.inf if value is None else value for name, value in one["figures"].items()}
    return Results(Result(**one) for one in found if not (one["scenario"] in scenarios and one["system"] in systems))


def write(folder: Path, results: Results, described: Mapping[str, str], sizes: Mapping[str, float]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(sorted(results, key=lambda result: list(LABELS).index(result.system)))
    head = json.dumps({"machine": described, "sizes": sizes}, indent=1).removesuffix("\n}")
    lines = ",\n  ".join(json.dumps(_finite(asdict(result)), allow_nan=False) for result in results)
    (folder / "results.json").write_text(f'{head},\n "results": [\n  {lines}\n ]\n}}\n')
    (folder / "README.md").write_text(_markdown(results, described, sizes))
    if results.systems("drain") or results.systems("drain-no-index"):
        _draw(results, folder / "drain.svg")


def _markdown(results: Results, described: Mapping[str, str], sizes: Mapping[str, float]) -> str:
    runs = Counter((result.scenario, result.system) for result in results).values()
    fewest, most = min(runs), max(runs)
    shown = {
        name: f"{sizes[name]:,}" for name in ("rows", "rows_without_index", "backfill_rows", "search_rows", "cost_rows")
    }
    about = ABOUT.format(
        **shown,
        request_ms=1000 * sizes["request_seconds"],
        input_ms=1000 * sizes["input_seconds"],
        grace=sizes["grace_seconds"],
        runs=f"{fewest}" if fewest == most else f"{fewest} to {most}",
    )
    parts = [about, "![Rows with vectors over time](drain.svg)\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in described.items()))
    parts.append("## Targets\n\n" + _table(["", "wanted", "measured", "met"], _target_rows(results)))
    for heading, scenario, columns in TABLES:
        rows = [
            [LABELS[system], *(_cell(results, scenario, system, *column) for column in columns.values())]
            for system in results.systems(scenario)
        ]
        if rows:
            parts.append(f"## {heading.format(**shown)}\n\n" + _table(["", *columns], rows))
    return "\n".join(parts)


def _target_rows(results: Results) -> list[list[str]]:
    measured = [(target, target.measured(results)) for target in TARGETS]
    return [
        [
            target.text,
            f"{target.relation} {target.wanted:g}",
            _number(value),
            "yes" if target.is_met_by(value) else "no",
        ]
        for target, value in measured
        if value is not None
    ]


def _cell(results: Results, scenario: str, system: str, figure: str, factor: float) -> str:
    value = results.median(scenario, system, figure)
    return "" if value is None else _number(value * factor)


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _draw(results: Results, file: Path) -> None:
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9})
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, scenario, heading in zip(
        panels, ["drain", "drain-no-index"], ["with an HNSW index", "without index"], strict=True
    ):
        for system in results.systems(scenario):
            points = results.median_drain(scenario, system).curve
            panel.plot(
                [second for second, _ in points], [row for _, row in points], label=LABELS[system], **LINES[system]
            )
        panel.set(xscale="log", xlabel="seconds", title=heading)
        panel.grid(alpha=0.3)
        if results.systems(scenario):
            panel.legend(fontsize=8)
    panels[0].set_ylabel("rows with vectors")
    figure.savefig(file, metadata={"Date": None})


def _finite(value: object) -> object:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
