"""What starting any Triton kernel needs."""

import functools

import torch
import triton.language as tl
from torch import Tensor


def arithmetic(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the dtype that a kernel computes in: fp32, for fp64 inputs fp64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def rows_of(x: Tensor) -> Tensor:
    """`x` as (rows, size) with each row's elements side by side; copied only where it has to be."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@functools.cache
def num_programs(device: torch.device) -> int:
    """Programs that keep a GPU full when each loops over many rows: a few for each multiprocessor."""
    if device.type != "cuda":
        return 3  # Triton's interpreter, where a test should see several
    return 4 * int(torch.cuda.get_device_properties(device).multi_processor_count)
