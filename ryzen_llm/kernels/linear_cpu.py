"""`linear` of a training step on a CPU with AVX512-BF16, in C++, forward and backward.

Weights are rounded to bf16 while they are packed, so that no copy of them is kept for backward, and their
gradient is summed and given in fp32. PyTorch's products have a copy in bf16 of each.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ryzen_llm.kernels.cpp_extension import compile_beside
from ryzen_llm.kernels.derivatives import refuse_second_derivative
from ryzen_llm.kernels.hardware import cpu_features

MULTIPLE = 16
"""Of which the sizes of a weight have to be multiples."""

FEWEST_ROWS = 1024
"""With fewer, what packing takes is not won back."""


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether `multiply` is for these: a training step in bf16, or under bf16 autocast, of enough rows."""
    trained = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if torch.is_autocast_enabled("cpu"):
        in_bf16 = torch.get_autocast_dtype("cpu") == torch.bfloat16
    else:
        in_bf16 = x.dtype == weight.dtype == torch.bfloat16
    return trained and in_bf16 and x.numel() >= FEWEST_ROWS * x.shape[-1] and takes(weight)


def takes(weight: Tensor) -> bool:
    """Whether this machine can run the ops with `weight`, (outputs, inputs)."""
    typed = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float32)
    sizes_suit = not weight.shape[0] % MULTIPLE and not weight.shape[1] % MULTIPLE
    return typed and sizes_suit and weight.is_contiguous() and is_in_cpp()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def is_in_cpp() -> bool:
    """Whether this machine is to run the ops, which are compiled in its first call.

    Not where PyTorch's products have AMX, a CPU's unit for them, which these do not use.
    """
    features = cpu_features()
    return features.avx512_bf16 and not features.amx_bf16 and _is_compiled()


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ of (..., inputs) in bf16 and (outputs, inputs) in bf16 or fp32 -> (..., outputs) in bf16.

    Sums are in fp32. It can be differentiated once. Raises RuntimeError for other dtypes, and for sizes of
    the weight that are not multiples of `MULTIPLE`.
    """
    y: Tensor = torch.ops.ryzen_llm.linear_cpu(x, weight)
    return y


def by_input(upstream: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `multiply` by x, (..., inputs) in bf16, where `upstream` is that by its result."""
    dx: Tensor = torch.ops.ryzen_llm.linear_cpu_by_input(upstream, weight)
    return dx


def add_by_weight(total: Tensor, upstream: Tensor, x: Tensor, add: bool) -> None:
    """Fill `total`, (outputs, inputs) in fp32, with the gradient by the weight, or `add` it."""
    torch.ops.ryzen_llm.linear_cpu_add_by_weight(total, upstream, x, add)


@functools.cache
def _is_compiled() -> bool:
    otherwise = "linear layers of a training step take PyTorch's products, slower"
    if not compile_beside(
        __file__,
        otherwise,
        linear_cpu=_shape,
        linear_cpu_by_input=_shape_by_input,
        linear_cpu_by_weight=_shape_by_weight,
        linear_cpu_add_by_weight=lambda *_: None,
    ):
        return False
    ops = torch.ops.ryzen_llm
    torch.library.register_autograd("ryzen_llm::linear_cpu", _differentiate, setup_context=_keep)
    register_flop_formula([ops.linear_cpu, ops.linear_cpu_by_input])(_flops)
    register_flop_formula(ops.linear_cpu_by_weight)(_flops_by_weight)
    return True


def _shape(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _shape_by_input(upstream: Tensor, weight: Tensor) -> Tensor:
    return upstream.new_empty(*upstream.shape[:-1], weight.shape[1])


def _shape_by_weight(upstream: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(upstream.shape[-1], x.shape[-1], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
    refuse_second_derivative("linear")
    x, weight = ctx.saved_tensors
    by_x, by_weight = ctx.needs_input_grad
    dx = by_input(upstream, weight) if by_x else None
    dw = torch.ops.ryzen_llm.linear_cpu_by_weight(upstream, x).to(weight.dtype) if by_weight else None
    return dx, dw


def _flops(x: list[int], weight: list[int], **_: Any) -> int:
    return 2 * math.prod(x[:-1]) * weight[0] * weight[1]


def _flops_by_weight(upstream: list[int], x: list[int], **_: Any) -> int:
    return 2 * math.prod(x) * upstream[-1]
