"""Weights that go back to where nothing was wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector
from tiny_run import PoisonedWeights, Tiny


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


class NanFrom(Tiny):
    """From step `at` on every loss is NaN, whatever the weights, as of a data set with a bad end."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at = at

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step + 1 >= self.at else loss


def test_a_fault_that_is_still_there_after_a_rollback_is_found_again(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """Were it still the same fault, nothing would be undone or stopped any more, and all weights be NaN."""
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3, max_rollbacks=2)
    trainer = make_trainer(callbacks=[detector])
    with pytest.warns(UserWarning, match="there were 2 rollbacks"):
        trainer.fit(NanFrom(11), make_loader())
    assert detector.rollbacks == [
        {"at_step": 12, "to_step": 9, "anomaly_step": 11},
        {"at_step": 15, "to_step": 9, "anomaly_step": 13},
    ]
    assert trainer.global_step == 16


class LooksAtLastGood(Callback):
    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        (path,) = Path(trainer.default_root_dir).rglob("last_good.ckpt")
        kept = torch.load(path, weights_only=False)
        self.step = kept["global_step"]
        self.finite = all(tensor.isfinite().all() for tensor in kept["state_dict"].values())


def test_nothing_is_kept_as_good_while_a_fault_goes_on(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """A fault that is only warned of is found once; the intervals after it, with no news, are not good."""
    detector = AnomalyDetector({"loss_spike": "rollback"}, checkpoint_every_n_steps=3)
    look = LooksAtLastGood()
    with pytest.warns(UserWarning, match="is nan"):
        make_trainer(callbacks=[detector, look]).fit(NanFrom(11), make_loader())
    assert look.finite
    assert look.step == 9


class Descent(Tiny):
    """Its loss is its one weight, from 3.0 down by 0.01 a step; at step 150 it is 5 more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(3.0))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.weight + 5.0 * (self.trainer.global_step + 1 == 150)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([self.weight], lr=0.01)


def test_where_the_weights_go_back_what_is_usual_goes_back_with_them(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """The losses of the first weights are high for step 150, and usual for those weights."""
    actions: dict[str, Any] = {"loss_spike": "rollback", "divergence": "rollback", "stall": "record"}
    detector = AnomalyDetector(actions)
    module = Descent()
    trainer = make_trainer(callbacks=[detector], max_epochs=20)
    with pytest.warns(UserWarning, match="back at step 0"):
        trainer.fit(module, make_loader())
    assert [a.step for a in detector.anomalies if a.kind in ("loss_spike", "divergence")] == [150]
    assert module.weight.item() == pytest.approx(3.0 - 0.01 * (320 - 150), abs=1e-3)


def test_a_second_detector_goes_back_with_the_weights(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """Else the losses of the first weights, after step 150, were spikes to it."""
    actions: dict[str, Any] = {"loss_spike": "rollback", "divergence": "rollback", "stall": "record"}
    detectors = [AnomalyDetector(dict.fromkeys(actions, "record"), name="watches"), AnomalyDetector(actions)]
    trainer = make_trainer(callbacks=detectors, max_epochs=20)
    with pytest.warns(UserWarning, match="back at step 0"):
        trainer.fit(Descent(), make_loader())
    for detector in detectors:
        assert [a.step for a in detector.anomalies if a.kind in ("loss_spike", "divergence")] == [150]


def test_two_detectors_that_roll_back_are_refused_before_training(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detectors = [AnomalyDetector({"non_finite": "rollback"}, name=name) for name in ("a", "b")]
    with pytest.raises(ValueError, match="two AnomalyDetectors of one Trainer roll back"):
        make_trainer(callbacks=detectors).fit(tiny, make_loader())
    assert tiny.batch_losses == []


def test_the_steps_after_a_checkpoint_a_rollback_and_a_report_are_not_timed(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """With the rollback: kept at the start and at 9, found and undone at 12."""
    for action, untimed in (("rollback", [1, 10, 13]), ("record", [1, 13])):
        collector = TrainingMetricsCollector(sample_every_n_steps=1)
        actions: dict[str, Any] = {"non_finite": action, "stall": "record"}
        path = tmp_path / "anomalies.json" if action == "record" else None
        detector = AnomalyDetector(actions, path, checkpoint_every_n_steps=9)
        make_trainer(callbacks=[detector, collector], max_epochs=1).fit(PoisonedWeights((10,)), make_loader())
        assert [b["step"] for b in collector.report().batches if "step_time_s" not in b] == untimed


class Unfreezes(PoisonedWeights):
    """Its backbone joins the optimizer at step 8, in a group of its own, and one weight is NaN at step 20."""

    def __init__(self) -> None:
        super().__init__((20,))
        self.backbone = torch.nn.Linear(8, 8)

    def loss(self, batch: Any) -> torch.Tensor:
        return super().loss((self.backbone(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam((p for p in self.parameters() if p.requires_grad), lr=0.01)


@pytest.mark.parametrize("order", [1, -1], ids=["detector first", "finetuning first"])
def test_a_rollback_to_before_the_backbone_was_unfrozen(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], order: int
) -> None:
    """The last good checkpoint is of the start; the optimizer keeps the groups that it has by now."""
    detector = AnomalyDetector({"non_finite": "rollback"})
    unfreezer = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    module = Unfreezes()
    backbone = {name: p.detach().clone() for name, p in module.backbone.named_parameters()}
    seen: dict[int, Any] = {}

    class Looks(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            (optimizer,) = trainer.optimizers
            present = {name: p.detach().clone() for name, p in pl_module.backbone.named_parameters()}
            states = [len(optimizer.state[p]) for group in optimizer.param_groups for p in group["params"]]
            seen[trainer.global_step] = present, states

    trainer = make_trainer(callbacks=[Looks(), *[detector, unfreezer][::order]], max_epochs=3)
    with pytest.warns(UserWarning, match="back at step 0"):
        trainer.fit(module, make_loader())
    assert detector.rollbacks == [{"at_step": 21, "to_step": 0, "anomaly_step": 21}]
    assert not all(torch.equal(backbone[name], p) for name, p in seen[20][0].items())
    assert all(torch.equal(backbone[name], p) for name, p in seen[21][0].items())
    assert set(seen[21][1]) == {0}
    assert trainer.global_step == 48
    assert all(p.isfinite().all() for p in module.parameters())
    assert not all(torch.equal(backbone[name], p) for name, p in module.backbone.named_parameters())


def test_a_rollback_to_before_a_schedule_began(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """Weight averaging's schedule, from the second epoch on, keeps its own figures in the groups."""
    detector = AnomalyDetector({"non_finite": "rollback"})
    averaging = StochasticWeightAveraging(0.01, swa_epoch_start=1, annealing_epochs=1)
    trainer = make_trainer(callbacks=[detector, averaging], max_epochs=4)
    with pytest.warns(UserWarning, match="back at step 0"):
        trainer.fit(PoisonedWeights((20,)), make_loader())
    assert [r["to_step"] for r in detector.rollbacks] == [0]
    assert trainer.global_step == 64
    assert [group["swa_lr"] for group in trainer.optimizers[0].param_groups] == [0.01]


class Regroups(PoisonedWeights):
    """At step 5 a layer leaves the optimizer."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 5:
            del self.trainer.optimizers[0].param_groups[0]["params"][2:]
            self.left = self.layers[2].weight.detach().clone()


def test_a_rollback_that_the_optimizer_does_not_fit_stops_the_run_and_changes_nothing(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector({"non_finite": "rollback"})
    module = Regroups((10,))
    trainer = make_trainer(callbacks=[detector])
    with pytest.warns(UserWarning, match="no going back, as the optimizers have other.*is nan at step 11"):
        trainer.fit(module, make_loader())
    assert trainer.global_step == 12
    assert detector.rollbacks == []
    assert detector.anomalies[0].step == 11
    assert torch.equal(module.layers[2].weight, module.left)


class Scheduled(PoisonedWeights):
    """Each learning rate follows from the one before; `d` is the optimizer's own, as Prodigy has it."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD([{"params": self.parameters(), "d": 1.0}], lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.trainer.global_step in self.at:
            self.trainer.optimizers[0].param_groups[0]["d"] = float("nan")


def test_a_rollback_does_not_turn_the_learning_rate_back(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """The optimizer's state has the rate of its step in it, and goes back, but for what is scheduled."""
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    module = Scheduled((10,))
    trainer = make_trainer(callbacks=[detector])
    with pytest.warns(UserWarning, match="back at step 9"):
        trainer.fit(module, make_loader())
    assert module.rates == pytest.approx([0.1 * 0.9**step for step in range(32)])
    assert trainer.optimizers[0].param_groups[0]["d"] == 1.0
    assert all(p.isfinite().all() for p in module.parameters())


class Validated(PoisonedWeights):
    """Remembers whether validation saw sound weights."""

    def __init__(self, at: tuple[int, ...]) -> None:
        super().__init__(at)
        self.sound: list[bool] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.sound.append(all(bool(p.isfinite().all()) for p in self.parameters()))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@pytest.mark.parametrize("validates", [True, False])
@pytest.mark.parametrize("order", [1, -1], ids=["collector first", "detector first"])
def test_a_fault_in_the_last_interval_is_undone_before_validation_and_at_the_end(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], validates: bool, order: int
) -> None:
    """No batch comes after it. In the second epoch Adam has to go on from states that validation loaded."""
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=6)
    module = Validated((13, 30))
    trainer = make_trainer(callbacks=[TrainingMetricsCollector(), detector][::order], log_every_n_steps=6)
    with pytest.warns(UserWarning, match="back at step 12"):
        trainer.fit(module, make_loader(), make_loader(8) if validates else None)
    assert [(r["at_step"], r["to_step"]) for r in detector.rollbacks] == [(16, 12), (32, 30)]
    assert all(p.isfinite().all() for p in module.parameters())
    assert all(module.sound)


def test_a_rollback_in_an_accumulation_forgets_its_gradients_and_its_losses(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """Validation comes after the fifth of batches that make a step by twos. That batch's gradient is NaN,
    and so is the third step's loss, which is no new fault.
    """
    detector = AnomalyDetector({"non_finite": "rollback"})
    module = Validated((1,))
    trainer = make_trainer(
        callbacks=[detector], accumulate_grad_batches=2, val_check_interval=5, max_epochs=1
    )
    with pytest.warns(UserWarning, match="back at step 0"):
        trainer.fit(module, make_loader(), make_loader(8))
    assert detector.rollbacks == [{"at_step": 2, "to_step": 0, "anomaly_step": 2}]
    assert [a.step for a in detector.anomalies if a.kind == "non_finite"] == [2, 2]  # loss and gradient norm
    assert all(p.isfinite().all() for p in module.parameters())


class SavesAt11(Callback):
    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 11:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "saved")


def test_a_step_taken_before_the_rollback_and_judged_after_it_is_no_new_fault(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """A checkpoint finds the fault at step 11, within a log interval; step 12 is not looked at until 15."""
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=5)
    module = PoisonedWeights((10,))
    trainer = make_trainer(callbacks=[detector, SavesAt11()], log_every_n_steps=5)
    with pytest.warns(UserWarning, match="back at step 10"):
        trainer.fit(module, make_loader())
    assert detector.rollbacks == [{"at_step": 12, "to_step": 10, "anomaly_step": 11}]


@pytest.mark.parametrize("order", [1, -1], ids=["detector first", "average first"])
def test_a_rollback_gives_back_the_weights_themselves_and_their_average(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], order: int
) -> None:
    """Weight averaging puts the average in the place of the weights in a checkpoint. At the end it puts it
    in the place of the weights in the module, where one NaN taken into the average would stay.
    """
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    module = PoisonedWeights((10,))
    trainer = make_trainer(callbacks=[detector, EMAWeightAveraging(decay=0.9)][::order])
    with pytest.warns(UserWarning, match="back at step 9"):
        trainer.fit(module, make_loader())
    assert torch.equal(module.weights[12], module.weights[9])
    assert all(p.isfinite().all() for p in module.parameters())


class FrozenBackbone(PoisonedWeights):
    """Its checkpoints leave out what is not trained, as those of adapters do."""

    def __init__(self, at: tuple[int, ...]) -> None:
        super().__init__(at)
        self.backbone = torch.nn.Linear(8, 8).requires_grad_(False)
        self.strict_loading = False

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if not name.startswith("backbone")}


def test_a_module_whose_checkpoints_leave_something_out_can_be_rolled_back(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    module = FrozenBackbone((10,))
    with pytest.warns(UserWarning, match="back at step 9"):
        make_trainer(callbacks=[detector]).fit(module, make_loader())
    assert torch.equal(module.weights[12], module.weights[9])


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


def test_what_a_run_that_failed_had_to_undo_is_not_undone_in_the_next_run(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """The failing run's last steps are judged when it is too late; the next one begins with a validation."""
    detector = AnomalyDetector({"non_finite": "rollback"})
    with pytest.raises(KeyError, match="planted"), pytest.warns(UserWarning, match="is nan"):
        make_trainer(callbacks=[detector]).fit(FailsLate((12,)), make_loader())
    make_trainer(callbacks=[detector], max_epochs=1).fit(Tiny(), make_loader(), make_loader(8))
    assert detector.rollbacks == []
