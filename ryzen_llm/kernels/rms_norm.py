"""Root-mean-square normalisation (Zhang & Sennrich 2019, arXiv:1910.07467), also of a sum.

In a block the norm follows the addition to the residual stream, so one pass can make both.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_TRITON_ROW = 16384
"""More elements do not fit into the registers of one program."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x²) + eps) * weight over the last dimension, computed in fp32.

    `x` is (..., size) and `weight` (size,), of any floating dtype; the result has `x`'s shape and dtype.
    """
    x_fp32 = x.float()
    scale = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True) + eps)
    return (x_fp32 * scale * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum x + added, in the wider dtype of the two, and its `rms_norm`; without `added`, of x itself.

    `x` and `added` are (..., size), `weight` is (size,); both results are shaped like `x`.
    """
    total = x if added is None else x + added
    return total, rms_norm(total, weight, eps)


def add_rms_norm_by_pytorch(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same by PyTorch's own op."""
    total = x if added is None else x + added
    normed = F.rms_norm(total, weight.shape, weight.to(total.dtype), eps)
    return total, normed.to(total.dtype)


def add_rms_norm_by_triton(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The same in one kernel, and in one backward, for rows of up to 16384."""
    total, normed, _ = _add_rms_norm(x, added, weight, eps)
    return (x if added is None else total), normed


@torch.library.custom_op("ryzen_llm::add_rms_norm", mutates_args=())
def _add_rms_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum (empty without `added`), its norm, and 1 / rms of each row, (...,) in fp32."""
    from ryzen_llm.kernels.rms_norm_triton import forward  # Triton is there on Linux only

    return forward(x, added, weight, eps)


@_add_rms_norm.register_fake
def _add_rms_norm_fake(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    return (
        x.new_empty(0 if added is None else x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape[:-1], dtype=torch.promote_types(dtype, torch.float32)),
    )


@torch.library.custom_op("ryzen_llm::add_rms_norm_backward", mutates_args=())
def _backward(
    upstream: Tensor, upstream_total: Tensor | None, total: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients by the sum, in its dtype, and by the weight."""
    from ryzen_llm.kernels.rms_norm_triton import backward

    return backward(upstream, upstream_total, total, weight, inverse_rms)


@_backward.register_fake
def _backward_fake(
    upstream: Tensor, upstream_total: Tensor | None, total: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, added, weight, _ = inputs
    ctx.save_for_backward(x if added is None else output[0], weight, output[2])
    ctx.added_dtype = None if added is None else added.dtype
    ctx.x_dtype = x.dtype
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, upstream_total: Tensor | None, upstream: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    if ctx.added_dtype is None:
        upstream_total = None
    if upstream is None:  # only the sum was used
        gradient, by_weight = upstream_total, None
    else:
        gradient, by_weight = _backward(upstream, upstream_total, *ctx.saved_tensors)
    if gradient is None:
        return None, None, None, None
    by_added = None if ctx.added_dtype is None else gradient.to(ctx.added_dtype)
    return gradient.to(ctx.x_dtype), by_added, by_weight, None


_add_rms_norm.register_autograd(_differentiate, setup_context=_keep)
