"""Packed rows to test with."""

import torch

from ryzen_llm.kernels import PackedRows, TrellisRows, pack


def random_rows(
    bits: int, rows: int = 37, groups: int = 3, group: int = 16
) -> tuple[PackedRows, torch.Tensor]:
    """Packed rows, and their values by the formula in fp64."""
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (rows, groups, group), generator=draw)
    scale = torch.rand(rows, groups, generator=draw) + 0.5
    values = (codes - (2**bits - 1) / 2) * scale.double()[..., None]
    return PackedRows(pack(codes, bits), scale, bits), values.flatten(1)


def random_trellis(bits: int, rows: int = 37, size: int = 48) -> tuple[TrellisRows, torch.Tensor]:
    """Rows in trellis codes, and their values by the formula in Python's integers and fp64."""
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(256, (rows, 2 + size * bits // 8), generator=draw, dtype=torch.uint8)
    scale = torch.rand(rows, 1, generator=draw) + 0.5
    values = []
    for row in codes:
        stream = int.from_bytes(bytes(row.tolist()), "little")
        states = [stream >> bits * (j + 1) & 0xFFFF for j in range(size)]
        mixed = [(state * 34038481 + 76625530) % 2**32 for state in states]
        values.append([(sum(m.to_bytes(4, "little")) - 510) / 147.800537 for m in mixed])
    return TrellisRows(codes, scale, bits), torch.tensor(values, dtype=torch.float64) * scale
