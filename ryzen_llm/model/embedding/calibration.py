"""What a text says about how much each error of an embedding matters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ryzen_llm.errors import InputError


@dataclass(frozen=True)
class Calibration:
    """Second-order model of the loss: an error e of token i's row costs, in nats per token of text, about

        frequencies[i] * eᵀ (head_hessian + input_hessian) e / 2.

    The head's part is its Fisher matrix, the mean of (1 - sum p²) h hᵀ over final hidden states h and
    predictions p, for one expected prediction of a token. The lookup's is the mean of g gᵀ over the
    gradients g of the loss by the embedded input.

    Attributes:
        frequencies: (vocab_size,) fp32, positive: how often each token is looked up or predicted.
        head_hessian: (hidden_size, hidden_size) fp32.
        input_hessian: The same shape; zeros leave the lookup out.
    """

    frequencies: Tensor
    head_hessian: Tensor
    input_hessian: Tensor

    def __post_init__(self) -> None:
        size = len(self.head_hessian)
        shapes = [tuple(t.shape) for t in (self.head_hessian, self.input_hessian)]
        if shapes != [(size, size)] * 2 or self.frequencies.dim() != 1:
            raise InputError(
                f"calibration has frequencies {tuple(self.frequencies.shape)} and Hessians {shapes}, "
                "expected (vocab_size,) and two (hidden_size, hidden_size)"
            )
        if not all(t.isfinite().all() for t in (self.frequencies, self.head_hessian, self.input_hessian)):
            raise InputError("calibration is not finite: the text or the model is damaged")
        if (self.frequencies <= 0).any():
            raise InputError("calibration.frequencies must all be positive: smooth the counts")

    @property
    def hessian(self) -> Tensor:
        """Head and lookup together, with 1% of the mean curvature in every direction (damping)."""
        total = self.head_hessian + self.input_hessian
        return total + torch.eye(len(total), device=total.device) * total.diagonal().mean() * 0.01

    def cost(self, errors: Tensor) -> Tensor:
        """Expected increase of the loss by each row's error: (vocab_size, hidden_size) -> (vocab_size,)."""
        errors = errors.float()
        return (errors @ (self.head_hessian + self.input_hessian) * errors).sum(-1) * self.frequencies / 2

    @classmethod
    def uniform(cls, vocab_size: int, hidden_size: int) -> Calibration:
        """Without any text: every token and direction matters alike."""
        eye = torch.eye(hidden_size)
        return cls(torch.full((vocab_size,), 1 / vocab_size), eye, torch.zeros_like(eye))
