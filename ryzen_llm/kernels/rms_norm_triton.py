"""RMSNorm of a sum on a GPU: one program a row forward, one a group of rows backward."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels.rms_norm import LARGEST_TRITON_ROW
from ryzen_llm.kernels.triton_launch import arithmetic, num_programs, rows_of


@triton.jit
def forward_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    inverse_rms_ptr,
    x_stride,
    added_stride,
    size,
    eps,
    ADD: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum and norm of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(ARITHMETIC)
    if ADD:
        x += tl.load(added_ptr + row * added_stride + columns, mask=inside, other=0.0).to(ARITHMETIC)
        # What the norm is of has to be what the residual stream goes on with, and what backward reads.
        rounded = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * size + columns, rounded, mask=inside)
        x = rounded.to(ARITHMETIC)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(inverse_rms_ptr + row, inverse_rms)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ARITHMETIC)
    normed = x * inverse_rms * weight
    tl.store(normed_ptr + row * size + columns, normed.to(normed_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    upstream_ptr,
    upstream_total_ptr,
    total_ptr,
    weight_ptr,
    inverse_rms_ptr,
    gradient_ptr,
    by_weight_ptr,
    upstream_stride,
    upstream_total_stride,
    total_stride,
    rows,
    size,
    ADD: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With n = x / rms and g = upstream * weight: dx = (g - n mean(g n)) / rms; dw sums upstream * n."""
    columns = tl.arange(0, BLOCK)
    inside = columns < size
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(ARITHMETIC)
    by_weight = tl.zeros((BLOCK,), ARITHMETIC)
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x = tl.load(total_ptr + row * total_stride + columns, mask=inside, other=0.0).to(ARITHMETIC)
        up = tl.load(upstream_ptr + row * upstream_stride + columns, mask=inside, other=0.0).to(ARITHMETIC)
        inverse_rms = tl.load(inverse_rms_ptr + row)
        normed = x * inverse_rms
        scaled = up * weight
        gradient = (scaled - normed * (tl.sum(scaled * normed, 0) / size)) * inverse_rms
        if ADD:
            place = upstream_total_ptr + row * upstream_total_stride + columns
            gradient += tl.load(place, mask=inside, other=0.0).to(ARITHMETIC)
        tl.store(gradient_ptr + row * size + columns, gradient.to(gradient_ptr.dtype.element_ty), mask=inside)
        by_weight += up * normed
    tl.store(by_weight_ptr + tl.program_id(0).to(tl.int64) * size + columns, by_weight, mask=inside)


def forward(x: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """See `ryzen_llm.kernels.rms_norm`. Raises InputError for rows that do not fit in one program."""
    size = x.shape[-1]
    if size > LARGEST_TRITON_ROW:
        raise InputError(f"the rows have {size} elements, expected {LARGEST_TRITON_ROW} at most")
    dtype = x.dtype if added is None else torch.promote_types(x.dtype, added.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    total = x.new_empty(0 if added is None else x.shape, dtype=dtype)
    normed = x.new_empty(x.shape, dtype=dtype)
    inverse_rms = x.new_empty(x.shape[:-1], dtype=wide)
    if not inverse_rms.numel():
        return total, normed, inverse_rms
    flat = rows_of(x)
    flat_added = flat if added is None else rows_of(added)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(x):  # Triton starts kernels on the current device
        forward_kernel[(len(flat),)](
            flat,
            flat_added,
            weight.contiguous(),
            total,
            normed,
            inverse_rms,
            flat.stride(0),
            flat_added.stride(0),
            size,
            eps,
            ADD=added is not None,
            ARITHMETIC=arithmetic(wide),
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return total, normed, inverse_rms


def backward(
    upstream: Tensor, upstream_total: Tensor | None, total: Tensor, weight: Tensor, inverse_rms: Tensor
) -> tuple[Tensor, Tensor]:
    """See `ryzen_llm.kernels.rms_norm`."""
    size = total.shape[-1]
    gradient = total.new_empty(total.shape)
    if not inverse_rms.numel():
        return gradient, torch.zeros_like(weight)
    flat, up = rows_of(total), rows_of(upstream)
    up_total = up if upstream_total is None else rows_of(upstream_total)
    programs = min(len(flat), num_programs(total.device))
    by_weight = inverse_rms.new_empty(programs, size)
    block = triton.next_power_of_2(size)
    with torch.cuda.device_of(total):
        backward_kernel[(programs,)](
            up,
            up_total,
            flat,
            weight.contiguous(),
            inverse_rms.contiguous(),
            gradient,
            by_weight,
            up.stride(0),
            up_total.stride(0),
            flat.stride(0),
            len(flat),
            size,
            ADD=upstream_total is not None,
            ARITHMETIC=arithmetic(by_weight.dtype),
            BLOCK=block,
            num_warps=num_warps(block),
        )
    return gradient, by_weight.sum(0).to(weight.dtype)


def num_warps(block: int) -> int:
    """Each thread has 8 to 32 elements of the row."""
    return min(max(block // 512, 1), 16)
