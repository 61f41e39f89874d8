"""`cached_attention` of a few queries on a CPU, in C++: codes are unpacked once for all queries of a head."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ryzen_llm.kernels.cpp_extension import compile_beside


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_cpp() -> bool:
    """Whether the op is there; compiles it in a machine's first call, some ten seconds."""
    return _is_compiled()


def attend(
    queries: Tensor,
    keys: Sequence[Tensor | None],
    values: Sequence[Tensor | None],
    positions: Tensor,
    *,
    ring: int = 0,
    window: int = 0,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`cached_attention` of fp32 or bf16 queries, without a gradient.

    Keys and values are `Stored`, contiguous, with codes in fp32, bf16, int8 or packed. A query's result does
    not depend on how many others there are. Raises RuntimeError for what does not fit.
    """
    sink_keys, sink_values = sinks or (None, None)
    attended: Tensor = torch.ops.ryzen_llm.cached_attention(
        queries, *keys, *values, sink_keys, sink_values, positions, ring, window
    )
    return attended.transpose(1, 2)


@functools.cache
def _is_compiled() -> bool:
    if not compile_beside(__file__, "attention over a cache takes PyTorch's ops, slowly"):
        return False
    torch.library.register_fake("ryzen_llm::cached_attention", _shape)
    return True


def _shape(queries: Tensor, *others: Tensor | int | None) -> Tensor:
    value_codes = others[3]
    assert isinstance(value_codes, Tensor)
    head_dim = value_codes.shape[-1] * (2 if value_codes.dtype == torch.uint8 else 1)
    batch, heads, time, _ = queries.shape
    return queries.new_empty(batch, time, heads, head_dim)
