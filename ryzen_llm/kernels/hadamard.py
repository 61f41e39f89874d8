"""The Walsh-Hadamard rotation, which spreads an outlier over all channels (QuaRot, arXiv:2404.00456)."""

import functools
import math

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x Hᵀ in fp32 along the last dimension; H is orthonormal and symmetric, so that twice gives `x` again.

    `x` is (..., size). H has blocks of the largest power of two that divides `size`, 256 at most.
    """
    size = x.shape[-1]
    block = math.gcd(size, 256)
    rows = x.reshape(*x.shape[:-1], size // block, block)
    return rotate(rows, _matrix(block, x.device)).reshape(x.shape)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """x M in fp32: `x` (..., rows, size), `matrix` (..., size, size), whose leading sizes broadcast."""
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        # Multiply-and-sum, so that Inductor fuses it with what comes before and after: for the few rows of a
        # decoding step that is cheaper than a call into a matrix library. Training has many rows.
        return (x.float()[..., None, :] * matrix.mT[..., None, :, :]).sum(-1)
    return torch.matmul(x.float(), matrix.float())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _matrix(size: int, device: torch.device) -> Tensor:
    return _kept_matrix(size, device)  # Dynamo would trace through the cache and make it anew in each graph


@functools.cache
def _kept_matrix(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # whoever asks for it first, a training can ask next
        matrix = torch.ones(1, 1, device=device)
        while len(matrix) < size:
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        return matrix / math.sqrt(size)
