"""What the collector reports of a real run is what happened in it."""

import csv
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from ryzen_callbacks import (
    AnomalyDetector,
    OptimizationValidator,
    TrainingMetricsCollector,
    TrainingMetricsReport,
)
from ryzen_callbacks.metrics_log import EPOCH_FIELDS
from ryzen_callbacks.step_callback import StepCallback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import Tiny

NAME = "training_metrics_report.json"


def read(path: Path) -> TrainingMetricsReport:
    return TrainingMetricsReport.model_validate(json.loads(path.read_text()))


def test_loss_gradient_norm_and_rate_are_the_modules_own_with_accumulation(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """16 batches an epoch, 3 to a step: five full steps and one of a single batch; clipping comes after."""
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    trainer = make_trainer(callbacks=[collector], accumulate_grad_batches=3, gradient_clip_val=1e-3)
    trainer.fit(tiny, make_loader(), make_loader(16))
    report = read(tmp_path / NAME)

    def groups(losses: list[float]) -> Iterator[float]:
        for start in (0, 16):
            for first in range(start, start + 16, 3):
                yield statistics.fmean(losses[first : min(first + 3, start + 16)])

    expected = list(groups(tiny.batch_losses))
    assert [b["step"] for b in report.batches] == list(range(1, 13))
    assert [b["loss"] for b in report.batches] == pytest.approx(expected, rel=1e-6)
    assert [b["grad_norm"] for b in report.batches] == pytest.approx(tiny.gradient_norms, rel=1e-5)
    assert [b["learning_rate"] for b in report.batches] == pytest.approx(tiny.rates)
    assert [b["tokens"] for b in report.batches] == [96] * 5 + [32] + [96] * 5 + [32]
    assert report.epochs[0].train_loss == pytest.approx(statistics.fmean(expected[:6]))
    assert report.epochs[1].val_loss == pytest.approx(float(trainer.callback_metrics["val_loss"]))
    assert report.epochs[1].accuracy == pytest.approx(float(trainer.callback_metrics["val_accuracy"]))
    assert [row.compression_ratio for row in report.epochs] == [2.5, 2.5]
    assert report.metadata.status == "finished"
    assert report.metadata.model == "Tiny"


def test_the_first_step_of_each_epoch_is_not_timed_and_the_others_are(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[TrainingMetricsCollector(sample_every_n_steps=1)], val_check_interval=8)
    trainer.fit(tiny, make_loader(), make_loader(16))
    report = read(tmp_path / NAME)
    untimed = [b["step"] for b in report.batches if "step_time_s" not in b]
    assert untimed == [1, 9, 17, 25]
    for row, steps in zip(report.epochs, (report.batches[:16], report.batches[16:]), strict=True):
        timed = [b for b in steps if "step_time_s" in b]
        seconds = sum(b["step_time_s"] or 0 for b in timed)
        assert row.tokens_per_second == pytest.approx(sum(b["tokens"] or 0 for b in timed) / seconds)
        for b in timed:
            assert 0 < (b["data_wait_s"] or 0) < (b["step_time_s"] or 0)


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_every_statistic_can_be_computed_again_from_the_tensorboard_log(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path, prefix: str
) -> None:
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    tag = f"{prefix}-train/" if prefix else "train/"
    make_trainer(callbacks=[TrainingMetricsCollector()], logger=logger).fit(
        tiny, make_loader(), make_loader(8)
    )
    report = read(Path(logger.log_dir) / NAME)
    events = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0}).Reload()
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "step_time_s"} <= set(
        report.statistics
    )
    for name, reported in report.statistics.items():
        values = [event.value for event in events.Scalars(tag + name)]
        assert reported.count == len(values)
        assert reported.mean == pytest.approx(statistics.fmean(values), rel=1e-6)
        assert reported.std == pytest.approx(statistics.stdev(values), rel=1e-3, abs=1e-7)
        assert (reported.min, reported.max) == pytest.approx((min(values), max(values)), rel=1e-6)
        assert (reported.first, reported.last) == pytest.approx((values[0], values[-1]), rel=1e-6)
    assert [e.step for e in events.Scalars(tag + "loss")] == list(range(1, 33))


def test_a_run_that_ends_inside_an_epoch_has_a_row_for_it(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=[TrainingMetricsCollector()], max_steps=20).fit(tiny, make_loader())
    first, second = read(tmp_path / NAME).epochs
    assert (first.step, second.step) == (16, 20)
    assert second.train_loss == pytest.approx(statistics.fmean(tiny.batch_losses[16:20]), rel=1e-6)
    assert set(second.not_measured) == {n for n in EPOCH_FIELDS if getattr(second, n) is None}
    assert "val_loss" in second.not_measured


class Fails(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.at:
            raise RuntimeError("planted")


def test_a_run_that_fails_has_its_report_up_to_the_last_step(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[TrainingMetricsCollector(sample_every_n_steps=1), Fails(at=8)])
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(tiny, make_loader())
    report = read(tmp_path / NAME)
    assert report.metadata.status == "failed"
    assert [b["loss"] for b in report.batches] == pytest.approx(tiny.batch_losses, rel=1e-6)
    assert len(report.batches) == 8
    assert report.epochs[0].train_loss == pytest.approx(statistics.fmean(tiny.batch_losses), rel=1e-6)


def test_what_validation_left_behind_is_not_taken_for_a_training_metric(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=[TrainingMetricsCollector()], check_val_every_n_epoch=2, max_epochs=3).fit(
        tiny, make_loader(), make_loader(8)
    )
    report = read(tmp_path / NAME)
    assert "val_loss" not in report.statistics
    assert [row.val_loss is None for row in report.epochs] == [True, False, True]


def test_the_sampled_steps_as_csv_beside_the_report(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    collector = TrainingMetricsCollector(csv=True, sample_every_n_steps=8)
    make_trainer(callbacks=[collector]).fit(tiny, make_loader())
    with (tmp_path / NAME).with_suffix(".csv").open() as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    assert [row["step"] for row in rows] == [8, 16, 24, 32]
    assert rows == read(tmp_path / NAME).batches


def test_mfu_is_flops_over_the_peak(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ryzen_callbacks.collector.peak_flops", lambda device, precision: 1e6)
    collector = TrainingMetricsCollector(sample_every_n_steps=1, flops_per_token=50.0)
    make_trainer(callbacks=[collector]).fit(tiny, make_loader())
    timed = [b for b in read(tmp_path / NAME).batches if "mfu" in b]
    assert len(timed) == 30
    for b in timed:
        assert b["mfu"] == pytest.approx(50.0 * (b["tokens_per_second"] or 0) / 1e6)


def test_without_a_known_peak_there_is_no_mfu(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=[TrainingMetricsCollector(flops_per_token=50.0)]).fit(tiny, make_loader())
    assert "mfu" not in read(tmp_path / NAME).statistics


def test_a_report_that_cannot_be_written_stops_the_run_before_training(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    trainer = make_trainer(callbacks=[TrainingMetricsCollector(tmp_path / "file" / "r.json")])
    with pytest.raises(ValueError, match=r"cannot write r\.json"):
        trainer.fit(tiny, make_loader())
    assert tiny.batch_losses == []


def test_between_drains_nothing_is_read_from_the_device(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every read made below the three callbacks' hooks: one transfer for each drain, and no other."""
    reads: list[tuple[str, int]] = []
    depth = [0]

    def watched(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            depth[0] += 1
            try:
                return hook(*args, **kwargs)
            finally:
                depth[0] -= 1

        return run

    for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        monkeypatch.setattr(StepCallback, name, watched(getattr(StepCallback, name)))
    callbacks = [TrainingMetricsCollector(), AnomalyDetector(), OptimizationValidator()]
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(t: torch.Tensor, *a: Any, name: str = name, original: Any = original, **k: Any) -> Any:
            if depth[0]:
                reads.append((name, tiny.trainer.global_step))
            return original(t, *a, **k)

        monkeypatch.setattr(torch.Tensor, name, spy)
    make_trainer(callbacks=callbacks, max_epochs=1, log_every_n_steps=4).fit(tiny, make_loader())
    assert reads == [("tolist", 4), ("tolist", 8), ("tolist", 12), ("tolist", 16)]
