"""The plain embedding: one row a token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.kernels import linear_cross_entropy
from ryzen_llm.model.embedding.base import Embedding, LinearLoss


class DenseEmbedding(Embedding):
    """A (vocab_size, hidden_size) table, drawn from a normal distribution of deviation 0.02."""

    kind = "dense"

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        self._start(vocab_size, hidden_size, {})
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def lookup(self, input_ids: Tensor) -> Tensor:
        """See `Embedding.lookup`."""
        return F.embedding(input_ids, self.weight)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """See `Embedding.logits`."""
        return F.linear(hidden_states, self.weight)

    def loss(
        self, hidden_states: Tensor, targets: Tensor, loss: LinearLoss = linear_cross_entropy
    ) -> tuple[Tensor, Tensor]:
        """See `Embedding.loss`."""
        return loss(hidden_states, self.weight, targets)

    def dense_weight(self) -> Tensor:
        """See `Embedding.dense_weight`; the table itself, no copy."""
        return self.weight.detach()
