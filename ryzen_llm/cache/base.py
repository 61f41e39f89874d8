"""What a cache must know of a model, and the contract of a format that keys or values are kept in."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ryzen_llm.kernels import Stored


class AttentionShape(Protocol):
    """What a cache must know of a model; `ModelConfig` has it."""

    @property
    def num_layers(self) -> int: ...  # noqa: D102
    @property
    def num_kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def layer_windows(self) -> Sequence[int]: ...  # noqa: D102


class Format(ABC):
    """How keys, or values, are kept.

    Attributes:
        rotated: Whether `kernels.hadamard` is applied first. Rotating the queries as well leaves every score
            as it was, and rotating the context undoes it for the values.
    """

    rotated = False

    @abstractmethod
    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Stored:
        """Room for vectors of shape (batch, kv_heads, slots, head_dim), all zeros.

        `dtype` is the model's. Raises InputError where `device` or `head_dim` will not do.
        """

    @abstractmethod
    def encode(self, x: Tensor) -> Stored:
        """What to store for `x` (batch, kv_heads, time, head_dim), each vector by itself."""

    def as_codes(self, x: Tensor) -> Tensor:
        """Vectors (..., head_dim) with the channels that their codes have, if those are more."""
        return x

    def against_codes(self, queries: Tensor) -> Tensor:
        """What is multiplied with `as_codes(x)` to give queries · x; both (..., head_dim) before."""
        return queries


@dataclass(frozen=True, eq=False)
class Transform:
    """What is done to a layer's keys before they are stored, in place of a rotation.

    (key - offset) @ matrix is stored. It is undone for free: queries are multiplied by the inverse,
    transposed, and q · offset, the same for every key, does nothing in a softmax. The first channels are
    those that the key's format keeps more finely.

    Attributes:
        offset: (kv_heads, 1, head_dim) fp32.
        matrix: (kv_heads, head_dim, head_dim) fp16.
        inverse: The same, of `matrix`.
    """

    offset: Tensor
    matrix: Tensor
    inverse: Tensor

    def to(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Offset, and what keys and queries are multiplied by, on `device`."""
        queries = self.inverse.mT
        return self.offset.to(device), self.matrix.contiguous().to(device), queries.contiguous().to(device)


@dataclass(frozen=True)
class LayerFormat:
    """How one layer keeps its tokens.

    Attributes:
        keys: The format of the keys.
        values: The format of the values.
        sinks: How many of the first tokens are kept as they are, too: attention leans on them whatever they
            say (Xiao et al. 2023, arXiv:2309.17453), and their keys are the most extreme. All later keys are
            stored less the mean of theirs, so that codes are not spent on what a text's keys have in common;
            for free, as `Transform` says of its offset.
        key_transform: Measured by `KVCacheOptimizer`; None for none.
    """

    keys: Format
    values: Format
    sinks: int = 0
    key_transform: Transform | None = None
