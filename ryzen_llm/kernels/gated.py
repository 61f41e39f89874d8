"""SwiGLU and GeGLU activations (Shazeer 2020, arXiv:2002.05202), GELU in its tanh form as in Gemma."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` (..., 2 * size) holds the gate first; the result is (..., size)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, where `gate_up` (..., 2 * size) holds the gate first; the result is (..., size)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


def swiglu_by_triton(gate_up: Tensor) -> Tensor:
    """`swiglu` in one kernel, and in one backward."""
    output: Tensor = _gated(gate_up, False)
    return output


def geglu_by_triton(gate_up: Tensor) -> Tensor:
    """`geglu` in one kernel, and in one backward."""
    output: Tensor = _gated(gate_up, True)
    return output


@torch.library.custom_op("ryzen_llm::gated", mutates_args=())
def _gated(gate_up: Tensor, gelu: bool) -> Tensor:
    from ryzen_llm.kernels.gated_triton import forward  # Triton is there on Linux only

    return forward(gate_up, gelu)


@_gated.register_fake
def _gated_fake(gate_up: Tensor, gelu: bool) -> Tensor:
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("ryzen_llm::gated_backward", mutates_args=())
def _backward(upstream: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    from ryzen_llm.kernels.gated_triton import backward

    return backward(upstream, gate_up, gelu)


@_backward.register_fake
def _backward_fake(upstream: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep(ctx: Any, inputs: tuple[Tensor, bool], output: Tensor) -> None:
    gate_up, ctx.gelu = inputs
    ctx.save_for_backward(gate_up)


def _differentiate(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    return _backward(upstream, *ctx.saved_tensors, ctx.gelu), None


_gated.register_autograd(_differentiate, setup_context=_keep)
