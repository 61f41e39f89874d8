"""A linear layer of a training step."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.kernels import linear_cpu


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias of `x` (..., inputs), `weight` (outputs, inputs) and `bias` (outputs,) -> (..., outputs).

    Under autocast in its dtype.
    """
    return F.linear(x, weight, bias)


def linear_in_cpp(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by `linear_cpu` where it suits: a training step in bf16."""
    if not linear_cpu.suits(x, weight):
        return linear(x, weight, bias)
    y = linear_cpu.multiply(x.to(torch.bfloat16), weight)
    return y if bias is None else y + bias.to(torch.bfloat16)
