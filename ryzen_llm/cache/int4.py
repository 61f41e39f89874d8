"""4-bit integers with a scale and a minimum for each token and head."""

import torch
from torch import Tensor

from ryzen_llm.cache.base import Format
from ryzen_llm.cache.int8 import LEAST_SCALE
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import Stored

_STEPS = 255 / 15
"""Steps of an 8-bit code in one of a 4-bit code."""


class Int4(Format):
    """x ≈ codes * scale + minimum with codes from 0 to 15, two a byte as `kernels.cached_attention` has it.

    The vector is rotated first, so that no single channel stretches the scale (QuaRot, Ashkboos et al. 2024,
    arXiv:2404.00456).

    Args:
        fine: How many channels, the first ones, have 8 bits: 16 * h + l, as two codes h and l that attention
            takes for channels of their own. They share scale and minimum with the others, whose number is
            even.
    """

    rotated = True

    def __init__(self, fine: int = 0) -> None:
        self._fine = fine

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Stored:
        """See `Format.empty`."""
        if shape[-1] % 2:
            raise InputError(f"cache int4: head_dim is {shape[-1]}, expected an even number: choose int8")
        return Stored(
            torch.zeros(*shape[:-1], (shape[-1] + self._fine) // 2, dtype=torch.uint8, device=device),
            torch.zeros(shape[:-1], dtype=torch.float16, device=device),
            torch.zeros(shape[:-1], dtype=torch.float16, device=device),
        )

    def encode(self, x: Tensor) -> Stored:
        """See `Format.encode`."""
        x = x.float()
        minimum = x.amin(-1).half()
        scale = ((x.amax(-1) - minimum.float()) / 15).clamp(min=LEAST_SCALE).half()
        steps = (x - minimum.float()[..., None]) / scale.float()[..., None]
        # Scale and minimum are rounded, so codes may come out a little beyond 0 and 15.
        low, high = steps[..., self._fine :].round().clamp(0, 15).to(torch.uint8).chunk(2, -1)
        codes = low | (high << 4)
        if self._fine:
            fine = (steps[..., : self._fine] * _STEPS).round().clamp(0, 255).to(torch.uint8)
            codes = torch.cat(((fine >> 4) | ((fine & 15) << 4), codes), -1)
        return Stored(codes, scale, minimum)

    def as_codes(self, x: Tensor) -> Tensor:
        """See `Format.as_codes`: the fine channels twice, in front of either half of the others."""
        return self._twice(x, 1.0, 1.0)

    def against_codes(self, queries: Tensor) -> Tensor:
        """See `Format.against_codes`."""
        return self._twice(queries, 16 / _STEPS, 1 / _STEPS)

    def _twice(self, x: Tensor, first: float, second: float) -> Tensor:
        if not self._fine:
            return x
        fine, (low, high) = x[..., : self._fine], x[..., self._fine :].chunk(2, -1)
        return torch.cat((fine * first, low, fine * second, high), -1)
