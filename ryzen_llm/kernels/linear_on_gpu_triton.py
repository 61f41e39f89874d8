"""Few rows times weights of 8 or 4 bits: one program a piece of the outputs, all inputs in turn."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_llm.kernels.linear_on_gpu import GROUP
from ryzen_llm.kernels.triton_launch import rows_of

ROWS = 16
"""The fewest that tensor cores multiply; decoding has one, and the others are masked."""
OUTPUTS = 16
"""Few, for many programs: what bounds this is how many loads are under way."""
INPUTS = 128


@triton.jit
def int8_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """The codes are multiplied as integers in x's dtype, which holds them exactly; the scale comes last."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    output = (tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        x_mask = (row[:, None] < rows) & (column[None, :] < inputs)
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=x_mask, other=0.0)
        w_mask = (output[None, :] < outputs) & (column[:, None] < inputs)
        codes = tl.load(codes_ptr + output[None, :] * inputs + column[:, None], mask=w_mask, other=0)
        total = tl.dot(x, codes.to(x.dtype), total, input_precision="ieee")
    scale = tl.load(scale_ptr + output, mask=output < outputs, other=0.0).to(tl.float32)
    y = (total * scale[None, :]).to(y_ptr.dtype.element_ty)
    mask = (row[:, None] < rows) & (output[None, :] < outputs)
    tl.store(y_ptr + row[:, None] * outputs + output[None, :], y, mask=mask)


@triton.jit
def int4_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    y_ptr,
    rows,
    outputs,
    inputs,
    x_stride,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
):
    """A byte holds an even and an odd input: x's even and odd columns are multiplied one after the other."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    output = (tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)).to(tl.int64)
    total = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for start in range(0, inputs // 2, INPUTS // 2):
        pair = start + tl.arange(0, INPUTS // 2)
        inside = pair < inputs // 2
        w_mask = (output[None, :] < outputs) & inside[:, None]
        packed = tl.load(packed_ptr + output[None, :] * (inputs // 2) + pair[:, None], mask=w_mask, other=0)
        group = output[None, :] * (inputs // GROUP) + (2 * pair // GROUP)[:, None]
        scale = tl.load(scales_ptr + group, mask=w_mask, other=0.0).to(tl.float32)
        zero = tl.load(zeros_ptr + group, mask=w_mask, other=0.0).to(tl.float32)
        x_place = x_ptr + row[:, None] * x_stride + 2 * pair[None, :]
        x_mask = (row[:, None] < rows) & inside[None, :]
        even = tl.load(x_place, mask=x_mask, other=0.0)
        odd = tl.load(x_place + 1, mask=x_mask, other=0.0)
        low = ((packed & 15).to(tl.float32) - 8) * scale + zero
        high = ((packed >> 4).to(tl.float32) - 8) * scale + zero
        total = tl.dot(even, low.to(even.dtype), total, input_precision="ieee")
        total = tl.dot(odd, high.to(odd.dtype), total, input_precision="ieee")
    mask = (row[:, None] < rows) & (output[None, :] < outputs)
    y = total.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * outputs + output[None, :], y, mask=mask)


def int8_linear_on_gpu(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """See `ryzen_llm.kernels.linear_on_gpu`."""
    (rows, inputs), outputs = x.shape, len(codes)
    y = x.new_empty(rows, outputs)
    if not y.numel():
        return y
    x = rows_of(x)
    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        int8_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, OUTPUTS))](
            x,
            codes.contiguous(),
            scale.contiguous(),
            y,
            rows,
            outputs,
            inputs,
            x.stride(0),
            ROWS=ROWS,
            OUTPUTS=OUTPUTS,
            INPUTS=INPUTS,
        )
    return y


def int4_linear_on_gpu(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """See `ryzen_llm.kernels.linear_on_gpu`."""
    (rows, inputs), outputs = x.shape, len(packed)
    y = x.new_empty(rows, outputs)
    if not y.numel():
        return y
    x = rows_of(x)
    with torch.cuda.device_of(x):
        int4_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outputs, OUTPUTS))](
            x,
            packed.contiguous(),
            scales.contiguous(),
            zeros.contiguous(),
            y,
            rows,
            outputs,
            inputs,
            x.stride(0),
            GROUP=GROUP,
            ROWS=ROWS,
            OUTPUTS=OUTPUTS,
            INPUTS=INPUTS,
        )
    return y
