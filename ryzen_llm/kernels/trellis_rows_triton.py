"""Rows in trellis codes on a GPU: gather and dequantise, and the product with one or a few vectors.

See `ryzen_llm.kernels.trellis_rows` for the format. States are cut out of the codes and turned into values in
registers; nothing dense is written.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOOKUP_COLUMNS = 128
BLOCK_ROWS = 64
BLOCK_COLUMNS = 64


@triton.jit
def values_at(start, columns, mask, BITS: tl.constexpr):
    """The values, without scale, of `columns` of the rows whose bytes begin at the pointers `start`."""
    bit = (columns + 1) * BITS
    at = start + bit // 8
    # Sixteen bits from any bit on lie in three bytes, of which a row's last column has two.
    low = tl.load(at, mask=mask, other=0).to(tl.uint32)
    middle = tl.load(at + 1, mask=mask, other=0).to(tl.uint32)
    high = tl.load(at + 2, mask=mask & (bit % 8 != 0), other=0).to(tl.uint32)
    state = ((low | (middle << 8) | (high << 16)) >> (bit % 8).to(tl.uint32)) & 0xFFFF
    mixed = state * 34038481 + 76625530
    sums = (mixed & 255) + ((mixed >> 8) & 255) + ((mixed >> 16) & 255) + (mixed >> 24)
    return (sums.to(tl.int32) - 510).to(tl.float32) / 147.800537


@triton.jit
def lookup_kernel(
    indices_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    size,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for a block of columns of one looked-up row."""
    index = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < size
    row = tl.load(indices_ptr + index).to(tl.int64)
    values = values_at(codes_ptr + row * (2 + size * BITS // 8), columns, inside, BITS)
    values = values * tl.load(scale_ptr + row).to(tl.float32)
    tl.store(out_ptr + index * size + columns, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    rows,
    size,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for a block of rows and one x, as in `packed_rows_triton`."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_row = tl.program_id(1).to(tl.int64)
    inside = row < rows
    start = codes_ptr + row * (2 + size * BITS // 8)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, size, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        x = tl.load(x_ptr + x_row * size + columns, mask=columns < size, other=0.0).to(tl.float32)
        mask = inside[:, None] & (columns < size)[None, :]
        total += tl.sum(values_at(start[:, None], columns[None, :], mask, BITS) * x[None, :], 1)
    scale = tl.load(scale_ptr + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + x_row * rows + row, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)


def lookup(indices: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """See `packed_rows.packed_lookup`."""
    size = (codes.shape[1] - 2) * 8 // bits
    out = torch.empty(len(indices), size, dtype=scale.dtype, device=codes.device)
    if not len(indices):
        return out
    grid = (len(indices), triton.cdiv(size, LOOKUP_COLUMNS))
    with torch.cuda.device_of(codes):  # Triton starts kernels on the current device
        lookup_kernel[grid](indices, codes, scale, out, size, BITS=bits, COLUMNS=LOOKUP_COLUMNS, num_warps=4)
    return out


def linear(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """See `packed_rows.packed_linear`."""
    rows = codes.shape[0]
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, BLOCK_ROWS), x.shape[0])
    with torch.cuda.device_of(codes):
        linear_kernel[grid](
            x.contiguous(),
            codes,
            scale,
            out,
            rows,
            x.shape[1],
            BITS=bits,
            ROWS=BLOCK_ROWS,
            COLUMNS=BLOCK_COLUMNS,
            num_warps=4,
        )
    return out
