"""The last good checkpoint where the disk is full, and where the module is no longer what it was then."""

import errno
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from ryzen_callbacks import AnomalyDetector
from tiny_run import PoisonedWeights, Tiny


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, steps: range) -> list[int]:
    """Checkpoints of `steps` are half written, then there is no room; returns the steps tried."""
    tried: list[int] = []
    save = TorchCheckpointIO.save_checkpoint

    def save_or_fail(self: Any, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        tried.append(checkpoint["global_step"])
        if tried[-1] in steps:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(TorchCheckpointIO, "save_checkpoint", save_or_fail)
    return tried


def test_a_full_disk_is_one_warning_and_the_checkpoint_from_before_it_is_kept(
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The fault at step 10 is found at 12; the writings at 6 and at 9 fail, and that at 15 succeeds."""
    tried = fill_the_disk(monkeypatch, range(6, 12))
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    module = PoisonedWeights((10,))
    trainer = make_trainer(callbacks=[detector])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, make_loader())
    said = [str(w.message) for w in caught if "No space left" in str(w.message)]
    assert len(said) == 1
    assert f"{tmp_path / 'last_good.ckpt'} was not written" in said[0]
    assert "a rollback goes back to step 3" in said[0]
    assert tried[:5] == [0, 3, 6, 9, 15]
    assert detector.rollbacks == [{"at_step": 12, "to_step": 3, "anomaly_step": 11}]
    assert torch.equal(module.weights[12], module.weights[3])
    assert trainer.global_step == 32
    assert not list(tmp_path.rglob("*.ckpt"))


def test_with_no_last_good_checkpoint_at_all_training_goes_on_until_a_rollback_is_needed(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_the_disk(monkeypatch, range(99))
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    trainer = make_trainer(callbacks=[detector])
    with (
        pytest.warns(UserWarning, match="there is nothing to go back to"),
        pytest.warns(UserWarning, match="stopping: there is no going back, as no last good checkpoint"),
    ):
        trainer.fit(PoisonedWeights((10,)), make_loader())
    assert trainer.global_step == 12
    assert detector.rollbacks == []


def test_a_checkpoint_plugin_that_writes_in_the_background_has_written_when_it_is_needed(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    plugin = AsyncCheckpointIO()
    trainer = make_trainer(callbacks=[detector], plugins=[plugin])
    with pytest.warns(UserWarning, match="back at step 9"):
        trainer.fit(PoisonedWeights((10,)), make_loader())
    assert trainer.strategy.checkpoint_io is plugin
    assert not list(tmp_path.rglob("*.ckpt"))


class Changes(PoisonedWeights):
    """At step 5 its parameter `extra` changes, which no optimizer has; all else is as it was."""

    def __init__(self, change: str) -> None:
        super().__init__((10,))
        self.change = change
        if change != "added":
            self.extra = torch.nn.Parameter(torch.zeros(4))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.layers.parameters(), lr=0.1)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step == 5:
            if self.change == "removed":
                del self.extra
            else:
                self.extra = torch.nn.Parameter(torch.ones(5))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("added", "'extra' is new"),
        ("removed", "'extra' is gone"),
        ("resized", r"'extra' was \(4,\) and is \(5,\)"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_rollback_that_the_module_does_not_fit_changes_nothing_and_is_recorded(
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    change: str,
    words: str,
    strict: bool,
) -> None:
    """Half restored, it would go on with weights that were never together."""
    path = tmp_path / "anomalies.json"
    detector = AnomalyDetector({"non_finite": "rollback"}, path)
    module = Changes(change)
    module.strict_loading = strict
    trainer = make_trainer(callbacks=[detector])
    with pytest.warns(UserWarning, match=f"no going back, as the module is another.*{words}.*nan at step 11"):
        trainer.fit(module, make_loader())
    assert trainer.global_step == 12
    assert all(p.isnan().any() for p in module.layers.parameters())
    assert detector.rollbacks == []
    (refused,) = detector.refused_rollbacks
    assert (refused["at_step"], refused["anomaly_step"]) == (12, 11)
    assert "the module is another" in refused["reason"]
    assert json.loads(path.read_text())["refused_rollbacks"] == [refused]
    again = AnomalyDetector()
    again.load_state_dict(detector.state_dict())
    assert again.refused_rollbacks == [refused]


class KeepsOnlyAPart(PoisonedWeights):
    """Its checkpoints hold the trained weights only, by a hook, as those of adapters often do."""

    def __init__(self) -> None:
        super().__init__((10,))
        self.backbone = torch.nn.Linear(8, 8).requires_grad_(False)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {n: t for n, t in state.items() if not n.startswith("backbone")}


def test_a_hook_that_leaves_something_out_of_checkpoints_is_no_change_of_the_module(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    module = KeepsOnlyAPart()
    with pytest.warns(UserWarning, match="back at step 9"):
        make_trainer(callbacks=[detector]).fit(module, make_loader())
    assert torch.equal(module.weights[12], module.weights[9])


class Lazy(Tiny):
    """A layer takes its shape from the first batch, after the first checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = torch.nn.LazyLinear(16)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Not Tiny's."""


def test_a_lazy_layer_is_no_obstacle_to_training(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector({"non_finite": "rollback"}, checkpoint_every_n_steps=3)
    trainer = make_trainer(callbacks=[detector])
    trainer.fit(Lazy(), make_loader())
    assert trainer.global_step == 32
