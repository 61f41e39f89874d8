"""Rules for what happens over many steps: levels that shift, and a loss that does not get better."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from ryzen_callbacks.anomaly import Anomaly
from ryzen_callbacks.reports import Severity
from ryzen_callbacks.rule import READABLE, Rule
from ryzen_callbacks.window import Window


class _Blocks(Rule):
    """Looks at the medians of blocks of values, one after the other."""

    _block: Window
    _size: int

    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value."""
        if not math.isfinite(value):
            return None
        self._block.push(self._judged(value))
        if len(self._block) < self._size:
            return None
        anomaly = self._block_is_full(step)
        self._block.clear()
        return anomaly

    def update_all(self, steps: Sequence[int], values: Sequence[float]) -> list[Anomaly]:
        """Judge many values: up to one short of a full block they enter it together."""
        found: list[Anomaly] = []
        start = 0
        while start < len(values):
            last = start + self._size - len(self._block) - 1
            self._block.extend([self._judged(v) for v in values[start:last] if math.isfinite(v)])
            found += super().update_all(steps[last : last + 1], values[last : last + 1])
            start = last + 1
        return found

    @abstractmethod
    def _block_is_full(self, step: int) -> Anomaly | None:
        """Judge the block that ends at `step`."""

    def _judged(self, value: float) -> float:
        return value


class LevelShift(_Blocks):
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

    def _block_is_full(self, step: int) -> Anomaly | None:
        level = self._block.median()
        # A median of n normal values has the standard deviation 1.2533 sigma / sqrt(n).
        noise = 1.2533 * self._block.spread() / math.sqrt(self._size)
        if self._best is None or level < self._best:
            self._best, self._above = level, 0
            return None
        best = self._best
        line = best + max(self._least_shift(best), self._z * noise)
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
            f"{READABLE[self.signal]} is at {now:.4g} by step {step}, from {before:.4g} at its best: "
            f"{ADVICE[self.kind]}",
        )

    def _least_shift(self, best: float) -> float:
        return self._floor

    def in_doubt(self) -> bool:
        """Whether the last full block lay above the line."""
        return self._above > 0

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


class AccuracyDrop(LevelShift):
    """The accuracy is 0.05 below the best; 5 below it if that is more than 1, as it is in percent."""

    def __init__(self) -> None:
        super().__init__("accuracy", "accuracy_drop", floor=0.05, direction=-1, block=1, patience=1)

    def _least_shift(self, best: float) -> float:
        return 100 * self._floor if self._value(best) > 1 else self._floor


class Plateau(_Blocks):
    """The loss has not got better by `margin` for `steps` steps, judged by medians of blocks of 32.

    At the end of any training the loss is flat: this rule is only for runs that should be getting better.
    """

    signal = "loss"
    kind = "plateau"

    def __init__(self, steps: int, margin: float = 0.01, block: int = 32) -> None:
        self._steps = steps
        self._margin = margin
        self._size = block
        self._block = Window(block)
        self._best: float | None = None
        self._best_step = 0

    def _block_is_full(self, step: int) -> Anomaly | None:
        level = self._block.median()
        if self._best is None or level < self._best - self._margin:
            self._best, self._best_step = level, step
            return None
        if step - self._best_step < self._steps:
            return None
        since, self._best_step = self._best_step, step  # reported again only after as many steps more
        return Anomaly(
            step,
            self.kind,
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


ADVICE = {
    "divergence": "training is going backwards; lower the learning rate, or go back to an earlier checkpoint",
    "throughput_drop": "look for another job on the machine, a device that is too hot, or longer inputs",
    "data_wait_growth": "the data loader does not keep up; give it more workers, or look at the disk",
    "memory_growth": "look for tensors kept from step to step, such as losses added up with their graphs",
    "accuracy_drop": "the model has got worse; compare with the checkpoint of the best validation",
}
