"""Packed rows to test with."""

import torch

from ryzen_llm.kernels import PackedRows, pack


def random_rows(
    bits: int, rows: int = 37, groups: int = 3, group: int = 16
) -> tuple[PackedRows, torch.Tensor]:
    """Packed rows, and their values by the formula in fp64."""
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, groups, group), generator=draw)
    scale = torch.rand(rows, groups, generator=draw) + 0.5
    values = (codes - (2**bits - 1) / 2) * scale.double()[..., None]
    return PackedRows(pack(codes, bits), scale, bits), values.flatten(1)
