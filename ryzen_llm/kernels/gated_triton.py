"""SwiGLU and GeGLU on a GPU: each element of gate and up is read once, forward and backward."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_llm.kernels.triton_launch import arithmetic, rows_of

BLOCK = 1024


@triton.jit
def activate(gate, GELU: tl.constexpr):
    """The activation and its derivative."""
    if GELU:
        # tanh(u) = 2 sigmoid(2 u) - 1, which every backend has.
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = 2 / (1 + tl.exp(-2 * inner)) - 1
        slope = 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
        value = 0.5 * gate * (1 + tanh)
        derivative = 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh * tanh) * slope
    else:
        sigmoid = 1 / (1 + tl.exp(-gate))
        value = gate * sigmoid
        derivative = sigmoid * (1 + gate * (1 - sigmoid))
    return value, derivative


@triton.jit
def load_piece(gate_up_ptr, stride, size, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr):
    """This program's row and columns, which of these there are, and gate and up there."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    gate = tl.load(gate_up_ptr + row * stride + columns, mask=inside, other=0.0).to(ARITHMETIC)
    up = tl.load(gate_up_ptr + row * stride + size + columns, mask=inside, other=0.0).to(ARITHMETIC)
    return row, columns, inside, gate, up


@triton.jit
def forward_kernel(
    gate_up_ptr,
    output_ptr,
    stride,
    size,
    GELU: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """output = activation(gate) * up, one program a piece of a row."""
    row, columns, inside, gate, up = load_piece(gate_up_ptr, stride, size, ARITHMETIC, BLOCK)
    value, _ = activate(gate, GELU)
    tl.store(output_ptr + row * size + columns, (value * up).to(output_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    upstream_ptr,
    gate_up_ptr,
    gradient_ptr,
    upstream_stride,
    stride,
    size,
    GELU: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients by gate and up, side by side as they are."""
    row, columns, inside, gate, up = load_piece(gate_up_ptr, stride, size, ARITHMETIC, BLOCK)
    given = tl.load(upstream_ptr + row * upstream_stride + columns, mask=inside, other=0.0).to(ARITHMETIC)
    value, derivative = activate(gate, GELU)
    place = gradient_ptr + row * 2 * size + columns
    tl.store(place, (given * up * derivative).to(gradient_ptr.dtype.element_ty), mask=inside)
    tl.store(place + size, (given * value).to(gradient_ptr.dtype.element_ty), mask=inside)


def forward(gate_up: Tensor, gelu: bool) -> Tensor:
    """(..., 2 * size) -> (..., size)."""
    size = gate_up.shape[-1] // 2
    output = gate_up.new_empty((*gate_up.shape[:-1], size))
    if not output.numel():
        return output
    flat = rows_of(gate_up)
    with torch.cuda.device_of(gate_up):  # Triton starts kernels on the current device
        forward_kernel[(len(flat), triton.cdiv(size, BLOCK))](
            flat,
            output,
            flat.stride(0),
            size,
            GELU=gelu,
            ARITHMETIC=arithmetic(gate_up.dtype),
            BLOCK=BLOCK,
        )
    return output


def backward(upstream: Tensor, gate_up: Tensor, gelu: bool) -> Tensor:
    """The gradient by `gate_up`, shaped like it."""
    size = gate_up.shape[-1] // 2
    gradient = gate_up.new_empty(gate_up.shape)
    if not upstream.numel():
        return gradient
    flat, given = rows_of(gate_up), rows_of(upstream)
    with torch.cuda.device_of(gate_up):
        backward_kernel[(len(flat), triton.cdiv(size, BLOCK))](
            given,
            flat,
            gradient,
            given.stride(0),
            flat.stride(0),
            size,
            GELU=gelu,
            ARITHMETIC=arithmetic(gate_up.dtype),
            BLOCK=BLOCK,
        )
    return gradient
