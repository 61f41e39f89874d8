"""Compositional: two small tables, and each token's vector is the product of a row of each."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.model.embedding.base import Embedding, require


class HashedEmbedding(Embedding):
    """weight[i] = quotients[i // buckets] * remainders[i % buckets], as in the quotient-remainder trick.

    Every token has a vector of its own (Shi et al. 2020, arXiv:1909.02107). For training from scratch.

    Args:
        vocab_size: Number of token ids.
        hidden_size: Width of a vector.
        buckets: Rows of the table of remainders, from 1 to vocab_size.
    """

    kind = "hashed"

    def __init__(self, vocab_size: int, hidden_size: int, *, buckets: int = 1024) -> None:
        buckets = require("buckets", buckets, 1, vocab_size)
        self._start(vocab_size, hidden_size, {"buckets": buckets})
        self.quotients = nn.Parameter(torch.empty(-(-vocab_size // buckets), hidden_size))
        self.remainders = nn.Parameter(torch.empty(buckets, hidden_size))
        nn.init.normal_(self.quotients, mean=1.0, std=0.5)
        nn.init.normal_(self.remainders, std=0.02)

    def lookup(self, input_ids: Tensor) -> Tensor:
        """See `Embedding.lookup`."""
        self._check_ids(input_ids)
        buckets = len(self.remainders)
        quotients = F.embedding(input_ids // buckets, self.quotients)
        return quotients * F.embedding(input_ids % buckets, self.remainders)

    def logits(self, hidden_states: Tensor) -> Tensor:
        """See `Embedding.logits`."""
        scaled = hidden_states[..., None, :] * self.quotients.to(hidden_states.dtype)
        return F.linear(scaled, self.remainders.to(scaled.dtype)).flatten(-2)[..., : self.vocab_size]
