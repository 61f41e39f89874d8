"""What the checks get to work with."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import Calibration, QuantizedEmbedding
from ryzen_llm.training import autocast


@dataclass(frozen=True)
class Trained:
    """The outcome of a training run, as the fixture `trained` of the checks. A check changes nothing in it.

    Attributes:
        model: The trained model, fp32, not compiled.
        tokenizer: Its tokenizer.
        val_batches: Token ids of the validation split, (batch, context + 1) int64 each.
        training_report: training_metrics_report.json of the run, None where there is none.
        precision: Of the run: "bf16-mixed" or "32-true".
    """

    model: Transformer
    tokenizer: Tokenizer
    val_batches: Sequence[Tensor]
    training_report: Path | None
    precision: str

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def autocast(self) -> torch.autocast:
        """The autocast of the run's precision."""
        return autocast(self.precision, self.device)

    @property
    def new_tokens(self) -> int:
        """How many tokens a check generates: 16, or what the model's context leaves room for."""
        return min(16, self.model.config.max_position_embeddings - self.prompt.shape[1])

    @property
    def prompt(self) -> Tensor:
        """Up to 16 tokens of validation text, (1, time) int64, on the model's device."""
        longest = max(1, self.model.config.max_position_embeddings // 2)
        return self.val_batches[0][:1, : min(16, longest)].to(self.device)


def with_quantised_embedding(trained: Trained) -> Transformer:
    """The model with its embedding in 6 bits a number; one that was trained compressed is only packed."""
    model = copy.deepcopy(trained.model)
    config = model.config
    if config.embedding == "dense":
        calibration = Calibration.uniform(config.vocab_size, config.hidden_size)
        weight = model.embedding.dense_weight().cpu()
        model.replace_embedding(QuantizedEmbedding.from_dense(weight, calibration, bits=6).to(trained.device))
    else:
        model.replace_embedding(model.embedding.compressed())
    return model
