"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), half-split as in Llama checkpoints."""

import torch
from torch import Tensor

from ryzen_llm.kernels.rope_scaling import RopeScaling

Rope = tuple[Tensor, Tensor]
"""What `rotary_table` gives."""


def rotary_table(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> Rope:
    """Cosines and sines of the angle position * theta^(-2i / head_dim), for i in 0 .. head_dim/2 - 1.

    `positions` is (time,) of integers; both results are (time, head_dim / 2) in fp32 on its device. Positions
    of each text of a batch, (batch, time), give (batch, 1, time, head_dim / 2): `apply_rotary` takes that for
    all heads. `scaling` stretches the frequencies.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device) / head_dim
    frequencies = 1.0 / theta**exponents
    if scaling is not None:
        frequencies = scaling.stretch(frequencies, theta)
    angles = positions.float()[..., None] * frequencies
    if positions.dim() == 2:
        angles = angles[:, None]
    cos, sin = angles.cos(), angles.sin()
    if scaling is not None and scaling.amplitude != 1:
        cos, sin = cos * scaling.amplitude, sin * scaling.amplitude
    return cos, sin


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + head_dim/2]) by its angle, in fp32.

    `x` is (..., time, head_dim), queries or keys; `cos` and `sin` come from `rotary_table`. The result has
    `x`'s shape and dtype.
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
