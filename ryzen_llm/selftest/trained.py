"""What the checks get to work with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.model import Transformer


@dataclass(frozen=True)
class Trained:
    """The outcome of a training run, as the fixture `trained` of the checks. A check changes nothing in it.

    Attributes:
        model: The trained model, fp32, not compiled.
        tokenizer: Its tokenizer.
        val_batches: Token ids of the validation split, (batch, context + 1) int64 each.
        training_report: training_metrics_report.json of the run, None where there is none.
    """

    model: Transformer
    tokenizer: Tokenizer
    val_batches: Sequence[Tensor]
    training_report: Path | None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def new_tokens(self) -> int:
        """How many tokens a check generates: 16, or what the model's context leaves room for."""
        return min(16, self.model.config.max_position_embeddings - self.prompt.shape[1])

    @property
    def prompt(self) -> Tensor:
        """Up to 16 tokens of validation text, (1, time) int64, on the model's device."""
        longest = max(1, self.model.config.max_position_embeddings // 2)
        return self.val_batches[0][:1, : min(16, longest)].to(self.device)
