"""Low rank: a short vector a token, and one matrix to widen it."""

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.kernels import linear_cross_entropy
from ryzen_llm.model.embedding.base import CompressedEmbedding, LinearLoss, check_dense, require
from ryzen_llm.model.embedding.calibration import Calibration


class FactorizedEmbedding(CompressedEmbedding):
    """weight = codes @ widen, codes (vocab_size, rank) and widen (rank, hidden_size).

    From scratch as in ALBERT (Lan et al. 2020, arXiv:1909.11942). From a dense matrix the best such product
    in the calibration's norm, by a singular value decomposition of the matrix whitened with the activations
    and weighted with the frequencies (as in SVD-LLM, Wang et al. 2024, arXiv:2403.07378).

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of a vector.
        rank: From 1 to hidden_size; bytes are saved below vocab_size * hidden_size / (both's sum).
    """

    kind = "factorized"

    def __init__(self, vocab_size: int, hidden_size: int, *, rank: int = 64) -> None:
        rank = require("rank", rank, 1, min(vocab_size, hidden_size))
        self._start(vocab_size, hidden_size, {"rank": rank})
        self.codes = nn.Parameter(torch.empty(vocab_size, rank))
        self.widen = nn.Parameter(torch.empty(rank, hidden_size))
        nn.init.normal_(self.codes, std=0.02)
        nn.init.normal_(self.widen, std=1 / math.sqrt(rank))

    @classmethod
    def from_dense(cls, weight: Tensor, calibration: Calibration, **settings: Any) -> Self:
        """See `CompressedEmbedding.from_dense`."""
        check_dense(weight, calibration)
        made = cls(*weight.shape, **settings)
        rank = made.settings["rank"]
        root = torch.linalg.cholesky(calibration.hessian.double())  # hessian = root rootᵀ
        rows = calibration.frequencies.double().sqrt()[:, None]
        white = rows * (weight.double() @ root)
        # The right singular vectors, from a small matrix.
        basis = torch.linalg.eigh(white.T @ white).eigenvectors[:, -rank:]
        with torch.no_grad():
            made.codes.copy_(white @ basis / rows)
            made.widen.copy_(torch.linalg.solve_triangular(root, basis.T, upper=False, left=False))
        return made

    def lookup(self, input_ids: Tensor) -> Tensor:
        """See `Embedding.lookup`."""
        return F.embedding(input_ids, self.codes) @ self.widen

    def logits(self, hidden_states: Tensor) -> Tensor:
        """See `Embedding.logits`."""
        return F.linear(F.linear(hidden_states, self.widen), self.codes)

    def loss(
        self, hidden_states: Tensor, targets: Tensor, loss: LinearLoss = linear_cross_entropy
    ) -> tuple[Tensor, Tensor]:
        """See `Embedding.loss`."""
        narrow = F.linear(hidden_states, self.widen)
        return loss(narrow, self.codes, targets)
