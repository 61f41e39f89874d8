"""8-bit integers with one scale for each token and head."""

import torch
from torch import Tensor

from ryzen_llm.cache.base import Format
from ryzen_llm.kernels import Stored

LEAST_SCALE = torch.finfo(torch.float16).smallest_normal


class Int8(Format):
    """x ≈ codes * scale with codes from -127 to 127 and scale = max |x| / 127 in fp16.

    Args:
        rotated: See `Format`. Some channels of keys are many times as large as the others, which the scale
            would leave few codes. Rotating values gained nothing on SmolLM2 and Gemma 3.
    """

    def __init__(self, rotated: bool = False) -> None:
        self.rotated = rotated

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Stored:
        """See `Format.empty`."""
        return Stored(
            torch.zeros(shape, dtype=torch.int8, device=device),
            torch.zeros(shape[:-1], dtype=torch.float16, device=device),
        )

    def encode(self, x: Tensor) -> Stored:
        """See `Format.encode`."""
        x = x.float()
        scale = (x.abs().amax(-1) / 127).clamp(min=LEAST_SCALE).half()
        # The scale is rounded, so the largest code may come out as 127.06: the clamp is for that alone.
        codes = (x / scale.float()[..., None]).round().clamp(-127, 127)
        return Stored(codes.to(torch.int8), scale)
