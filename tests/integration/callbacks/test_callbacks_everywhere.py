"""The callbacks work in whatever Trainer and with whatever module they are dropped into."""

import importlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as lp
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from ryzen_callbacks import AnomalyDetector, Claim, OptimizationValidator, TrainingMetricsCollector
from tiny_run import Tiny
from torch.utils.data import DataLoader, TensorDataset


def three() -> list[Any]:
    claim = Claim(name="half", baseline=lambda: 2, optimized=lambda: 1, measure="bytes", threshold=2.0)
    return [
        TrainingMetricsCollector(sample_every_n_steps=1),
        AnomalyDetector(),
        OptimizationValidator([claim]),
    ]


def reports(folder: Path) -> dict[str, Any]:
    return {path.name: json.loads(path.read_text()) for path in folder.rglob("*_report.json")}


class Gan(lp.LightningModule):
    """Two optimizers stepped by hand in one batch, as in the Lightning documentation."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = torch.nn.Linear(2, 8), torch.nn.Linear(8, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        g, c = self.optimizers()
        real = batch[0]
        fake = self.generator(torch.randn(len(real), 2))
        critic_loss = self.critic(fake.detach()).mean() - self.critic(real).mean()
        c.zero_grad()
        self.manual_backward(critic_loss)
        c.step()
        generator_loss = -self.critic(fake).mean()
        g.zero_grad()
        self.manual_backward(generator_loss)
        g.step()
        return {"loss": generator_loss}

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.generator.parameters(), 0.1),
            torch.optim.SGD(self.critic.parameters(), 0.2),
        ]


def test_two_optimizers_by_hand_make_one_step_a_batch(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(callbacks=three(), max_epochs=1)
    trainer.fit(Gan(), make_loader())
    batches = reports(tmp_path)["training_metrics_report.json"]["batches"]
    assert trainer.global_step == 32
    assert [b["step"] for b in batches] == list(range(1, 17))
    assert {(b["learning_rate"], b["learning_rate_1"]) for b in batches} == {(0.1, 0.2)}
    assert all(b["grad_norm"] > 0 and "loss" in b for b in batches)


def test_a_collector_that_is_new_to_a_resumed_run_counts_steps_and_not_optimizers(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Gan(), make_loader())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    trainer = make_trainer(callbacks=three(), max_epochs=2)
    trainer.fit(Gan(), make_loader(), ckpt_path=tmp_path / "c.ckpt")
    batches = reports(tmp_path)["training_metrics_report.json"]["batches"]
    assert [b["step"] for b in batches] == list(range(17, 33))


class StepsOften(Gan):
    """Its critic steps five times a batch, as in a Wasserstein GAN."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        g, c = self.optimizers()
        fake = self.generator(torch.ones(4, 2))
        for _ in range(5):
            c.zero_grad()
            self.manual_backward(self.critic(fake.detach()).sum())
            c.step()
        g.zero_grad()
        self.manual_backward(self.generator(torch.ones(1, 2)).sum())
        g.step()
        return {"loss": fake.sum()}


def test_steps_of_one_optimizer_in_one_batch_do_not_add_up_in_the_gradient_norm(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    module, norms = StepsOften(), []

    class Watches(lp.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            gradients = [p.grad for p in module.parameters() if p.grad is not None]
            norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    make_trainer(callbacks=[*three(), Watches()], max_epochs=1).fit(module, make_loader())
    batches = reports(tmp_path)["training_metrics_report.json"]["batches"]
    assert [b["grad_norm"] for b in batches] == pytest.approx(norms, rel=1e-5)


class Half(lp.LightningModule):
    """A gradient of 100,000 values of 100, whose sum of squares is no float16."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(100_000))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return (100 * self.weights).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.0)


def test_gradients_in_half_precision_have_a_norm(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=three(), max_epochs=1, precision="16-true").fit(Half(), make_loader())
    report = reports(tmp_path)["training_metrics_report.json"]
    assert [b["grad_norm"] for b in report["batches"]] == pytest.approx([31622.8] * 16, rel=1e-4)
    assert report["anomalies"] == []


class Nested(Tiny):
    """Its batches are nested tensors, of rows of different lengths."""

    tokens_in_batch = None  # type: ignore[assignment]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.layers(torch.cat(batch.unbind())).mean()


def test_batches_of_rows_of_different_lengths(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    rows = [torch.ones(length, 8) for length in range(1, 13)]
    data = DataLoader(rows, batch_size=4, collate_fn=torch.nested.nested_tensor)  # type: ignore[arg-type]
    make_trainer(callbacks=three(), max_epochs=1).fit(Nested(), data)
    assert [b["samples"] for b in reports(tmp_path)["training_metrics_report.json"]["batches"]] == [4] * 3


class WithoutRate(torch.optim.SGD):
    """Finds its own learning rate, as Adafactor does; there is None in its groups, or nothing."""

    def __init__(self, parameters: Any, given: dict[str, Any]) -> None:
        super().__init__(parameters, lr=0.1)
        for group in self.param_groups:
            del group["lr"]
            group.update(given)

    def step(self, closure: Any = None) -> Any:
        return closure()


@pytest.mark.parametrize("given", [{}, {"lr": None}], ids=str)
def test_an_optimizer_without_a_learning_rate(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    given: dict[str, Any],
) -> None:
    tiny.configure_optimizers = lambda: WithoutRate(tiny.parameters(), given)  # type: ignore[method-assign]
    tiny.on_before_optimizer_step = lambda optimizer: None  # type: ignore[method-assign, assignment]
    make_trainer(callbacks=three(), max_epochs=1).fit(tiny, make_loader())
    batches = reports(tmp_path)["training_metrics_report.json"]["batches"]
    assert [b["loss"] for b in batches] == pytest.approx(tiny.batch_losses, rel=1e-6)
    assert not any("learning_rate" in b for b in batches)


class Skips(Tiny):
    """Returns no loss now and then, which Lightning allows on one device."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None if batch_idx % 4 == 0 else super().training_step(batch, batch_idx)


class WithoutLoss(Gan):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)


@pytest.mark.parametrize("module", [Skips, WithoutLoss])
def test_a_module_without_a_loss_at_every_batch(
    module: type[lp.LightningModule],
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
) -> None:
    make_trainer(callbacks=three(), max_epochs=1).fit(module(), make_loader())
    report = reports(tmp_path)["training_metrics_report.json"]
    row = report["epochs"][0]
    if module is WithoutLoss:
        assert row["train_loss"] is None
        assert row["not_measured"]["train_loss"] == "no finite loss was recorded"
    else:
        assert report["statistics"]["loss"]["count"] == 12


@pytest.mark.parametrize(
    "settings",
    [{"limit_train_batches": 7}, {"log_every_n_steps": 0}, {"val_check_interval": 5, "max_epochs": 1}],
    ids=str,
)
def test_a_stream_without_a_length(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    settings: dict[str, Any],
) -> None:
    make_trainer(callbacks=three(), **settings).fit(tiny, make_loader(stream=True), make_loader(8))
    report = reports(tmp_path)["training_metrics_report.json"]
    assert report["statistics"]["loss"]["count"] == len(tiny.batch_losses)


def test_fast_dev_run_leaves_nothing_behind(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=three(), fast_dev_run=2).fit(tiny, make_loader(), make_loader())
    assert reports(tmp_path) == {}


def test_the_sanity_check_is_not_an_epoch(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    make_trainer(callbacks=three(), num_sanity_val_steps=2, max_epochs=1).fit(
        tiny, make_loader(), make_loader(8)
    )
    rows = reports(tmp_path)["training_metrics_report.json"]["epochs"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 16)]


@pytest.mark.parametrize("entry", ["validate", "test", "predict"])
def test_without_training_there_is_no_report_and_no_fault(
    tiny: Tiny, make_trainer: Callable[..., Any], tmp_path: Path, entry: str
) -> None:
    tiny.predict_step = lambda batch, batch_idx: tiny.layers(batch[0])  # type: ignore[method-assign]
    data = DataLoader(TensorDataset(torch.randn(8, 8), torch.zeros(8, dtype=torch.long)), batch_size=4)
    getattr(make_trainer(callbacks=three()), entry)(tiny, data)
    assert reports(tmp_path) == {}


class TwoValidations(Tiny):
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


def test_several_val_loaders(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """Lightning names each loader's metric; the collector takes the one that it is told to."""
    callbacks = [TrainingMetricsCollector(val_loss="val_loss/dataloader_idx_1")]
    trainer = make_trainer(callbacks=callbacks, max_epochs=1)
    trainer.fit(TwoValidations(), make_loader(), [make_loader(8), make_loader(16)])
    row = reports(tmp_path)["training_metrics_report.json"]["epochs"][0]
    assert row["val_loss"] == pytest.approx(float(trainer.callback_metrics["val_loss/dataloader_idx_1"]))
    assert row["not_measured"]["accuracy"] == "the module logged no 'val_accuracy' in validation"


def test_early_stopping(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    stop = EarlyStopping("val_loss", min_delta=100.0, patience=1)
    make_trainer(callbacks=[*three(), stop], max_epochs=9).fit(tiny, make_loader(), make_loader(8))
    found = reports(tmp_path)
    assert len(found["training_metrics_report.json"]["epochs"]) == 2
    assert found["validation_report.json"]["summary"]["passed"] == 1


def test_any_logger_gets_the_values_of_every_step(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path)
    make_trainer(callbacks=three(), logger=logger, max_epochs=1).fit(tiny, make_loader())
    header, *lines = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    column = header.split(",").index("train/loss")
    logged = [float(line.split(",")[column]) for line in lines if line.split(",")[column]]
    assert logged == pytest.approx(tiny.batch_losses, rel=1e-6)


def test_a_pytorch_lightning_trainer(
    make_loader: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other distribution's Trainer takes a list of callbacks of this one, and finds their hooks."""
    pl = pytest.importorskip(
        "pytorch_lightning", reason="the distribution pytorch-lightning is not installed"
    )
    importlib.import_module("pytorch_lightning.loggers")

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(8, 2)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("seen", float(batch_idx))
            return torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.nn.functional.cross_entropy(self.layer(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        log_every_n_steps=3,
        default_root_dir=tmp_path,
        callbacks=three(),
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), make_loader(), make_loader(8))
    found = reports(tmp_path)
    assert found["training_metrics_report.json"]["statistics"]["loss"]["count"] == 16
    assert found["training_metrics_report.json"]["statistics"]["data_wait_s"]["min"] > 0
    assert found["training_metrics_report.json"]["epochs"][0]["val_loss"] is not None
    assert found["validation_report.json"]["summary"]["passed"] == 1


@pytest.fixture
def read_only_folder() -> Iterator[Path]:
    """A folder that this process may read and not write to, for root too: it gives that up meanwhile."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield folder
    finally:
        os.seteuid(user)
        folder.rmdir()


@pytest.mark.parametrize("which", range(3))
def test_a_read_only_log_directory_is_an_error_before_training_starts(
    which: int,
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    read_only_folder: Path,
) -> None:
    callback = [*three()[::2], AnomalyDetector(path=read_only_folder / "anomalies.json")][which]
    trainer = make_trainer(callbacks=[callback], default_root_dir=str(read_only_folder))
    with pytest.raises(
        ValueError, match=rf"cannot write .*\.json in {read_only_folder}.*: Permission denied; give"
    ):
        trainer.fit(tiny, make_loader())
    assert tiny.batch_losses == []
