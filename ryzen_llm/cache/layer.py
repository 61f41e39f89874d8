"""One layer's keys and values."""

from typing import Self

import torch
from torch import Tensor

from ryzen_llm.cache.base import LayerFormat
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import (
    MEMORY_ALIGNMENT,
    Stored,
    append_and_attend,
    append_suits,
    cached_attention,
    hadamard,
    is_in_cpp,
    rotate,
)

RING_SLACK = 128
"""How many tokens a ring buffer holds beyond its window: as many can be added or rolled back at once."""


class LayerCache:
    """Buffers of (batch, kv_heads, slots, ...) and attention on them.

    A compiled block reads the tensors here as inputs, and nothing that changes from token to token may be a
    Python number: that would compile the block anew for every token.

    Attributes:
        keys: What is stored of them; like the other tensors, views of `memory` where that is there.
        memory: All tensors as bytes, for compiled decoding on a CPU: Dynamo takes a microsecond or two for
            each, before every step. None until that begins.
        sinks: Keys and values of the first tokens, (2, batch, kv_heads, sinks, head_dim); None for none.
        positions: (1, time) or (batch, time) int64, those that the last `KVCache.append` gave out.
        ancestors: Of `append_and_attend`, for new tokens that are a tree where this layer `reads_trees`.
        ring: Slots of the ring buffer of a layer with a window; 0 where slot and position are the same.
        most_slots: What it can grow to.
        key_transform: Of the format's `Transform`, on the device; empty for none.
    """

    positions: Tensor
    ancestors: Tensor | None = None

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
        self.batch_size = batch_size
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.ring = window + RING_SLACK if window and window + RING_SLACK < max_length else 0
        self.most_slots = self.ring or max_length
        shape = (batch_size, kv_heads, 0, head_dim)
        self.keys = format.keys.empty(shape, dtype, device)
        self.values = format.values.empty(shape, dtype, device)
        self.memory: Tensor | None = None
        self._suits_cpp = append_suits(dtype, self.keys, self.values)
        self._dtypes = self.keys.codes.dtype, self.values.codes.dtype, dtype
        self._fine = self.keys.width - head_dim
        transform = format.key_transform
        self.key_transform: tuple[Tensor, ...] = () if transform is None else transform.to(device)
        self.sinks: Tensor | None = None
        if format.sinks:
            sinks = (2, batch_size, kv_heads, format.sinks, head_dim)
            self.sinks = torch.zeros(sinks, dtype=dtype, device=device)

    @property
    def tensors(self) -> list[Tensor]:
        """Everything that it holds."""
        if self.memory is not None:
            return [self.memory]
        return [
            part for part in (self.sinks, *self.key_transform, *self.keys, *self.values) if part is not None
        ]

    @property
    def num_slots(self) -> int:
        """How many tokens fit as it is now."""
        return self.keys.codes.shape[2]

    @property
    def reads_trees(self) -> bool:
        """Whether new tokens may be a tree, in compiled code."""
        return self.memory is not None and not self.ring

    def move(self, row: int, source: Tensor, target: Tensor) -> None:
        """Have the slots `target` of a text hold what the slots `source` do; both int64, without a ring."""
        for part in (*self.keys, *self.values):
            if part is not None:
                text = _without_fp8(part[row])
                text.index_copy_(1, target, text.index_select(1, source))

    def grow(self, num_slots: int) -> None:
        """Make room for `num_slots` tokens. Tensors are copied one after the other: only one exists twice."""
        num_slots = min(num_slots, self.most_slots)
        if num_slots <= self.num_slots:
            return
        if self.memory is not None:
            self._put_into_one(num_slots)
            return
        self.keys = self.keys.map(lambda part: _grown(part, num_slots))
        self.values = self.values.map(lambda part: _grown(part, num_slots))

    def prepare_to_compile(self) -> None:
        """Have torch.compile leave the number of slots open, so that growing does not compile anew.

        To be called again once it has grown. On a CPU it moves everything into `memory` the first time.
        """
        if self._suits_cpp and is_in_cpp():
            if self.memory is None:
                self._put_into_one(self.num_slots)
            torch._dynamo.mark_dynamic(self.memory, 0)
            return
        for part in (*self.keys, *self.values):
            if part is not None:
                torch._dynamo.mark_dynamic(part, 2)

    def _put_into_one(self, num_slots: int) -> None:
        """Everything, moved into a `memory` for so many slots, as `append_and_attend` finds it."""
        fixed = [part for part in (self.sinks, *self.key_transform) if part is not None]
        of_slots = [part for part in (*self.keys, *self.values) if part is not None]
        of_slots.sort(key=lambda part: -part.itemsize)  # so that each is aligned
        parts = [(part, part.shape, MEMORY_ALIGNMENT) for part in fixed]
        parts += [(part, torch.Size((*part.shape[:2], num_slots, *part.shape[3:])), 1) for part in of_slots]
        ends = [0]
        for part, shape, alignment in parts:
            ends.append(ends[-1] + -(-part.itemsize * shape.numel() // alignment) * alignment)
        memory = torch.zeros(ends[-1], dtype=torch.uint8, device=self.keys.codes.device)
        moved: dict[int, Tensor] = {}
        for start, (part, shape, _) in zip(ends, parts, strict=False):
            bytes_ = memory[start : start + part.itemsize * shape.numel()]
            view = moved[id(part)] = bytes_.view(part.dtype).view(shape)
            view[:, :, : part.shape[2]] = part
        self.memory = memory
        self.sinks = moved.get(id(self.sinks))
        self.key_transform = tuple(moved[id(part)] for part in self.key_transform)
        self.keys = self.keys.map(lambda part: moved[id(part)])
        self.values = self.values.map(lambda part: moved[id(part)])

    def rows(self, rows: slice | Tensor) -> Self:
        """The same for some rows of the batch: views of them for a slice, copies for indices (int64)."""
        chosen = object.__new__(type(self))
        chosen.__dict__.update(self.__dict__)
        chosen.keys = self.keys.map(lambda part: part[rows])
        chosen.values = self.values.map(lambda part: part[rows])
        chosen.memory = None
        chosen.batch_size = len(chosen.keys.codes)
        chosen.sinks = None if self.sinks is None else self.sinks[:, rows]
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
        # What is not compiled needs no C++ compiler.
        if torch.compiler.is_compiling() and self.memory is not None:
            return append_and_attend(
                queries,
                keys,
                values,
                self.memory,
                self._dtypes,
                positions,
                self.ancestors,
                sinks=self.format.sinks,
                fine=self._fine,
                ring=self.ring,
                window=self.window,
                rotated=(self.format.keys.rotated, self.format.values.rotated),
                transformed=self.format.key_transform is not None,
            )
        # No other tensor here is touched before: each would be an input of the graph.
        dtype = queries.dtype
        checked = queries.device.type == "cpu" and not torch.compiler.is_compiling()
        if checked and self.sinks is not None:  # which would hold them, whatever comes after
            for new in (keys, values):
                _require_finite(Stored(new))
        self._keep_first(keys, values, positions)
        offset = self._key_offset(positions)
        if offset is not None:
            later = positions >= self.format.sinks  # sinks are not read from here
            keys = torch.where(later[:, None, :, None], keys - offset, keys)
        if self.key_transform:
            grouped = rotate(torch.unflatten(queries, 1, (keys.shape[1], -1)), self.key_transform[2][:, None])
            queries, keys = torch.flatten(grouped, 1, 2), self._turned_keys(keys)
        elif self.format.keys.rotated:
            # One product for both; the scores stay the same.
            rotated = hadamard(torch.cat((queries, keys), 1))
            queries, keys = torch.split(rotated, [queries.shape[1], keys.shape[1]], 1)
        queries = self.format.keys.against_codes(queries).to(dtype)
        values = self._turned_values(values)
        slots = positions % self.ring if self.ring else positions
        formats = self.format.keys, self.format.values
        for format, stored, new in zip(formats, (self.keys, self.values), (keys, values), strict=True):
            encoded = format.encode(new)
            if checked:
                _require_finite(encoded)
            for kept, fresh in zip(stored, encoded, strict=True):
                if kept is not None and fresh is not None:
                    _write(kept, fresh, slots)
        sinks = self._sinks_read(dtype, offset)
        context = cached_attention(
            queries, self.keys, self.values, positions, ring=self.ring, window=self.window, sinks=sinks
        )
        if self.format.values.rotated:
            context = hadamard(context)
        return context.to(dtype)

    def _keep_first(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Keep those first tokens that are among the new ones."""
        if self.sinks is None:
            return
        num_sinks, (batch, kv_heads, time, head_dim) = self.format.sinks, keys.shape
        among_new = torch.arange(num_sinks, device=keys.device) - positions[:, :1]
        is_new = ((among_new >= 0) & (among_new < time))[:, None, :, None]
        index = among_new.clamp(0, time - 1)[:, None, :, None].expand(batch, kv_heads, -1, head_dim)
        for buffer, new in zip(self.sinks, (keys, values), strict=True):
            buffer.copy_(torch.where(is_new, new.to(buffer.dtype).gather(2, index), buffer))

    def _key_offset(self, positions: Tensor) -> Tensor | None:
        """What later keys are stored without, (1 or batch, kv_heads, 1, head_dim) fp32."""
        if self.key_transform:
            return self.key_transform[0]
        if self.sinks is None:
            return None
        # One after the other, so that the sum is the same to the bit wherever it is taken.
        first, *others = torch.split(self.sinks[0].float(), 1, 2)
        mean = sum(others, start=first) / self.format.sinks
        # Until all of them are there, some are of a text that was rolled back, and no later key is seen.
        return torch.where((positions[:, -1:] >= self.format.sinks)[..., None, None], mean, 0.0)

    def _turned_keys(self, keys: Tensor) -> Tensor:
        if self.key_transform:
            return rotate(keys, self.key_transform[1])
        return hadamard(keys) if self.format.keys.rotated else keys

    def _turned_values(self, values: Tensor) -> Tensor:
        return hadamard(values) if self.format.values.rotated else values

    def _sinks_read(self, dtype: torch.dtype, offset: Tensor | None) -> tuple[Tensor, Tensor] | None:
        """The first tokens, transformed as the others are."""
        if self.sinks is None:
            return None
        keys, values = self.sinks
        keys = self.format.keys.as_codes(self._turned_keys(keys - offset))
        return keys.to(dtype), self._turned_values(values).to(dtype)

    def _check(self, queries: Tensor, keys: Tensor, values: Tensor) -> None:
        kv_heads = self.kv_heads
        expected = (self.batch_size, kv_heads, self.positions.shape[1], self.head_dim)
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
    buffer, new = _without_fp8(buffer), _without_fp8(new)
    if slots.shape[0] == 1:
        buffer.index_copy_(2, slots[0], new)
    else:
        rows = torch.arange(buffer.shape[0], device=buffer.device)
        buffer[rows[:, None], :, slots] = new.transpose(1, 2)


def _without_fp8(x: Tensor) -> Tensor:
    """The same bytes, since few ops know fp8."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


def _require_finite(encoded: Stored) -> None:
    """A vector with a NaN or an infinity has such a scale or minimum, or is stored as it is."""
    telling = [encoded.codes] if encoded.scale is None else encoded[1:]
    if not all(bool(part.isfinite().all()) for part in telling if part is not None):
        raise InputError(
            "cache: keys or values are NaN, infinite or too large for the format (65504 times a code): the "
            "model's weights are damaged, or its activations overflow in this dtype"
        )
