"""Is B faster than A? Paired, interleaved timing that holds on a noisy machine."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ryzen_callbacks.intervals import median_interval


@dataclass(frozen=True)
class Ratio:
    """A ratio of times with its 95% interval; the bounds are None below 6 rounds."""

    value: float
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class PairedTimes:
    """Seconds of each run: per round, each arm's two timings, in the order taken."""

    baseline: list[tuple[float, float]] = field(default_factory=list)
    optimized: list[tuple[float, float]] = field(default_factory=list)

    def speedup(self) -> Ratio:
        """exp of the median over rounds of ln(t_base / t_opt), each t the mean of the round's two timings."""
        return _ratio([math.log(sum(a) / sum(b)) for a, b in zip(self.baseline, self.optimized, strict=True)])

    def control(self) -> Ratio:
        """The baseline against itself: the two timings that each round has of it.

        The quotient's direction alternates by round, so that a machine that slowly gets slower does not show
        as a difference of the baseline from itself.
        """
        return _ratio([math.log(a / b) * (-1) ** i for i, (a, b) in enumerate(self.baseline)])


def measure_pair(
    baseline: Callable[[], Any],
    optimized: Callable[[], Any],
    rounds: int,
    warmup: int = 1,
    on_round: Callable[[int, int], None] = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> PairedTimes:
    """Time two arms in `rounds` rounds of A B B A and B A A B in turn, after `warmup` untimed runs of each.

    Whatever slows the machine for longer than a round slows both arms alike, and whatever changes steadily
    within a round cancels. The accelerator, if there is one, is synchronised around every run.
    `on_round(done, total)` is called after each round, outside the timings.
    """
    for _ in range(warmup):
        _timed(baseline, clock)
        _timed(optimized, clock)
    times = PairedTimes()
    for index in range(rounds):
        seconds: dict[str, list[float]] = {"A": [], "B": []}
        for arm in "ABBA" if index % 2 == 0 else "BAAB":
            seconds[arm].append(_timed(baseline if arm == "A" else optimized, clock))
        times.baseline.append((seconds["A"][0], seconds["A"][1]))
        times.optimized.append((seconds["B"][0], seconds["B"][1]))
        on_round(index + 1, rounds)
    return times


def _timed(arm: Callable[[], Any], clock: Callable[[], float]) -> float:
    _synchronize()
    start = clock()
    arm()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _ratio(log_ratios: Sequence[float]) -> Ratio:
    interval = median_interval(log_ratios)
    low, high = (math.exp(interval[0]), math.exp(interval[1])) if interval else (None, None)
    return Ratio(math.exp(statistics.median(log_ratios)), low, high)
