"""What the callbacks cost: steps of a Trainer with them, without them, and with other projects' callbacks."""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import DeviceStatsMonitor
from lightning.pytorch.callbacks.throughput_monitor import ThroughputMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ryzen_callbacks import (
    AnomalyDetector,
    OptimizationValidator,
    TrainingMetricsCollector,
    describe_environment,
    write_json,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.side_by_side import interleaved, speedup
from benchmarks.spike_rules import KillLossSpike, SixSigma, SpikeDetection

OFF, CONTROL, OURS = "no callback", "no callback, again", "all three"
WIDTH = 256
BLOCK = 50
"""Steps that are timed together: as many as Lightning's log interval, so that each block has one drain."""


class PublishedRules(Callback):
    """The published spike rules as their projects run them: the loss read at every batch."""

    def __init__(self) -> None:
        self._rules = (KillLossSpike(), SpikeDetection(), SixSigma())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Judge the batch."""
        loss = outputs["loss"].item()
        for rule in self._rules:
            rule.flags(loss, None)


ARMS: dict[str, Callable[[], list[Callback]]] = {
    OFF: list,
    OURS: lambda: [TrainingMetricsCollector(), AnomalyDetector(), OptimizationValidator()],
    "TrainingMetricsCollector": lambda: [TrainingMetricsCollector()],
    "AnomalyDetector": lambda: [AnomalyDetector()],
    "ThroughputMonitor (Lightning)": lambda: [ThroughputMonitor(batch_size_fn=lambda batch: len(batch[0]))],
    "published spike rules": lambda: [PublishedRules()],
    CONTROL: list,
}
if find_spec("psutil") is not None:
    ARMS["DeviceStatsMonitor (Lightning)"] = lambda: [DeviceStatsMonitor(cpu_stats=True)]


class Classifier(LightningModule):
    """A plain classifier that notes when a block of steps begins; set-up and final reports are in none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)
        )
        self.marks: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss; the first block starts with the second batch."""
        if batch_idx % BLOCK == 1:
            self.marks.append(time.perf_counter())
        return F.cross_entropy(self.layers(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(arguments: list[str]) -> None:
    """Train with each set of callbacks in interleaved rounds; print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmark.py callbacks", description=__doc__)
    parser.add_argument(
        "--step-ms", type=float, default=5.0, help="aimed at by the batch's size (default: 5)"
    )
    parser.add_argument("--blocks", type=int, default=3, help=f"of {BLOCK} steps in each run (default: 3)")
    parser.add_argument("--rounds", type=int, default=30, help="runs of each arm (default: 30)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/callbacks.json"))
    options = parser.parse_args(arguments)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    console = Console()

    if find_spec("psutil") is None:
        console.print("DeviceStatsMonitor is left out: it needs psutil, which is not installed")
    torch.set_num_threads(1)  # the other core is for the loggers' threads, in every arm
    batch = _batch_size(options.step_ms / 1000)
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        for build in ARMS.values():
            _seconds_of_a_step(build(), batch, 1, folder)
        plan = list(interleaved(list(ARMS), options.rounds))
        for name in track(plan, "measuring", console=console, transient=True):
            times[name].append(_seconds_of_a_step(ARMS[name](), batch, options.blocks, folder))

    table = Table(
        title=f"{options.rounds} rounds; a batch of {batch} on {torch.get_num_threads()} thread",
        box=box.SIMPLE,
    )
    for heading in ("callbacks", "ms a step", "times none", "us more"):
        table.add_column(heading, justify="left" if heading == "callbacks" else "right", no_wrap=True)
    rows = []
    for name, seconds in times.items():
        against = speedup(times, name, OFF)
        more = statistics.median(a - b for a, b in zip(seconds, times[OFF], strict=True))
        rows.append(
            {
                "callbacks": name,
                "step_seconds": statistics.median(seconds),
                "time_against_none": None if name == OFF else vars(against),
                "more_seconds_a_step": None if name == OFF else more,
                "seconds": seconds,
            }
        )
        figures = ("", "") if name == OFF else (str(against), f"{1e6 * more:.0f}")
        table.add_row(name, f"{1e3 * statistics.median(seconds):.3f}", *figures)
    console.print(table)
    write_json(
        options.out,
        {
            "benchmark": "callbacks",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": {
                "step_seconds_aimed_at": options.step_ms / 1000,
                "batch": batch,
                "parameters": sum(p.numel() for p in Classifier().parameters()),
                "steps_in_a_block": BLOCK,
                "blocks_in_a_run": options.blocks,
                "rounds": options.rounds,
                "log_every_n_steps": BLOCK,
                "logger": "TensorBoardLogger in every arm",
            },
            "arms": rows,
            "environment": describe_environment(),
        },
    )
    console.print(f"written: {options.out}")


def _batch_size(seconds: float) -> int:
    """Rows in a batch for which a step takes about `seconds`."""
    batch = 64
    for _ in range(4):
        with tempfile.TemporaryDirectory() as folder:
            batch = max(8, round(batch * seconds / _seconds_of_a_step([], batch, 2, folder)))
    return batch


def _seconds_of_a_step(callbacks: list[Callback], batch: int, blocks: int, folder: str) -> float:
    """The median of the blocks of one run: a burst of other work on the machine spoils one of them."""
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(
        torch.randn(batch, WIDTH, generator=generator), torch.randint(10, (batch,), generator=generator)
    )
    batches = [data[:]] * (BLOCK * blocks + 2)
    module = Classifier()
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(folder),
        callbacks=callbacks,
        log_every_n_steps=BLOCK,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    return statistics.median(b - a for a, b in itertools.pairwise(module.marks)) / BLOCK
