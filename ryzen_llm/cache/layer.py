"""One layer's keys and values."""

from typing import Self

import torch
from torch import Tensor

from ryzen_llm.cache.base import LayerFormat
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import Stored, cached_attention, hadamard, rotate

RING_SLACK = 128
"""How many tokens a ring buffer holds beyond its window: as many can be added or rolled back at once."""


class LayerCache:
    """Buffers of (batch, kv_heads, slots, ...) and attention on them.

    A compiled block reads the tensors here as inputs, and nothing that changes from token to token may be a
    Python number: that would compile the block anew for every token.

    Attributes:
        positions: (1, time) or (batch, time) int64, those that the last `KVCache.append` gave out.
        ring: Slots of the ring buffer of a layer with a window; 0 where slot and position are the same.
        most_slots: What it can grow to.
        key_transform: Offset, matrix and inverse of the format's `Transform`, on the device; empty for none.
    """

    positions: Tensor

    def __init__(
        self,
        format: LayerFormat,
        *,
        batch_size: int,
        kv_heads: int,
        head_dim: int,
        window: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.format = format
        self.window = window
        self.head_dim = head_dim
        self.ring = window + RING_SLACK if window and window + RING_SLACK < max_length else 0
        self.most_slots = self.ring or max_length
        shape = (batch_size, kv_heads, 0, head_dim)
        self.keys = format.keys.empty(shape, dtype, device)
        self.values = format.values.empty(shape, dtype, device)
        # The last slot takes every later token's, so that writing needs no branch.
        sinks = (batch_size, kv_heads, format.sinks + 1, head_dim)
        transform = format.key_transform
        self.key_transform: tuple[Tensor, ...] = () if transform is None else transform.to(device)
        self.sinks = (
            tuple(torch.zeros(sinks, dtype=dtype, device=device) for _ in range(2)) if format.sinks else ()
        )

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that it holds."""
        parts = (*self.keys, *self.values, *self.sinks, *self.key_transform)
        return [part for part in parts if part is not None]

    @property
    def num_slots(self) -> int:
        """How many tokens fit as it is now."""
        return self.keys.codes.shape[2]

    def grow(self, num_slots: int) -> None:
        """Make room for `num_slots` tokens, one tensor after the other, so that only one exists twice."""
        num_slots = min(num_slots, self.most_slots)
        if num_slots > self.num_slots:
            self.keys = self.keys.map(lambda part: _grown(part, num_slots))
            self.values = self.values.map(lambda part: _grown(part, num_slots))

    def mark_dynamic(self) -> None:
        """Have torch.compile leave the number of slots open, so that growing does not compile anew."""
        for part in (*self.keys, *self.values):
            if part is not None:
                torch._dynamo.mark_dynamic(part, 2)

    def rows(self, rows: slice | Tensor) -> Self:
        """The same for some rows of the batch: views of them for a slice, copies for indices (int64)."""
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen.keys = self.keys.map(lambda part: part[rows])
        chosen.values = self.values.map(lambda part: part[rows])
        chosen.sinks = tuple(part[rows] for part in self.sinks)
        return chosen

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write the new tokens' keys and values, then attend over everything up to each of them.

        `queries` is (batch, heads, time, head_dim), `keys` and `values` (batch, kv_heads, time, head_dim),
        for the positions that the last `KVCache.append` gave out. The new tokens are read back as they are
        stored, so that it makes no difference whether a token came alone or with others. The result is shaped
        like `queries`.

        Raises InputError for another shape or dtype, and on a CPU for keys or values that are not finite
        numbers; in compiled code and on a GPU, where that would wait for the device, they reach the logits,
        which `Generator` looks at.
        """
        self._check(queries, keys, values)
        if self.ring and queries.shape[2] > RING_SLACK:
            # More at once would overwrite what the first of them still see.
            parts = [torch.split(x, RING_SLACK, 2) for x in (queries, keys, values)]
            steps = zip(*parts, torch.split(self.positions, RING_SLACK, 1), strict=True)
            return torch.cat([self._attend(*step) for step in steps], 2)
        return self._attend(queries, keys, values, self.positions)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        dtype = queries.dtype
        if self.sinks:
            held = positions.clamp(max=self.format.sinks)
            for buffer, new in zip(self.sinks, (keys, values), strict=True):
                _write(buffer, new, held)
        if self.key_transform:
            inverse = self.key_transform[2]
            grouped = rotate(torch.unflatten(queries, 1, (keys.shape[1], -1)), inverse.mT[:, None])
            queries, keys = torch.flatten(grouped, 1, 2), self._stored_keys(keys)
        elif self.format.keys.rotated:
            # One product for both; the scores stay the same.
            rotated = hadamard(torch.cat((queries, keys), 1))
            queries, keys = torch.split(rotated, [queries.shape[1], keys.shape[1]], 1)
            keys = keys.to(dtype)
        queries, values = self.format.keys.against_codes(queries).to(dtype), self._stored_values(values)
        slots = positions % self.ring if self.ring else positions
        formats = self.format.keys, self.format.values
        for format, stored, new in zip(formats, (self.keys, self.values), (keys, values), strict=True):
            encoded = format.encode(new)
            if new.device.type == "cpu" and not torch.compiler.is_compiling():
                _require_finite(encoded)
            for kept, fresh in zip(stored, encoded, strict=True):
                if kept is not None and fresh is not None:
                    _write(kept, fresh, slots)
        sinks = self._sinks_read(dtype)
        context = cached_attention(
            queries, self.keys, self.values, positions, ring=self.ring, window=self.window, sinks=sinks
        )
        if self.format.values.rotated:
            context = hadamard(context)
        return context.to(dtype)

    def _stored_keys(self, keys: Tensor) -> Tensor:
        """What the format is given to encode for `keys`."""
        if self.key_transform:
            offset, matrix, _ = self.key_transform
            return rotate(keys - offset, matrix).to(keys.dtype)
        return hadamard(keys).to(keys.dtype) if self.format.keys.rotated else keys

    def _stored_values(self, values: Tensor) -> Tensor:
        return hadamard(values) if self.format.values.rotated else values

    def _sinks_read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The first tokens, transformed as the others are."""
        if not self.sinks:
            return None
        keys, values = (buffer[:, :, : self.format.sinks] for buffer in self.sinks)
        keys = self.format.keys.as_codes(self._stored_keys(keys))
        return keys.to(dtype), self._stored_values(values).to(dtype)

    def _check(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        batch, kv_heads = self.keys.codes.shape[:2]
        expected = (batch, kv_heads, self.positions.shape[1], self.head_dim)
        for name, x in (("keys", keys), ("values", values)):
            if x.shape != expected or not x.is_floating_point():
                raise InputError(
                    f"cache: {name} are {tuple(x.shape)} {x.dtype}, expected {expected} of a floating dtype: "
                    "was the cache built for this model and batch?"
                )
        if queries.dtype != keys.dtype or queries.shape[1] % kv_heads or queries.shape[2:] != expected[2:]:
            raise InputError(
                f"cache: queries are {tuple(queries.shape)} {queries.dtype}, expected the keys' dtype "
                f"{keys.dtype} and a multiple of their {kv_heads} heads"
            )


def _grown(part: Tensor, num_slots: int) -> Tensor:
    # Zeros, not empty: masked slots weigh nothing in attention, but 0 * NaN would.
    grown = part.new_zeros(*part.shape[:2], num_slots, *part.shape[3:])
    grown[:, :, : part.shape[2]] = part
    return grown


def _write(buffer: Tensor, new: Tensor, slots: Tensor) -> None:
    new = new.to(buffer.dtype)
    if buffer.dtype == torch.float8_e4m3fn:  # which few ops know
        buffer, new = buffer.view(torch.uint8), new.view(torch.uint8)
    if slots.shape[0] == 1:
        buffer.index_copy_(2, slots[0], new)
    else:
        rows = torch.arange(buffer.shape[0], device=buffer.device)
        buffer[rows[:, None], :, slots] = new.transpose(1, 2)


def _require_finite(encoded: Stored) -> None:
    """A vector with a NaN or an infinity has such a scale or minimum, or is stored as it is."""
    telling = [encoded.codes] if encoded.scale is None else encoded[1:]
    if not all(bool(part.isfinite().all()) for part in telling if part is not None):
        raise InputError(
            "cache: keys or values are NaN, infinite or too large for the format (65504 times a code): the "
            "model's weights are damaged, or its activations overflow in this dtype"
        )
