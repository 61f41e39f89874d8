"""How many bits each row of an embedding gets: more for the rows that matter more."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import MOST_TRELLIS_BITS, trellis_bytes
from ryzen_llm.model.embedding.base import require
from ryzen_llm.model.embedding.calibration import Calibration

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of a tier. Not 1: a row of 1 bit is off by a third of its variance, and rare tokens do occur."""
Tiers = list[list[int]]
"""[rows, bits] of each tier, first the rows that matter most."""


def check_tiers(bits: int | Tiers, vocab_size: int) -> Tiers:
    """`bits` as tiers that cover the vocabulary. Raises InputError where they cannot."""
    if isinstance(bits, int):
        return [[vocab_size, require("bits", bits, 1, 8)]]
    fits = isinstance(bits, list) and all(isinstance(tier, list | tuple) and len(tier) == 2 for tier in bits)
    if not fits or not bits:
        raise InputError(f"embedding_settings.bits is {bits!r}, expected 1 to 8, or a list of [rows, bits]")
    tiers = [[require("bits", n, 1, vocab_size), require("bits", b, 1, 8)] for n, b in bits]
    if sum(n for n, _ in tiers) != vocab_size:
        raise InputError(
            f"embedding_settings.bits has {sum(n for n, _ in tiers)} rows, expected vocab_size = {vocab_size}"
        )
    return tiers


def sensitivity(weight: Tensor, calibration: Calibration) -> Tensor:
    """What a row's quantisation error costs, up to a factor that all rows share: (vocab_size,).

    The error is proportional to what is coded, the distance from the centre. Which tier's is not known yet;
    the tiers with few bits, which count, have most of the rows, and so about the centre of all.
    """
    weight = weight.float()
    return calibration.frequencies * (weight - weight.mean(0)).square().mean(-1)


def allocate_bits(
    weight: Tensor, calibration: Calibration, bytes_available: int, code: str = "grid"
) -> Tiers:
    """Tiers of whole rows for `QuantizedEmbedding.from_dense` that fit into `bytes_available`.

    A bit more quarters a row's error; so each row gets the bits at which its next one is worth the same to
    all (Shannon's reverse water-filling). Raises InputError where even the fewest bits do not fit.
    """
    vocab_size, hidden_size = weight.shape
    costs = sensitivity(weight, calibration).double().sort(descending=True).values
    errors = [_TRELLIS_ERRORS[b] if in_trellis(code, b) else _GRID_ERRORS[b] for b in WIDTHS]
    factors = torch.tensor(errors, dtype=torch.float64)
    beside = 2 + position_dtype(vocab_size).itemsize  # a scale and a position
    row_sizes = [
        (trellis_bytes if in_trellis(code, b) else _grid_bytes)(hidden_size, b) + beside for b in WIDTHS
    ]
    sizes = torch.tensor(row_sizes, dtype=torch.float64)

    def size(chosen: Tensor) -> int:
        # With the signs of the rotation and each tier's centre.
        return int(sizes[chosen].sum()) + hidden_size * (1 + 2 * len(torch.unique(chosen)))

    low, high = -80.0, 20.0
    for _ in range(80):
        middle = (low + high) / 2
        chosen = (costs[:, None] * factors + math.exp(middle) * sizes).argmin(-1)
        if size(chosen) > bytes_available:
            low = middle
        else:
            high = middle
    chosen = (costs[:, None] * factors + math.exp(high) * sizes).argmin(-1)
    if size(chosen) > bytes_available:
        raise InputError(
            f"{bytes_available} bytes are too few for {vocab_size} rows of {hidden_size}: expected at least "
            f"{size(chosen)}"
        )
    counts = [(int((chosen == i).sum()), bits) for i, bits in enumerate(WIDTHS)]
    return [[rows, bits] for rows, bits in reversed(counts) if rows]


def position_dtype(vocab_size: int) -> torch.dtype:
    """Of the place that a token's row has in the order of tiers."""
    return torch.uint16 if vocab_size <= 2**16 else torch.int32


def in_trellis(code: str, bits: int) -> bool:
    """Whether a tier of so many bits is in trellis codes; of more bits, every tier is on a grid."""
    return code == "trellis" and bits <= MOST_TRELLIS_BITS


def _grid_bytes(size: int, bits: int) -> int:
    return size * bits // 8


_GRID_ERRORS = {2: 0.1188, 3: 0.0374, 4: 0.01154, 5: 0.00349, 6: 0.00104, 8: 0.0000877}
"""Squared error of the grids in `GAUSSIAN_STEPS`, in variances (Max 1960)."""
_TRELLIS_ERRORS = {2: 0.0775, 3: 0.0202, 4: 0.0054}
"""The same of trellis codes: measured on 256 rows of 576 normal numbers."""
