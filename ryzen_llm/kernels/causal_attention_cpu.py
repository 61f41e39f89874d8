"""`causal_attention` of a training step on a CPU with AVX512-BF16, in C++, forward and backward.

Scores stay in the caches and their masked half is not computed; backward computes the rest again (Dao et al.
2022, arXiv:2205.14135). PyTorch's ops write each block of scores to memory, several times over. Products
are AMX's where the CPU has it and head_dim is a multiple of 32.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.kernels.cpp_extension import compile_beside
from ryzen_llm.kernels.derivatives import refuse_second_derivative
from ryzen_llm.kernels.hardware import cpu_features

HEAD_MULTIPLE = 16
"""Of which head_dim has to be a multiple."""


def suits(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether `attend` takes such queries; compiles it in a machine's first call, some seconds."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not head_dim % HEAD_MULTIPLE and is_in_cpp()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_cpp() -> bool:
    """Whether this machine can run the op, which is compiled in its first call."""
    return cpu_features().avx512_bf16 and _is_compiled()


def attend(
    queries: Tensor, keys: Tensor, values: Tensor, window: int = 0, starts: Tensor | None = None
) -> Tensor:
    """`causal_attention` of what `suits`, sums and softmax in fp32; a weight is rounded to bf16 before it is
    divided by their sum. It can be differentiated once.

    Raises RuntimeError for another dtype, or a head_dim that is not a multiple of 16.
    """
    context: Tensor = torch.ops.ryzen_llm.causal_attention(queries, keys, values, starts, window)[0]
    return context.transpose(1, 2)


@functools.cache
def _is_compiled() -> bool:
    otherwise = "attention of a training step takes PyTorch's ops, slower"
    if not compile_beside(
        __file__, otherwise, causal_attention=_shapes, causal_attention_backward=_gradient_shapes
    ):
        return False
    torch.library.register_autograd("ryzen_llm::causal_attention", _differentiate, setup_context=_keep)
    return True


def _shapes(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, window: int) -> tuple[Tensor, Tensor]:
    batch, heads, time, width = q.shape
    return q.new_empty(batch, time, heads, width), q.new_empty(batch, heads, time, dtype=torch.float32)


def _gradient_shapes(
    upstream: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    context: Tensor,
    logs: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    by_q, by_k, by_v = (x.new_empty(x.transpose(1, 2).shape) for x in (q, k, v))
    return by_q, by_k, by_v


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.window = inputs[4]


def _differentiate(ctx: Any, by_context: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("causal_attention")
    saved = ctx.saved_tensors
    gradients = torch.ops.ryzen_llm.causal_attention_backward(by_context, *saved, ctx.window)
    return *(gradient.transpose(1, 2) for gradient in gradients), None, None
