"""A decoding step's attention on a CPU, in C++: new tokens are stored, and a few queries attend to all.

One call rotates, encodes, writes and attends, which else would be a dozen small loops, each of which wakes
all threads.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ryzen_llm.kernels.cached_attention import Stored
from ryzen_llm.kernels.cpp_extension import compile_beside

_FLOATING = (torch.float32, torch.bfloat16)
_CODES = (*_FLOATING, torch.int8, torch.uint8)
"""In the order of the op's `Codes`."""
MEMORY_ALIGNMENT = 64
"""Bytes, see `append_and_attend`."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_cpp() -> bool:
    """Whether the op is there; compiles it in a machine's first call, up to half a minute."""
    return _is_compiled()


def append_suits(dtype: torch.dtype, keys: Stored, values: Stored) -> bool:
    """Whether `append_and_attend` could take these: queries of `dtype`, and keys and values stored so."""
    codes = {keys.codes.dtype, values.codes.dtype}
    return keys.codes.device.type == "cpu" and dtype in _FLOATING and codes <= set(_CODES)


def append_and_attend(
    queries: Tensor,
    new_keys: Tensor,
    new_values: Tensor,
    memory: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype],
    positions: Tensor,
    ancestors: Tensor | None = None,
    *,
    sinks: int = 0,
    fine: int = 0,
    ring: int = 0,
    window: int = 0,
    rotated: tuple[bool, bool] = (False, False),
    transformed: bool = False,
) -> Tensor:
    """Store the new tokens at `positions`, then `cached_attention` of their queries, without a gradient.

    A query's result does not depend on how many others there are. What is not finite becomes NaN in whatever
    attends to it. Raises RuntimeError for what does not fit.

    Args:
        queries: (batch, heads, time, head_dim), fp32 or bf16.
        new_keys: (batch, kv_heads, time, head_dim), of the same dtype, as `new_values`.
        new_values: To be stored as `cache.Int8` and `cache.Int4` say, by the dtype of the codes.
        memory: (bytes,) uint8, written to. First the sinks' keys and values, not rotated, (2, batch,
            kv_heads, sinks, head_dim); then the transform: an offset (kv_heads, 1, head_dim) fp32 and two
            matrices (kv_heads, head_dim, head_dim) fp16; each of these from a multiple of `MEMORY_ALIGNMENT`
            on. Then, of all slots, the keys' codes, scale and minimum and the values', as far as there are
            such, those of 4 bytes a number first, then of 2.
        dtypes: Of keys' codes, of values' codes and of the sinks: fp32, bf16, int8 or, for packed codes,
            uint8.
        positions: As of `cached_attention`, like `ring` and `window`; but for a tree, ascending by one.
        ancestors: (batch, time) int64, for new tokens that are a tree, of at most 32: the bits of a number
            say which of them the text up to a token is made of, itself and the first one included. Token i is
            stored in slot positions[0] + i, and attends to its own text as if that were all there is, to the
            bit. Not with a `ring`, nor among the `sinks`.
        sinks: How many first tokens are kept as they are; later keys are stored less the mean of theirs,
            or the transform's offset.
        fine: How many channels of packed keys have 8 bits, see `cache.Int4`.
        ring: Slots of a ring buffer.
        window: Tokens that each query sees.
        rotated: Whether keys and values are stored rotated by `hadamard`; the context is rotated back.
        transformed: Keys are not rotated, but (key - offset) @ the first matrix is stored, and queries are
            multiplied by the second, which undoes that in a product.

    Returns the context (batch, heads, time, head_dim), typed like `queries`.
    """
    attended: Tensor = torch.ops.ryzen_llm.append_and_attend(
        queries,
        new_keys,
        new_values,
        memory,
        positions,
        ancestors,
        *(_CODES.index(dtype) for dtype in dtypes),
        sinks,
        fine,
        ring,
        window,
        *rotated,
        transformed,
    )
    return attended.transpose(1, 2)


@functools.cache
def _is_compiled() -> bool:
    return compile_beside(
        __file__, "attention over a cache takes PyTorch's ops, slowly", append_and_attend=_shape
    )


def _shape(queries: Tensor, *others: Tensor | int | None) -> Tensor:
    batch, heads, time, head_dim = queries.shape
    return queries.new_empty(batch, time, heads, head_dim)
