"""What the collector reports of a real run is what happened in it."""

import csv
import errno
import os
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
)
from ryzen_callbacks.metrics_log import EPOCH_FIELDS
from ryzen_callbacks.step_callback import StepCallback
from ryzen_callbacks.step_recorder import StepRecorder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import Tiny, read

NAME = "training_metrics_report.json"


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


class FailsInTest(Tiny):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        raise RuntimeError("planted")


@pytest.mark.parametrize("process", ["same", "another"])
@pytest.mark.parametrize("fault", ["test", "missing checkpoint"])
def test_a_finished_runs_report_outlives_what_goes_wrong_later(
    process: str,
    fault: str,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """In a test after the fit or in a fit that does not begin, with the collector of the run or a new one."""
    path = tmp_path / "r.json"
    trainer, module = make_trainer(callbacks=[TrainingMetricsCollector(path)], max_epochs=1), FailsInTest()
    trainer.fit(module, make_loader())
    finished = path.read_text()
    assert read(path).metadata.status == "finished"
    if process == "another":
        trainer = make_trainer(callbacks=[TrainingMetricsCollector(path)])
    if fault == "test":
        with pytest.raises(RuntimeError, match="planted"):
            trainer.test(module, make_loader(8), verbose=False)
    else:
        with pytest.raises(FileNotFoundError):
            trainer.fit(module, make_loader(), ckpt_path=tmp_path / "missing.ckpt")
    assert path.read_text() == finished


class FailsAtTheEnd(Callback):
    def on_train_end(self, trainer: Any, module: Any) -> None:
        raise RuntimeError("planted")


def test_a_fit_that_fails_after_its_last_step_has_failed(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=[TrainingMetricsCollector(), FailsAtTheEnd()], max_epochs=1)
    with pytest.raises(RuntimeError, match="planted"):
        trainer.fit(tiny, make_loader())
    assert read(tmp_path / NAME).metadata.status == "failed"


class ReadsTheReport(Callback):
    """Remembers what the report said of the run before each batch, if there is one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[tuple[str, str | None]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if self.path.exists():
            metadata = read(self.path).metadata
            self.seen.append((metadata.status, metadata.finished_at))


def test_a_run_that_goes_on_in_a_second_fit_is_not_finished_meanwhile(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    reader = ReadsTheReport(tmp_path / NAME)
    collector = TrainingMetricsCollector(write_every_n_steps=1)
    trainer = make_trainer(callbacks=[collector, reader], max_epochs=1, log_every_n_steps=1)
    trainer.fit(tiny, make_loader())
    assert read(tmp_path / NAME).metadata.finished_at is not None
    reader.seen.clear()
    trainer.fit_loop.max_epochs = 2
    trainer.fit(tiny, make_loader())
    assert set(reader.seen[1:]) == {("running", None)}
    assert read(tmp_path / NAME).metadata.status == "finished"


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the disk that reports go to is full, to be set by the test."""
    full = [False]
    fsync = os.fsync

    def flush(descriptor: int) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr("ryzen_callbacks.atomic_file.os.fsync", flush)
    return full


class FillsTheDisk(Callback):
    """From one batch to another."""

    def __init__(self, full: list[bool], first: int, last: int) -> None:
        self.full, self.first, self.last = full, first, last

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.full[0] = self.first <= batch_idx < self.last


def test_a_disk_that_is_full_for_a_while_costs_no_more_than_a_report(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    full_disk: list[bool],
) -> None:
    callbacks = [TrainingMetricsCollector(write_every_n_steps=3), FillsTheDisk(full_disk, 4, 8)]
    with pytest.warns(UserWarning, match="report was not written.*No space left"):
        make_trainer(callbacks=callbacks, max_epochs=1).fit(tiny, make_loader())
    report = read(tmp_path / NAME)
    assert (report.metadata.status, report.statistics["loss"].count) == ("finished", 16)


def test_a_full_disk_does_not_hide_what_ended_the_run(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], full_disk: list[bool]
) -> None:
    callbacks = [TrainingMetricsCollector(), FillsTheDisk(full_disk, 4, 99), Fails(at=8)]
    with (
        pytest.warns(UserWarning, match="report was not written"),
        pytest.raises(RuntimeError, match="planted"),
    ):
        make_trainer(callbacks=callbacks).fit(tiny, make_loader())


def test_a_report_missing_at_the_end_is_an_error(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], full_disk: list[bool]
) -> None:
    """Whoever looks for it then finds another run's, or none."""
    callbacks = [TrainingMetricsCollector(), FillsTheDisk(full_disk, 4, 99)]
    with (
        pytest.warns(UserWarning, match="report was not written"),
        pytest.raises(OSError, match="No space left"),
    ):
        make_trainer(callbacks=callbacks).fit(tiny, make_loader())


class ValidatesNowAndThen(Tiny):
    """Logs nothing in every second validation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch % 2 == 0:
            super().validation_step(batch, batch_idx)


def test_a_validation_that_logs_nothing_does_not_repeat_the_one_before(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=[TrainingMetricsCollector()], max_epochs=4).fit(
        ValidatesNowAndThen(), make_loader(), make_loader(8)
    )
    rows = read(tmp_path / NAME).epochs
    assert [(row.val_loss is None, row.accuracy is None) for row in rows] == [(False,) * 2, (True,) * 2] * 2
    assert rows[1].not_measured["val_loss"] == "the module logged no 'val_loss' in validation"
    assert rows[1].not_measured["accuracy"] == "the module logged no 'val_accuracy' in validation"


def test_two_collectors_have_a_report_and_a_state_each_and_log_once(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    def collectors() -> list[TrainingMetricsCollector]:
        return [
            TrainingMetricsCollector(tmp_path / "a.json", sample_every_n_steps=1),
            TrainingMetricsCollector(tmp_path / "b.json", sample_every_n_steps=8, name="coarse"),
        ]

    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(callbacks=collectors(), logger=logger, max_epochs=1)
    trainer.fit(Tiny(), make_loader())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    points = EventAccumulator(logger.log_dir).Reload().Scalars("train/loss")
    assert [point.step for point in points] == list(range(1, 17))
    trainer = make_trainer(callbacks=collectors())
    trainer.fit(Tiny(), make_loader(), ckpt_path=tmp_path / "c.ckpt")
    fine, coarse = (read(tmp_path / name).batches for name in ("a.json", "b.json"))
    assert [b["step"] for b in fine] == list(range(1, 33))
    assert [b["step"] for b in coarse] == [8, 16, 24, 32]
    assert [b["loss"] for b in coarse] == [b["loss"] for b in fine[7::8]]


def test_two_collectors_with_one_report_are_refused_before_training(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    trainer = make_trainer(callbacks=[TrainingMetricsCollector(), TrainingMetricsCollector(name="b")])
    with pytest.raises(ValueError, match=f"both report to .*{NAME}; give each a path"):
        trainer.fit(tiny, make_loader())
    assert tiny.batch_losses == []


@pytest.mark.parametrize("count", [torch.tensor(7), 7.0, True])
def test_tokens_may_be_whatever_can_be_read_as_a_number(
    count: Any,
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
) -> None:
    collector = TrainingMetricsCollector(sample_every_n_steps=1, tokens_in_batch=lambda batch: count)
    make_trainer(callbacks=[collector], max_epochs=1, accumulate_grad_batches=2).fit(tiny, make_loader())
    assert [b["tokens"] for b in read(tmp_path / NAME).batches] == [2 * int(count)] * 8


@pytest.mark.parametrize("count", [[7], torch.tensor([3, 4]), "seven", float("nan")], ids=str)
def test_tokens_that_are_no_number_are_an_error_that_names_them(
    count: Any, tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """At the first batch, not when the values are handed out."""
    collector = TrainingMetricsCollector(tokens_in_batch=lambda batch: count)
    with pytest.raises(TypeError, match="tokens_in_batch returned no number but a "):
        make_trainer(callbacks=[collector]).fit(tiny, make_loader())
    assert len(tiny.batch_losses) == 1


def test_a_large_log_interval_does_not_pile_steps_up(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Some hundred are kept on the device at most, and all of them are in the report."""
    most = [0]
    ended = StepRecorder.step_ended

    def spy(recorder: StepRecorder, step: int, epoch: int) -> None:
        ended(recorder, step, epoch)
        most[0] = max(most[0], len(recorder))

    monkeypatch.setattr(StepRecorder, "step_ended", spy)
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    trainer = make_trainer(callbacks=[collector], max_epochs=1, log_every_n_steps=10**6)
    trainer.fit(tiny, make_loader(4 * 1100))
    assert most[0] == 500
    assert [b["loss"] for b in collector.report().batches] == pytest.approx(tiny.batch_losses, rel=1e-6)


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

    for name in ("on_before_optimizer_step", "on_train_batch_end"):
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
