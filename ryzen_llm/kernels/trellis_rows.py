"""Rows of numbers of 1 to 4 bits in trellis codes, which are closer to normal numbers than any grid is.

A code of `bits` bits does not stand for a number by itself: the last 16 bits that were read, `bits` of them
new, are the state, and a column's value is a fixed, noise-like function of it, close to normal,

    mixed = (state * 34038481 + 76625530) mod 2**32
    value = (the sum of mixed's four bytes - 510) / 147.8 * scale[row]

("1MAD" of QTIP, Tseng et al. 2024, arXiv:2406.11235). So a code is chosen for what it allows after it, and
2 bits a column are off by 0.078 of a normal number's variance, where the best grid is at 0.119 and the bound
(Shannon's) at 0.0625. A row is the first state's 16 bits and then the codes, the lowest bits first:

    state[j] = bits bits * (j + 1) to bits * (j + 1) + 15 of the row.

Codes are found by the M-algorithm (Jelinek & Anderson 1971): the 128 best beginnings of the row are kept from
column to column.
"""

from __future__ import annotations

import functools
import platform
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels.cpp_extension import compile_beside
from ryzen_llm.kernels.hardware import cpu_features

STATE_BITS = 16
MOST_TRELLIS_BITS = 4
_FACTOR, _OFFSET = 34038481, 76625530
_MEAN, _DEVIATION = 510, 147.800537


class TrellisRows(NamedTuple):
    """`codes` (rows, 2 + size * bits / 8) uint8 and `scale` (rows, 1), floating; size a multiple of 8."""

    codes: Tensor
    scale: Tensor
    bits: int


def trellis_bytes(size: int, bits: int) -> int:
    """Bytes of a row of `size` columns without its scale."""
    return (STATE_BITS + size * bits) // 8


def unpack_trellis(rows: TrellisRows) -> Tensor:
    """The values, (rows, size), in the dtype of the scale."""
    on_cpu = rows.codes.device.type == "cpu" and has_fast_values()
    values: Tensor = torch.ops.ryzen_llm.trellis_values(rows.codes, rows.bits) if on_cpu else values_of(rows)
    return values.to(rows.scale.dtype) * rows.scale


def values_of(rows: TrellisRows) -> Tensor:
    """The values without the scale, (rows, size) fp32, in PyTorch's ops."""
    codes, bits = rows.codes, rows.bits
    size = (codes.shape[1] * 8 - STATE_BITS) // bits
    starts = bits * torch.arange(1, size + 1, device=codes.device)
    # Sixteen bits from any bit on lie in three bytes; what is beyond the row is shifted out.
    padded = F.pad(codes, (0, 1)).to(torch.int32)
    words = padded[:, :-2] | padded[:, 1:-1] << 8 | padded[:, 2:] << 16
    states = words.index_select(1, starts // 8) >> (starts % 8).to(torch.int32) & (2**STATE_BITS - 1)
    mixed = states.to(torch.int64) * _FACTOR + _OFFSET
    sums = (mixed & 255) + (mixed >> 8 & 255) + (mixed >> 16 & 255) + (mixed >> 24 & 255)
    values: Tensor = (sums - _MEAN).float() / _DEVIATION
    return values


def trellis_encode(target: Tensor, feedback: Tensor, bits: int) -> Tensor:
    """Codes as in `TrellisRows` whose values, of scale 1, approximate `target`.

    Column by column, a path's error e = (target[j] - value) / feedback[j, j] costs e², and takes
    feedback[i, j] * e from its target of each column i that follows: GPTQ's rule for one path, which
    `error_feedback.quantise_rows` states, for all paths.

    Args:
        target: (rows, size) fp32, each row with a deviation near 1; size a multiple of 8.
        feedback: (size, size) fp32, lower triangular with a positive diagonal.
        bits: 1 to 4.

    Returns (rows, 2 + size * bits / 8) uint8. Raises InputError for numbers that are not finite and
    where not `can_encode`.
    """
    if not can_encode():
        raise InputError(
            "trellis codes are made by C++, which needs a C++ compiler and ninja, and AVX2 on x86: install "
            'them, or use code: "grid"'
        )
    if not (target.isfinite().all() and feedback.isfinite().all() and (feedback.diagonal() > 0).all()):
        raise InputError("target and feedback must be finite, and feedback's diagonal positive")
    codes: Tensor = torch.ops.ryzen_llm.trellis_encode(target, feedback, bits)
    return codes


def can_encode() -> bool:
    """Whether `trellis_encode` works here; compiles the C++ form in the first call."""
    without_avx2 = platform.machine() in ("x86_64", "AMD64") and not cpu_features().avx2
    return not without_avx2 and _is_compiled()


def trellis_dot(x: Tensor, rows: TrellisRows) -> Tensor:
    """x (size,) times the rows on a CPU where `has_fast_values`: (rows,) fp32, every code read once."""
    y: Tensor = torch.ops.ryzen_llm.trellis_dot(x, rows.codes, rows.bits) * rows.scale[:, 0].float()
    return y


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def has_fast_values() -> bool:
    """Whether there is a C++ form for this CPU, with AVX2; compiles it in the first call."""
    return cpu_features().avx2 and _is_compiled()


@functools.cache
def _is_compiled() -> bool:
    return compile_beside(
        __file__,
        "trellis codes cannot be made here, and are read by slower loops",
        trellis_dot=_shape_of_dot,
        trellis_values=_shape_of_values,
    )


def _shape_of_dot(x: Tensor, codes: Tensor, bits: int) -> Tensor:
    return x.new_empty(codes.shape[0], dtype=torch.float32)


def _shape_of_values(codes: Tensor, bits: int) -> Tensor:
    size = (codes.shape[1] * 8 - STATE_BITS) // bits
    return codes.new_empty(codes.shape[0], size, dtype=torch.float32)
