"""Faults planted into a real run are found, reported, and acted upon as asked."""

import errno
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector, write_json
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


def test_two_detectors_have_a_state_each(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    def two() -> list[AnomalyDetector]:
        actions: dict[str, Any] = {"non_finite": "record", "plateau": "record"}
        return [AnomalyDetector(), AnomalyDetector(actions, plateau_steps=32, name="plateaus")]

    first = two()
    trainer = make_trainer(callbacks=first, max_epochs=4)
    with pytest.warns(UserWarning, match="is nan"):
        trainer.fit(BadBatch(10, float("nan")), make_loader())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    second = two()
    make_trainer(callbacks=second, max_epochs=4).fit(Tiny(), make_loader(), ckpt_path=tmp_path / "c.ckpt")
    states = [[json.dumps(d.state_dict()) for d in detectors] for detectors in (first, second)]
    assert states[0] == states[1]
    assert states[0][0] != states[0][1]


def test_a_run_without_anomalies_leaves_none_of_another_run_in_its_file(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    path = tmp_path / "anomalies.json"
    for module, found in ((BadBatch(10, float("nan")), True), (Tiny(), False)):
        detector = AnomalyDetector({"non_finite": "record", "stall": "record"}, path=path)
        make_trainer(callbacks=[detector], max_epochs=1).fit(module, make_loader())
        kinds = [anomaly["kind"] for anomaly in json.loads(path.read_text())["anomalies"]]
        assert ("non_finite" in kinds) == found


@pytest.mark.parametrize("for_good", [False, True])
def test_a_full_disk_costs_no_more_than_the_file(
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    for_good: bool,
) -> None:
    """Full when the fault is found; at the end the file is written anew, and an error if it cannot be."""
    path = tmp_path / "anomalies.json"
    detector = AnomalyDetector({"non_finite": "record", "stall": "record"}, path)
    trainer = make_trainer(callbacks=[detector], max_epochs=1)

    def write(*arguments: Any) -> Any:
        if trainer.global_step >= 11 and (for_good or trainer.global_step < 16):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_json(*arguments)

    monkeypatch.setattr("ryzen_callbacks.detector.write_json", write)
    error = pytest.raises(OSError, match="No space left") if for_good else nullcontext()
    with pytest.warns(UserWarning, match="anomalies were not written.*No space left"), error:
        trainer.fit(BadBatch(10, float("nan")), make_loader())
    assert trainer.global_step == 16
    if not for_good:
        assert json.loads(path.read_text())["anomalies"][0]["step"] == 11


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
