"""Causal grouped-query attention over a whole sequence, for training and for scoring without a cache."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from ryzen_llm.kernels import causal_attention_cpu

SMALLEST_BLOCK = 64
MOST_BLOCKS = 8  # each is compiled on its own, so this bounds the compile time


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, window: int = 0, starts: Tensor | None = None
) -> Tensor:
    """softmax(Q Kᵀ / sqrt(head_dim) + causal mask) V, every heads / kv_heads queries sharing one key head.

    `queries` is (batch, heads, time, head_dim), `keys` and `values` (batch, kv_heads, time, head_dim); the
    result is shaped like `queries` (Ainslie et al. 2023, arXiv:2305.13245). With a `window`, each position
    sees that many tokens, itself the last (Beltagy et al. 2020, arXiv:2004.05150); 0 lets it see all. With
    `starts`, as `document_starts` gives them, it sees none before its document's first.
    """
    if queries.device.type == "cpu" and torch.compiler.is_compiling():
        return attention_in_cpp(queries, keys, values, window, starts)
    return attention_by_pytorch(queries, keys, values, window, starts)


def attention_in_cpp(
    queries: Tensor, keys: Tensor, values: Tensor, window: int = 0, starts: Tensor | None = None
) -> Tensor:
    """`causal_attention` by `causal_attention_cpu` where it suits, else in query blocks."""
    if causal_attention_cpu.suits(queries.dtype, queries.device, queries.shape[-1]):
        return causal_attention_cpu.attend(queries, keys, values, window, starts)
    return attention_in_query_blocks(queries, keys, values, window, starts)


def attention_by_pytorch(
    queries: Tensor, keys: Tensor, values: Tensor, window: int = 0, starts: Tensor | None = None
) -> Tensor:
    """`causal_attention` by PyTorch's fused kernel; a window goes into its mask.

    Documents do, too, or on a GPU, where blocks are compiled, FlexAttention skips what none of a block sees.
    """
    time = queries.shape[2]
    if starts is not None and queries.device.type == "cuda" and torch.compiler.is_compiling():
        return attention_by_flex(queries, keys, values, window, starts)
    if starts is None and not 0 < window < time:
        return F.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
    positions = torch.arange(time, device=queries.device)
    mask = visible(positions, positions, window, starts)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)


def attention_by_flex(queries: Tensor, keys: Tensor, values: Tensor, window: int, starts: Tensor) -> Tensor:
    """`causal_attention` by PyTorch's FlexAttention (Dong et al. 2024, arXiv:2412.05496)."""

    def sees(text: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = (key <= query) & (key >= starts[text, query])
        return seen & (query - key < window) if window else seen

    batch, _, time, _ = queries.shape
    mask = create_block_mask(sees, batch, None, time, time, device=queries.device)
    context: Tensor = flex_attention(queries, keys, values, block_mask=mask, enable_gqa=True)
    return context


def document_starts(input_ids: Tensor, separator: int) -> Tensor:
    """Where each token's document begins: (batch, time) int64, as `input_ids`.

    A document ends with a `separator`, and the first one of a row may have begun before it.
    """
    ended = F.pad(input_ids[:, :-1] == separator, (1, 0))
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    return torch.where(ended, positions, 0).cummax(dim=1).values


def visible(
    query_positions: Tensor, key_positions: Tensor, window: int = 0, starts: Tensor | None = None
) -> Tensor:
    """Which keys each query sees, (queries, keys) bool: those up to it, and with a `window` its last ones.

    With the queries' `starts`, (batch, queries), also none before these: (batch, 1, queries, keys).
    """
    distances = query_positions[:, None] - key_positions
    seen = (distances >= 0) & (distances < window) if window else distances >= 0
    return seen if starts is None else seen & (key_positions >= starts[:, None, :, None])


def attention_in_query_blocks(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    window: int = 0,
    starts: Tensor | None = None,
    blocks: int = MOST_BLOCKS,
) -> Tensor:
    """`causal_attention` with the softmax in fp32, a block of queries at a time over the keys that it sees.

    It skips most of the masked half, and the queries that share a key head make one larger matrix product.
    Backward computes a block's softmax again, as in Dao et al. 2022 (arXiv:2205.14135), which takes less time
    than to keep it, and a third less of a step's memory (docs/kernels.md). There are `blocks` of them, or
    fewer where they would have under `SMALLEST_BLOCK` queries.
    """
    batch, num_heads, time, head_dim = queries.shape
    num_kv_heads = keys.shape[1]
    queries = queries.reshape(batch, num_kv_heads, -1, time, head_dim)
    positions = torch.arange(time, device=queries.device)
    block = max(SMALLEST_BLOCK, -(-time // blocks))
    contexts = []
    for start in range(0, time, block):
        end = min(start + block, time)
        first = max(0, start - window + 1) if window else 0
        begun = None if starts is None else starts[:, start:end]
        context = checkpoint(
            _attend,
            queries[..., start:end, :].flatten(2, 3),
            keys[:, :, first:end],
            values[:, :, first:end],
            visible(positions[start:end], positions[first:end], window, begun),
            use_reentrant=False,
            preserve_rng_state=False,
        )
        contexts.append(context.view(batch, num_heads, end - start, head_dim))
    return torch.cat(contexts, dim=2)


def _attend(rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """Of rows (batch, kv_heads, heads / kv_heads * queries, head_dim), with a mask from `visible`."""
    scores = (rows @ keys.mT).float() * rows.shape[-1] ** -0.5
    scores = scores.unflatten(2, (-1, mask.shape[-2]))
    scores = scores.masked_fill(~(mask if mask.dim() == 2 else mask[:, None]), -torch.inf)
    context: Tensor = scores.softmax(-1).to(values.dtype).flatten(2, 3) @ values
    return context
