"""The LightningModule that trains draft heads for a model, which stays as it is."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric

from ryzen_llm.decoding import DraftHeads, HeadsConfig, output_rows
from ryzen_llm.kernels import linear_cross_entropy
from ryzen_llm.model import Transformer
from ryzen_llm.training.language_module import CHECKPOINT_FORMAT, CHECKPOINT_KEY
from ryzen_llm.training.optimizer import OptimizerConfig, ScheduledModule, build_adamw
from ryzen_llm.training.target_text import Batch

IGNORED = -100


class DraftHeadsModule(ScheduledModule):
    """Trains `DraftHeads` to foretell what the model itself would write, at every depth of a draft.

    The loss is the cross-entropy of the model's own tokens, the mean over depths. Logs ``val_loss``,
    ``val_accuracy`` (of the first drafted token) and ``val_accepted``: how many tokens of a draft would have
    stood, on average.

    Args:
        target: The model that is drafted for; not trained, not in the checkpoint.
        heads: Shape of the heads.
        vocabulary: Ids that can be drafted.
        optimizer: AdamW's settings and the schedule.
    """

    index: Tensor
    rows: Tensor

    def __init__(
        self,
        target: Transformer,
        heads: HeadsConfig,
        vocabulary: Tensor,
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        super().__init__()
        self.heads = DraftHeads(heads, vocabulary)
        self._target = [target.eval()]  # in a list, it is none of this module's parts
        index = torch.full((target.config.vocab_size,), IGNORED)
        index[vocabulary] = torch.arange(len(vocabulary))
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("rows", output_rows(target, vocabulary).clone(), persistent=False)
        self.optimizer_config = optimizer or OptimizerConfig()
        self.mean_loss = MeanMetric(nan_strategy=math.nan)  # which stays: it would be left out
        self.accuracy = MeanMetric()
        self.accepted = MeanMetric()

    @property
    def target(self) -> Transformer:
        """The model that is drafted for."""
        return self._target[0]

    def setup(self, stage: str) -> None:
        """Bring the target to where the heads are."""
        self.target.to(self.device)

    def tokens_in_batch(self, batch: Batch) -> int:
        """Places to draft from. `TrainingMetricsCollector` counts with it."""
        return len(batch[0])

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss over the depths, and in validation which tokens were right, (depth, batch) bool."""
        states, tokens, own = batch
        embedded = self.target.embedding.lookup(tokens[:, :-1]).detach()
        rows = self.rows.to(embedded.dtype)
        states = states.to(embedded.dtype)
        losses, right = [], []
        for d in range(self.heads.config.depth):
            states = self.heads(states, embedded[:, d])
            labels = torch.where(own[:, d], self.index[tokens[:, d + 1]], IGNORED)
            loss, _ = linear_cross_entropy(states, rows, labels, reduction="sum")
            # Of none, where a batch has no token that can be drafted, the mean would be NaN.
            losses.append(loss / (labels != IGNORED).sum().clamp(min=1))
            if not self.training:
                right.append(torch.nn.functional.linear(states, rows).argmax(-1) == labels)
        return torch.stack(losses).mean(), torch.stack(right) if right else own.new_zeros(0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Mean cross-entropy over the depths, in nats per token."""
        loss, _ = self._losses(batch)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Accumulate loss, accuracy and accepted tokens."""
        loss, right = self._losses(batch)
        self.mean_loss.update(loss, weight=right.shape[1])
        self.accuracy.update(right[0].float())
        self.accepted.update(right.int().cumprod(0).sum(0).float())

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        metrics = {"loss": self.mean_loss, "accuracy": self.accuracy, "accepted": self.accepted}
        self.log_dict(
            {f"val_{name}": metric.compute() for name, metric in metrics.items()},
            prog_bar=True,
            sync_dist=True,
        )
        for metric in metrics.values():
            metric.reset()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over the heads, with the schedule stepped every optimizer step."""
        optimizer = build_adamw(self.heads, self.optimizer_config, fused=False)
        return self.with_schedule(optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the heads' shape."""
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "heads": asdict(self.heads.config),
            "optimizer": asdict(self.optimizer_config),
        }
