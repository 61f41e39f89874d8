"""The product of one x with packed rows on a CPU, in C++ with AVX2: every code is read once, in registers.

Inductor's loop makes floats of each plane's codes by themselves; this puts the planes together first, sixteen
codes at a time. Sums are fp32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ryzen_llm.kernels.cpp_extension import compile_beside
from ryzen_llm.kernels.hardware import cpu_features

LANES = 8


def suits(group: int, bits: int) -> bool:
    """Whether groups of so many columns can be multiplied here; compiles the C++ form in the first call."""
    narrowest = bits & -bits
    return not group * narrowest // 8 % LANES and _is_there()


def packed_dot(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """x (size,) times rows as in `PackedRows`, which `suits`: (rows,) fp32."""
    y: Tensor = torch.ops.ryzen_llm.packed_dot(x, codes, scale, bits)
    return y


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_there() -> bool:
    return cpu_features().avx2 and _is_compiled()


@functools.cache
def _is_compiled() -> bool:
    return compile_beside(
        __file__, "compressed embeddings are multiplied by a slower loop", packed_dot=_shape
    )


def _shape(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    return x.new_empty(codes.shape[0], dtype=torch.float32)
