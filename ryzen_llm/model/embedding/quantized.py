"""Few bits a number, more for the rows that matter more."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import (
    PackedRows,
    TrellisRows,
    linear_cross_entropy,
    pack,
    packed_linear,
    packed_lookup,
    trellis_bytes,
)
from ryzen_llm.model.embedding.base import CompressedEmbedding, Embedding, LinearLoss, check_dense, require
from ryzen_llm.model.embedding.calibration import Calibration
from ryzen_llm.model.embedding.error_feedback import (
    gaussian_scale,
    quantise_in_trellis,
    quantise_rows,
    to_codes,
)
from ryzen_llm.model.embedding.rotation import rotate, rotate_back
from ryzen_llm.model.embedding.tiers import Tiers, check_tiers, in_trellis, position_dtype, sensitivity

CODES = ("trellis", "grid")
"""From the one with the smaller error to the one that can be trained."""
ROUNDED_FROM = 0.7
"""Share of a training's steps after which `weight` is rounded: docs/embeddings.md has what others cost."""


class QuantizedEmbedding(CompressedEmbedding):
    """Codes of 1 to 8 bits in tiers of rows, each group of columns with a scale of its own.

    What is coded is a row's distance from the centre of its tier, a vector that is stored once: of what rows
    have in common, no bits are spent in each of them.

    It has two forms. To be trained, it holds `weight` and rounds it as it is used, with gradients straight
    through (Bengio et al. 2013, arXiv:1308.3432) and learned scales (as in LSQ, Esser et al. 2019,
    arXiv:1902.08153); in a training that calls `at_step`, in the last part of it only, until which it
    computes to the bit what a dense embedding of the same seed does. `compressed()` and `from_dense` give the
    packed form, in which nothing dense is left and nothing is trained: see `ryzen_llm.kernels.packed_rows`.
    Codes, scales and centres are in a rotated basis. Tiers of few bits can be in trellis codes, which have
    about half of the grids' error (`ryzen_llm.kernels.trellis_rows`): these are made from a dense matrix, and
    not trained.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of a vector, a multiple of 8.
        bits: 1 to 8 for all rows, or a list of [rows, bits], which add up to vocab_size.
        group_size: Columns that share a scale; 0 stands for the whole row. Without rotation, 32 or 64.
        rotate: Spread each row's columns over all others first, so that one scale suits them all.
        code: "grid", or "trellis" for the tiers of 1 to 4 bits; then group_size is 0.
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
        code: str = "grid",
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
        if code not in CODES:
            raise InputError(f"embedding_settings.code is {code!r}, expected {' or '.join(CODES)}")
        if code == "trellis" and (self.group != hidden_size or not packed):
            raise InputError(
                "embedding_settings.code is 'trellis', expected grid: trellis codes are made from a trained "
                "embedding, with group_size 0"
            )
        self.code = code
        self.settings = {
            "bits": self.tiers,
            "group_size": group_size,
            "rotate": rotate,
            "code": code,
            "reordered": reordered,
            "packed": packed,
        }
        draw = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (hidden_size,), generator=draw, dtype=torch.int8, device="cpu") * 2 - 1
        self.register_buffer("signs", signs if rotate else None)
        order = torch.arange(vocab_size).to(position_dtype(vocab_size))
        self.register_buffer("position", order if reordered else None)
        self._rounds = True
        self.weight: nn.Parameter | None = None
        self.log_scale: nn.Parameter | None = None
        groups = hidden_size // self.group
        self.centre = nn.Parameter(torch.zeros(len(self.tiers), hidden_size), requires_grad=not packed)
        if packed:
            for i, (rows, bits) in enumerate(self.tiers):
                shape: tuple[int, ...] = (rows, groups, self.group * bits // 8)
                if in_trellis(code, bits):
                    shape = (rows, trellis_bytes(hidden_size, bits))
                self.register_buffer(f"codes_{i}", torch.zeros(shape, dtype=torch.uint8))
                # A parameter, so that it follows the model's floating dtype.
                scale = nn.Parameter(torch.ones(rows, groups), requires_grad=False)
                self.register_parameter(f"scale_{i}", scale)
            return
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)
        self.log_scale = nn.Parameter(self._gaussian_scales())
        self.register_state_dict_pre_hook(_fit_scales)  # type: ignore[no-untyped-call]

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, calibration: Calibration, **settings: Any) -> Self:
        """See `CompressedEmbedding.from_dense`. The rows are put into tiers by what their errors cost."""
        made, weight, hessian = cls._prepared(weight, calibration, {**settings, "packed": True})
        for i, (start, stop, bits) in enumerate(made._spans):
            rows = weight[start:stop] - made.centre[i]
            if in_trellis(made.code, bits):
                codes, scale = quantise_in_trellis(rows, hessian, bits)
            else:
                values, scale = quantise_rows(rows, hessian, bits, made.group)
                codes = pack(to_codes(values, scale, bits), bits)
            made._set_tier(i, codes, scale)
        return made

    @classmethod
    @torch.no_grad()
    def trainable_from_dense(cls, weight: Tensor, calibration: Calibration, **settings: Any) -> Self:
        """`from_dense` in the form to be trained, to heal it. It computes the same as the packed one, whose
        codes must be on grids.
        """
        made, weight, hessian = cls._prepared(weight, calibration, {**settings, "packed": False})
        assert made.weight is not None
        assert made.log_scale is not None
        scales = []
        for i, (start, stop, bits) in enumerate(made._spans):
            values, scale = quantise_rows(weight[start:stop] - made.centre[i], hessian, bits, made.group)
            made.weight[start:stop] = made._rotated_back(values)
            scales.append(scale)
        made.log_scale.copy_(torch.cat(scales).log().flatten())
        return made

    @classmethod
    def _prepared(
        cls, weight: Tensor, calibration: Calibration, settings: dict[str, Any]
    ) -> tuple[Self, Tensor, Tensor]:
        """One with centres and order, but no codes yet; `weight` in its basis and order, and the Hessian."""
        check_dense(weight, calibration)
        several = isinstance(settings.get("bits"), list) and len(settings["bits"]) > 1
        made = cls(*weight.shape, **settings | {"reordered": several})
        rotated, hessian = weight.float(), calibration.hessian
        if made.signs is not None:
            signs = made.signs.float()
            rotated, hessian = rotate(rotated, signs), rotate(rotate(hessian, signs).T, signs).T
        if several:
            order = sensitivity(weight, calibration).argsort(descending=True)
            assert made.position is not None
            made.position.copy_(order.argsort())
            rotated = rotated[order]
        for i, (start, stop, _) in enumerate(made._spans):
            made.centre[i] = rotated[start:stop].mean(0).bfloat16()  # as it will be stored
        return made, rotated, hessian

    def lookup(self, input_ids: Tensor) -> Tensor:
        """See `Embedding.lookup`."""
        self._check_ids(input_ids)
        rows = input_ids.flatten()
        if self.position is not None:
            rows = self._row_of(rows)
        if self.weight is not None:
            values = self._trained(rows)
        elif len(self.tiers) == 1:
            values = packed_lookup(rows, self._rows(0)) + self.centre[0]
        else:
            # Every token is looked up in every tier, at a row that exists there; one of them is its own.
            values = torch.zeros((), dtype=self.get_parameter("scale_0").dtype, device=rows.device)
            for i, (start, stop, _) in enumerate(self._spans):
                mine = (rows >= start) & (rows < stop)
                found = packed_lookup((rows - start).clamp(0, stop - start - 1), self._rows(i))
                values = torch.where(mine[:, None], found + self.centre[i], values)
        if self._rounds:
            values = self._rotated_back(values)
        # What is rounded as it is used is in fp32, the rest of the model may be in bf16.
        return values.view(*input_ids.shape, self.hidden_size).to(self.centre.dtype)

    def _row_of(self, input_ids: Tensor) -> Tensor:
        assert self.position is not None
        # CUDA finds nothing in a tensor of 16 bits without a sign.
        position = self.position if self.position.device.type == "cpu" else self.position.int()
        return position[input_ids].long()

    def logits(self, hidden_states: Tensor) -> Tensor:
        """See `Embedding.logits`."""
        x = self._as_weight(hidden_states).reshape(-1, self.hidden_size)
        if self.weight is not None:
            logits = F.linear(x, self._trained().to(x.dtype))
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
            targets = torch.where(targets < 0, targets, self._row_of(targets.clamp(min=0)))
        return loss(self._as_weight(hidden_states), self._trained(), targets)

    @torch.no_grad()
    def at_step(self, step: int, steps: int) -> None:
        """See `Embedding.at_step`: rounding begins with grids that fit the weight as it is by then."""
        begin = math.ceil(ROUNDED_FROM * steps)
        self._rounds = step >= begin
        if step == begin and self.weight is not None and self.log_scale is not None:
            self._begin_rounding()

    def compressed(self) -> Embedding:
        """See `Embedding.compressed`: the packed form."""
        if self.weight is None:
            return super().compressed()
        if self._rounds:
            return self._packed()
        rounded = copy.deepcopy(self)
        rounded._begin_rounding()
        return rounded._packed()

    def check_loaded(self) -> None:
        """See `Embedding.check_loaded`."""
        if self.position is not None:
            order = self.position.long().sort().values
            if not torch.equal(order, torch.arange(self.vocab_size, device=order.device)):
                raise InputError(f"embedding.position is no order of {self.vocab_size} rows")
        if self.signs is not None and not bool((self.signs.abs() == 1).all()):
            raise InputError("embedding.signs are not all 1 or -1")

    @torch.no_grad()
    def _begin_rounding(self) -> None:
        """Put centres and scales where the weight is. Another time, it changes nothing."""
        assert self.weight is not None
        assert self.log_scale is not None
        for i, (start, stop, _) in enumerate(self._spans):
            mean = self.weight[start:stop].mean(0)
            self.centre[i] += self._rotated(mean)
            self.weight[start:stop] -= mean
        self.log_scale.copy_(self._gaussian_scales())

    @torch.no_grad()
    def _gaussian_scales(self) -> Tensor:
        """The logarithm of each row's and group's scale, as `log_scale`."""
        assert self.weight is not None
        weight, spans = self._rotated(self.weight), self._spans
        scales = [gaussian_scale(weight[start:stop], bits, self.group) for start, stop, bits in spans]
        return torch.cat(scales).log().flatten()

    @property
    def _spans(self) -> list[tuple[int, int, int]]:
        """First row, the row after the last, and bits of each tier."""
        stops = list(itertools.accumulate(rows for rows, _ in self.tiers))
        return [(stop - rows, stop, bits) for stop, (rows, bits) in zip(stops, self.tiers, strict=True)]

    def _rows(self, tier: int) -> PackedRows | TrellisRows:
        bits = self.tiers[tier][1]
        kind = TrellisRows if in_trellis(self.code, bits) else PackedRows
        return kind(self.get_buffer(f"codes_{tier}"), self.get_parameter(f"scale_{tier}"), bits)

    def _set_tier(self, tier: int, codes: Tensor, scale: Tensor) -> None:
        self.get_buffer(f"codes_{tier}").copy_(codes)
        self.get_parameter(f"scale_{tier}").copy_(scale)

    def _as_weight(self, hidden_states: Tensor) -> Tensor:
        """`hidden_states` in the basis of the rows that they are multiplied with: see `_trained`."""
        return self._rotated(hidden_states) if self._rounds else hidden_states

    def _rotated(self, x: Tensor) -> Tensor:
        """`x` (..., hidden_size) in the basis of the codes, in its dtype."""
        # On the meta device, where a model is built that gets its weights later, signs are still values.
        return x if self.signs is None else rotate(x, self.signs.to(x.device)).to(x.dtype)

    def _rotated_back(self, x: Tensor) -> Tensor:
        return x if self.signs is None else rotate_back(x, self.signs).to(x.dtype)

    def _trained(self, rows: Tensor | None = None) -> Tensor:
        """What stands for `weight`, or for some rows of it, in fp32 or wider: on its grid and in the basis of
        the codes, or before rounding has begun as it is.
        """
        assert self.weight is not None
        assert self.log_scale is not None
        counts = [n for n, _ in self.tiers]
        weight: Tensor = self.weight
        # Rounded as it will be stored; the gradient passes.
        centre = self.centre + (self.centre.bfloat16() - self.centre).detach()
        if not self._rounds:
            centre = self._rotated_back(centre).detach()
        if rows is None:
            centre = torch.cat([c.expand(n, -1) for c, n in zip(centre, counts, strict=True)])
        else:
            tier = torch.bucketize(rows, torch.tensor(counts, device=rows.device).cumsum(0), right=True)
            weight, centre = F.embedding(rows, weight), F.embedding(tier, centre)
        if not self._rounds:
            # Centres and scales take part, as a distributed training expects of every parameter.
            return weight + centre + 0.0 * (self.centre.sum() + self.log_scale.sum())
        with torch.autocast(weight.device.type, enabled=False):  # grids are finer than bf16
            weight = self._rotated(weight)
        scale = self.log_scale.view(self.vocab_size, -1)
        most = torch.cat([torch.full((n,), 2.0**bits - 1) for n, bits in self.tiers]).to(weight.device)
        if rows is not None:
            scale, most = F.embedding(rows, scale), most[rows]
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
        weight = self._rotated(self.weight.float())
        for i, (start, stop, bits) in enumerate(self._spans):
            codes = to_codes(weight[start:stop], scales[start:stop], bits)
            made._set_tier(i, pack(codes, bits), scales[start:stop])
        return made.to(self.weight.device, self.weight.dtype)


def _fit_scales(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    """What is saved before rounding has begun can be rounded, too, by whoever loads it."""
    assert isinstance(module, QuantizedEmbedding)
    if not module._rounds and module.log_scale is not None:
        with torch.no_grad():
            module.log_scale.copy_(module._gaussian_scales())
