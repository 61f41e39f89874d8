"""An orthonormal rotation of any width that needs no matrix of that width."""

import math

import torch
from torch import Tensor

from ryzen_llm.kernels import hadamard


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """(..., size) -> the same, fp32: signs, Hadamard blocks, then a cosine transform across the blocks.

    It spreads every column over all, so that a row's entries are much alike and one scale fits them all
    (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456). `signs` are (size,) of +-1.
    """
    x = hadamard(x * signs)
    blocks = torch.unflatten(x, -1, (-1, math.gcd(x.shape[-1], 256)))
    mixed = (_cosine(blocks.shape[-2], x.device) @ blocks).flatten(-2)
    return mixed


def rotate_back(x: Tensor, signs: Tensor) -> Tensor:
    """The inverse of `rotate`, its transpose."""
    blocks = torch.unflatten(x.float(), -1, (-1, math.gcd(x.shape[-1], 256)))
    return hadamard((_cosine(blocks.shape[-2], x.device).T @ blocks).flatten(-2)) * signs


def _cosine(size: int, device: torch.device) -> Tensor:
    """The orthonormal DCT-II, (size, size)."""
    k = torch.arange(size, device=device, dtype=torch.float32)
    matrix = torch.cos(math.pi / size * (k + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix
