"""The command line: measures each system in each scenario, in turns, and writes docs/bench/."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from bench import CACHE, ROOT, documents, machine, report, scenarios
from bench.results import Result, Results
from bench.scenarios import Measured, Sizes
from bench.server import running_server
from bench.splitters import SPLITTERS
from bench.systems import System
from bench.systems.autoembed import Autoembed
from bench.systems.guide import Guide
from bench.systems.pgai import Pgai
from extension.hostile.attacks import ATTACKS
from harness import Connection, Server

# The rivals at their best: found by trying batch sizes, concurrencies and processes from half to several times these.
SYSTEMS: dict[str, System] = {
    "autoembed": Autoembed("defaults", lanes=1),
    "autoembed-best": Autoembed("best", lanes=2),
    "autoembed-local": Autoembed("local", lanes=1, model="all-MiniLM-L6-v2"),
    "guide": Guide("defaults"),
    "guide-best": Guide("best", schedule="1 second", arguments="batch_size => 20, max_requests => 100"),
    "pgai": Pgai("defaults"),
    "pgai-best": Pgai("best", batch_size=100, concurrency=5, processes=2, poll_interval="1s"),
}
# Connections.
LIMITS = {"limit-1": 1, "limit-2": 2}
NAMES = [*SYSTEMS, *LIMITS, *SPLITTERS, *ATTACKS]
SCENARIOS: dict[str, Callable[..., Measured]] = {
    "drain": scenarios.drain,
    "drain-no-index": scenarios.drain,
    "backfill": scenarios.backfill,
    "local-model": scenarios.local_model,
    "search": scenarios.search,
    "chunking": scenarios.chunks,
    "quality": scenarios.quality,
    "recall": scenarios.recall,
    "search-speed": scenarios.search_speed,
    "text-leg": scenarios.text_leg,
    "fresh-idle": scenarios.fresh_when_idle,
    "fresh-steady": scenarios.fresh_when_steady,
    "fresh-backfill": scenarios.fresh_during_backfill,
    "fresh-backlog": scenarios.fresh_behind_a_backlog,
    "neighbours": scenarios.fresh_beside_a_neighbour,
    "cost": scenarios.cost,
    "beside": scenarios.beside,
    "idle": scenarios.idle,
}
# The index would be the wall, or is of other dimensions.
WITHOUT_INDEX = (
    "drain-no-index",
    "backfill",
    "local-model",
    "search",
    "chunking",
    "quality",
    "recall",
    "search-speed",
    "text-leg",
    "beside",
)

Measurement = Callable[[Server, Connection], Measured]


def main() -> None:
    options = _options()
    sizes = Sizes(
        rows=options.rows,
        rows_without_index=options.rows_without_index or 10 * options.rows,
        backfill_rows=options.backfill_rows or 50 * options.rows,
        search_rows=options.search_rows,
        cost_rows=options.cost_rows,
        cost_rounds=9,
        freshness_seconds=options.freshness_seconds,
        idle_seconds=options.idle_seconds,
        request_seconds=options.request_seconds,
        input_seconds=options.input_seconds,
        grace_seconds=10,
    )
    CACHE.mkdir(exist_ok=True)
    results = Results()
    described: dict[str, str] = {}
    kept = report.read(options.output, but=(options.scenarios, options.systems)) if options.add else Results()
    shown = dict.fromkeys([*options.systems, *(result.system for result in kept)])
    versions = [SYSTEMS[name].install() for name in shown if name in SYSTEMS]
    try:
        for run in range(1, options.runs + 1):
            for scenario, name, measurement in _plan(options.scenarios, options.systems, sizes):
                image = options.text_image if scenario == "text-leg" else options.image
                with (
                    running_server(image, sizes.request_seconds, sizes.input_seconds) as server,
                    closing(server.connect()) as db,
                ):
                    described = described or machine.describe(db, versions)
                    documents.create(db, with_index=scenario not in WITHOUT_INDEX)
                    began = time.monotonic()
                    measured = measurement(server, db)
                    took = time.monotonic() - began
                results.append(Result(scenario, name, run, measured.figures, measured.curve))
                figures = ", ".join(f"{figure} {value:.4g}" for figure, value in measured.figures.items())
                print(f"{run} {scenario} {name}: {figures} ({took:.0f} s)", flush=True)
    finally:
        # An hour's figures outlive the failure of one measurement.
        if results:
            report.write(options.output, Results([*kept, *results]), described, asdict(sizes))
            print(f"written to {options.output}")


def _plan(names_of_scenarios: list[str], names: list[str], sizes: Sizes) -> Iterator[tuple[str, str, Measurement]]:
    for scenario in names_of_scenarios:
        # A drain of few rows without an index is over before anybody is at full speed.
        own = replace(sizes, rows=sizes.rows_without_index) if scenario == "drain-no-index" else sizes
        for name in names:
            if name in LIMITS:
                if scenario.startswith("drain"):
                    yield scenario, name, partial(scenarios.write_limit, connections=LIMITS[name], sizes=own)
            elif name in SPLITTERS:
                if scenario == "chunking":
                    yield scenario, name, partial(scenarios.chunks, splitter=name)
            elif name in ATTACKS:
                if scenario == "neighbours":
                    yield scenario, name, partial(scenarios.fresh_beside_a_neighbour, attack=name, sizes=own)
            elif _is_of_use(scenario, SYSTEMS[name]):
                yield scenario, name, partial(SCENARIOS[scenario], system=SYSTEMS[name], sizes=own)


def _is_of_use(scenario: str, system: System) -> bool:
    if scenario in ("chunking", "neighbours"):
        return False
    if scenario in ("local-model", "quality") or system.settings == "local":
        return scenario in ("local-model", "search", "quality") and system.settings == "local"
    if scenario in ("backfill", "search", "search-speed", "text-leg", "recall", "beside"):
        return system.name == "autoembed" and system.settings == "defaults"
    if scenario == "drain-no-index" and system.name != "autoembed":
        return system.settings == "best"  # a rival's defaults are its speed, with an index or without
    if scenario == "cost":
        return system.settings == "defaults"  # the best are the workers', not the triggers'
    return scenario.startswith("drain") or system.sees_rows_by_itself


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="autoembed and its rivals, side by side.")
    add = parser.add_argument
    add("--rows", type=int, default=2000, help="rows of a drain (%(default)s)")
    add("--rows-without-index", type=int, help="and of one without an index (10 times the rows)")
    add("--runs", type=int, default=3, help="measurements of each figure, whose median counts (%(default)s)")
    add("--systems", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    add("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS), metavar="NAME")
    add("--image", default="autoembed", help="(%(default)s)")
    add("--text-image", default="autoembed:17", help="of PostgreSQL 17, for pg_textsearch (%(default)s)")
    add("--request-seconds", type=float, default=0.1, help="what the fake API takes per request (%(default)s)")
    add("--input-seconds", type=float, default=0.002, help="and per input (%(default)s)")
    add("--backfill-rows", type=int, help="rows that wait while freshness is measured (50 times the rows)")
    add("--search-rows", type=int, default=70_000, help="rows that are searched for speed (%(default)s)")
    add("--cost-rows", type=int, default=10_000, help="rows of the INSERT whose cost is measured (%(default)s)")
    add("--freshness-seconds", type=float, default=20, help="how long rows are inserted (%(default)s)")
    add("--idle-seconds", type=float, default=60, help="how long nothing happens (%(default)s)")
    add("--add", action="store_true", help="keep the figures of other scenarios and systems that the report has")
    add("--output", type=Path, default=ROOT / "docs" / "bench", help="folder of the report (docs/bench)")
    parser.epilog = f"systems: {', '.join(NAMES)}; scenarios: {', '.join(SCENARIOS)}"
    return parser.parse_args()


if __name__ == "__main__":
    main()
