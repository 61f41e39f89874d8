"""Streaming statistics of one metric in constant memory."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(slots=True)
class RunningStatistics:
    """Count, mean, min, max, standard deviation, first and last of a stream of numbers.

    Welford's update (Technometrics 4(3), 1962), and the pairwise merge of Chan, Golub and LeVeque (1979).
    NaN and infinities are counted in `non_finite` and touch nothing else, so that one bad step does not erase
    the run's mean. Before the first finite value all but the two counts are NaN.
    """

    count: int = 0
    mean: float = math.nan
    min: float = math.nan
    max: float = math.nan
    first: float = math.nan
    last: float = math.nan
    non_finite: int = 0
    sum_of_squares: float = 0.0
    """Of the deviations from the mean."""

    @property
    def std(self) -> float:
        """The *sample* standard deviation (divisor n - 1); NaN below two values."""
        return math.sqrt(self.sum_of_squares / (self.count - 1)) if self.count > 1 else math.nan

    def push(self, value: float) -> None:
        """Take in one value."""
        if not math.isfinite(value):
            self.non_finite += 1
            return
        self.count += 1
        self.last = value
        if self.count == 1:
            self.mean = self.min = self.max = self.first = value
            return
        delta = value - self.mean
        self.mean += delta / self.count
        self.sum_of_squares += delta * (value - self.mean)
        if value < self.min:
            self.min = value
        elif value > self.max:
            self.max = value

    def merge(self, later: RunningStatistics) -> RunningStatistics:
        """The statistics of this stream followed by `later`; neither is changed."""
        non_finite = self.non_finite + later.non_finite
        if not self.count or not later.count:
            return replace(self if self.count else later, non_finite=non_finite)
        count = self.count + later.count
        delta = later.mean - self.mean
        return RunningStatistics(
            count=count,
            mean=self.mean + delta * later.count / count,
            min=min(self.min, later.min),
            max=max(self.max, later.max),
            first=self.first,
            last=later.last,
            non_finite=non_finite,
            sum_of_squares=self.sum_of_squares
            + later.sum_of_squares
            + delta * delta * self.count * later.count / count,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state, enough to go on exactly."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RunningStatistics:
        """The statistics that gave `state`."""
        return cls(**state)
