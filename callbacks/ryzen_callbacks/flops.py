"""How many floating-point operations a piece of work takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils.flop_counter import FlopCounterMode


def count_flops(work: Callable[[], Any]) -> int:
    """FLOPs of the matrix products, convolutions and attention that `work()` does, by torch's
    FlopCounterMode.

    For a collector's `flops_per_token`: count a training step, forward and backward, of the model as it is
    before compilation (what happens inside compiled code is not seen), and divide by the tokens of the batch.
    The count is of what is computed; recomputation for activation checkpointing is in it.
    """
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())
