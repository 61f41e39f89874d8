"""4-bit integers with a scale and a minimum for each token and head."""

import torch
from torch import Tensor

from ryzen_llm.cache.base import Format
from ryzen_llm.cache.int8 import LEAST_SCALE
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import Stored


class Int4(Format):
    """x ≈ codes * scale + minimum with codes from 0 to 15, two a byte as `kernels.cached_attention` has it.

    The vector is rotated first, so that no single channel stretches the scale (QuaRot, Ashkboos et al. 2024,
    arXiv:2404.00456).
    """

    rotated = True

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Stored:
        """See `Format.empty`."""
        if shape[-1] % 2:
            raise InputError(f"cache int4: head_dim is {shape[-1]}, expected an even number: choose int8")
        return Stored(
            torch.zeros(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, device=device),
            torch.zeros(shape[:-1], dtype=torch.float16, device=device),
            torch.zeros(shape[:-1], dtype=torch.float16, device=device),
        )

    def encode(self, x: Tensor) -> Stored:
        """See `Format.encode`."""
        x = x.float()
        minimum = x.amin(-1).half()
        scale = ((x.amax(-1) - minimum.float()) / 15).clamp(min=LEAST_SCALE).half()
        codes = (x - minimum.float()[..., None]) / scale.float()[..., None]
        # Scale and minimum are rounded, so codes may come out a little beyond 0 and 15.
        low, high = codes.round().clamp(0, 15).to(torch.uint8).chunk(2, -1)
        return Stored(low | (high << 4), scale, minimum)
