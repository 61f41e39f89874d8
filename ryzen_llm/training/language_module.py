"""The LightningModule: a Transformer, its loss, its optimiser and what it logs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torchmetrics import MeanMetric

from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.training.optimizer import OptimizerConfig, ScheduledModule, build_adamw
from ryzen_llm.training.sharded import shard

CHECKPOINT_KEY = "ryzen_llm"
"""Where a checkpoint keeps what is needed to rebuild what it is of, as plain types."""

CHECKPOINT_FORMAT = 1


class LanguageModule(ScheduledModule):
    """Trains a decoder-only transformer to predict the next token.

    Batches are int64 tensors of shape (batch, context + 1): positions ``[:-1]`` are the input and ``[1:]``
    the targets. Logs ``val_loss`` (nats per token), ``val_perplexity`` and ``val_accuracy`` (next token,
    greedy) at validation, and the same under ``test_``; the collector has the per-step training figures.
    Logs the embedding's `compression_ratio` every epoch.

    Args:
        model: A model to go on training, such as one from `load_pretrained`, or the shape of one to begin.
        optimizer: AdamW's settings and the schedule.
        compile: Compile each block and the loss with torch.compile when fitting starts. One block is compiled
            and reused for all layers, so the warm-up does not grow with depth.
        checkpoint_activations: Compute each block's activations again in backward instead of keeping them:
            less memory, about a third more time.
        document_separator: The id that ends each document in the batches, for no token to see another one
            (of the same row); None lets it see all before it.
    """

    def __init__(
        self,
        model: Transformer | ModelConfig,
        optimizer: OptimizerConfig | None = None,
        compile: bool = False,
        checkpoint_activations: bool = False,
        document_separator: int | None = None,
    ) -> None:
        super().__init__()
        self.model = model.train() if isinstance(model, Transformer) else Transformer(model)
        self.model.checkpoint_activations = checkpoint_activations
        self.model.document_separator = document_separator
        self.optimizer_config = optimizer or OptimizerConfig()
        self.compile_blocks = compile
        self.mean_loss = MeanMetric(nan_strategy=math.nan)  # which stays: it would be left out
        self.accuracy = MeanMetric()

    def configure_model(self) -> None:
        """Compile the blocks, and shard them where the strategy is to; once."""
        if self.compile_blocks:
            self.model.compile_blocks()
            self.compile_blocks = False
        if self.device_mesh is not None and not isinstance(self.model, FSDPModule):
            shard(self.model, self.device_mesh["data_parallel"])

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, time, vocab) of token ids (batch, time)."""
        logits: Tensor = self.model(input_ids)
        return logits

    def tokens_in_batch(self, batch: Tensor) -> int:
        """Target tokens of a batch; there is no padding. `TrainingMetricsCollector` counts with it."""
        return batch[:, 1:].numel()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Tell the embedding how far training is, where it is known how far it goes and it is not sharded."""
        steps = self.trainer.estimated_stepping_batches
        if math.isfinite(steps) and self.device_mesh is None:
            self.model.embedding.at_step(self.trainer.global_step, int(steps))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean cross-entropy of the batch, in nats per token, fp32."""
        loss, _ = self.model.loss(batch[:, :-1], batch[:, 1:])
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def on_train_epoch_start(self) -> None:
        """Log `compression_ratio`: bytes of a dense bf16 embedding over those of the one to be kept."""
        if self.device_mesh is None:  # else each process has a part of the embedding only
            self.log("compression_ratio", self.model.embedding.compression_ratio)

    def _evaluate(self, batch: Tensor) -> None:
        targets = batch[:, 1:]
        # Where weights are sharded, FSDP has hooked `loss`, and with gradients would wait for a backward.
        evaluate = self.model.evaluation_loss if self.device_mesh is None else self.model.loss
        loss, correct = evaluate(batch[:, :-1], targets)
        self.mean_loss.update(loss, weight=targets.numel())
        self.accuracy.update(correct / targets.numel(), weight=targets.numel())

    def _log_evaluation(self, split: str) -> None:
        loss = self.mean_loss.compute()
        self.log_dict(
            {
                f"{split}_loss": loss,
                f"{split}_perplexity": loss.exp(),
                f"{split}_accuracy": self.accuracy.compute(),
            },
            prog_bar=split == "val",
            sync_dist=True,  # the same on all ranks already; Lightning warns without it
        )
        self.mean_loss.reset()
        self.accuracy.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Accumulate loss and accuracy over the validation split, every token counted once."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation figures."""
        self._log_evaluation("val")

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """Accumulate loss and accuracy over the test split."""
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        """Log the test figures."""
        self._log_evaluation("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, fused where the device has it, with the schedule stepped every optimizer step."""
        optimizer = build_adamw(self.model, self.optimizer_config, fused=self.trainer.precision != "16-mixed")

        return self.with_schedule(optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip under bf16 autocast too.

        Lightning refuses to clip for fused AdamW under any autocast, because fp16 gradients would still be
        scaled there; bf16 has no scaler.
        """
        if gradient_clip_val and self.trainer.precision == "bf16-mixed":
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the model's shape. (The data module adds the tokenizer, so one file is enough.)"""
        checkpoint[CHECKPOINT_KEY] = {
            "format": CHECKPOINT_FORMAT,
            "model": self.model.config.to_dict(),
            "optimizer": asdict(self.optimizer_config),
        }
