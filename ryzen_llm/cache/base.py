"""The contract of a key-value cache."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from ryzen_llm.errors import InputError


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


class LayerCache(ABC):
    """One layer's keys and values.

    A compiled block reads its tensors as inputs, so they keep their addresses, and nothing that changes from
    token to token may be a Python number here: that would compile the block anew for every token.
    """

    @abstractmethod
    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write the new tokens' keys and values, then attend over everything up to each of them.

        `queries` is (batch, heads, time, head_dim), `keys` and `values` (batch, kv_heads, time, head_dim),
        for the positions that the last `KVCache.append` gave out. A layer with a window lets each token see
        that many, itself the last (`AttentionShape.layer_windows`). The result is shaped like `queries`.
        """


class KVCache(ABC):
    """Keys and values of the tokens seen so far, in a memory of fixed size.

    A forward pass calls `append` once and then `attend` on each of `layers`. What is read back for a token
    depends on that token and its position only, so that however the tokens are split into calls, and whatever
    was rolled back in between, attention sees the same values.
    """

    layers: Sequence[LayerCache]

    def __init__(self, max_length: int) -> None:
        if max_length < 1:
            raise InputError(f"cache: max_length is {max_length}, expected at least 1 token")
        self.max_length = max_length
        self.length = 0

    def append(self, num_tokens: int) -> Tensor:
        """Make room for the next `num_tokens` tokens and return their positions, (num_tokens,) int64.

        Raises InputError, and changes nothing, where they do not fit.
        """
        if self.length + num_tokens > self.max_length:
            raise InputError(
                f"cache: {num_tokens} more tokens after {self.length} exceed its max_length of "
                f"{self.max_length}: truncate it, or build it with a larger max_length"
            )
        positions = self._prepare(self.length, self.length + num_tokens)
        self.length += num_tokens
        return positions

    def truncate(self, length: int) -> None:
        """Forget every token from position `length` on, in constant time.

        Raises InputError unless 0 <= `length` <= `self.length`.
        """
        if not 0 <= length <= self.length:
            raise InputError(f"cache: cannot truncate to {length}, expected 0 to its length of {self.length}")
        self.length = length

    def reset(self) -> None:
        """Forget every token."""
        self.truncate(0)

    @property
    @abstractmethod
    def bytes_allocated(self) -> int:
        """Bytes of every tensor that the cache holds, used or not."""

    @abstractmethod
    def _prepare(self, start: int, end: int) -> Tensor:
        """Tell the layers that positions `start` to `end` come next, and return these positions."""
