"""A decoding step as a CUDA graph: one launch a step instead of hundreds."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ryzen_llm.cache import KVCache, LayerCache

Result = TypeVar("Result")
Step = Callable[[Tensor, Tensor, Sequence[LayerCache]], Result]
"""Tokens (batch, width), their positions and the cache's layers -> tensors."""


class GraphedStep(Generic[Result]):
    """`step` on `cache`, recorded once and replayed; nothing of it goes through Python or the host again.

    The cache has to be as large as it will be (`KVCache.reserve`), since a graph reads and writes addresses.
    The texts may be, or come to be, of different lengths.
    """

    def __init__(self, step: Step[Result], cache: KVCache, tokens: Tensor) -> None:
        self.cache = cache
        self.tokens = tokens.clone()
        lengths = cache.lengths
        width = tokens.shape[1]
        self.positions = cache.append(width).view(-1, width).expand(tokens.shape).clone()
        for layer in cache.layers:
            layer.positions = self.positions
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is compiled or allocated on first use must not be recorded
            for _ in range(3):
                step(self.tokens, self.positions, cache.layers)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = step(self.tokens, self.positions, cache.layers)
        cache.truncate(lengths)  # the tokens written meanwhile will be written again

    def __call__(self, tokens: Tensor) -> Result:
        """What `step` gives for `tokens`, shaped as they were; overwritten by the next call."""
        self.positions.copy_(self.cache.append(tokens.shape[1]).view(-1, tokens.shape[1]))
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.result
