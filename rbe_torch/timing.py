"""Timing functions side by side: interleaved in one process, so that a noisy machine is as noisy for each of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of one call."""

    minimum: float
    median: float
    runs: int


def interleave(functions: Mapping[str, Callable[[], Any]], seconds: float = 1.0, least_runs: int = 5) -> dict[str, Timing]:
    """Calls the functions in turn, after one call each to warm up, for about `seconds` in all and at least `least_runs` times each."""
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(samples.values()))) < least_runs:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(time.perf_counter() - start)
    return {name: Timing(min(values), statistics.median(values), len(values)) for name, values in samples.items()}
