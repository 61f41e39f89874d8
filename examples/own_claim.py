"""A project that claims something of its own, and has it measured at the end of its training.

The claims: answering 64 questions in one batch is at least 3 times as fast as one by one; in bfloat16 the
weights take half the bytes; and the loss is no more than 1% higher for it.

Run `python examples/own_claim.py`; the verdicts are printed and written to
runs/own_claim/validation_report.json.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from ryzen_callbacks import Claim, OptimizationValidator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Regressor(LightningModule):
    """Fits a curve; its method `optimization_claims` is what the validator looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 128), nn.Tanh(), nn.Linear(128, 1))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss."""
        x, y = batch
        return F.mse_loss(self.layers(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)

    def optimization_claims(self) -> list[Claim]:
        """Measured on the trained weights. The two arms of each claim do the same work."""
        questions = data(64, seed=3).tensors[0]
        small = copy.deepcopy(self.layers).to(torch.bfloat16)
        held_out = [data(64, seed=seed).tensors for seed in range(10, 22)]

        def losses(layers: nn.Module, dtype: torch.dtype) -> list[float]:
            with torch.no_grad():
                return [F.mse_loss(layers(x.to(dtype)).float(), y).item() for x, y in held_out]

        @torch.no_grad()
        def one_by_one() -> list[Tensor]:
            return [self.layers(question) for question in questions]

        @torch.no_grad()
        def in_one_batch() -> Tensor:
            return self.layers(questions)

        return [
            Claim(
                name="batched answers",
                baseline=one_by_one,
                optimized=in_one_batch,
                measure="time",
                threshold=3.0,
                baseline_name="one by one",
                optimized_name="in one batch",
            ),
            Claim(
                name="bfloat16 weights",
                baseline=lambda: _bytes(self.layers),
                optimized=lambda: _bytes(small),
                measure="bytes",
                quantity="saving",
                threshold=0.5,
            ),
            Claim(
                name="bfloat16 loss",
                baseline=lambda: losses(self.layers, torch.float32),
                optimized=lambda: losses(small, torch.bfloat16),
                measure="loss",
                threshold=0.01,
            ),
        ]


def data(count: int, seed: int) -> TensorDataset:
    """`count` points of a noisy curve, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    y = torch.sin(x.sum(1, keepdim=True)) + 0.3 * torch.randn(count, 1, generator=generator)
    return TensorDataset(x, y)


def main(arguments: Sequence[str]) -> None:
    """Train, measure, print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/own_claim"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    validator = OptimizationValidator()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        default_root_dir=options.output_dir,
        callbacks=[validator],
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Regressor(), DataLoader(data(6400, seed=1), batch_size=64))
    assert validator.report is not None
    for result in validator.report.results:
        print(f"{result.status:12} {result.name}: {result.message}")
    print(f"written: {options.output_dir / 'validation_report.json'}")


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


if __name__ == "__main__":
    main(sys.argv[1:])
