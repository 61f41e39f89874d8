"""What this run's training step gains over the naive baseline, measured while it trains."""

from __future__ import annotations

import copy
import time
import warnings
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from ryzen_callbacks.paired import measure_pair
from torch import Tensor

from ryzen_llm.kernels import PLAIN
from ryzen_llm.training import LanguageModule

_ROUNDS = 2
_LARGEST_SHARE = 0.05


class SpeedBursts(Callback):
    """Logs `speedup` at the ends of epochs, where the collector takes it up.

    `speedup` is the time of forward and backward of the epoch's last batch in eager fp32 with all logits at
    once, over that in this run's own recipe, both with the weights as they are: two paired rounds, too few
    for an interval (the claims have one). It changes neither weights, gradients nor random numbers. An epoch
    is left out where the bursts would take more than 5% of the time since training began. Nothing is logged
    with several processes.
    """

    def __init__(self) -> None:
        self._batch: Tensor | None = None
        self._started = 0.0
        self._spent = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._started, self._spent = time.perf_counter(), 0.0

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the batch."""
        self._batch = batch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and log."""
        # With several processes each has a part of the work only.
        if not isinstance(pl_module, LanguageModule) or trainer.world_size > 1:
            return
        started = time.perf_counter()
        affordable = self._spent <= _LARGEST_SHARE * (started - self._started)
        if self._batch is None or not affordable:
            return
        try:
            pl_module.log("speedup", _measure(trainer, pl_module, self._batch))
        except torch.OutOfMemoryError:
            warnings.warn("speedup is not measured: the naive baseline does not fit in memory", stacklevel=2)
        self._batch = None
        self._spent += time.perf_counter() - started


def _measure(trainer: Trainer, module: LanguageModule, batch: Tensor) -> float:
    inputs, targets = batch[:, :-1], batch[:, 1:]
    parameters = list(module.parameters())

    # A copy is not compiled. To switch the model itself to plain ops and back would have it compiled anew.
    plain = copy.deepcopy(module.model)
    plain.use_kernels(PLAIN)

    def naive() -> None:
        with torch.autocast(batch.device.type, enabled=False):
            loss, _ = plain.loss(inputs, targets)
        torch.autograd.grad(loss, list(plain.parameters()), allow_unused=True)

    def ours() -> None:
        with trainer.precision_plugin.forward_context():
            loss, _ = module.model.loss(inputs, targets)
        torch.autograd.grad(loss, parameters, allow_unused=True)

    return measure_pair(naive, ours, _ROUNDS).speedup().value
