"""Healing: training a compressed embedding and the last norm until the model predicts as before."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.utils.data import DataLoader

from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import Embedding
from ryzen_llm.training.embedding_calibration import check_text, with_embedding
from ryzen_llm.training.optimizer import OptimizerConfig, ScheduledModule


class HealingModule(ScheduledModule):
    """Distils a dense model into the same blocks around another embedding (Hinton et al. 2015).

    Only the embedding and the last norm are trained; the blocks are shared with the teacher, and `heal`
    freezes them. Batches are token ids (batch, time) int64. Logs `loss`, the mean divergence from the teacher
    in nats.

    Args:
        teacher: The dense model.
        embedding: Of a kind that is trained, in its form to be trained.
        optimizer: AdamW's settings and the schedule.
    """

    def __init__(self, teacher: Transformer, embedding: Embedding, optimizer: OptimizerConfig) -> None:
        super().__init__()
        # Not a submodule: it is neither trained nor saved.
        self._teacher = [teacher]
        self.model = with_embedding(teacher, embedding)
        self.model.norm = copy.deepcopy(teacher.norm)
        self.optimizer_config = optimizer
        if not any(p.requires_grad for p in embedding.parameters()):
            raise InputError(f"this {embedding.kind} embedding has nothing to train: give its trainable form")

    def on_fit_start(self) -> None:
        """The teacher goes where Lightning has put the blocks that both share."""
        self._teacher[0].to(self.device)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Mean KL divergence of the student's from the teacher's predictions, fp32."""
        with torch.no_grad():
            teacher = self._teacher[0]
            expected = teacher.logits(teacher.hidden_states(batch)).float().flatten(0, 1).log_softmax(-1)
        logits = self.model.logits(self.model.hidden_states(batch)).float().flatten(0, 1)
        loss = F.kl_div(logits.log_softmax(-1), expected, log_target=True, reduction="batchmean")
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def tokens_in_batch(self, batch: Tensor) -> int:
        """For `TrainingMetricsCollector`."""
        return batch.numel()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW without decay (the codes' places are no weights to keep small), with the schedule."""
        trained = [p for p in (*self.model.embedding.parameters(), self.model.norm.weight) if p.requires_grad]
        config = self.optimizer_config
        optimizer = torch.optim.AdamW(
            trained,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=0.0,
            fused=True,
        )
        return self.with_schedule(optimizer)


def heal(
    teacher: Transformer,
    embedding: Embedding,
    text: Tensor,
    *,
    steps: int,
    batch_size: int = 2,
    learning_rate: float = 2e-4,
    callbacks: list[Callback] | None = None,
    **trainer: Any,
) -> Transformer:
    """The model with `embedding`, healed for `steps` optimizer steps on `text` and packed.

    `text` is token ids (rows, time) int64, of which batches are drawn. `callbacks` and `trainer` go to
    Lightning's Trainer. Raises InputError for text that cannot work and fewer than one step.
    """
    check_text(text, teacher.config.vocab_size, "text to heal on")
    if steps < 1 or batch_size < 1:
        raise InputError(f"steps is {steps} and batch_size {batch_size}, expected 1 or more")
    module = HealingModule(teacher, embedding, OptimizerConfig(learning_rate=learning_rate))
    order = torch.Generator().manual_seed(0)
    sampler = torch.utils.data.RandomSampler(
        range(len(text)), replacement=True, num_samples=steps * batch_size, generator=order
    )
    loader: DataLoader[Tensor] = DataLoader(text, batch_size, sampler=sampler)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "accelerator": "auto",
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    trained = [p.requires_grad for p in teacher.blocks.parameters()]
    device = teacher.norm.weight.device
    try:
        teacher.blocks.requires_grad_(False)
        pl.Trainer(max_steps=steps, max_epochs=-1, callbacks=callbacks, **settings | trainer).fit(
            module, loader
        )
    finally:  # the blocks are the caller's
        teacher.to(device)
        for parameter, before in zip(teacher.blocks.parameters(), trained, strict=True):
            parameter.requires_grad_(before)
    healed = with_embedding(teacher, module.model.embedding.compressed().to(torch.bfloat16))
    healed.norm = module.model.norm.to(device)
    return healed.eval()
