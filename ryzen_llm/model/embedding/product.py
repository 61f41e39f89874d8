"""Vector quantisation: each stretch of a row is an entry of a trained codebook, or a sum of several."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import linear_cross_entropy
from ryzen_llm.model.embedding.base import CompressedEmbedding, Embedding, LinearLoss, check_dense, require
from ryzen_llm.model.embedding.calibration import Calibration

_ROUNDS = 8
_TRAINED_ON = 16384
_ROWS = 4096


class ProductEmbedding(CompressedEmbedding):
    """A row is cut into vectors of `width` columns, each the sum of an entry from each of `stages` codebooks.

    Product quantisation (Jégou et al. 2011); with several stages, residual quantisation of each vector. To be
    trained it holds `weight`, and looks up the nearest entries with the gradient straight through and to the
    entries alike (DPQ, Chen et al. 2020, arXiv:1908.09756, the variant with centroids). `compressed()` and
    `from_dense` give the packed form, one byte a code, of which only the codebooks are trained.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of a row, a multiple of `width`.
        width: Columns of a vector.
        entries: Of each codebook, 2 to 256.
        stages: Codebooks for each vector.
        packed: Build the packed form, to load one.
    """

    kind = "product"

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        *,
        width: int = 8,
        entries: int = 256,
        stages: int = 1,
        packed: bool = False,
    ) -> None:
        settings = {
            "width": require("width", width, 1, hidden_size),
            "entries": require("entries", entries, 2, min(256, vocab_size)),
            "stages": require("stages", stages, 1, 8),
            "packed": packed,
        }
        self._start(vocab_size, hidden_size, settings)
        if hidden_size % width:
            raise InputError(
                f"embedding_settings.width is {width}, expected a divisor of hidden_size = {hidden_size}"
            )
        self.stages, self.vectors = stages, hidden_size // width
        self.codebooks = nn.Parameter(torch.empty(stages, self.vectors, entries, width))
        self.weight: nn.Parameter | None = None
        if packed:
            self.codes = nn.Buffer(torch.zeros(stages, vocab_size, self.vectors, dtype=torch.uint8))
        else:
            self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
            nn.init.normal_(self.weight, std=0.02)
        for stage in range(stages):
            nn.init.normal_(self.codebooks[stage], std=0.02 / 2**stage)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, weight: Tensor, calibration: Calibration, **settings: Any) -> Self:
        """See `CompressedEmbedding.from_dense`: k-means (Lloyd) of each vector, whitened and weighted.

        Columns are scaled by the root of the Hessian's diagonal, rows count by their frequency; the codebooks
        are trained on a sample of the rows.
        """
        check_dense(weight, calibration)
        made = cls(*weight.shape, **settings | {"packed": True})
        entries, width = made.codebooks.shape[2:]
        column_scale = calibration.hessian.diagonal().sqrt()
        white = torch.unflatten(weight.float() * column_scale, -1, (-1, width)).transpose(0, 1).contiguous()
        draw = torch.Generator().manual_seed(0)
        weights = calibration.frequencies.sqrt().cpu()
        sample = torch.multinomial(weights, min(_TRAINED_ON, len(weights)), generator=draw)
        per_vector = column_scale.view(-1, 1, width)
        for stage in range(made.stages):
            rows, importance = white[:, sample], weights[sample].to(white.device)
            books = rows[:, torch.randperm(len(sample), generator=draw)[:entries]].clone()
            for _ in range(_ROUNDS):
                nearest = _nearest(rows, books)
                total = torch.zeros_like(books).scatter_add_(
                    1, nearest[..., None].expand_as(rows), rows * importance[:, None]
                )
                count = torch.zeros(books.shape[:2], device=books.device).scatter_add_(
                    1, nearest, importance.expand_as(nearest)
                )
                books = torch.where(count[..., None] > 0, total / count.clamp(min=1e-12)[..., None], books)
            made.codebooks[stage] = books / per_vector
            # The codebook as it is stored, so that the next stage sees what is left of it.
            codes = _nearest(white, books)
            made.codes[stage] = codes.T.to(torch.uint8)
            white -= torch.gather(books, 1, codes[..., None].expand(-1, -1, width))
        return made

    def lookup(self, input_ids: Tensor) -> Tensor:
        """See `Embedding.lookup`."""
        self._check_ids(input_ids)
        rows = input_ids.flatten()
        values = (
            self._decoded(rows) if self.weight is None else self._assigned(F.embedding(rows, self.weight))
        )
        return values.view(*input_ids.shape, self.hidden_size)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """See `Embedding.logits`. Packed, each entry is multiplied once, and products are summed."""
        if self.weight is not None:
            return F.linear(hidden_states, self._assigned(self.weight).to(hidden_states.dtype))
        x = hidden_states.reshape(-1, self.vectors, self.codebooks.shape[-1])
        if len(x) > 16:  # rows are put together for a matrix product, some at a time
            tiles = [
                F.linear(x.flatten(1), self._decoded(ids).to(x.dtype))
                for ids in torch.split(torch.arange(self.vocab_size, device=x.device), _ROWS)
            ]
            logits = torch.cat(tiles, -1)
        else:
            products = torch.einsum("nvw,svew->nsve", x, self.codebooks.to(x.dtype)).float()
            codes = self.codes.transpose(1, 2).long().expand(len(x), -1, -1, -1)
            logits = products.gather(-1, codes).sum((1, 2)).to(x.dtype)
        return logits.view(*hidden_states.shape[:-1], self.vocab_size)

    def loss(
        self, hidden_states: Tensor, targets: Tensor, loss: LinearLoss = linear_cross_entropy
    ) -> tuple[Tensor, Tensor]:
        """See `Embedding.loss`."""
        if self.weight is None:
            return super().loss(hidden_states, targets, loss)
        return loss(hidden_states, self._assigned(self.weight), targets)

    def compressed(self) -> Embedding:
        """See `Embedding.compressed`: the packed form."""
        if self.weight is None:
            return super().compressed()
        made = type(self)(self.vocab_size, self.hidden_size, **self.settings | {"packed": True})
        with torch.no_grad():
            made.codebooks.copy_(self.codebooks)
            made.codes.copy_(self._codes(self.weight))
        return made.to(self.codebooks.device, self.codebooks.dtype)

    def check_loaded(self) -> None:
        """See `Embedding.check_loaded`."""
        entries = self.codebooks.shape[2]
        if self.weight is None and int(self.codes.max()) >= entries:
            raise InputError(f"embedding.codes reach {int(self.codes.max())}, expected less than {entries}")

    def _codes(self, values: Tensor) -> Tensor:
        """The nearest entries, stage by stage, of `values` (rows, hidden_size): (stages, rows, vectors)."""
        left = torch.unflatten(values.detach().float(), -1, (self.vectors, -1)).transpose(0, 1)
        codes = []
        for books in self.codebooks.detach().float():
            nearest = _nearest(left, books)
            left = left - torch.gather(books, 1, nearest[..., None].expand_as(left))
            codes.append(nearest.T)
        return torch.stack(codes)

    def _assigned(self, values: Tensor) -> Tensor:
        return self._sum(self._codes(values)) + (values - values.detach())

    def _decoded(self, rows: Tensor) -> Tensor:
        return self._sum(self.codes[:, rows].long())

    def _sum(self, codes: Tensor) -> Tensor:
        """The rows of `codes` (stages, rows, vectors) int64: (rows, hidden_size)."""
        vectors = torch.arange(self.vectors, device=codes.device)
        entries = [books[vectors, code] for books, code in zip(self.codebooks, codes, strict=True)]
        return torch.stack(entries).sum(0).flatten(-2)


def _nearest(rows: Tensor, books: Tensor) -> Tensor:
    """For rows (vectors, n, width), the nearest entry of books (vectors, entries, width): (vectors, n)."""
    norms = books.square().sum(-1)[:, None] / 2
    parts = [(norms - part @ books.transpose(1, 2)).argmin(-1) for part in torch.split(rows, _ROWS, 1)]
    return torch.cat(parts, 1)
