"""4-bit integers with a scale and a minimum for each token and head."""

import torch
from torch import Tensor

from ryzen_llm.cache.base import Format
from ryzen_llm.cache.int8 import LEAST_SCALE
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import Stored

_STEPS = 255 / 15
"""Steps of an 8-bit code in one of a 4-bit code."""
_SHARE = 0.96
"""Of the range of 64 normal numbers: 16 steps have the least squared error there, 5% less than at 1."""


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
        """See `Format.encode`: on a grid of 96% of the range, then on the one that fits these codes in least
        squares.
        """
        x = x.float()
        spread = x.amax(-1) - x.amin(-1)
        scale, minimum = _stored(_SHARE * spread / 15, x.amin(-1) + (1 - _SHARE) / 2 * spread)
        codes = self._rounded(x, scale, minimum)
        # Sums in fp64 are the same fp16 in any order: in one pass over many tokens and in many over one.
        values, middle = x.double(), codes.double().mean(-1)
        centred = codes - middle[..., None]
        # All codes are the same where all channels are: nothing over nothing, but for the clamp.
        slope = (centred * values).sum(-1) / centred.square().sum(-1).clamp(min=1e-6)
        scale, minimum = _stored(slope, values.mean(-1) - slope * middle)
        codes = self._rounded(x, scale, minimum)
        low, high = codes[..., self._fine :].to(torch.uint8).chunk(2, -1)
        packed = low | (high << 4)
        if self._fine:
            fine = (codes[..., : self._fine] * _STEPS).round().to(torch.uint8)
            packed = torch.cat(((fine >> 4) | ((fine & 15) << 4), packed), -1)
        return Stored(packed, scale, minimum)

    def _rounded(self, x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
        """The place of each channel on the grid, from 0 to 15 in fp32."""
        steps = ((x - minimum.float()[..., None]) / scale.float()[..., None]).clamp(0, 15)
        if not self._fine:
            return steps.round()
        fine = (steps[..., : self._fine] * _STEPS).round() / _STEPS
        return torch.cat((fine, steps[..., self._fine :].round()), -1)

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


def _stored(scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    return scale.clamp(min=LEAST_SCALE).half(), minimum.half()
