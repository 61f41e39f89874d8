"""`rotary_qkv` of a training step on a CPU with AVX512-BF16, in C++, forward and backward."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.kernels.cpp_extension import compile_beside
from ryzen_llm.kernels.derivatives import refuse_second_derivative
from ryzen_llm.kernels.hardware import cpu_features

HEAD_MULTIPLE = 32
"""Of which head_dim has to be a multiple."""


def suits(projected: Tensor, cos: Tensor) -> bool:
    """Whether `split_and_rotate` is for these: a training step in bf16, all texts at the same positions."""
    trained = projected.requires_grad and torch.is_grad_enabled()
    in_bf16 = projected.device.type == "cpu" and projected.dtype == torch.bfloat16
    return trained and in_bf16 and cos.dim() == 2 and not 2 * cos.shape[-1] % HEAD_MULTIPLE and is_in_cpp()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_cpp() -> bool:
    """Whether this machine can run the op; compiles it in its first call, some seconds."""
    return cpu_features().avx512_bf16 and _is_compiled()


def split_and_rotate(
    projected: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, query_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`rotary_qkv` without QK-norm of what `suits`.

    Raises RuntimeError for another dtype, or tables of other shapes.
    """
    q, k, v = torch.ops.ryzen_llm.rotary_qkv_cpu(projected, cos, sin, num_heads, num_kv_heads, query_scale)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@functools.cache
def _is_compiled() -> bool:
    otherwise = "the rotary embedding of a training step takes PyTorch's ops, slower"
    if not compile_beside(
        __file__, otherwise, rotary_qkv_cpu=_shapes, rotary_qkv_cpu_backward=_gradient_shape
    ):
        return False
    torch.library.register_autograd("ryzen_llm::rotary_qkv_cpu", _differentiate, setup_context=_keep)
    return True


def _shapes(
    projected: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, query_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = projected.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = (
        projected.new_empty(batch, time, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q, k, v


def _gradient_shape(
    by_q: Tensor, by_k: Tensor, by_v: Tensor, cos: Tensor, sin: Tensor, query_scale: float
) -> Tensor:
    batch, heads, time, head_dim = by_q.shape
    return by_q.new_empty(batch, time, (heads + 2 * by_k.shape[1]) * head_dim)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:3])
    ctx.query_scale = inputs[5]


def _differentiate(ctx: Any, by_q: Tensor, by_k: Tensor, by_v: Tensor) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("rotary_qkv")
    turned = (gradient.transpose(1, 2) for gradient in (by_q, by_k, by_v))
    by_projected = torch.ops.ryzen_llm.rotary_qkv_cpu_backward(*turned, *ctx.saved_tensors, ctx.query_scale)
    return by_projected, None, None, None, None, None
