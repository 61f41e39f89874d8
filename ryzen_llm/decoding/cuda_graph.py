"""A decoding step as a CUDA graph: one launch a token instead of hundreds."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ryzen_llm.cache import KVCache, LayerCache

Step = Callable[[Tensor, Tensor, Sequence[LayerCache]], Tensor]
"""Tokens (batch, 1), their positions and the cache's layers -> logits (batch, vocab)."""


class GraphedStep:
    """`step` on `cache`, recorded once and replayed; nothing of it goes through Python or the host again.

    The cache has to be as large as it will be (`KVCache.reserve`), since a graph reads and writes addresses.
    """

    def __init__(self, step: Step, cache: KVCache, tokens: Tensor) -> None:
        self.cache = cache
        self.tokens = tokens.clone()
        lengths = cache.lengths
        positions = cache.append(1)
        self.positions = positions.clone()
        for layer in cache.layers:
            layer.positions = self.positions.view(-1, 1)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled or allocated on first use must not be recorded
            for _ in range(3):
                step(self.tokens, self.positions, cache.layers)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = step(self.tokens, self.positions, cache.layers)
        cache.truncate(lengths)  # the token written meanwhile will be written again

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, vocab) after `tokens` (batch, 1); overwritten by the next call."""
        self.positions.copy_(self.cache.append(1).view_as(self.positions))
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits
