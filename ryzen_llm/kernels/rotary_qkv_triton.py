"""Split, QK-norm and rotary embedding on a GPU: one program a token and group of heads."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ryzen_llm.kernels.triton_launch import arithmetic, rows_of

HEADS_BLOCK = 8


@triton.jit
def kinds(head, num_heads, num_kv_heads):
    """Which heads are queries, keys and values."""
    is_k = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_v = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    return head < num_heads, is_k, is_v


@triton.jit
def weights(q_weight_ptr, k_weight_ptr, column, q_mask, k_mask, ARITHMETIC: tl.constexpr):
    """Of the norm at these columns of each head, 0 for values."""
    w = tl.load(q_weight_ptr + column, mask=q_mask, other=0.0).to(ARITHMETIC)
    return w + tl.load(k_weight_ptr + column, mask=k_mask, other=0.0).to(ARITHMETIC)


@triton.jit
def forward_kernel(
    projected_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    stride,
    table_stride_batch,
    table_stride_time,
    time,
    num_heads,
    num_kv_heads,
    half,
    eps,
    query_scale,
    NORM: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Each head in two halves, of which the columns make the pairs that turn."""
    row = tl.program_id(0).to(tl.int64)
    batch, t = row // time, row % time
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_q, is_k, is_v = kinds(head, num_heads, num_kv_heads)
    inside = (column < half) & (is_q | is_k | is_v)
    place = projected_ptr + row * stride + head * 2 * half + column
    first = tl.load(place, mask=inside, other=0.0).to(ARITHMETIC)
    second = tl.load(place + half, mask=inside, other=0.0).to(ARITHMETIC)
    if NORM:
        mean_square = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half)
        scale = 1.0 / tl.sqrt(mean_square[:, None] + eps)
        turned = inside & (is_q | is_k)
        q_mask, k_mask = inside & is_q, inside & is_k
        w_first = weights(q_weight_ptr, k_weight_ptr, column + 0 * head, q_mask, k_mask, ARITHMETIC)
        w_second = weights(q_weight_ptr, k_weight_ptr, half + column + 0 * head, q_mask, k_mask, ARITHMETIC)
        first = tl.where(turned, first * scale * w_first, first)
        second = tl.where(turned, second * scale * w_second, second)
    table = batch * table_stride_batch + t * table_stride_time + column
    cos = tl.load(cos_ptr + table, mask=column < half, other=0.0).to(ARITHMETIC)
    sin = tl.load(sin_ptr + table, mask=column < half, other=0.0).to(ARITHMETIC)
    factor = tl.where(is_q, query_scale, 1.0).to(ARITHMETIC)
    out_first = tl.where(is_v, first, (first * cos - second * sin) * factor)
    out_second = tl.where(is_v, second, (second * cos + first * sin) * factor)
    dtype = q_ptr.dtype.element_ty
    q_place = q_ptr + ((batch * num_heads + head) * time + t) * 2 * half + column
    tl.store(q_place, out_first.to(dtype), mask=inside & is_q)
    tl.store(q_place + half, out_second.to(dtype), mask=inside & is_q)
    k_place = k_ptr + ((batch * num_kv_heads + head - num_heads) * time + t) * 2 * half + column
    tl.store(k_place, out_first.to(dtype), mask=inside & is_k)
    tl.store(k_place + half, out_second.to(dtype), mask=inside & is_k)
    v_head = head - num_heads - num_kv_heads
    v_place = v_ptr + ((batch * num_kv_heads + v_head) * time + t) * 2 * half + column
    tl.store(v_place, out_first.to(dtype), mask=inside & is_v)
    tl.store(v_place + half, out_second.to(dtype), mask=inside & is_v)


@triton.jit
def backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    projected_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    gradient_ptr,
    by_q_weight_ptr,
    by_k_weight_ptr,
    stride,
    table_stride_batch,
    table_stride_time,
    time,
    num_heads,
    num_kv_heads,
    half,
    eps,
    query_scale,
    NORM: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The rotation the other way round, then the gradient of the norm as in `rms_norm_triton`."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    batch, t = row // time, row % time
    head = (group * HEADS + tl.arange(0, HEADS))[:, None]
    column = tl.arange(0, HALF)[None, :]
    is_q, is_k, is_v = kinds(head, num_heads, num_kv_heads)
    inside = (column < half) & (is_q | is_k | is_v)
    q_mask, k_mask, v_mask = inside & is_q, inside & is_k, inside & is_v
    q_place = dq_ptr + ((batch * num_heads + head) * time + t) * 2 * half + column
    k_place = dk_ptr + ((batch * num_kv_heads + head - num_heads) * time + t) * 2 * half + column
    v_head = head - num_heads - num_kv_heads
    v_place = dv_ptr + ((batch * num_kv_heads + v_head) * time + t) * 2 * half + column
    up_first = tl.load(q_place, mask=q_mask, other=0.0).to(ARITHMETIC)
    up_first += tl.load(k_place, mask=k_mask, other=0.0).to(ARITHMETIC)
    up_first += tl.load(v_place, mask=v_mask, other=0.0).to(ARITHMETIC)
    up_second = tl.load(q_place + half, mask=q_mask, other=0.0).to(ARITHMETIC)
    up_second += tl.load(k_place + half, mask=k_mask, other=0.0).to(ARITHMETIC)
    up_second += tl.load(v_place + half, mask=v_mask, other=0.0).to(ARITHMETIC)
    table = batch * table_stride_batch + t * table_stride_time + column
    cos = tl.load(cos_ptr + table, mask=column < half, other=0.0).to(ARITHMETIC)
    sin = tl.load(sin_ptr + table, mask=column < half, other=0.0).to(ARITHMETIC)
    factor = tl.where(is_q, query_scale, 1.0).to(ARITHMETIC)
    first = tl.where(is_v, up_first, (up_first * cos + up_second * sin) * factor)
    second = tl.where(is_v, up_second, (up_second * cos - up_first * sin) * factor)
    if NORM:
        place = projected_ptr + row * stride + head * 2 * half + column
        x_first = tl.load(place, mask=inside, other=0.0).to(ARITHMETIC)
        x_second = tl.load(place + half, mask=inside, other=0.0).to(ARITHMETIC)
        mean_square = (tl.sum(x_first * x_first, 1) + tl.sum(x_second * x_second, 1)) / (2 * half)
        scale = 1.0 / tl.sqrt(mean_square[:, None] + eps)
        normed_first, normed_second = x_first * scale, x_second * scale
        # Partial sums of this program; the caller adds up those of all.
        partial = (row * tl.num_programs(1) + group) * 2 * half + tl.arange(0, HALF)
        within = tl.arange(0, HALF) < half
        dw_first, dw_second = first * normed_first, second * normed_second
        tl.store(by_q_weight_ptr + partial, tl.sum(tl.where(is_q, dw_first, 0.0), 0), mask=within)
        tl.store(by_q_weight_ptr + partial + half, tl.sum(tl.where(is_q, dw_second, 0.0), 0), mask=within)
        tl.store(by_k_weight_ptr + partial, tl.sum(tl.where(is_k, dw_first, 0.0), 0), mask=within)
        tl.store(by_k_weight_ptr + partial + half, tl.sum(tl.where(is_k, dw_second, 0.0), 0), mask=within)
        w_first = weights(q_weight_ptr, k_weight_ptr, column + 0 * head, q_mask, k_mask, ARITHMETIC)
        w_second = weights(q_weight_ptr, k_weight_ptr, half + column + 0 * head, q_mask, k_mask, ARITHMETIC)
        g_first, g_second = first * w_first, second * w_second
        mean = (tl.sum(g_first * normed_first, 1) + tl.sum(g_second * normed_second, 1)) / (2 * half)
        first = tl.where(is_v, first, (g_first - normed_first * mean[:, None]) * scale)
        second = tl.where(is_v, second, (g_second - normed_second * mean[:, None]) * scale)
    width = (num_heads + 2 * num_kv_heads) * 2 * half
    out = gradient_ptr + row * width + head * 2 * half + column
    tl.store(out, first.to(gradient_ptr.dtype.element_ty), mask=inside)
    tl.store(out + half, second.to(gradient_ptr.dtype.element_ty), mask=inside)


def forward(
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ryzen_llm.kernels.rotary_qkv`."""
    batch, time, width = projected.shape
    half = width // (num_heads + 2 * num_kv_heads) // 2
    q, k, v = (
        projected.new_empty(batch, heads, time, 2 * half) for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    if not projected.numel():
        return q, k, v
    flat, (cos, sin) = rows_of(projected), (cos.contiguous(), sin.contiguous())
    with torch.cuda.device_of(projected):  # Triton starts kernels on the current device
        forward_kernel[_grid(batch * time, num_heads, num_kv_heads)](
            flat,
            cos,
            sin,
            flat if q_weight is None else q_weight.contiguous(),
            flat if k_weight is None else k_weight.contiguous(),
            q,
            k,
            v,
            flat.stride(0),
            *_table_strides(cos),
            time,
            num_heads,
            num_kv_heads,
            half,
            eps,
            query_scale,
            NORM=q_weight is not None,
            ARITHMETIC=arithmetic(projected.dtype),
            HEADS=HEADS_BLOCK,
            HALF=triton.next_power_of_2(half),
        )
    return q, k, v


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    projected: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    query_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ryzen_llm.kernels.rotary_qkv`."""
    batch, num_heads, time, head_dim = dq.shape
    num_kv_heads = dk.shape[1]
    gradient = projected.new_empty(projected.shape)
    grid = _grid(batch * time, num_heads, num_kv_heads)
    wide = torch.promote_types(projected.dtype, torch.float32)
    shape = (0,) if q_weight is None else (grid[0] * grid[1], head_dim)
    by_q, by_k = (projected.new_empty(shape, dtype=wide) for _ in range(2))
    if projected.numel():
        flat, (cos, sin) = rows_of(projected), (cos.contiguous(), sin.contiguous())
        with torch.cuda.device_of(projected):
            backward_kernel[grid](
                dq.contiguous(),
                dk.contiguous(),
                dv.contiguous(),
                flat,
                cos,
                sin,
                flat if q_weight is None else q_weight.contiguous(),
                flat if k_weight is None else k_weight.contiguous(),
                gradient,
                by_q,
                by_k,
                flat.stride(0),
                *_table_strides(cos),
                time,
                num_heads,
                num_kv_heads,
                head_dim // 2,
                eps,
                query_scale,
                NORM=q_weight is not None,
                ARITHMETIC=arithmetic(projected.dtype),
                HEADS=HEADS_BLOCK,
                HALF=triton.next_power_of_2(head_dim // 2),
            )
    if q_weight is None or k_weight is None:
        return gradient, projected.new_empty(0), projected.new_empty(0)
    return gradient, by_q.sum(0).to(q_weight.dtype), by_k.sum(0).to(k_weight.dtype)


def _grid(tokens: int, num_heads: int, num_kv_heads: int) -> tuple[int, int]:
    return tokens, triton.cdiv(num_heads + 2 * num_kv_heads, HEADS_BLOCK)


def _table_strides(table: Tensor) -> tuple[int, int]:
    """From text to text of a batch, and from position to position: (time, half) serves all texts."""
    return (table.stride(0) if table.dim() == 4 else 0), table.stride(-2)
