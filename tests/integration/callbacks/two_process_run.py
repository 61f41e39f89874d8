"""Runs over two processes, started by test_callbacks_two_processes.py; each rank writes what it saw."""

import errno
import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from ryzen_callbacks import AnomalyDetector, Claim, OptimizationValidator, TrainingMetricsCollector
from tiny_run import Tiny, dataset
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader


class FaultOnOneRank(Tiny):
    """At the eleventh step the second rank's loss is NaN, and only its."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.global_step == 10 and self.global_rank == 1 else loss


class WorseOnOneRank(Tiny):
    """From the third epoch on the second rank's validation accuracy is lower; nothing is synchronised."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        worse = self.current_epoch > 1 and self.global_rank == 1
        self.log("val_accuracy", 0.5 if worse else 0.9, sync_dist=False)


class Sharded(FaultOnOneRank):
    """Its weights, gradients and optimizer states are shared out over the ranks (FSDP2)."""

    def configure_model(self) -> None:
        for layer in (self.layers[0], self.layers[2]):
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self, mesh=self.device_mesh["data_parallel"])

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Not Tiny's: it would look at this rank's part only."""


def fill_the_disk() -> None:
    """The first rank has no room for its third and fourth checkpoint, or its part of a sharded one."""

    def fails(save: Any) -> Any:
        @functools.wraps(save)
        def save_or_fail(self: Any, *args: Any, **kwargs: Any) -> Any:
            times[save] += 1
            if torch.distributed.get_rank() == 0 and times[save] in (3, 4):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return save(self, *args, **kwargs)

        return save_or_fail

    times: Counter[Any] = Counter()
    for owner, name in ((TorchCheckpointIO, "save_checkpoint"), (FileSystemWriter, "write_data")):
        setattr(owner, name, fails(getattr(owner, name)))


RUNS: dict[str, Any] = {
    "sharded": lambda: (Sharded(), {"non_finite": "rollback"}),
    "stop": lambda: (FaultOnOneRank(), {"non_finite": "stop"}),
    "rollback": lambda: (FaultOnOneRank(), {"non_finite": "rollback"}),
    "accuracy": lambda: (WorseOnOneRank(), {"accuracy_drop": "stop"}),
}


def main(folder: Path, name: str) -> None:
    torch.set_num_threads(1)
    kind = name.removesuffix(" on a full disk")
    if kind != name:
        fill_the_disk()
    module, actions = RUNS[kind]()
    claim = Claim(name="half", baseline=lambda: 2, optimized=lambda: 1, measure="bytes", threshold=2.0)
    strategy: Any = "ddp"
    if kind == "sharded":  # FSDPStrategy itself is for GPUs only
        strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
    detector = AnomalyDetector(actions, checkpoint_every_n_steps=3)
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        strategy=strategy,
        devices=2,
        log_every_n_steps=3,
        default_root_dir=folder,
        callbacks=[collector, detector, OptimizationValidator([claim])],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    data = DataLoader(dataset(), batch_size=4)
    trainer.fit(module, data, data)
    seen = {
        "losses": module.batch_losses,
        "steps": trainer.global_step,
        "anomalies": [(a.step, a.kind, a.value) for a in detector.anomalies],
        "rollbacks": detector.rollbacks,
        "weights": [
            (p.full_tensor() if isinstance(p, DTensor) else p).sum().item() for p in module.parameters()
        ],
    }
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
