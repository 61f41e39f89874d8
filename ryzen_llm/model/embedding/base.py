"""The contract of an embedding."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Embedding(nn.Module, ABC):
    """A vector for each token id, usable as the tied output head."""

    @abstractmethod
    def lookup(self, input_ids: Tensor) -> Tensor:
        """The vectors of `input_ids` (...) int64, as (..., hidden_size)."""

    @abstractmethod
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Each token's dot product with `hidden_states` (..., hidden_size), as (..., vocab_size)."""

    @property
    def bytes_resident(self) -> int:
        """Bytes of all parameters and buffers that lookup and logits need."""
        tensors = {t.untyped_storage().data_ptr(): t for t in (*self.parameters(), *self.buffers())}
        return sum(t.untyped_storage().nbytes() for t in tensors.values())
