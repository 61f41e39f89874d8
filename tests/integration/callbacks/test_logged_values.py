"""What the module logs itself: where it goes, and what it is not taken for."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from ryzen_callbacks import (
    TrainingMetricsCollector,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import Tiny, read

NAME = "training_metrics_report.json"
RESERVED = (
    *("step", "loss", "learning_rate", "grad_norm", "samples", "step_time_s", "data_wait_s"),
    *("tokens", "tokens_per_second", "samples_per_second", "memory_bytes", "mfu"),
)


class LogsReserved(Tiny):
    """Logs figures of its own under every name that the collector measures something under."""

    tokens_in_batch = None  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        for name in RESERVED:
            self.log(name, -1.0)
        self.log("mine", -1.0)
        return super().training_step(batch, batch_idx)


def test_what_the_module_logs_is_not_taken_for_what_is_measured(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """Not even at a step that has no such value: the tokens here, and at an epoch's first step the times."""
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    make_trainer(callbacks=[collector], log_every_n_steps=1, max_epochs=1).fit(LogsReserved(), make_loader())
    report = read(tmp_path / NAME)
    assert [b["step"] for b in report.batches] == list(range(1, 17))
    for batch in report.batches:
        assert batch.pop("mine") == -1.0
        assert -1.0 not in batch.values()
    assert not {"step", "tokens", "tokens_per_second", "mfu"} & set(report.statistics)


class LogsNowAndThen(Tiny):
    """Logs one figure once and another in every fifth batch: in those of the steps 1, 6, 11 and 16."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 1:
            self.log("once", 7.0)
        if batch_idx % 5 == 0:
            self.log("fifth", batch_idx, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


def test_what_the_module_logs_now_and_then_is_not_repeated(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """At a log interval there is what was logged since the one before."""
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    make_trainer(callbacks=[collector], max_epochs=1).fit(LogsNowAndThen(), make_loader())
    steps = {b["step"]: b for b in collector.report().batches}
    assert {step: b["once"] for step, b in steps.items() if "once" in b} == {3: 7.0}
    assert {step: b["fifth"] for step, b in steps.items() if "fifth" in b} == {3: 0.0, 6: 5.0, 12: 10.0}
    assert "fifth_step" not in collector.statistics()


class LogsItsLoss(Tiny):
    """Sends figures under two of the collector's names to the loggers, and keeps a third from them."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("train/loss", -1.0)
        self.log("train/grad_norm", -1.0, on_step=False, on_epoch=True)
        self.log("train/samples", -1.0, logger=False)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_a_curve_that_the_module_draws_itself_is_its_own(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path, prefix: str
) -> None:
    logger, other = TensorBoardLogger(tmp_path, prefix=prefix), CSVLogger(tmp_path)
    collector = TrainingMetricsCollector()
    make_trainer(callbacks=[collector], logger=[logger, other], max_epochs=1).fit(
        LogsItsLoss(), make_loader()
    )
    events = EventAccumulator(logger.log_dir).Reload()
    with (Path(other.log_dir) / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, points in (("loss", 5), ("grad_norm", 1)):
        values = [
            event.value for event in events.Scalars(f"{prefix}-train/{name}" if prefix else f"train/{name}")
        ]
        assert values == [-1.0] * points
        assert {float(row[f"train/{name}"]) for row in rows if row[f"train/{name}"]} == {-1.0}
        assert collector.statistics()[name].min > 0
        assert collector.statistics()[name].count == 16
    assert [float(row["train/samples"]) for row in rows if row["train/samples"]] == [4.0] * 16


class LogsLate(Tiny):
    """Logs its figures when an epoch is over, the speed-up only of every second one."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch)

    def on_train_epoch_end(self) -> None:
        self.log("compression_ratio", float(self.current_epoch + 1))
        if self.current_epoch % 2 == 0:
            self.log("speedup", 3.0 + self.current_epoch)


@pytest.mark.parametrize("resumed", [False, True])
def test_figures_that_the_module_logs_at_the_end_of_an_epoch_are_in_its_row(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path, resumed: bool
) -> None:
    """The module's own hook is called after the callbacks', but before a checkpoint is written."""

    def fit(epochs: int, **settings: Any) -> None:
        saver = ModelCheckpoint(tmp_path, filename="c")
        trainer = make_trainer(
            callbacks=[TrainingMetricsCollector(), saver], max_epochs=epochs, enable_checkpointing=True
        )
        trainer.fit(LogsLate(), make_loader(), **settings)

    if resumed:
        fit(2)
    fit(4, ckpt_path=tmp_path / "c.ckpt" if resumed else None)
    rows = read(tmp_path / NAME).epochs
    assert [row.compression_ratio for row in rows] == [1.0, 2.0, 3.0, 4.0]
    assert [row.speedup for row in rows] == [3.0, None, 5.0, None]


def test_what_validation_left_behind_is_not_taken_for_a_training_metric(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=[TrainingMetricsCollector()], check_val_every_n_epoch=2, max_epochs=3).fit(
        tiny, make_loader(), make_loader(8)
    )
    report = read(tmp_path / NAME)
    assert "val_loss" not in report.statistics
    assert [row.val_loss is None for row in report.epochs] == [True, False, True]
