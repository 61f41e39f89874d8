"""Faults planted into a real run are found, reported, and acted upon as asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import Tiny


class BadBatch(Tiny):
    """At one step, a batch whose labels are all wrong and whose inputs are `factor` times too large."""

    def __init__(self, at: int, factor: float) -> None:
        super().__init__()
        self.at = at
        self.factor = factor

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        if self.trainer.global_step == self.at:
            x, y = x * self.factor, 1 - y
        return super().training_step((x, y), batch_idx)


@pytest.mark.parametrize(("factor", "kind"), [(100.0, "loss_spike"), (float("nan"), "non_finite")])
@pytest.mark.parametrize("order", [1, -1], ids=["collector first", "detector first"])
def test_a_bad_batch_is_found_and_stands_in_the_report(
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    factor: float,
    kind: str,
    order: int,
) -> None:
    """The hundredth step has the fault: `at` counts from 0, reports count the steps done."""
    callbacks = [TrainingMetricsCollector(tmp_path / "r.json"), AnomalyDetector()][::order]
    logger = TensorBoardLogger(tmp_path)
    trainer = make_trainer(callbacks=callbacks, max_epochs=7, logger=logger)
    with pytest.warns(UserWarning, match="at step 100"):
        trainer.fit(BadBatch(99, factor), make_loader())
    (detector,) = [c for c in callbacks if isinstance(c, AnomalyDetector)]
    assert (detector.anomalies[0].kind, detector.anomalies[0].step) == (kind, 100)
    reported = json.loads((tmp_path / "r.json").read_text())["anomalies"]
    assert (reported[0]["kind"], reported[0]["step"]) == (kind, 100)
    texts = EventAccumulator(logger.log_dir).Reload().Tags()["tensors"]
    assert f"anomaly/{kind}/text_summary" in texts


def test_stop_ends_training_at_the_next_log_interval(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "anomalies.json"
    detector = AnomalyDetector({"non_finite": "stop"}, path=path)
    trainer = make_trainer(callbacks=[detector], max_epochs=9)
    with pytest.warns(UserWarning, match="the loss is nan"):
        trainer.fit(BadBatch(10, float("nan")), make_loader())
    assert trainer.global_step == 12
    written = json.loads(path.read_text())
    assert written["schema_version"] == 1
    first = written["anomalies"][0]
    assert (first["kind"], first["step"], first["value"]) == ("non_finite", 11, None)


def test_record_says_nothing(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], recwarn: pytest.WarningsRecorder
) -> None:
    detector = AnomalyDetector({"non_finite": "record"})
    make_trainer(callbacks=[detector], max_epochs=1).fit(BadBatch(10, float("nan")), make_loader())
    assert {a.kind for a in detector.anomalies} == {"non_finite"}
    assert not [w for w in recwarn if "is nan" in str(w.message)]


class PoisonedWeights(Tiny):
    """Steps `at` set a weight to NaN, as an overflow in the optimizer would; all later losses are NaN."""

    def __init__(self, at: tuple[int, ...]) -> None:
        super().__init__()
        self.at = at
        self.weights: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step in self.at:
            with torch.no_grad():
                self.layers[0].weight[0, 0] = float("nan")
        self.weights[step] = self.layers[0].weight.detach().clone()


@pytest.mark.parametrize("order", [1, -1], ids=["collector first", "detector first"])
def test_rollback_restores_the_last_good_weights_and_goes_on_with_later_batches(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path, order: int
) -> None:
    """Log interval 3: the last state kept before the fault at 10 is that of step 9; found at step 12."""
    path = tmp_path / "anomalies.json"
    detector = AnomalyDetector({"non_finite": "rollback"}, path=path, checkpoint_every_n_steps=3)
    module = PoisonedWeights((10,))
    trainer = make_trainer(callbacks=[TrainingMetricsCollector(), detector][::order])
    with pytest.warns(UserWarning, match="back at step 9"):
        trainer.fit(module, make_loader())
    assert detector.rollbacks == [{"at_step": 12, "to_step": 9, "anomaly_step": 11}]
    assert torch.equal(module.weights[12], module.weights[9])
    assert not module.weights[11].isfinite().all()
    assert trainer.global_step == 32
    assert all(p.isfinite().all() for p in module.parameters())
    assert json.loads(path.read_text())["rollbacks"] == detector.rollbacks
    assert not list(tmp_path.rglob("*.ckpt"))


def test_after_the_allowed_rollbacks_the_next_fault_stops_training(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3, max_rollbacks=2)
    trainer = make_trainer(callbacks=[detector], max_epochs=9)
    with pytest.warns(UserWarning, match="there were 2 rollbacks"):
        trainer.fit(PoisonedWeights((4, 13, 22, 31)), make_loader())
    assert len(detector.rollbacks) == 2
    assert trainer.global_step == 24


class FailsLate(PoisonedWeights):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 14:
            raise KeyError("planted")


def test_a_run_that_fails_leaves_no_checkpoint_behind_and_can_be_started_again(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """Lightning calls no teardown after an exception: the callback has to clean up in on_exception."""
    detector = AnomalyDetector({"non_finite": "rollback"})
    with pytest.raises(KeyError, match="planted"):
        make_trainer(callbacks=[detector]).fit(FailsLate(()), make_loader())
    assert not list(tmp_path.rglob("*.ckpt"))
    assert detector.last_step == 14
    assert detector.state_dict()["last_step"] == 14
    make_trainer(callbacks=[detector], max_epochs=1).fit(Tiny(), make_loader())
    assert detector.last_step == 14 + 16


class DeviceFails(Tiny):
    """Its losses cannot be read any more, as after a fault of the accelerator."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 4:
            raise KeyError("planted")
        return super().training_step(batch, batch_idx)


def test_a_device_that_fails_does_not_hide_the_first_error(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("ryzen_callbacks.step_recorder._to_floats", fails)
    trainer = make_trainer(callbacks=[AnomalyDetector()], log_every_n_steps=50)
    with (
        pytest.warns(UserWarning, match="last steps are lost: the device is gone"),
        pytest.raises(KeyError, match="planted"),
    ):
        trainer.fit(DeviceFails(), make_loader())


class Worse(Tiny):
    """Its validation accuracy falls in the third epoch."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", 0.9 if self.current_epoch < 2 else 0.5)


def test_an_accuracy_that_falls_is_found_at_its_validation(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector()
    with pytest.warns(UserWarning, match="validation accuracy is at 0.5"):
        make_trainer(callbacks=[detector], max_epochs=3).fit(Worse(), make_loader(), make_loader(8))
    assert [(a.kind, a.step, a.value) for a in detector.anomalies] == [("accuracy_drop", 48, 0.5)]
