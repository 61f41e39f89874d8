"""What the hardware gives at best, measured: the ceilings that a kernel's rate is set against."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ryzen_llm.training.op_clock import op_clock


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of a large matrix product, in floating-point operations per second."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _shortest(lambda: a @ b, device)


def copy_bandwidth(device: torch.device) -> float:
    """The best rate of copying a large array, in bytes read and written per second."""
    count = 2**26 if device.type == "cpu" else 2**28  # fp32: 256 MiB and 1 GiB
    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    return 8 * count / _shortest(lambda: target.copy_(source), device)


def read_bandwidth() -> float:
    """The best rate of reading a large array by the CPU, in bytes per second."""
    source = torch.ones(2**27)  # fp32: 512 MiB
    return 4 * source.numel() / _shortest(lambda: source.sum(), source.device)


def _shortest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the shortest of ten runs."""
    clock = op_clock(device)
    return min(clock(run) for _ in range(10))
