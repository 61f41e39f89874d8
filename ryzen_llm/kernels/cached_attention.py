"""Attention of a few new queries over cached keys and values, straight on their quantised form.

A stored tensor stands for x[t] = codes[t] * scale[t] + minimum[t], one scale and one minimum for a token and
head. Both factors leave the sums over channels, so that no full-precision copy of the cache ever exists:

    q · k[t]      = scale[t] * (q · codes[t]) + minimum[t] * sum(q)
    Σ_t p[t] v[t] = Σ_t (p[t] * scale[t]) codes[t] + Σ_t p[t] * minimum[t]

Codes of 4 bits are packed two a byte: channel i in the low half and channel i + width / 2 in the high half of
byte i. Keys may have more channels than values, and queries then as many: a number in two codes counts as two
channels. A ring buffer holds the token of position p in slot p mod ring.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_BLOCK = 512
QUERY_BLOCK = 512
MOST_ROWS = 64
"""Queries of a key head for which there are kernels of our own; beyond, matrix products are faster."""


class Stored(NamedTuple):
    """Keys or values of a layer, (batch, kv_heads, slots, ...) each.

    Attributes:
        codes: (..., width) of any number type, or packed 4-bit codes, (..., width / 2) uint8.
        scale: (...,) what the codes are multiplied by; None for 1.
        minimum: (...,) what is added then; None for 0.
    """

    codes: Tensor
    scale: Tensor | None = None
    minimum: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.codes.dtype == torch.uint8

    @property
    def width(self) -> int:
        """How many channels there are."""
        return self.codes.shape[-1] * (2 if self.packed else 1)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Stored":
        """With every tensor that there is put through `change`."""
        scale, minimum = (None if part is None else change(part) for part in self[1:])
        return Stored(change(self.codes), scale, minimum)

    def slots(self, start: int, end: int) -> "Stored":
        """The slots from `start` to `end`, as views."""
        return self.map(lambda part: part[:, :, start:end])

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The codes, without scale and minimum, (..., width)."""
        if not self.packed:
            return self.codes.to(dtype)
        return torch.cat((self.codes & 15, self.codes >> 4), dim=-1).to(dtype)

    def dequantised(self) -> Tensor:
        """The stored tensor itself in fp32, (..., width)."""
        x = self.unpacked(torch.float32)
        if self.scale is not None:
            x = x * self.scale.float()[..., None]
        if self.minimum is not None:
            x = x + self.minimum.float()[..., None]
        return x


def cached_attention(
    queries: Tensor,
    keys: Stored,
    values: Stored,
    positions: Tensor,
    *,
    ring: int = 0,
    window: int = 0,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(head_dim) + mask) V over everything in the cache up to each query's position.

    Args:
        queries: (batch, heads, time, the keys' width); heads / kv_heads of them share a key head.
        keys: What the cache holds, the queries' own tokens included.
        values: The same for the values, whose width is head_dim.
        positions: (1, time) or (batch, time) int64, of the queries, ascending.
        ring: Number of slots after which the slots repeat; 0 where slot and position are the same.
        window: How many tokens each query sees, itself the last; 0 for all.
        sinks: Keys and values of the first tokens in full precision, (batch, kv_heads, sinks, width) each,
            used in place of what the slots hold for them.

    Returns the context (batch, heads, time, head_dim), typed like `queries`.
    """
    num_sinks = 0 if sinks is None else sinks[0].shape[2]
    few = queries.shape[1] // keys.codes.shape[1] * queries.shape[2] <= MOST_ROWS
    if few and queries.device.type == "cuda":
        from ryzen_llm.kernels.cached_attention_triton import decode  # Triton is there on Linux only

        parts = [(keys, values, ring, num_sinks)]
        if sinks is not None:
            parts.append((Stored(sinks[0]), Stored(sinks[1]), 0, 0))
        decoded: Tensor = decode(queries, parts, positions, window)
        return decoded
    segments = [(keys, values, _visible(positions, keys.codes.shape[2], ring, window, num_sinks))]
    if sinks is not None:
        seen = _visible(positions, num_sinks, 0, window, 0)
        segments.insert(0, (Stored(sinks[0]), Stored(sinks[1]), seen))
    dense = sinks is None and keys.scale is None and values.scale is None
    if dense and few:
        return _grouped(queries, keys.codes, values.codes, segments[0][2])
    if dense:
        slots = keys.codes.shape[2]
        if queries.device.type == "cpu" and not (ring or torch.compiler.is_compiling()):
            slots = int(positions.max()) + 1  # a prompt's sums are not to depend on the room in the cache
        return F.scaled_dot_product_attention(
            queries,
            keys.codes[:, :, :slots].to(queries.dtype),
            values.codes[:, :, :slots].to(queries.dtype),
            attn_mask=segments[0][2][:, None, :, :slots],
            enable_gqa=True,
        )
    return _in_blocks(queries, segments)


def reference(
    queries: Tensor,
    keys: Stored,
    values: Stored,
    positions: Tensor,
    *,
    ring: int = 0,
    window: int = 0,
    sinks: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The same from the dequantised cache in fp32, for tests."""
    k, v = keys.dequantised(), values.dequantised()
    if sinks is not None:
        count = sinks[0].shape[2]
        k, v = (torch.cat((s.float(), x[:, :, count:]), 2) for s, x in zip(sinks, (k, v), strict=True))
    mask = _visible(positions, k.shape[2], ring, window, 0)[:, None]
    groups = queries.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = queries.float() @ k.mT * values.width**-0.5
    context: Tensor = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    return context.to(queries.dtype)


Segment = tuple[Stored, Stored, Tensor]
"""Keys, values and which of them each query sees, (1 or batch, time, slots) bool."""


def _visible(positions: Tensor, slots: int, ring: int, window: int, num_sinks: int) -> Tensor:
    """Which slots each query sees, (1 or batch, time, slots) bool."""
    held = torch.arange(slots, device=positions.device)[None]
    if ring:
        last = positions[:, -1:]
        held = held + (last - last % ring)  # the position if written in this round of the ring,
        held = torch.where(held > last, held - ring, held)  # or else in the one before
    positions, held = positions[:, :, None], held[:, None]
    seen = (held <= positions) & (held >= num_sinks)  # of a byte each: differences would take eight
    return seen & (held > positions - window) if window else seen


def _grouped(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """The queries that share a key head as rows of one head, so that its keys are read once for all."""
    batch, heads, time, head_dim = queries.shape
    kv_heads = keys.shape[1]
    rows = queries.reshape(batch, kv_heads, -1, head_dim)
    mask = seen[:, None].expand(-1, heads // kv_heads, -1, -1).flatten(1, 2)[:, None]
    context = F.scaled_dot_product_attention(
        rows, keys.to(queries.dtype), values.to(queries.dtype), attn_mask=mask
    )
    return context.view(batch, heads, time, head_dim)


def _in_blocks(queries: Tensor, segments: Sequence[Segment]) -> Tensor:
    """Online softmax (Milakov & Gimelshein 2018, arXiv:1805.02867) over blocks of keys, for many queries.

    Scores are fp32 products, since a bf16 product would be rounded to three digits before the softmax.
    """
    if queries.shape[2] > QUERY_BLOCK:
        parts = range(0, queries.shape[2], QUERY_BLOCK)
        return torch.cat(
            [
                _in_blocks(
                    queries[:, :, i : i + QUERY_BLOCK],
                    [(keys, values, seen[:, i : i + QUERY_BLOCK]) for keys, values, seen in segments],
                )
                for i in parts
            ],
            dim=2,
        )
    batch, heads, time, width = queries.shape
    kv_heads, head_dim = segments[0][0].codes.shape[1], segments[0][1].width
    q = queries.reshape(batch, kv_heads, -1, width).float() * head_dim**-0.5
    shape = (batch, kv_heads, heads // kv_heads, time)
    highest = q.new_full((*q.shape[:-1], 1), -torch.inf)
    total = torch.zeros_like(highest)
    context = q.new_zeros(*q.shape[:-1], head_dim)
    compiled = torch.compiler.is_compiling()  # then the number of slots is open, and nothing is looked at
    for keys, values, seen in segments:
        size = keys.codes.shape[2] if compiled else KEY_BLOCK
        for start in (0,) if compiled else range(0, keys.codes.shape[2], KEY_BLOCK):
            block = seen[:, :, start : start + size]
            if queries.device.type == "cpu" and not compiled and not block.any():
                continue
            k, v = (stored.slots(start, start + size) for stored in (keys, values))
            s = q @ k.unpacked(torch.float32).mT
            if k.scale is not None:
                s = s * k.scale.float()[:, :, None]
            if k.minimum is not None:
                s = s + q.sum(-1, keepdim=True) * k.minimum.float()[:, :, None]
            s = s.view(*shape, -1).masked_fill(~block[:, None, None], -torch.inf).flatten(2, 3)
            # A query may see nothing of a block, so its maximum may still be -inf: any finite number will do.
            reached = torch.maximum(highest, s.amax(-1, keepdim=True))
            finite = reached.masked_fill(reached == -torch.inf, 0.0)
            p = (s - finite).exp()
            shrink = (highest - finite).exp()
            total = total * shrink + p.sum(-1, keepdim=True)
            weighted = p if v.scale is None else p * v.scale.float()[:, :, None]
            mixed = weighted.to(queries.dtype) @ v.unpacked(queries.dtype)
            context = context * shrink + mixed.float()
            if v.minimum is not None:
                context = context + (p * v.minimum.float()[:, :, None]).sum(-1, keepdim=True)
            highest = reached
    result: Tensor = (context / total).view(batch, heads, time, head_dim).to(queries.dtype)
    return result
