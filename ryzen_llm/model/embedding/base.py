"""The contract of an embedding, and of how one is made from a dense matrix."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import chunked_cross_entropy, linear_cross_entropy
from ryzen_llm.model.embedding.calibration import Calibration

LinearLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden_states, weight, targets): a form of `linear_cross_entropy`."""


class Embedding(nn.Module, ABC):
    """A vector for each token id, usable as the tied output head.

    Built by `(vocab_size, hidden_size, **settings)`, ready to be trained from scratch; `settings` are plain
    numbers and lists, those that the class keeps in `settings`.
    """

    kind: str
    """Its name in `EMBEDDINGS`."""
    vocab_size: int
    hidden_size: int
    settings: dict[str, Any]

    @abstractmethod
    def lookup(self, input_ids: Tensor) -> Tensor:
        """The vectors of `input_ids` (...) int64, as (..., hidden_size)."""

    @abstractmethod
    def logits(self, hidden_states: Tensor) -> Tensor:
        """Each token's dot product with `hidden_states` (..., hidden_size), as (..., vocab_size)."""

    def loss(
        self, hidden_states: Tensor, targets: Tensor, loss: LinearLoss = linear_cross_entropy
    ) -> tuple[Tensor, Tensor]:
        """`linear_cross_entropy` of the tied head, from `logits` of a chunk of rows at a time.

        A kind that trains a matrix has `loss`, the form that the model uses, work on that instead.
        """
        found: tuple[Tensor, Tensor] = chunked_cross_entropy(
            self.logits, hidden_states, targets, list(self.parameters())
        )
        return found

    def at_step(self, step: int, steps: int) -> None:
        """For a training loop to call before each optimizer step, of which this is one of `steps`, from 0.

        Some kinds are trained otherwise first, which this tells them; without it, they never are.
        """

    def compressed(self) -> Embedding:
        """The form to keep and to decode with: a smaller one where training needs more, else this one."""
        return self

    def check_loaded(self) -> None:
        """Raise InputError where codes or positions, loaded from a file, point at what is not there."""

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The (vocab_size, hidden_size) matrix that this embedding stands for; allocates it."""
        return self.lookup(torch.arange(self.vocab_size, device=next(self.parameters()).device))

    @property
    def bytes_resident(self) -> int:
        """Bytes of all parameters and buffers that lookup and logits need."""
        tensors = {t.untyped_storage().data_ptr(): t for t in (*self.parameters(), *self.buffers())}
        return sum(t.untyped_storage().nbytes() for t in tensors.values())

    @property
    def compression_ratio(self) -> float:
        """Bytes of the dense matrix in bf16 over all bytes of `compressed()` in bf16."""
        compressed = copy.deepcopy(self.compressed()).to(torch.bfloat16)
        return 2 * self.vocab_size * self.hidden_size / compressed.bytes_resident

    def _check_ids(self, input_ids: Tensor) -> None:
        """Raise InputError for ids out of range, where that makes no device wait and no graph break."""
        if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or not input_ids.numel():
            return
        low, high = int(input_ids.min()), int(input_ids.max())
        if low < 0 or high >= self.vocab_size:
            raise InputError(f"input_ids reach from {low} to {high}, expected 0 to {self.vocab_size - 1}")

    def _start(self, vocab_size: int, hidden_size: int, settings: Mapping[str, Any]) -> None:
        """nn.Module's own, and what every kind keeps."""
        nn.Module.__init__(self)
        self.vocab_size, self.hidden_size, self.settings = vocab_size, hidden_size, dict(settings)


class CompressedEmbedding(Embedding):
    """One that can be made from a dense matrix."""

    @classmethod
    @abstractmethod
    def from_dense(cls, weight: Tensor, calibration: Calibration, **settings: Any) -> Self:
        """The embedding nearest to `weight` (vocab_size, hidden_size) in what `calibration` says matters.

        Raises InputError for a weight that is not finite, settings that cannot work and a calibration of
        another size.
        """


def check_dense(weight: Tensor, calibration: Calibration) -> None:
    """Raise InputError for a weight that is no finite matrix, or a calibration of another shape."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise InputError(
            f"weight is {tuple(weight.shape)} {weight.dtype}, expected a floating (vocab_size, hidden_size)"
        )
    if not weight.isfinite().all():
        raise InputError("weight has values that are not finite (NaN or infinite): the model is damaged")
    found = (len(calibration.frequencies), len(calibration.head_hessian))
    if found != tuple(weight.shape):
        raise InputError(f"calibration is of a {found} embedding, weight is {tuple(weight.shape)}")


def require(name: str, value: Any, low: int, high: int) -> int:
    """`value` if it is a whole number from `low` to `high`; else InputError naming the setting."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(
            f"embedding_settings.{name} is {value!r}, expected a whole number from {low} to {high}"
        )
    return value
