"""From one projection to the queries, keys and values of attention: split, QK-norm and rotary embedding.

The norm of each query and key head is that of Henry et al. 2020 (arXiv:2010.04245) as Qwen3 and Gemma 3 have
it, an RMSNorm with one weight for all heads; rotary embedding is that of `rotary`.
"""

from typing import Any

import torch
from torch import Tensor

from ryzen_llm.kernels import rotary_qkv_cpu
from ryzen_llm.kernels.rms_norm import rms_norm
from ryzen_llm.kernels.rotary import apply_rotary


def rotary_qkv(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    query_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (batch, num_heads, time, head_dim), and keys and values of num_kv_heads heads.

    `projected` is (batch, time, (num_heads + 2 num_kv_heads) * head_dim), queries first; `cos` and `sin` come
    from `rotary_table`. `q_weight` and `k_weight`, (head_dim,), are those of the norms; None leaves both out.
    Queries are multiplied by `query_scale`. All results have the dtype of `projected`.
    """
    batch, time, width = projected.shape
    num_all = num_heads + 2 * num_kv_heads
    heads = projected.view(batch, time, num_all, width // num_all)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=2)
    if q_weight is not None and k_weight is not None:
        q, k = rms_norm(q, q_weight, eps), rms_norm(k, k_weight, eps)
    if query_scale != 1:
        q = q * query_scale
    q, k = (apply_rotary(x.transpose(1, 2), cos, sin) for x in (q, k))
    return q, k, v.transpose(1, 2)


def rotary_qkv_in_cpp(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    query_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same by `rotary_qkv_cpu` where it suits and there is no norm, else as above."""
    if q_weight is None and rotary_qkv_cpu.suits(projected, cos):
        return rotary_qkv_cpu.split_and_rotate(projected, cos, sin, num_heads, num_kv_heads, query_scale)
    heads = {"num_heads": num_heads, "num_kv_heads": num_kv_heads}
    return rotary_qkv(projected, cos, sin, q_weight, k_weight, eps=eps, query_scale=query_scale, **heads)


def rotary_qkv_by_triton(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    query_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in one kernel, which also lays out the heads, and in one backward.

    `cos` and `sin` get no gradient: they come from positions.
    """
    sizes = (num_heads, num_kv_heads, eps, query_scale)
    output: tuple[Tensor, Tensor, Tensor] = _rotary_qkv(projected, cos, sin, q_weight, k_weight, *sizes)
    return output


@torch.library.custom_op("ryzen_llm::rotary_qkv", mutates_args=())
def _rotary_qkv(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from ryzen_llm.kernels.rotary_qkv_triton import forward  # Triton is there on Linux only

    return forward(projected, cos, sin, q_weight, k_weight, num_heads, num_kv_heads, eps, query_scale)


@_rotary_qkv.register_fake
def _rotary_qkv_fake(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, time, width = projected.shape
    head_dim = width // (num_heads + 2 * num_kv_heads)
    q, k, v = (
        projected.new_empty(batch, heads, time, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    return q, k, v


@torch.library.custom_op("ryzen_llm::rotary_qkv_backward", mutates_args=())
def _backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by the projection and by the two weights (empty where there are none)."""
    from ryzen_llm.kernels.rotary_qkv_triton import backward

    return backward(dq, dk, dv, projected, cos, sin, q_weight, k_weight, eps, query_scale)


@_backward.register_fake
def _backward_fake(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    by_weights = (projected.new_empty(0) if w is None else torch.empty_like(w) for w in (q_weight, k_weight))
    return projected.new_empty(projected.shape), *by_weights  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.eps, ctx.query_scale = inputs[7:]


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    q_weight = ctx.saved_tensors[3]
    by_projected, by_q, by_k = _backward(dq, dk, dv, *ctx.saved_tensors, ctx.eps, ctx.query_scale)
    by_weights = (None, None) if q_weight is None else (by_q, by_k)
    return by_projected, None, None, *by_weights, None, None, None, None


_rotary_qkv.register_autograd(_differentiate, setup_context=_keep)
