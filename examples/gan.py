"""A GAN with manual optimisation: two optimizers that step in one batch make one step in the report.

Run `python examples/gan.py`; the report is runs/gan/training_metrics_report.json. The learning rate of the
generator is `learning_rate` there, and that of the critic `learning_rate_1`.
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


class Gan(LightningModule):
    """Learns to draw points of a circle."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 2))
        self.critic = nn.Sequential(nn.Linear(2, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One step of each; what is returned as `loss` is what the callbacks see."""
        generator, critic = self.optimizers()
        (real,) = batch
        fake = self.generator(torch.randn(len(real), 4, device=self.device))

        critic_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake.detach())).mean()
        critic.zero_grad()
        self.manual_backward(critic_loss)
        critic.step()

        generator_loss = F.softplus(-self.critic(fake)).mean()
        generator.zero_grad()
        self.manual_backward(generator_loss)
        generator.step()

        self.log("critic_loss", critic_loss)
        return {"loss": generator_loss}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The generator's and the critic's."""
        return [
            torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.9)),
            torch.optim.Adam(self.critic.parameters(), lr=2e-3, betas=(0.5, 0.9)),
        ]


def main(arguments: Sequence[str]) -> None:
    """Train and say where the report is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/gan"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    angles = 2 * torch.pi * torch.rand(3200)
    points = TensorDataset(torch.stack([angles.cos(), angles.sin()], 1))
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=options.output_dir,
        # A generator's loss may well rise while it learns: what counts here is whether it stays finite.
        callbacks=[
            TrainingMetricsCollector(sample_every_n_steps=10),
            AnomalyDetector({"divergence": "record", "loss_spike": "record", "non_finite": "stop"}),
        ],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Gan(), DataLoader(points, batch_size=32, shuffle=True))
    print(f"written: {options.output_dir / 'training_metrics_report.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
