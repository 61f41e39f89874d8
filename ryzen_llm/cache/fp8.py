"""8-bit floating point with one scale for each token and head; for CUDA."""

import torch
from torch import Tensor

from ryzen_llm.cache.base import Format
from ryzen_llm.cache.int8 import LEAST_SCALE
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import Stored

LARGEST = torch.finfo(torch.float8_e4m3fn).max


class Fp8(Format):
    """x ≈ codes * scale with codes in e4m3 (Micikevicius et al. 2022, arXiv:2209.05433).

    The scale follows each token, max |x| / 448, where a scale that is set beforehand would clip outliers.
    """

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Stored:
        """See `Format.empty`."""
        if device.type != "cuda":
            raise InputError(
                f"cache fp8 needs a CUDA device, not {device.type}: choose int8, of the same size"
            )
        return Stored(
            torch.zeros(shape, dtype=torch.float8_e4m3fn, device=device),
            torch.zeros(shape[:-1], dtype=torch.float16, device=device),
        )

    def encode(self, x: Tensor) -> Stored:
        """See `Format.encode`."""
        x = x.float()
        scale = (x.abs().amax(-1) / LARGEST).clamp(min=LEAST_SCALE).half()
        codes = (x / scale.float()[..., None]).clamp(-LARGEST, LARGEST)
        return Stored(codes.to(torch.float8_e4m3fn), scale)
