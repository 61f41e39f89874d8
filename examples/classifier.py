"""A plain Lightning classifier with the collector and the detector dropped in.

Run `python examples/classifier.py`; the report is runs/classifier/training_metrics_report.json. One batch of
the data has been spoilt on purpose: the detector warns of it, and it stands in the report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(LightningModule):
    """Three classes from sixteen numbers; nothing in it knows of the callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        x, y = batch
        return F.cross_entropy(self.layers(x), y)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the two figures that the report has room for."""
        x, y = batch
        logits = self.layers(x)
        self.log("val_loss", F.cross_entropy(logits, y))
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def data(count: int, seed: int) -> TensorDataset:
    """`count` labelled points, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 16, generator=generator)
    return TensorDataset(x, x[:, :3].argmax(1))


def main(arguments: Sequence[str]) -> None:
    """Train and say where the report is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/classifier"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    training = data(6400, seed=1)
    training.tensors[0][5120:5152] *= 100  # the 161st batch of each epoch
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=options.output_dir,
        callbacks=[TrainingMetricsCollector(sample_every_n_steps=10, csv=True), AnomalyDetector()],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(
        Classifier(),
        DataLoader(training, batch_size=32),
        DataLoader(data(640, seed=2), batch_size=64),
    )
    print(f"written: {options.output_dir / 'training_metrics_report.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
