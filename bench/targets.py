"""The targets of autoembed: ratios and counts within one bench."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from bench.results import Results
from extension.hostile.attacks import ATTACKS

COMPARE = {"≥": operator.ge, "≤": operator.le}


@dataclass(frozen=True)
class Target:
    """A figure of one system in one scenario, over the same figure of another where one is named."""

    text: str
    relation: str
    wanted: float
    scenario: str
    system: str
    figure: str
    over: str | None = None
    factor: float = 1  # to the text's unit

    def measured(self, results: Results) -> float | None:
        value = results.median(self.scenario, self.system, self.figure)
        if self.over:
            other = results.median(self.scenario, self.over, self.figure)
            return value / other if value is not None and other else None
        return None if value is None else value * self.factor

    def is_met_by(self, value: float) -> bool:
        return bool(COMPARE[self.relation](value, self.wanted))


def _drain(text: str, wanted: float, scenario: str, system: str, over: str) -> Target:
    return Target(text, "≥", wanted, scenario, system, "rows_per_second", over)


TARGETS = [
    _drain("Drain with HNSW, defaults: × the guide", 25, "drain", "autoembed", "guide"),
    _drain("… × pgai", 3, "drain", "autoembed", "pgai"),
    _drain("… × the limit of 1 connection", 0.85, "drain", "autoembed", "limit-1"),
    _drain("Drain with HNSW, best settings: × the guide", 2.2, "drain", "autoembed-best", "guide-best"),
    _drain("… × pgai", 2, "drain", "autoembed-best", "pgai-best"),
    _drain("… × the limit of 2 connections", 0.85, "drain", "autoembed-best", "limit-2"),
    _drain("Drain without index, best settings: × the guide", 8, "drain-no-index", "autoembed-best", "guide-best"),
    _drain("… × pgai", 7, "drain-no-index", "autoembed-best", "pgai-best"),
    Target("Inputs in a request, of 100 that may be", "≥", 100, "drain", "autoembed", "inputs_per_request"),
    Target("Inputs sent per row", "≤", 1, "drain", "autoembed", "inputs_per_row"),
    Target("Freshness, idle lane: p50, ms", "≤", 100, "fresh-idle", "autoembed", "p50_seconds", factor=1000),
    Target("… p99, ms", "≤", 400, "fresh-idle", "autoembed", "p99_seconds", factor=1000),
    Target("Freshness at 50 rows/s: p99, ms", "≤", 1000, "fresh-steady", "autoembed", "p99_seconds", factor=1000),
    Target("Freshness in a backfill: p99, ms", "≤", 1000, "fresh-backfill", "autoembed", "p99_seconds", factor=1000),
    *(
        Target(f"Freshness beside {attack.label}: p99, ms", "≤", 2000, "neighbours", name, "p99_seconds", factor=1000)
        for name, attack in ATTACKS.items()
    ),
    Target("INSERT of many rows: × a plain table", "≤", 1.6, "cost", "autoembed", "insert_ratio"),
    Target("Single-row INSERTs: × a plain table", "≤", 1.5, "cost", "autoembed", "insert_single_ratio"),
    Target("UPDATE of other columns, all rows: × a plain table", "≤", 1.15, "cost", "autoembed", "update_other_ratio"),
    Target("… row by row", "≤", 1.15, "cost", "autoembed", "update_other_single_ratio"),
    Target(
        "Vectors beside: UPDATE of another column, 1,000 rows: × plain",
        "≤",
        1.5,
        "beside",
        "autoembed",
        "update_beside_ratio",
    ),
    Target("… row by row", "≤", 1.1, "beside", "autoembed", "single_beside_ratio"),
    Target("… growth of the application's table, %", "≤", 0.5, "beside", "autoembed", "beside_growth", factor=100),
    Target("Idle lane: CPU, % of a core", "≤", 0.5, "idle", "autoembed", "lane_cpu_percent"),
    Target("… after a backfill", "≤", 0.5, "backfill", "autoembed", "idle_lane_cpu_percent"),
    Target("… WAL, bytes", "≤", 0, "idle", "autoembed", "wal_bytes"),
    Target("… rows written", "≤", 0, "idle", "autoembed", "rows_written"),
    Target("… growth of tables and log, bytes", "≤", 0, "idle", "autoembed", "growth_bytes"),
    Target("Private memory of a lane, MB", "≤", 80, "drain", "autoembed", "private_bytes", factor=1e-6),
    Target("… in a backfill", "≤", 80, "backfill", "autoembed", "private_bytes", factor=1e-6),
    Target("… with the local model", "≤", 200, "local-model", "autoembed-local", "private_bytes", factor=1e-6),
    Target("… of a session that calls embed()", "≤", 80, "search", "autoembed", "private_bytes", factor=1e-6),
    Target("… with the local model", "≤", 200, "search", "autoembed-local", "private_bytes", factor=1e-6),
    Target("Backfill: rows/s at the end × at the start", "≥", 0.9, "backfill", "autoembed", "end_over_start"),
    Target("Local model: × a bare onnxruntime loop", "≥", 0.9, "local-model", "autoembed-local", "ratio"),
    Target("search(): nDCG@10, hybrid", "≥", 0.65, "quality", "autoembed-local", "hybrid_ndcg"),
    Target("… p50, hybrid × vector", "≤", 3, "quality", "autoembed-local", "hybrid_ratio"),
    Target("search(): p50 by vector × SQL alone", "≤", 1.1, "search-speed", "autoembed", "vector_ratio"),
    Target("… hybrid", "≤", 3, "search-speed", "autoembed", "hybrid_ratio"),
    Target("… p95, hybrid", "≤", 3, "search-speed", "autoembed", "hybrid_p95_ratio"),
    Target("search() by words: p50 × pg_textsearch, questions", "≤", 2.5, "text-leg", "autoembed", "questions_ratio"),
    Target("… three words", "≤", 2.5, "text-leg", "autoembed", "words_ratio"),
    Target("… places that exact BM25 gives", "≥", 0.99, "text-leg", "autoembed", "same_by_text"),
    Target("… upkeep of a text, ms of CPU", "≤", 0.3, "text-leg", "autoembed", "upkeep_seconds", factor=1000),
    Target("Recall@10, worst of five filters and a policy", "≥", 0.99, "recall", "autoembed", "recall"),
    Target("… worst query", "≥", 0.8, "recall", "autoembed", "worst"),
    Target("… rows × those that match", "≥", 1, "recall", "autoembed", "share_of_rows"),
    Target("Chunks: MRR@10", "≥", 0.75, "chunking", "chunks-autoembed", "reciprocal_rank"),
    Target("… × semantic-text-splitter", "≥", 1, "chunking", "chunks-autoembed", "reciprocal_rank", "chunks-semantic"),
    Target("… answer in 2,000 characters", "≥", 0.75, "chunking", "chunks-autoembed", "answer_share"),
    Target("… right document first", "≥", 0.8, "chunking", "chunks-autoembed", "right_document"),
    Target("… new after a word, %", "≤", 2, "chunking", "chunks-autoembed", "new_after_word_percent"),
    Target("… a sentence", "≤", 3, "chunking", "chunks-autoembed", "new_after_sentence_percent"),
    Target("… a paragraph", "≤", 5, "chunking", "chunks-autoembed", "new_after_paragraph_percent"),
    Target("… speed, MB/s of a core", "≥", 1, "chunking", "chunks-autoembed", "megabytes_per_second"),
    Target("… memory for 50 MB, MB", "≤", 100, "chunking", "chunks-autoembed", "long_text_bytes", factor=1e-6),
    Target("… longest step in it, ms", "≤", 1000, "chunking", "chunks-autoembed", "longest_step_seconds", factor=1000),
]
