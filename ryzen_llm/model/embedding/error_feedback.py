"""Rounding a matrix to a grid so that what it does, not what it is, changes least."""

from __future__ import annotations

import torch
from torch import Tensor

from ryzen_llm.kernels import TrellisRows, trellis_encode, unpack

GAUSSIAN_STEPS = {1: 1.596, 2: 0.9957, 3: 0.586, 4: 0.3352, 5: 0.1881, 6: 0.1041, 7: 0.0569, 8: 0.0308}
"""The uniform grid's step, in standard deviations, with the least squared error on normal numbers
(Max 1960, "Quantizing for minimum distortion")."""
TRELLIS_SPREAD = {1: 0.9, 2: 1.0, 3: 1.02, 4: 1.03}
"""The standard deviation of a row over that of its trellis codes with the least squared error on normal
numbers, to a hundredth."""
_BLOCK = 64
_SCALES = (0.85, 1.0, 1.15)
"""Steps that are tried for each row, as multiples of the Gaussian one."""


def gaussian_scale(weight: Tensor, bits: int, group: int) -> Tensor:
    """The step for each row and group of `weight` (rows, size), as (rows, groups) fp32, positive."""
    groups = torch.unflatten(weight.float(), -1, (-1, group))
    return (groups.square().mean(-1).sqrt() * GAUSSIAN_STEPS[bits]).clamp(min=1e-8)


def to_codes(values: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest codes of `values` (rows, size) with `scale` (rows, groups): (rows, groups, group), fp32."""
    half = (2**bits - 1) / 2
    grouped = torch.unflatten(values, -1, (scale.shape[1], -1)) / scale[..., None]
    nearest: Tensor = (grouped + half).round()
    return nearest.clamp(0, 2**bits - 1)


def quantise_rows(weight: Tensor, hessian: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Values (rows, size) whose nearest codes approximate `weight` (rows, size), and scales (rows, groups).

    Column by column, what rounding does to eᵀ hessian e is made up for in the columns that follow, as in GPTQ
    (Frantar et al. 2022, arXiv:2210.17323). The scale of each row is the best of three. The values are those
    before rounding, within the grid, so that training can go on from them; scales are exact in bf16.
    """
    feedback = _feedback(hessian)
    best_values, best_scale, best_error = weight, weight, torch.empty(0)
    for multiple in _SCALES:
        scale = (gaussian_scale(weight, bits, group) * multiple).bfloat16().float()
        values, error = _round_with_feedback(weight.float(), feedback, scale, bits, group)
        if not len(best_error):
            best_values, best_scale, best_error = values, scale, error
        else:
            better = error < best_error
            best_values = torch.where(better[:, None], values, best_values)
            best_scale = torch.where(better[:, None], scale, best_scale)
            best_error = torch.where(better, error, best_error)
    return best_values, best_scale


def quantise_in_trellis(weight: Tensor, hessian: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales (rows, 1), as in `TrellisRows`, that approximate `weight` (rows, size).

    By the same rule as `quantise_rows`; then each row gets the scale at which eᵀ hessian e of its codes is
    least, in bf16. Raises InputError as `trellis_encode` does.
    """
    weight = weight.float()
    unit = (weight.square().mean(-1, keepdim=True).sqrt() * TRELLIS_SPREAD[bits]).clamp(min=1e-8)
    feedback = _feedback(hessian)
    # In proportion, so that costs are near 1 whatever the Hessian's unit is.
    feedback = (feedback / feedback.diagonal().mean()).T.contiguous()
    codes = trellis_encode((weight / unit).cpu(), feedback.cpu(), bits).to(weight.device)
    values = unpack(TrellisRows(codes, torch.ones_like(unit), bits))
    weighted = values @ hessian.float()
    scale = (weighted * weight).sum(-1, keepdim=True) / (weighted * values).sum(-1, keepdim=True)
    return codes, scale.bfloat16().float()


def _feedback(hessian: Tensor) -> Tensor:
    """What an error in a column (row) takes from those after it, upper triangular fp32, as in GPTQ."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian.double()))
    feedback: Tensor = torch.linalg.cholesky(inverse, upper=True).float()
    return feedback


def _round_with_feedback(
    weight: Tensor, feedback: Tensor, scale: Tensor, bits: int, group: int
) -> tuple[Tensor, Tensor]:
    # Columns as rows: each is read and written as a whole.
    left, values = weight.T.contiguous(), torch.empty_like(weight.T, memory_format=torch.contiguous_format)
    half = (2**bits - 1) / 2
    error = torch.zeros(len(weight), device=weight.device)
    for start in range(0, len(left), _BLOCK):
        stop = min(start + _BLOCK, len(left))
        errors = torch.empty_like(left[start:stop])
        for j in range(start, stop):
            step = scale[:, j // group]
            values[j] = torch.clamp(left[j], -half * step, half * step)
            rounded = ((values[j] / step + half).round().clamp(0, 2 * half) - half) * step
            errors[j - start] = (left[j] - rounded) / feedback[j, j]
            left[j + 1 : stop] -= feedback[j, j + 1 : stop, None] * errors[j - start]
        error += errors.square().sum(0)
        left[stop:] -= feedback[start:stop, stop:].T @ errors
    return values.T.contiguous(), error
