"""The figures of all measurements, and their medians."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.scenarios import Figures


@dataclass(frozen=True)
class Result:
    scenario: str
    system: str
    run: int
    figures: Figures
    curve: list[tuple[float, int]]  # seconds, and rows with vectors by then


class Results(list[Result]):
    def of(self, scenario: str, system: str) -> Sequence[Result]:
        return [result for result in self if (result.scenario, result.system) == (scenario, system)]

    def systems(self, scenario: str) -> list[str]:
        return list(dict.fromkeys(result.system for result in self if result.scenario == scenario))

    def median(self, scenario: str, system: str, figure: str) -> float | None:
        values = [result.figures[figure] for result in self.of(scenario, system) if figure in result.figures]
        return statistics.median(values) if values else None

    def median_drain(self, scenario: str, system: str) -> Result:
        """The run whose rate is the median one, or next below."""
        runs = sorted(self.of(scenario, system), key=lambda result: result.figures["rows_per_second"])
        return runs[(len(runs) - 1) // 2]
