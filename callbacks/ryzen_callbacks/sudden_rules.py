"""Rules for what happens from one step to the next: values that are not finite, spikes, stalls."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from ryzen_callbacks.anomaly import Anomaly
from ryzen_callbacks.rule import READABLE, Rule
from ryzen_callbacks.window import Window


class NonFinite(Rule):
    """NaN or infinity. Critical for the loss; mixed precision in fp16 overflows a gradient now and then."""

    kind = "non_finite"

    def __init__(self, signal: str) -> None:
        self.signal = signal
        self._going_on = False

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value."""
        starts = not math.isfinite(value) and not self._going_on
        self._going_on = not math.isfinite(value)
        if not starts:
            return None
        return Anomaly(
            step,
            self.kind,
            "critical" if self.signal == "loss" else "warning",
            value,
            (None, None),
            f"{READABLE[self.signal]} is {value} at step {step}: look for a division by zero, a logarithm "
            "of zero, an overflow in half precision, or a learning rate that is too high",
        )

    def update_all(self, steps: Sequence[int], values: Sequence[float]) -> list[Anomaly]:
        """Judge many values."""
        if not self._going_on and all(map(math.isfinite, values)):
            return []
        return super().update_all(steps, values)

    def in_doubt(self) -> bool:
        """Whether the last value was not finite."""
        return self._going_on

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"going_on": self._going_on}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._going_on = state["going_on"]


class _Sudden(Rule):
    """Compares each value with a window of those before it."""

    _window: Window
    _warmup: int
    _streak: int = 0
    """Anomalous values in a row."""

    @abstractmethod
    def _quiet_up_to(self) -> float:
        """What is no larger is plainly no anomaly: the full look costs two sorts."""

    def _judged(self, value: float) -> float:
        return value

    def in_doubt(self) -> bool:
        """Whether the last value was anomalous."""
        return self._streak > 0

    def update_all(self, steps: Sequence[int], values: Sequence[float]) -> list[Anomaly]:
        """Judge many values: those that are plainly no anomaly enter the window together."""
        found: list[Anomaly] = []
        start = 0
        while start < len(values):
            stop = start + 1
            if len(self._window) >= self._warmup:
                limit = self._quiet_up_to()
                stop = min(start + self._window.pushes_to_refresh(), len(values))
                quiet = [j for v in values[start:stop] if v > -math.inf and (j := self._judged(v)) <= limit]
                if len(quiet) == stop - start:
                    self._window.extend(quiet)
                    self._streak = 0
                    start = stop
                    continue
            found += super().update_all(steps[start:stop], values[start:stop])
            start = stop
        return found


class Spike(_Sudden):
    """A sudden rise above the median of the last `window` sound values.

    A spike lies more than `z` robust standard deviations *and* more than `floor` above the median. The floor
    is absolute, in the signal's own units (nats for a loss); with `log` it is for the signal's logarithm,
    which suits gradient norms. Values after a spike are judged by the window before it; when `patience` of
    them in a row lie above the line, the level has changed for good and the window starts anew (a lasting
    rise is what `LevelShift` reports).
    """

    def __init__(
        self,
        signal: str,
        kind: str,
        floor: float,
        z: float = 6.0,
        log: bool = False,
        window: int = 128,
        warmup: int = 64,
        patience: int = 16,
    ) -> None:
        self.signal = signal
        self.kind = kind
        self._floor = floor
        self._z = z
        self._log = log
        self._warmup = warmup
        self._patience = patience
        self._window = Window(window)

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value."""
        if not math.isfinite(value):
            return None
        judged = self._judged(value)
        line = self._line_for(judged)
        if judged <= line:
            self._streak = 0
            self._window.push(judged)
            return None
        self._streak += 1
        if self._streak >= self._patience:
            self._window.clear()
            self._streak = 0
        if self._streak != 1:
            return None
        middle = self._window.median()
        usual, high = (math.exp(middle), math.exp(line)) if self._log else (middle, line)
        far = judged - middle > 2 * (line - middle)
        return Anomaly(
            step,
            self.kind,
            "critical" if far else "warning",
            value,
            (None, high),
            f"{READABLE[self.signal]} jumped to {value:.4g} at step {step}; around {usual:.4g} is "
            f"usual here, up to {high:.4g} within the noise: look at this step's batch and the learning rate",
        )

    def _line_for(self, judged: float) -> float:
        if len(self._window) < self._warmup or judged <= self._quiet_up_to():
            return math.inf  # too early to tell, or plainly no spike
        return self._window.median() + max(self._floor, self._z * self._window.spread())

    def _quiet_up_to(self) -> float:
        return self._window.recent_median() + self._floor / 2

    def _judged(self, value: float) -> float:
        return math.log(max(value, 1e-30)) if self._log else value

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"window": self._window.state_dict(), "streak": self._streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._window.load_state_dict(state["window"])
        self._streak = state["streak"]


class Stall(_Sudden):
    """One step took far longer than steps do.

    A stall takes more than `factor` times the median, more than 1.5 times the third-longest of the last
    `window` steps, and at least `floor` seconds more than the median. Slow steps that come back regularly (a
    checkpoint, an optimizer that does its heavy work every tenth step) are among the three longest and are no
    stalls.
    """

    signal = "step_time"
    kind = "stall"

    def __init__(self, factor: float = 5.0, floor: float = 0.1, window: int = 512, warmup: int = 64) -> None:
        self._factor = factor
        self._floor = floor
        self._warmup = warmup
        self._window = Window(window)

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value."""
        if not math.isfinite(value):
            return None
        window = self._window
        anomaly = None
        if len(window) >= self._warmup and value > self._quiet_up_to():
            usual = window.median()
            high = max(self._factor * usual, 1.5 * window.largest(3), usual + self._floor)
            if value > high:
                anomaly = Anomaly(
                    step,
                    self.kind,
                    "warning",
                    value,
                    (None, high),
                    f"step {step} took {value:.3g} s, where {usual:.3g} s is usual: "
                    "look for a slow disk or network, another job on the machine, or a recompilation",
                )
        # It enters the window all the same: a slow step that comes back is then expected.
        window.push(value)
        return anomaly

    def _quiet_up_to(self) -> float:
        return 2 * self._window.recent_median()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"window": self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._window.load_state_dict(state["window"])
