"""The plain embedding: one row a token."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.model.embedding.base import Embedding


class DenseEmbedding(Embedding):
    """A (vocab_size, hidden_size) table, drawn from a normal distribution of deviation 0.02."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.normal_(self.weight, std=0.02)

    def lookup(self, input_ids: Tensor) -> Tensor:
        """See `Embedding.lookup`."""
        return F.embedding(input_ids, self.weight)

    def dense_weight(self) -> Tensor:
        """See `Embedding.dense_weight`."""
        return self.weight.detach()

    def head(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """See `Embedding.head`."""
        return hidden_states, self.weight
