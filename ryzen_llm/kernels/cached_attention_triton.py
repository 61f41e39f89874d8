"""Attention on the quantised cache for a few queries on a GPU: split-K (flash decoding, Dao et al. 2023).

One text's decoding step has too few heads to fill a GPU, so the slots are split between programs; each reads
its codes once for all queries that share them, and their partial softmaxes are joined at the end.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_llm.kernels.cached_attention import Stored

PLAIN, PACKED, FP8 = 0, 1, 2
"""Kinds of codes: numbers as they are, two 4-bit numbers a byte, e4m3."""

Segment = tuple[Stored, Stored, int, int]
"""Keys, values, ring, and how many of the first tokens to leave out."""


def decode(queries: Tensor, segments: list[Segment], positions: Tensor, window: int) -> Tensor:
    """See `cached_attention`; a token's keys and values may lie in any of the segments, but in one only.

    No value is brought to the host, so that the call can be part of a CUDA graph.
    """
    kv_heads, time = segments[0][0].codes.shape[1], queries.shape[2]
    q = queries.reshape(queries.shape[0], kv_heads, -1, queries.shape[3]).contiguous()
    partial = [_partial_contexts(q, *segment, positions, time, window) for segment in segments]
    contexts, logsumexps = (torch.cat(parts, 2) for parts in zip(*partial, strict=True))
    weights = logsumexps.softmax(2)[..., None]
    return (contexts * weights).sum(2).view(*queries.shape[:3], -1).to(queries.dtype)


def block_slots(head_dim: int, dtype: torch.dtype) -> int:
    """Slots that a program handles at once: so many that keys and values fit in registers.

    Without tensor cores, which in full precision have no fp32, a product takes several times the registers:
    four times the slots went to memory and back, and of long heads did not fit in an A100's shared memory.
    """
    slots = 128 if head_dim <= 64 else 64 if head_dim <= 128 else 32
    return max(slots // 4, 16) if dtype == torch.float32 else slots


def _partial_contexts(
    q: Tensor,
    keys: Stored,
    values: Stored,
    ring: int,
    skipped: int,
    positions: Tensor,
    time: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Context (batch, kv_heads, splits, rows, head_dim) and log-sum-exp (batch, kv_heads, splits, rows)."""
    batch, kv_heads, rows, width = q.shape
    slots, head_dim = keys.codes.shape[2], values.width
    block = block_slots(head_dim, q.dtype)
    processors = (
        torch.cuda.get_device_properties(q.device).multi_processor_count if q.device.type == "cuda" else 8
    )
    splits = max(1, min(triton.cdiv(4 * processors, batch * kv_heads), triton.cdiv(slots, block)))
    split = triton.cdiv(triton.cdiv(slots, splits), block) * block
    splits = triton.cdiv(slots, split)
    contexts = q.new_empty(batch, kv_heads, splits, rows, head_dim, dtype=torch.float32)
    logsumexps = q.new_empty(batch, kv_heads, splits, rows, dtype=torch.float32)
    arguments = [argument for stored in (keys, values) for argument in _arguments(stored)]
    # Triton starts kernels on the current device. Compiled code makes the device current itself, and Dynamo
    # cannot trace a change of it.
    with nullcontext() if torch.compiler.is_compiling() else torch.cuda.device_of(q):
        attend_split[(batch * kv_heads, splits)](
            q,
            *arguments,
            positions,
            contexts,
            logsumexps,
            kv_heads,
            rows,
            time,
            positions.stride(0) if positions.shape[0] > 1 else 0,
            slots,
            split,
            ring,
            window,
            skipped,
            K_KIND=_kind(keys),
            K_SCALE=keys.scale is not None,
            K_MINIMUM=keys.minimum is not None,
            V_KIND=_kind(values),
            V_SCALE=values.scale is not None,
            V_MINIMUM=values.minimum is not None,
            KEY_DIM=width,
            HEAD_DIM=head_dim,
            ROWS=max(16, triton.next_power_of_2(rows)),
            BLOCK=block,
            num_warps=4,
        )
    return contexts, logsumexps


def _kind(stored: Stored) -> int:
    if stored.packed:
        return PACKED
    return FP8 if stored.codes.dtype == torch.float8_e4m3fn else PLAIN


def _arguments(stored: Stored) -> tuple[Tensor | int, ...]:
    codes = stored.codes.view(torch.uint8) if _kind(stored) == FP8 else stored.codes
    scale = codes if stored.scale is None else stored.scale  # a pointer that is not read
    minimum = codes if stored.minimum is None else stored.minimum
    return codes, scale, minimum, codes.stride(0), codes.stride(1), scale.stride(0), scale.stride(1)


@triton.jit
def load_codes(codes, slots, channels, mask, WIDTH: tl.constexpr, KIND: tl.constexpr):
    """Bytes or numbers of `slots` and `channels`; e4m3 becomes fp16 exactly, on every architecture."""
    x = tl.load(codes + slots[:, None] * WIDTH + channels[None, :], mask=mask, other=0)
    if KIND == 2:
        bits = ((x & 0x80).to(tl.uint16) << 8) | ((x & 0x7F).to(tl.uint16) << 7)
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        return x


@triton.jit
def attend_split(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    k_minimum_ptr,
    k_batch,
    k_head,
    k_scale_batch,
    k_scale_head,
    v_ptr,
    v_scale_ptr,
    v_minimum_ptr,
    v_batch,
    v_head,
    v_scale_batch,
    v_scale_head,
    positions_ptr,
    context_ptr,
    logsumexp_ptr,
    kv_heads,
    rows,
    time,
    positions_batch,
    slots,
    split,
    ring,
    window,
    skipped,
    K_KIND: tl.constexpr,
    K_SCALE: tl.constexpr,
    K_MINIMUM: tl.constexpr,
    V_KIND: tl.constexpr,
    V_SCALE: tl.constexpr,
    V_MINIMUM: tl.constexpr,
    KEY_DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One key head of one text and `split` of its slots, for all queries of that head."""
    pair = tl.program_id(0)
    part = tl.program_id(1)
    batch = (pair // kv_heads).to(tl.int64)
    head = (pair % kv_heads).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    # No argument: as one, Inductor would give it in fp64, and all that is multiplied by it were fp64.
    SOFTMAX_SCALE: tl.constexpr = HEAD_DIM**-0.5
    # A packed tensor is worked on in halves of the channels, the low and the high one.
    KEY_HALF: tl.constexpr = KEY_DIM // 2
    K_WIDTH: tl.constexpr = KEY_HALF if K_KIND == 1 else KEY_DIM
    V_WIDTH: tl.constexpr = HALF if V_KIND == 1 else HEAD_DIM
    KD: tl.constexpr = max(16, triton.next_power_of_2(K_WIDTH))
    VD: tl.constexpr = max(16, triton.next_power_of_2(V_WIDTH))
    row = tl.arange(0, ROWS)
    k_channel = tl.arange(0, KD)
    v_channel = tl.arange(0, VD)
    row_ok = row < rows
    q_rows = q_ptr + (pair.to(tl.int64) * rows + row[:, None]) * KEY_DIM
    k_ok = k_channel < K_WIDTH
    v_ok = v_channel < V_WIDTH
    q = tl.load(q_rows + k_channel[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0)
    q_sum = tl.sum(q.to(tl.float32), 1)
    q_high = q
    if K_KIND == 1:
        q_high = tl.load(
            q_rows + KEY_HALF + k_channel[None, :], mask=row_ok[:, None] & k_ok[None, :], other=0.0
        )
        q_sum += tl.sum(q_high.to(tl.float32), 1)
    position = tl.load(positions_ptr + batch * positions_batch + row % time, mask=row_ok, other=0)
    last = tl.load(positions_ptr + batch * positions_batch + time - 1)

    k_ptr += batch * k_batch + head * k_head
    v_ptr += batch * v_batch + head * v_head
    k_factors = batch * k_scale_batch + head * k_scale_head
    v_factors = batch * v_scale_batch + head * v_scale_head
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low = tl.zeros([ROWS, VD], tl.float32)
    high = tl.zeros([ROWS, VD], tl.float32)
    start = part * split
    end = tl.minimum(start + split, slots)
    if ring == 0:
        end = tl.minimum(end, (last + 1).to(tl.int32))  # the rest of the buffer is not written yet
    for first in range(start, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        ok = slot < end
        held = slot.to(tl.int64)
        if ring > 0:
            held += last - last % ring
            held = tl.where(held > last, held - ring, held)
        seen = ok & (held >= skipped)
        seen = seen[None, :] & (held[None, :] <= position[:, None])
        if window > 0:
            seen &= position[:, None] - held[None, :] < window

        k = load_codes(k_ptr, slot, k_channel, ok[:, None] & k_ok[None, :], K_WIDTH, K_KIND)
        if K_KIND == 1:
            s = tl.dot(q, tl.trans((k & 15).to(q.dtype)), input_precision="ieee")
            s += tl.dot(q_high, tl.trans((k >> 4).to(q.dtype)), input_precision="ieee")
        else:
            s = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        if K_SCALE:
            s *= tl.load(k_scale_ptr + k_factors + slot, mask=ok, other=0.0).to(tl.float32)[None, :]
        if K_MINIMUM:
            minimum = tl.load(k_minimum_ptr + k_factors + slot, mask=ok, other=0.0).to(tl.float32)
            s += q_sum[:, None] * minimum[None, :]
        s = tl.where(seen, s * SOFTMAX_SCALE, float("-inf"))

        reached = tl.maximum(highest, tl.max(s, 1))
        finite = tl.where(reached == float("-inf"), 0.0, reached)  # nothing of this block may be seen
        p = tl.exp(s - finite[:, None])
        shrink = tl.exp(highest - finite)
        total = total * shrink + tl.sum(p, 1)
        highest = reached
        weighted = p
        if V_SCALE:
            weighted *= tl.load(v_scale_ptr + v_factors + slot, mask=ok, other=0.0).to(tl.float32)[None, :]
        weighted = weighted.to(q.dtype)
        v = load_codes(v_ptr, slot, v_channel, ok[:, None] & v_ok[None, :], V_WIDTH, V_KIND)
        low *= shrink[:, None]
        if V_KIND == 1:
            high *= shrink[:, None]
            low += tl.dot(weighted, (v & 15).to(q.dtype), input_precision="ieee")
            high += tl.dot(weighted, (v >> 4).to(q.dtype), input_precision="ieee")
        else:
            low += tl.dot(weighted, v.to(q.dtype), input_precision="ieee")
        if V_MINIMUM:
            minimum = tl.load(v_minimum_ptr + v_factors + slot, mask=ok, other=0.0).to(tl.float32)
            offset = tl.sum(p * minimum[None, :], 1)[:, None]
            low += offset
            high += offset

    divisor = tl.where(total == 0.0, 1.0, total)
    out = (pair.to(tl.int64) * tl.num_programs(1) + part) * rows + row
    context = context_ptr + out[:, None] * HEAD_DIM + v_channel[None, :]
    tl.store(context, low / divisor[:, None], mask=row_ok[:, None] & v_ok[None, :])
    if V_KIND == 1:
        tl.store(context + HALF, high / divisor[:, None], mask=row_ok[:, None] & v_ok[None, :])
    tl.store(logsumexp_ptr + out, highest + tl.log(divisor), mask=row_ok)
