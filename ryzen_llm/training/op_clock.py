"""How long an op takes in a training step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

Clock = Callable[[Callable[[], object]], float]
"""What to time -> seconds."""

HEAD_START = 10_000_000
"""Cycles of a GPU, some 5 ms, in which the host has launched all that one run of an op consists of."""


def host_seconds(run: Callable[[], object]) -> float:
    """Seconds until `run` is over, on the accelerator, too, if there is one."""
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def cuda_seconds(run: Callable[[], object]) -> float:
    """Seconds that CUDA's current device takes for what `run` launches.

    Python takes longer to launch a short op than a GPU to run it, but in a training step it is ahead of the
    GPU. So it is here: the GPU is kept waiting until everything is launched.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def op_clock(device: torch.device) -> Clock:
    """What times an op on `device`."""
    return cuda_seconds if device.type == "cuda" else host_seconds


def synchronize() -> None:
    """Wait for the accelerator, if there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
