"""The key-value cache of a model: which tokens it holds, and one `LayerCache` for each layer."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from ryzen_llm.cache.base import AttentionShape, LayerFormat
from ryzen_llm.cache.layer import RING_SLACK, LayerCache
from ryzen_llm.errors import InputError

BLOCK = 128
"""Tokens that the buffers grow by."""


class KVCache:
    """Keys and values of the tokens seen so far, for a batch of texts of the same or different lengths.

    A forward pass calls `append` once and then `attend` on each of `layers`. What is read back for a token
    depends on that token, its position and the text's first tokens only, so that however the tokens are split
    into calls, and whatever was rolled back in between, attention sees the same values. Buffers grow in
    blocks of 128 tokens, up to `max_length`, or with `reserve` at once; between two growths their addresses
    stay.

    Args:
        config: The model's shape.
        formats: How each layer keeps its tokens.
        batch_size: Number of texts.
        max_length: Most tokens that each can have.
        dtype: The model's.
        device: Where it computes.

    Raises InputError for a number that cannot work.
    """

    def __init__(
        self,
        config: AttentionShape,
        formats: Sequence[LayerFormat],
        *,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"cache: {name} is {value}, expected at least 1")
        if len(formats) != config.num_layers:
            raise InputError(
                f"cache: {len(formats)} formats for {config.num_layers} layers, expected one each"
            )
        self.max_length = max_length
        self.device = device
        self.layers = [
            LayerCache(
                format,
                batch_size=batch_size,
                kv_heads=config.num_kv_heads,
                head_dim=config.head_dim,
                window=window,
                max_length=max_length,
                dtype=dtype,
                device=device,
            )
            for format, window in zip(formats, config.layer_windows, strict=True)
        ]
        self.sinks = max(layer.format.sinks for layer in self.layers)
        self._ring = min((layer.ring for layer in self.layers if layer.ring), default=max_length)
        self._lengths = [0] * batch_size  # shared with the views that `row` gives
        self._rows = range(batch_size)
        self._reserved = 0  # tokens that there is room for
        self._appended = 0  # tokens that the last `append` added
        self._longest = [0] * batch_size  # ever held: what a ring buffer has overwritten follows from it

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text."""
        return tuple(self._lengths[row] for row in self._rows)

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return max(self.lengths)

    @property
    def longest(self) -> tuple[int, ...]:
        """The most tokens of each text since it was empty, those that were rolled back included."""
        return tuple(self._longest[row] for row in self._rows)

    @property
    def bytes_allocated(self) -> int:
        """Bytes of every tensor that the cache holds, used or not."""
        tensors = (tensor for layer in self.layers for tensor in layer.tensors)
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def append(self, num_tokens: int) -> Tensor:
        """Make room for the next `num_tokens` tokens of each text and return their positions, int64.

        They are (num_tokens,) where all texts are of one length, or else (batch, num_tokens). Raises
        InputError, and changes nothing, where they do not fit.
        """
        lengths = self.lengths
        if num_tokens < 1 or self.length + num_tokens > self.max_length:
            raise InputError(
                f"cache: {num_tokens} more tokens after {self.length} exceed its max_length of "
                f"{self.max_length}: truncate it, or build it with a larger max_length"
            )
        self.reserve(self.length + num_tokens)
        new = torch.arange(num_tokens, device=self.device)
        if len(set(lengths)) == 1:
            positions = new[None] + lengths[0]
        else:
            positions = new + torch.tensor(lengths, device=self.device)[:, None]
        for layer in self.layers:
            layer.positions, layer.ancestors = positions, None
        self._appended = num_tokens
        for row in self._rows:
            self._lengths[row] += num_tokens
            self._longest[row] = max(self._longest[row], self._lengths[row])
        return positions[0] if len(positions) == 1 else positions

    def truncate(self, length: int | Sequence[int]) -> None:
        """Forget every token from position `length` on, of all texts or of each, in constant time.

        Raises InputError unless 0 <= `length` <= `self.length`, and where a ring buffer has overwritten what
        the tokens up to there saw: it keeps 128 tokens to roll back.
        """
        lengths = [length] * len(self._rows) if isinstance(length, int) else list(length)
        if len(lengths) != len(self._rows):
            raise InputError(f"cache: {len(lengths)} lengths to truncate to, expected {len(self._rows)}")
        for row, wanted in zip(self._rows, lengths, strict=True):
            if not 0 <= wanted <= self._lengths[row]:
                raise InputError(
                    f"cache: cannot truncate to {wanted}, expected 0 to its length of {self._lengths[row]}"
                )
            longest = self._longest[row]
            if longest > self._ring and 0 < wanted < longest - RING_SLACK:
                raise InputError(
                    f"cache: cannot truncate from {longest} to {wanted}: layers with a sliding window keep "
                    f"{RING_SLACK} tokens to roll back; truncate to 0 and read the text again"
                )
        for row, wanted in zip(self._rows, lengths, strict=True):
            self._lengths[row] = wanted
            if not wanted:
                self._longest[row] = 0

    def keep(self, kept: Sequence[Sequence[int]]) -> None:
        """Of the tokens that the last `append` added, have each text go on with these only.

        They are numbered from 0 and ascending. What another token stands for is moved, what comes after is
        forgotten. Raises InputError as `truncate` does, and for tokens of a ring buffer that would be moved.
        """
        if all(len(indices) == self._appended for indices in kept):  # all of them
            return
        lengths = self.lengths
        for row, (length, indices) in enumerate(zip(lengths, kept, strict=True)):
            first = length - self._appended
            moved = [(i, place) for place, i in enumerate(indices) if i != place]
            if moved:
                if any(layer.ring for layer in self.layers):
                    raise InputError(
                        "cache: tokens of a ring buffer cannot be moved: keep the first ones only"
                    )
                source, target = (
                    torch.tensor(part, device=self.device) + first for part in zip(*moved, strict=True)
                )
                for layer in self.layers:
                    layer.move(row, source, target)
        self.truncate([length - self._appended + len(i) for length, i in zip(lengths, kept, strict=True)])

    def resize(self, lengths: Sequence[int], longest: Sequence[int]) -> None:
        """Have each text be of a length, with slots to be filled, and once have been as long as `longest`."""
        self.reserve(max(lengths))
        for row, length, most in zip(self._rows, lengths, longest, strict=True):
            self._lengths[row], self._longest[row] = length, most

    def reset(self) -> None:
        """Forget every token."""
        self.truncate(0)

    def reserve(self, length: int) -> None:
        """Grow now to hold texts of `length` tokens, rounded up to whole blocks; never shrinks."""
        if length <= self._reserved:
            return
        self._reserved = min(-(-length // BLOCK) * BLOCK, self.max_length)
        for layer in self.layers:
            layer.grow(self._reserved)

    def row(self, index: int, length: int) -> Self:
        """A cache for one text of the batch that shares its memory, with room for `length` tokens.

        What is added to it is added to this cache; it is for texts of different lengths, each read alone.
        """
        self.reserve(length)
        row = self._like([layer.rows(slice(index, index + 1)) for layer in self.layers])
        row._rows = range(index, index + 1)
        row.max_length = min(length, self.max_length)
        return row

    def fork(self, rows: Sequence[int] | None = None) -> Self:
        """A copy, or one whose texts are copies of these `rows`, in that order (for beam search)."""
        chosen = list(range(len(self._rows)) if rows is None else rows)
        indices = torch.tensor(chosen, device=self.device)
        fork = self._like([layer.rows(indices) for layer in self.layers])
        fork._rows = range(len(chosen))
        fork._lengths = [self._lengths[self._rows[row]] for row in chosen]
        fork._longest = [self._longest[self._rows[row]] for row in chosen]
        return fork

    def _like(self, layers: list[LayerCache]) -> Self:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.layers = layers
        return other
