"""What the anomaly detector asks of a rule."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from ryzen_callbacks.anomaly import Anomaly


class Rule(ABC):
    """Watches one signal and knows one kind of fault.

    All thresholds are robust (medians and absolute deviations of a window), and a value found faulty never
    enters the window that the next one is judged by.
    """

    signal: str
    """Name of the value it watches."""
    kind: str
    """What it calls an anomaly. No two rules have both the same signal and the same kind."""

    @abstractmethod
    def update(self, step: int, value: float) -> Anomaly | None:
        """Judge the next value; an anomaly is reported at its first step only."""

    def update_all(self, steps: Sequence[int], values: Sequence[float]) -> list[Anomaly]:
        """Judge many values: what `update` finds, one after the other, for less where nothing is wrong."""
        found = (self.update(step, value) for step, value in zip(steps, values, strict=True))
        return [anomaly for anomaly in found if anomaly is not None]

    def in_doubt(self) -> bool:
        """Whether a fault is going on, or what may turn out to be one."""
        return False

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Plain Python state."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""


READABLE = {
    "loss": "the loss",
    "grad_norm": "the gradient norm",
    "throughput": "the throughput",
    "data_wait_share": "the share of a step spent waiting for data",
    "memory": "the memory in use",
    "accuracy": "the validation accuracy",
}
"""The signals in messages."""
