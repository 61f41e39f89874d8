"""The rules that the anomaly detector has."""

from __future__ import annotations

import math

from ryzen_callbacks.rule import Rule
from ryzen_callbacks.slow_rules import ADVICE, AccuracyDrop, LevelShift, Plateau
from ryzen_callbacks.sudden_rules import NonFinite, Spike, Stall

KINDS = ("loss_spike", "grad_norm_spike", "non_finite", "stall", "plateau", *ADVICE)
OF_THE_WEIGHTS = ("loss_spike", "grad_norm_spike", "non_finite", "divergence", "accuracy_drop")
"""Kinds of rules whose statistics are of what the weights give: they go back where the weights go back."""
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
        AccuracyDrop(),
    ]
    return rules if plateau_steps is None else [*rules, Plateau(plateau_steps)]
