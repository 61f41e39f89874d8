"""AdamW with decay groups, the two learning-rate schedules, and the base of modules that follow them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn

from ryzen_llm.errors import InputError


@dataclass(frozen=True)
class OptimizerConfig:
    """How the model is optimised.

    Args:
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay of matrices; norms and biases are not decayed.
        beta1: Decay of AdamW's first moment.
        beta2: Decay of AdamW's second moment.
        schedule: After the warm-up, ``cosine`` decays over the rest of the run; ``wsd`` (warm-up, stable,
            decay) holds the peak and decays linearly over the last `decay_fraction` of it.
        warmup_fraction: Part of all steps over which the learning rate rises linearly from zero.
        decay_fraction: Part of all steps over which ``wsd`` decays.
        final_fraction: Learning rate of the last step, as a fraction of the peak.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_fraction: float = 0.05
    decay_fraction: float = 0.2
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"optimizer.learning_rate must be a positive number, got {self.learning_rate}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"optimizer.weight_decay must be zero or positive, got {self.weight_decay}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} must be in [0, 1), got {getattr(self, name)}")
        for name in ("warmup_fraction", "decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"optimizer.{name} must be between 0 and 1, got {getattr(self, name)}")
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise InputError(
                "optimizer.warmup_fraction + optimizer.decay_fraction must not exceed 1 with schedule wsd, "
                f"got {self.warmup_fraction} + {self.decay_fraction}"
            )

    def factor(self, step: int, total_steps: int) -> float:
        """Learning rate of optimizer step `step` (from 0) of `total_steps`, as a fraction of the peak."""
        warmup = round(self.warmup_fraction * total_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        decay = round(self.decay_fraction * total_steps) if self.schedule == "wsd" else total_steps - warmup
        progress = min(max((step - (total_steps - decay)) / max(decay - 1, 1), 0.0), 1.0)
        remaining = 1 - progress if self.schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.final_fraction + (1 - self.final_fraction) * remaining


def build_adamw(model: nn.Module, config: OptimizerConfig, fused: bool = True) -> torch.optim.AdamW:
    """AdamW over two groups: matrices are decayed, vectors (norm weights, biases) are not.

    Not `fused` it is PyTorch's default, which on a GPU updates many weights at once.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=fused or None,  # with False it would update one weight after the other, whatever the device
    )


class ScheduledModule(LightningModule):
    """Base of modules whose learning rate follows `optimizer_config`, step by step over the whole run."""

    optimizer_config: OptimizerConfig

    def with_schedule(self, optimizer: torch.optim.Optimizer) -> OptimizerLRScheduler:
        """What `configure_optimizers` returns."""

        def factor(step: int) -> float:
            # The scheduler asks for step 0 at once. Asking Lightning for the total so early would make it
            # forget to restore the loader's place when it resumes: `on_train_start` sets that step's.
            return self._factor(step) if step else 0.0

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Set the first step's learning rate, also of a resumed run, whose schedule may be another one."""
        for scheduled in self.trainer.lr_scheduler_configs:
            schedule = scheduled.scheduler
            for group, peak in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = peak * self._factor(self.trainer.global_step)

    def _factor(self, step: int) -> float:
        total_steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(total_steps):
            raise InputError(
                "the learning rate's schedule ends with the run, which has no end: set trainer.max_steps or "
                "trainer.max_epochs"
            )
        return self.optimizer_config.factor(step, int(total_steps))
