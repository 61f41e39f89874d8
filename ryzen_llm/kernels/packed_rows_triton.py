"""Rows of 1 to 8 bits on a GPU: gather and dequantise, and the product with one or a few vectors.

See `ryzen_llm.kernels.packed_rows` for the format. Codes are unpacked in registers; nothing dense is written.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOOKUP_COLUMNS = 128
BLOCK_ROWS = 64
BLOCK_BYTES = 64


@triton.jit
def lookup_kernel(
    indices_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    groups,
    group,
    BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program for a block of columns of one looked-up row and group."""
    index = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1)
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < group
    row = tl.load(indices_ptr + index).to(tl.int64)
    base = codes_ptr + (row * groups + which) * (group * BITS // 8)
    code = tl.zeros((COLUMNS,), tl.int32)
    shift = 0
    for position in tl.static_range(4):
        width = 8 >> position
        if BITS & width:
            length = group * width // 8
            byte = tl.load(base + columns % length, mask=inside, other=0).to(tl.int32)
            code += ((byte >> (columns // length * width)) & ((1 << width) - 1)) << shift
            base += length
            shift += width
    scale = tl.load(scale_ptr + row * groups + which).to(tl.float32)
    values = (code.to(tl.float32) - ((1 << BITS) - 1) / 2) * scale
    out = out_ptr + (index * groups + which) * group + columns
    tl.store(out, values.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def linear_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    out_ptr,
    rows,
    groups,
    group,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """A program for a block of rows and one x: memory-bound, so several x's are as many programs."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    x_row = tl.program_id(1).to(tl.int64)
    inside = row < rows
    total = tl.zeros((ROWS,), tl.float32)
    for which in range(groups):
        x_group = x_ptr + (x_row * groups + which) * group
        base = codes_ptr + (row * groups + which) * (group * BITS // 8)
        dots = tl.zeros((ROWS,), tl.float32)
        sum_x = 0.0
        for start in range(0, group, BYTES):
            columns = start + tl.arange(0, BYTES)
            sum_x += tl.sum(tl.load(x_group + columns, mask=columns < group, other=0.0).to(tl.float32), 0)
        shift = 0
        for position in tl.static_range(4):
            width = 8 >> position
            if BITS & width:
                length = group * width // 8
                for start in range(0, length, BYTES):
                    at = start + tl.arange(0, BYTES)
                    mask = inside[:, None] & (at < length)[None, :]
                    byte = tl.load(base[:, None] + at[None, :], mask=mask, other=0).to(tl.int32)
                    for part in tl.static_range(8 // (8 >> position)):
                        x = tl.load(x_group + part * length + at, mask=at < length, other=0.0)
                        code = (byte >> (part * width)) & ((1 << width) - 1)
                        terms = code.to(tl.float32) * x.to(tl.float32)[None, :]
                        dots += tl.sum(terms, 1) * (1 << shift)
                base += length
                shift += width
        scale = tl.load(scale_ptr + row * groups + which, mask=inside, other=0.0).to(tl.float32)
        total += (dots - sum_x * (((1 << BITS) - 1) / 2)) * scale
    tl.store(out_ptr + x_row * rows + row, total.to(out_ptr.dtype.element_ty), mask=inside)


def lookup(indices: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """See `packed_rows.packed_lookup`."""
    groups, group = codes.shape[1], codes.shape[2] * 8 // bits
    out = torch.empty(len(indices), groups * group, dtype=scale.dtype, device=codes.device)
    if not len(indices):
        return out
    grid = (len(indices), groups, triton.cdiv(group, LOOKUP_COLUMNS))
    with torch.cuda.device_of(codes):  # Triton starts kernels on the current device
        lookup_kernel[grid](
            indices, codes, scale, out, groups, group, BITS=bits, COLUMNS=LOOKUP_COLUMNS, num_warps=4
        )
    return out


def linear(x: Tensor, codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """See `packed_rows.packed_linear`."""
    rows, groups = codes.shape[:2]
    out = torch.empty(x.shape[0], rows, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(rows, BLOCK_ROWS), x.shape[0])
    with torch.cuda.device_of(codes):
        linear_kernel[grid](
            x.contiguous(),
            codes,
            scale,
            out,
            rows,
            groups,
            codes.shape[2] * 8 // bits,
            BITS=bits,
            ROWS=BLOCK_ROWS,
            BYTES=BLOCK_BYTES,
            num_warps=8,  # with 4, tiles of 64 rows and bytes do not fit into the registers
        )
    return out
