"""The plain cache: keys and values as they are, in buffers allocated once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.cache.base import AttentionShape, KVCache, LayerCache
from ryzen_llm.kernels import visible

SMALLEST_PREFIX = 256


class DenseLayer(LayerCache):
    """Two buffers of (batch, kv_heads, max_length, head_dim)."""

    positions: Tensor
    mask: Tensor

    def __init__(self, shape: tuple[int, ...], window: int, dtype: torch.dtype, device: torch.device) -> None:
        self.window = window
        # Zeros, not empty: masked positions weigh nothing in attention, but 0 * NaN would.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `LayerCache.attend`; keys and values are kept in the cache's dtype."""
        self.keys.index_copy_(2, self.positions, keys.to(self.keys.dtype))
        self.values.index_copy_(2, self.positions, values.to(self.values.dtype))
        prefix = self.mask.shape[-1]
        return F.scaled_dot_product_attention(
            queries,
            self.keys[:, :, :prefix].to(queries.dtype),
            self.values[:, :, :prefix].to(queries.dtype),
            attn_mask=self.mask,
            enable_gqa=True,
        )


class DenseCache(KVCache):
    """Unquantised, contiguous, written by index.

    Attention reads a prefix of the buffers that doubles as the text grows: a short text does not pay for
    `max_length`, and a compiled block meets few shapes.
    """

    layers: list[DenseLayer]

    def __init__(
        self,
        config: AttentionShape,
        *,
        batch_size: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(max_length)
        shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
        self.layers = [DenseLayer(shape, window, dtype, device) for window in config.layer_windows]
        self._positions = torch.arange(max_length, device=device)

    @property
    def bytes_allocated(self) -> int:
        """See `KVCache.bytes_allocated`."""
        buffers = [self._positions, *(t for layer in self.layers for t in (layer.keys, layer.values))]
        return sum(buffer.untyped_storage().nbytes() for buffer in buffers)

    def _prepare(self, start: int, end: int) -> Tensor:
        positions = self._positions[start:end]
        prefix = SMALLEST_PREFIX
        while prefix < end:
            prefix *= 2
        windows = {layer.window for layer in self.layers}
        masks = {window: visible(positions, self._positions[:prefix], window) for window in windows}
        for layer in self.layers:
            layer.positions, layer.mask = positions, masks[layer.window]
        return positions
