"""Few bits a number, more for the rows that matter more."""

from __future__ import annotations

import itertools
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import PackedRows, linear_cross_entropy, pack, packed_linear, packed_lookup
from ryzen_llm.model.embedding.base import CompressedEmbedding, Embedding, LinearLoss, check_dense, require
from ryzen_llm.model.embedding.calibration import Calibration
from ryzen_llm.model.embedding.error_feedback import gaussian_scale, quantise_rows, to_codes
from ryzen_llm.model.embedding.rotation import rotate, rotate_back

WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of a tier. Not 1: a row of 1 bit is off by a third of its variance, and rare tokens do occur."""
Tiers = list[list[int]]
"""[rows, bits] of each tier, first the rows that matter most."""


class QuantizedEmbedding(CompressedEmbedding):
    """Codes of 1 to 8 bits in tiers of rows, each group of columns with a scale of its own.

    What is coded is a row's distance from the centre of its tier, a vector that is stored once: of what rows
    have in common, no bits are spent in each of them.

    It has two forms. To be trained, it holds `weight` and rounds it as it is used, with gradients straight
    through (Bengio et al. 2013, arXiv:1308.3432) and learned scales (as in LSQ, Esser et al. 2019,
    arXiv:1902.08153). `compressed()` and `from_dense` give the packed form, in which nothing dense is left
    and nothing is trained: see `ryzen_llm.kernels.packed_rows`. Both live in a rotated basis.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of a vector, a multiple of 8.
        bits: 1 to 8 for all rows, or a list of [rows, bits], which add up to vocab_size.
        group_size: Columns that share a scale; 0 stands for the whole row. Without rotation, 32 or 64.
        rotate: Spread each row's columns over all others first, so that one scale suits them all.
        reordered: Whether the rows are in another order than that of the ids.
        packed: Build the packed form, to load one.
    """

    kind = "quantized"
    signs: Tensor | None
    position: Tensor | None

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        bits: int | Tiers = 4,
        group_size: int = 0,
        rotate: bool = True,
        reordered: bool = False,
        packed: bool = False,
    ) -> None:
        self._start(vocab_size, hidden_size, {})
        self.tiers = check_tiers(bits, vocab_size)
        self.group = require("group_size", group_size or hidden_size, 8, hidden_size)
        if hidden_size % self.group or self.group % 8:
            raise InputError(
                f"embedding_settings.group_size is {group_size}, expected a divisor of hidden_size = "
                f"{hidden_size} and a multiple of 8"
            )
        self.settings = {
            "bits": self.tiers,
            "group_size": group_size,
            "rotate": rotate,
            "reordered": reordered,
            "packed": packed,
        }
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (hidden_size,), generator=draw, dtype=torch.int8, device="cpu") * 2 - 1
        self.register_buffer("signs", signs if rotate else None)
        index = torch.uint16 if vocab_size <= 2**16 else torch.int32
        self.register_buffer("position", torch.arange(vocab_size).to(index) if reordered else None)
        self.weight: nn.Parameter | None = None
        self.log_scale: nn.Parameter | None = None
        groups = hidden_size // self.group
        self.centre = nn.Parameter(torch.zeros(len(self.tiers), hidden_size), requires_grad=not packed)
        if packed:
            for i, (rows, bits) in enumerate(self.tiers):
                codes = torch.zeros(rows, groups, self.group * bits // 8, dtype=torch.uint8)
                self.register_buffer(f"codes_{i}", codes)
                # A parameter, so that it follows the model's floating dtype.
                scale = nn.Parameter(torch.ones(rows, groups), requires_grad=False)
                self.register_parameter(f"scale_{i}", scale)
            return
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        with torch.no_grad():
            scales = [
                gaussian_scale(self.weight[start:stop], b, self.group) for start, stop, b in self._spans
            ]
        self.log_scale = nn.Parameter(torch.cat(scales).log().flatten())

    @classmethod
    def from_dense(cls, weight: Tensor, calibration: Calibration, **settings: Any) -> Self:
        """See `CompressedEmbedding.from_dense`. The rows are put into tiers by what their errors cost."""
        return cls.trainable_from_dense(weight, calibration, **settings)._packed()

    @classmethod
    @torch.no_grad()
    def trainable_from_dense(cls, weight: Tensor, calibration: Calibration, **settings: Any) -> Self:
        """`from_dense` in the form to be trained, to heal it. It computes the same as the packed one."""
        check_dense(weight, calibration)
        several = isinstance(settings.get("bits"), list) and len(settings["bits"]) > 1
        made = cls(*weight.shape, **settings | {"reordered": several, "packed": False})
        assert made.weight is not None
        assert made.log_scale is not None
        weight, hessian = weight.float(), calibration.hessian
        if made.signs is not None:
            signs = made.signs.float()
            weight, hessian = rotate(weight, signs), rotate(rotate(hessian, signs).T, signs).T
        if several:
            order = sensitivity(weight, calibration).argsort(descending=True)
            assert made.position is not None
            made.position.copy_(order.argsort())
            weight = weight[order]
        scales = []
        for i, (start, stop, bits) in enumerate(made._spans):
            rows = weight[start:stop]
            made.centre[i] = rows.mean(0).bfloat16()  # as it will be stored
            values, scale = quantise_rows(rows - made.centre[i], hessian, bits, made.group)
            made.weight[start:stop] = values
            scales.append(scale)
        made.log_scale.copy_(torch.cat(scales).log().flatten())
        return made

    def lookup(self, input_ids: Tensor) -> Tensor:
        """See `Embedding.lookup`."""
        self._check_ids(input_ids)
        rows = input_ids.flatten()
        if self.position is not None:
            rows = self.position[rows].long()
        if self.weight is not None:
            values = self._rounded(rows)
        elif len(self.tiers) == 1:
            values = packed_lookup(rows, self._rows(0)) + self.centre[0]
        else:
            # Every token is looked up in every tier, at a row that exists there; one of them is its own.
            values = torch.zeros((), dtype=self.get_parameter("scale_0").dtype, device=rows.device)
            for i, (start, stop, _) in enumerate(self._spans):
                mine = (rows >= start) & (rows < stop)
                found = packed_lookup((rows - start).clamp(0, stop - start - 1), self._rows(i))
                values = torch.where(mine[:, None], found + self.centre[i], values)
        if self.signs is not None:
            values = rotate_back(values, self.signs).to(values.dtype)
        return values.view(*input_ids.shape, self.hidden_size)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """See `Embedding.logits`."""
        x = self._rotated(hidden_states).reshape(-1, self.hidden_size)
        if self.weight is not None:
            logits = F.linear(x, self._rounded().to(x.dtype))
        else:
            common = torch.split(F.linear(x, self.centre.to(x.dtype)), 1, -1)
            logits = torch.cat([packed_linear(x, self._rows(i)) + c for i, c in enumerate(common)], -1)
        if self.position is not None:
            logits = logits.index_select(-1, self.position.int())
        return logits.view(*hidden_states.shape[:-1], self.vocab_size)

    def loss(
        self, hidden_states: Tensor, targets: Tensor, loss: LinearLoss = linear_cross_entropy
    ) -> tuple[Tensor, Tensor]:
        """See `Embedding.loss`."""
        if self.weight is None:
            return super().loss(hidden_states, targets, loss)
        if self.position is not None:
            targets = torch.where(targets < 0, targets, self.position[targets.clamp(min=0)].long())
        return loss(self._rotated(hidden_states), self._rounded(), targets)

    def compressed(self) -> Embedding:
        """See `Embedding.compressed`: the packed form."""
        return super().compressed() if self.weight is None else self._packed()

    @property
    def _spans(self) -> list[tuple[int, int, int]]:
        """First row, the row after the last, and bits of each tier."""
        stops = list(itertools.accumulate(rows for rows, _ in self.tiers))
        return [(stop - rows, stop, bits) for stop, (rows, bits) in zip(stops, self.tiers, strict=True)]

    def _rows(self, tier: int) -> PackedRows:
        codes, scale = self.get_buffer(f"codes_{tier}"), self.get_parameter(f"scale_{tier}")
        return PackedRows(codes, scale, self.tiers[tier][1])

    def _rotated(self, hidden_states: Tensor) -> Tensor:
        if self.signs is None:
            return hidden_states
        return rotate(hidden_states, self.signs).to(hidden_states.dtype)

    def _rounded(self, rows: Tensor | None = None) -> Tensor:
        """`weight`, or some rows of it, on its grid, in fp32 or wider."""
        assert self.weight is not None
        assert self.log_scale is not None
        counts = [n for n, _ in self.tiers]
        most = torch.cat([torch.full((n,), 2.0**bits - 1) for n, bits in self.tiers]).to(self.weight.device)
        weight: Tensor = self.weight
        scale = self.log_scale.view(self.vocab_size, -1)
        # Rounded as it will be stored; the gradient passes.
        centre = self.centre + (self.centre.bfloat16() - self.centre).detach()
        if rows is None:
            centre = torch.cat([c.expand(n, -1) for c, n in zip(centre, counts, strict=True)])
        else:
            tier = torch.bucketize(rows, torch.tensor(counts, device=rows.device).cumsum(0), right=True)
            weight, scale, centre = (
                F.embedding(at, x) for at, x in ((rows, weight), (rows, scale), (tier, centre))
            )
            most = most[rows]
        most = most[:, None, None]
        scale = scale.exp()
        scale = (scale + (scale.bfloat16() - scale).detach())[..., None]
        places = torch.clamp(torch.unflatten(weight, -1, (-1, self.group)) / scale + most / 2, most * 0, most)
        places = places + (places.round() - places).detach()
        return ((places - most / 2) * scale).flatten(-2) + centre

    @torch.no_grad()
    def _packed(self) -> Self:
        assert self.weight is not None
        assert self.log_scale is not None
        made = type(self)(self.vocab_size, self.hidden_size, **self.settings | {"packed": True})
        if self.position is not None and made.position is not None:
            made.position.copy_(self.position)
        made.centre.copy_(self.centre.bfloat16())
        scales = self.log_scale.exp().view(self.vocab_size, -1).bfloat16().float()
        for i, (start, stop, bits) in enumerate(self._spans):
            codes = to_codes(self.weight[start:stop].float(), scales[start:stop], bits)
            made.get_buffer(f"codes_{i}").copy_(pack(codes, bits))
            made.get_parameter(f"scale_{i}").copy_(scales[start:stop])
        return made.to(self.weight.device)


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
    weight: Tensor,
    calibration: Calibration,
    bytes_available: int,
    widths: tuple[int, ...] = WIDTHS,
) -> Tiers:
    """Tiers of whole rows for `QuantizedEmbedding.from_dense` that fit into `bytes_available`.

    A bit more quarters a row's error; so each row gets the bits at which its next one is worth the same to
    all (Shannon's reverse water-filling). Raises InputError where even the fewest bits do not fit.
    """
    vocab_size, hidden_size = weight.shape
    costs = sensitivity(weight, calibration).double().sort(descending=True).values
    # The squared error of the Gaussian grids is about step² / 12, and larger where clipping counts.
    factors = torch.tensor([_ERRORS[b] for b in widths], dtype=torch.float64)
    sizes = torch.tensor([b * hidden_size / 8 + 2 + 2 for b in widths], dtype=torch.float64)

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
    counts = [(int((chosen == i).sum()), bits) for i, bits in enumerate(widths)]
    return [[rows, bits] for rows, bits in reversed(counts) if rows]


_ERRORS = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.01154, 5: 0.00349, 6: 0.00104, 7: 0.000304, 8: 0.0000877}
"""Squared error of the grids in `GAUSSIAN_STEPS`, in variances (Max 1960)."""
