"""The rules of the anomaly detector: each watches one signal and knows one kind of fault.

All thresholds are robust (medians and absolute deviations of a window), and a value found faulty never enters
the window that the next one is judged by.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

from ryzen_callbacks.anomaly import Anomaly
from ryzen_callbacks.reports import Severity
from ryzen_callbacks.window import Window


class Rule(Protocol):
    """What the detector asks of a rule."""

    signal: str
    """Name of the value it watches."""

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value; an anomaly is reported at its first step only."""

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""


class NonFinite:
    """NaN or infinity. Critical for the loss; mixed precision in fp16 overflows a gradient now and then."""

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
            "non_finite",
            "critical" if self.signal == "loss" else "warning",
            value,
            (None, None),
            f"{_READABLE[self.signal]} is {value} at step {step}: look for a division by zero, a logarithm "
            "of zero, an overflow in half precision, or a learning rate that is too high",
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"going_on": self._going_on}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._going_on = state["going_on"]


class Spike:
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
        self._streak = 0

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value."""
        if not math.isfinite(value):
            return None
        judged = math.log(max(value, 1e-30)) if self._log else value
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
            f"{_READABLE[self.signal]} jumped to {value:.4g} at step {step}; around {usual:.4g} is "
            f"usual here, up to {high:.4g} within the noise: look at this step's batch and the learning rate",
        )

    def _line_for(self, judged: float) -> float:
        window = self._window
        if len(window) < self._warmup or judged <= window.recent_median() + self._floor / 2:
            return math.inf  # too early to tell, or plainly no spike: the full look costs two sorts
        return window.median() + max(self._floor, self._z * window.spread())

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"window": self._window.state_dict(), "streak": self._streak}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._window.load_state_dict(state["window"])
        self._streak = state["streak"]


class LevelShift:
    """A signal that goes up slowly, or goes up and stays (with `direction` -1: down).

    The median of each block of `block` values is compared with the lowest such median so far. `patience`
    blocks in a row that lie more than `floor` above it, and more than `z` times the noise of a block's
    median, are a shift. The level then found becomes the new reference, so that a signal that stays up is
    reported once and one that goes on rising again. With `log` the floor is for the signal's logarithm.
    """

    def __init__(
        self,
        signal: str,
        kind: str,
        floor: float,
        direction: int = 1,
        log: bool = False,
        block: int = 32,
        patience: int = 2,
        z: float = 6.0,
        severity: Severity = "warning",
    ) -> None:
        self.signal = signal
        self.kind = kind
        self._floor = floor
        self._direction = direction
        self._log = log
        self._size = block
        self._patience = patience
        self._z = z
        self._severity: Severity = severity
        self._block = Window(block)
        self._best: float | None = None
        self._above = 0

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value."""
        if not math.isfinite(value):
            return None
        self._block.push(self._judged(value))
        if len(self._block) < self._size:
            return None
        level = self._block.median()
        # A median of n normal values has the standard deviation 1.2533 sigma / sqrt(n).
        noise = 1.2533 * self._block.spread() / math.sqrt(self._size)
        self._block.clear()
        if self._best is None or level < self._best:
            self._best, self._above = level, 0
            return None
        best = self._best
        line = best + max(self._floor, self._z * noise)
        self._above = self._above + 1 if level > line else 0
        if self._above < self._patience:
            return None
        self._best, self._above = level, 0
        now, before, bound = self._value(level), self._value(best), self._value(line)
        return Anomaly(
            step,
            self.kind,
            self._severity,
            now,
            (None, bound) if self._direction > 0 else (bound, None),
            f"{_READABLE[self.signal]} is at {now:.4g} by step {step}, from {before:.4g} at its best: "
            f"{_ADVICE[self.kind]}",
        )

    def _judged(self, value: float) -> float:
        return self._direction * (math.log(max(value, 1e-30)) if self._log else value)

    def _value(self, judged: float) -> float:
        return math.exp(self._direction * judged) if self._log else self._direction * judged

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"block": self._block.state_dict(), "best": self._best, "above": self._above}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._block.load_state_dict(state["block"])
        self._best, self._above = state["best"], state["above"]


class Plateau:
    """The loss has not got better by `margin` for `steps` steps, judged by medians of blocks of 32.

    At the end of any training the loss is flat: this rule is only for runs that should be getting better.
    """

    signal = "loss"

    def __init__(self, steps: int, margin: float = 0.01, block: int = 32) -> None:
        self._steps = steps
        self._margin = margin
        self._size = block
        self._block = Window(block)
        self._best: float | None = None
        self._best_step = 0

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value."""
        if not math.isfinite(value):
            return None
        self._block.push(value)
        if len(self._block) < self._size:
            return None
        level = self._block.median()
        self._block.clear()
        if self._best is None or level < self._best - self._margin:
            self._best, self._best_step = level, step
            return None
        if step - self._best_step < self._steps:
            return None
        since, self._best_step = self._best_step, step  # reported again only after as many steps more
        return Anomaly(
            step,
            "plateau",
            "warning",
            level,
            (None, self._best - self._margin),
            f"the loss is at {level:.4g} and has not got better than {self._best:.4g} since step {since}: "
            "look at the learning rate, or stop here",
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"block": self._block.state_dict(), "best": self._best, "best_step": self._best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._block.load_state_dict(state["block"])
        self._best, self._best_step = state["best"], state["best_step"]


class Stall:
    """One step took far longer than steps do.

    A stall takes more than `factor` times the median, more than 1.5 times the third-longest of the last
    `window` steps, and at least `floor` seconds more than the median. Slow steps that come back regularly (a
    checkpoint, an optimizer that does its heavy work every tenth step) are among the three longest and are no
    stalls.
    """

    signal = "step_time"

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
        if len(window) >= self._warmup and value > 2 * window.recent_median():
            usual = window.median()
            high = max(self._factor * usual, 1.5 * window.largest(3), usual + self._floor)
            if value > high:
                anomaly = Anomaly(
                    step,
                    "stall",
                    "warning",
                    value,
                    (None, high),
                    f"step {step} took {value:.3g} s, {value / usual:.1f} times the usual {usual:.3g} s: "
                    "look for a slow disk or network, another job on the machine, or a recompilation",
                )
        # It enters the window all the same: a slow step that comes back is then expected.
        window.push(value)
        return anomaly

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""
        return {"window": self._window.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._window.load_state_dict(state["window"])


_READABLE = {
    "loss": "the loss",
    "grad_norm": "the gradient norm",
    "throughput": "the throughput",
    "data_wait_share": "the share of a step spent waiting for data",
    "memory": "the memory in use",
    "accuracy": "the validation accuracy",
}
_ADVICE = {
    "divergence": "training is going backwards; lower the learning rate, or go back to an earlier checkpoint",
    "throughput_drop": "look for another job on the machine, a device that is too hot, or longer inputs",
    "data_wait_growth": "the data loader does not keep up; give it more workers, or look at the disk",
    "memory_growth": "look for tensors kept from step to step, such as losses added up with their graphs",
    "accuracy_drop": "the model has got worse; compare with the checkpoint of the best validation",
}

KINDS = ("loss_spike", "grad_norm_spike", "non_finite", "stall", "plateau", *_ADVICE)
SIGNALS = ("loss", "grad_norm", "step_time", "throughput", "data_wait_share", "memory", "accuracy")


def default_rules(plateau_steps: int | None) -> list[Rule]:
    """The detector's rules; `Plateau` is among them only if asked for."""
    rules: list[Rule] = [
        NonFinite("loss"),
        NonFinite("grad_norm"),
        Spike("loss", "loss_spike", floor=0.3),
        Spike("grad_norm", "grad_norm_spike", floor=math.log(4), log=True),
        LevelShift("loss", "divergence", floor=0.3, severity="critical"),
        Stall(),
        LevelShift("throughput", "throughput_drop", floor=math.log(1.5), direction=-1, log=True),
        LevelShift("data_wait_share", "data_wait_growth", floor=0.25),
        LevelShift("memory", "memory_growth", floor=math.log(1.5), log=True, block=8),
        LevelShift("accuracy", "accuracy_drop", floor=0.05, direction=-1, block=1, patience=1),
    ]
    return rules if plateau_steps is None else [*rules, Plateau(plateau_steps)]
