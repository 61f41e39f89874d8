"""y = x Wᵀ of few rows in bf16 on a CPU with AVX512-BF16, in C++: weights are read once, where they are.

Decoding multiplies a row or a few by every weight, for which PyTorch's product takes twice as long
(docs/kernels.md). Sums are in fp32, and a row of the result does not depend on how many rows there are,
which PyTorch's product does not promise.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ryzen_llm.kernels.cpp_extension import compile_beside
from ryzen_llm.kernels.hardware import cpu_features

MOST_ROWS = 128
"""With twice as many PyTorch's product is as fast."""
FEWEST_OUTPUTS = 4


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_cpp() -> bool:
    """Whether this machine can run the op; compiles it in its first call, some seconds."""
    return cpu_features().avx512_bf16 and _is_compiled()


def few_rows_linear(x: Tensor, weight: Tensor) -> Tensor:
    """(rows, in_features) and (out_features, in_features) -> (rows, out_features), all bf16.

    Raises RuntimeError for another dtype or shape, and for fewer than `FEWEST_OUTPUTS` outputs.
    """
    y: Tensor = torch.ops.ryzen_llm.few_rows_linear(x, weight)
    return y


@functools.cache
def _is_compiled() -> bool:
    return compile_beside(
        __file__, "bf16 weights are multiplied by PyTorch's product, which is slower", few_rows_linear=_shape
    )


def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
