"""Other projects' rules for spikes, from their descriptions, for benchmarks/anomalies.py."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Protocol


class SpikeRule(Protocol):
    """Whether a step is out of order; called once a step, in order."""

    def flags(self, loss: float, grad_norm: float | None) -> bool:
        """Judge the next step."""


class KillLossSpike:
    """llm-foundry's: the loss is above twice the mean of the last 100, more than 4 times in a row.

    Its limit for the loss as such (10 by default) is left out: nothing here gets there.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=100)
        self._outliers = 0

    def flags(self, loss: float, grad_norm: float | None) -> bool:
        """Judge the next step."""
        full = len(self._losses) == 100
        self._outliers = self._outliers + 1 if full and loss > 2 * statistics.fmean(self._losses) else 0
        self._losses.append(loss)
        return self._outliers > 4


class SpikeDetection:
    """Lightning's (fabric): not finite; or above the loss before, and 2 running means (of 10) off the mean.

    It ends the run at its first spike; here it goes on, and the spike stays out of the mean.
    """

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=10)

    def flags(self, loss: float, grad_norm: float | None) -> bool:
        """Judge the next step."""
        if not math.isfinite(loss):
            return True
        if self._losses and loss > self._losses[-1]:
            mean = statistics.fmean(self._losses)
            if abs(loss - mean) >= 2 * abs(mean):
                return True
        self._losses.append(loss)
        return False


class SixSigma:
    """OLMo's (SkipStepOptimizer): loss or gradient norm above mean + 6 sigma of the last 128, from 64 on."""

    def __init__(self) -> None:
        self._windows: dict[str, deque[float]] = {"loss": deque(maxlen=128), "grad_norm": deque(maxlen=128)}

    def flags(self, loss: float, grad_norm: float | None) -> bool:
        """Judge the next step."""
        outlier = False
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if value is None:
                continue
            window = self._windows[name]
            if len(window) >= 64:
                mean = math.fsum(window) / len(window)
                variance = math.fsum((v - mean) ** 2 for v in window) / (len(window) - 1)
                outlier |= value > mean + 6 * math.sqrt(variance)
            window.append(value)
        return outlier


class ZClip:
    """ZClip's (arXiv:2504.02507): z > 2.5 on exponential averages (0.97) of gradient norms, after 25 steps.

    It clips what it finds, and is not meant to raise an alarm each time. A clipped norm (z* = 2.5^2 / z)
    enters its averages.
    """

    def __init__(self) -> None:
        self._first: list[float] = []
        self._mean = self._variance = 0.0

    def flags(self, loss: float, grad_norm: float | None) -> bool:
        """Judge the next step."""
        if grad_norm is None:
            return False
        if len(self._first) < 25:
            self._first.append(grad_norm)
            self._mean, self._variance = statistics.fmean(self._first), statistics.pvariance(self._first)
            return False
        deviation = math.sqrt(self._variance)
        z = (grad_norm - self._mean) / (deviation + 1e-6)
        clips = z > 2.5
        if clips:
            grad_norm = self._mean + 2.5**2 / z * deviation
        self._mean = 0.97 * self._mean + 0.03 * grad_norm
        self._variance = 0.97 * self._variance + 0.03 * (grad_norm - self._mean) ** 2
        return clips
