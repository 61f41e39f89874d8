"""Rows of numbers of 1 to 8 bits: looked up, and multiplied with, without a dense copy of them all.

A row of `size` columns is cut into groups, and

    value = (code - (2**bits - 1) / 2) * scale[row, group],

a symmetric grid without zero. The bits of a code lie in planes of 8, 4, 2 or 1 bit (6 = 4 + 2, 3 = 2 + 1).
In a plane of w bits, byte j of a group holds column j in its lowest bits, then column j + group * w / 8, and
so on, so that unpacking needs shifts and masks only, and columns that are next to each other stay so.

`packed_lookup` and `packed_linear` take rows in trellis codes too (`trellis_rows.py`).
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.kernels.packed_dot import packed_dot, suits
from ryzen_llm.kernels.trellis_rows import TrellisRows, has_fast_values, trellis_dot, unpack_trellis

TILE_ROWS = 2048
"""Rows that are unpacked at once for a matrix product: in bf16 they stay in a CPU's L2 cache."""

MOST_KERNEL_ROWS = 16
"""With more x's than that, matrix products of unpacked tiles are less work than the kernel's dot products."""


class PackedRows(NamedTuple):
    """`codes` (rows, groups, group * bits / 8) uint8 and `scale` (rows, groups), floating."""

    codes: Tensor
    scale: Tensor
    bits: int


Rows = PackedRows | TrellisRows


def planes_of(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, shift) of each plane: the plane's bits count 2**shift."""
    found, shift = [], 0
    for width in (8, 4, 2, 1):
        if bits & width:
            found.append((width, shift))
            shift += width
    return tuple(found)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes (rows, groups, group) from 0 to 2**bits - 1, group a multiple of 8, as the planes' bytes."""
    packed = []
    for width, shift in planes_of(bits):
        plane = (codes.to(torch.int32) >> shift) & (2**width - 1)
        parts = plane.unflatten(-1, (8 // width, -1))
        weights = (2 ** (width * torch.arange(8 // width, device=codes.device))).to(torch.int32)
        packed.append((parts * weights[:, None]).sum(-2).to(torch.uint8))
    return torch.cat(packed, -1)


def _parts(codes: Tensor, bits: int) -> list[list[Tensor]]:
    """By plane, its parts: uint8 (rows, groups, group * width / 8) each, not shifted to their weight yet."""
    planes, start = [], 0
    group = codes.shape[-1] * 8 // bits
    for width, _ in planes_of(bits):
        plane = codes[..., start : start + group * width // 8]
        start += plane.shape[-1]
        planes.append([(plane >> (width * i)) & (2**width - 1) for i in range(8 // width)])
    return planes


def unpack(rows: Rows) -> Tensor:
    """The values, (rows, groups * group), in the dtype of the scale."""
    if isinstance(rows, TrellisRows):
        return unpack_trellis(rows)
    values = torch.zeros((), dtype=rows.scale.dtype, device=rows.codes.device)
    for (_, shift), parts in zip(planes_of(rows.bits), _parts(rows.codes, rows.bits), strict=True):
        values = values + torch.cat(parts, -1).to(rows.scale.dtype) * 2**shift
    centred: Tensor = values - (2**rows.bits - 1) / 2
    return (centred * rows.scale[..., None]).flatten(1)


def packed_lookup(indices: Tensor, rows: Rows) -> Tensor:
    """The values of the rows at `indices` (n,) int64, as (n, size) in the dtype of the scale."""
    if rows.codes.is_cuda and not torch.compiler.is_compiling() and (kernels := _triton(rows)) is not None:
        return torch.as_tensor(kernels.lookup(indices, *rows))
    return unpack(rows._replace(codes=rows.codes[indices], scale=rows.scale[indices]))


def packed_linear(x: Tensor, rows: Rows) -> Tensor:
    """x (n, size) times the rows, as (n, rows) in x's dtype; its gradient goes to `x` only.

    One x in a compiled decoding step is multiplied straight from the codes, by `packed_dot`, `trellis_dot` or
    a loop that Inductor makes; several, and on a CPU without the compiler, tile by tile of `TILE_ROWS` rows.
    On CUDA a Triton kernel unpacks in registers.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        product: Tensor = _PackedLinear.apply(x, *rows, type(rows))  # type: ignore[no-untyped-call]
        return product
    return _multiply(x, rows)


def _multiply(x: Tensor, rows: Rows) -> Tensor:
    compiling = torch.compiler.is_compiling()
    if x.is_cuda and not compiling and x.shape[0] <= MOST_KERNEL_ROWS:
        if (kernels := _triton(rows)) is not None:
            return torch.as_tensor(kernels.linear(x, *rows))
    elif x.shape[0] == 1 and compiling:
        on_cpu = x.device.type == "cpu"
        if isinstance(rows, TrellisRows):
            if on_cpu and has_fast_values():
                return trellis_dot(x[0], rows).to(x.dtype)[None]
        elif on_cpu and suits(x.shape[1] // rows.codes.shape[1], rows.bits):
            return packed_dot(x[0], *rows).to(x.dtype)[None]
        else:
            return _dot(x[0], rows).to(x.dtype)[None]
    return multiply_by_tiles(x, rows)


def multiply_by_tiles(x: Tensor, rows: Rows) -> Tensor:
    """`packed_linear` for many x's, for which unpacking is little work beside the products."""
    out = x.new_empty(x.shape[0], len(rows.codes))
    for start, tile in _tiles(rows):
        out[:, start : start + TILE_ROWS] = F.linear(x, tile.to(x.dtype))
    return out


def _dot(x: Tensor, rows: PackedRows) -> Tensor:
    """x (size,) times the rows in fp32, (rows,)."""
    x = x.float().view(rows.codes.shape[1], -1)
    planes = planes_of(rows.bits)
    # All planes in stretches as long as the narrowest plane, so that Inductor makes one loop of them.
    length = x.shape[-1] * planes[-1][0] // 8
    terms = torch.zeros((), device=x.device)
    for (_, shift), parts in zip(planes, _parts(rows.codes, rows.bits), strict=True):
        stretches = [stretch for part in parts for stretch in torch.split(part, length, -1)]
        for stretch, values in zip(stretches, torch.split(x, length, -1), strict=True):
            terms = terms + stretch.float() * (values * 2**shift)
    dots: Tensor = (terms.sum(-1) - x.sum(-1) * ((2**rows.bits - 1) / 2)) * rows.scale
    return dots.sum(-1)


def _tiles(rows: Rows) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(rows.codes), TILE_ROWS):
        part = slice(start, start + TILE_ROWS)
        yield start, unpack(rows._replace(codes=rows.codes[part], scale=rows.scale[part]))


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, bits: int, kind: type[Rows]) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.bits, ctx.kind = bits, kind
        return _multiply(x, kind(codes, scale, bits))

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = upstream
        dx = torch.zeros((), device=gradient.device)
        for start, tile in _tiles(ctx.kind(*ctx.saved_tensors, ctx.bits)):
            part = gradient[:, start : start + TILE_ROWS]
            dx = dx + (part @ tile.to(part.dtype)).float()
        return dx.to(gradient.dtype), None, None, None, None


@functools.cache
def _modules() -> tuple[Any, Any] | None:
    """The modules of the Triton kernels, of packed and of trellis rows; None where Triton does not exist."""
    try:
        from ryzen_llm.kernels import packed_rows_triton, trellis_rows_triton
    except ImportError:  # Triton is there on Linux only
        return None
    return packed_rows_triton, trellis_rows_triton


def _triton(rows: Rows) -> Any:
    modules = _modules()
    return None if modules is None else modules[isinstance(rows, TrellisRows)]
