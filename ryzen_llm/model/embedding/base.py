"""The contract of an embedding."""

from abc import ABC, abstractmethod

import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Module, ABC):
    """A vector for each token id, usable as the tied output head."""

    @abstractmethod
    def lookup(self, input_ids: Tensor) -> Tensor:
        """The vectors of `input_ids` (...) int64, as (..., hidden_size)."""

    @abstractmethod
    def dense_weight(self) -> Tensor:
        """The vectors of all token ids, (vocab_size, hidden_size) without gradient: what is exported.

        `DenseEmbedding` gives a view of its own weight, which imported weights are written into.
        """

    @abstractmethod
    def head(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """What to multiply for the logits of `hidden_states` (..., hidden_size): x (..., size) and a weight
        (vocab_size, size), so that logits are x weightᵀ. The fused loss multiplies them by itself.
        """

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Each token's dot product with `hidden_states` (..., hidden_size), as (..., vocab_size)."""
        return F.linear(*self.head(hidden_states))

    @property
    def bytes_resident(self) -> int:
        """Bytes of all parameters and buffers that lookup and logits need."""
        tensors = {t.untyped_storage().data_ptr(): t for t in (*self.parameters(), *self.buffers())}
        return sum(t.untyped_storage().nbytes() for t in tensors.values())
