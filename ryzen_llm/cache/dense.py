"""Keys and values as they are, in the model's dtype."""

import torch
from torch import Tensor

from ryzen_llm.cache.base import Format
from ryzen_llm.kernels import Stored


class Dense(Format):
    """No quantisation."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Stored:
        """See `Format.empty`."""
        return Stored(torch.zeros(shape, dtype=dtype, device=device))

    def encode(self, x: Tensor) -> Stored:
        """See `Format.encode`."""
        return Stored(x)
