"""What is compiled for training and validation."""

import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from small_module import QUIET, build_module
from torch._dynamo.testing import CompileCounter

from ryzen_llm.data import TextDataModule
from ryzen_llm.errors import InputError
from ryzen_llm.training import LanguageModule


@pytest.mark.parametrize(("algorithm", "largest"), [("norm", 1e-3), ("value", 1e-3)])
def test_gradients_are_clipped_under_bf16_autocast(
    algorithm: str, largest: float, data: TextDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning refuses to, for an optimizer of one kernel: by their norm and one by one."""
    found: list[list[torch.Tensor]] = []
    monkeypatch.setattr(
        LanguageModule,
        "on_before_zero_grad",
        lambda module, _: found.append([p.grad.clone() for p in module.parameters() if p.grad is not None]),
    )
    settings = {"max_steps": 2, "limit_val_batches": 0, "enable_checkpointing": False, **QUIET}
    clipped = {"gradient_clip_val": largest, "gradient_clip_algorithm": algorithm}
    Trainer(precision="bf16-mixed", **settings, **clipped).fit(build_module(data), datamodule=data)
    gradients = next(each for each in reversed(found) if each)
    measured = (
        torch.stack([g.norm() for g in gradients]).norm()
        if algorithm == "norm"
        else torch.stack([g.abs().max() for g in gradients]).max()
    )
    assert float(measured) == pytest.approx(largest, rel=1e-2)


def test_validation_takes_the_graph_that_training_compiled(
    data: TextDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without gradients would take as long to compile again. Its losses are those of no graph at all."""

    def run(compiled: bool) -> tuple[int, dict[str, float]]:
        torch._dynamo.reset()
        count = CompileCounter()  # a backend that counts, and runs what it is given
        monkeypatch.setattr(torch.nn.Module, "compile", lambda region: compile_with(region, backend=count))
        data.prepare_data()
        lasting = {"max_steps": 4, "val_check_interval": 2, "enable_checkpointing": False}
        trainer = Trainer(inference_mode=False, **lasting, **QUIET)  # the mode of scripts/train.py
        trainer.fit(build_module(data, compile=compiled), datamodule=data)
        after_training = count.frame_count
        (found,) = trainer.validate(trainer.lightning_module, datamodule=data, verbose=False)
        assert count.frame_count == after_training
        return after_training, found

    compile_with = torch.nn.Module.compile
    with torch._dynamo.config.patch(disable=False):
        graphs, losses = run(compiled=True)
    assert graphs == 2, "a block's, which the other takes as well, and the last norm's"
    assert losses == pytest.approx(run(compiled=False)[1], rel=1e-5)


def test_a_batch_whose_loss_is_nan_shows_in_the_mean(
    data: TextDataModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean over the others would say that a model which has diverged is well."""
    data.prepare_data()
    module = build_module(data)
    evaluate, calls = module.model.evaluation_loss, []

    def first_is_nan(*batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(batch)
        loss, correct = evaluate(*batch)
        return (loss * math.nan if len(calls) == 1 else loss), correct

    monkeypatch.setattr(module.model, "evaluation_loss", first_is_nan)
    (found,) = Trainer(**QUIET).validate(module, datamodule=data, verbose=False)
    assert len(calls) > 1
    assert math.isnan(found["val_loss"])


def test_a_run_without_an_end_is_refused_since_the_schedule_needs_it(data: TextDataModule) -> None:
    endless = {"max_epochs": -1, "max_time": {"seconds": 20}, "enable_checkpointing": False}
    with pytest.raises(InputError, match=r"max_steps or trainer\.max_epochs"):
        Trainer(**endless, **QUIET).fit(build_module(data), datamodule=data)


def test_a_run_that_is_made_longer_follows_its_schedule_from_its_first_step_on(
    data: TextDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: dict[int, float] = {}
    monkeypatch.setattr(
        LanguageModule,
        "on_before_optimizer_step",
        lambda module, optimizer: rates.update({module.global_step: optimizer.param_groups[0]["lr"]}),
    )
    settings = {"limit_val_batches": 0, "enable_checkpointing": False, **QUIET}
    trainer = Trainer(max_steps=4, **settings)
    trainer.fit(build_module(data), datamodule=data)
    trainer.save_checkpoint(tmp_path / "step=4.ckpt")
    module = build_module(data)
    Trainer(max_steps=8, **settings).fit(
        module, datamodule=data, ckpt_path=tmp_path / "step=4.ckpt", weights_only=True
    )
    config = module.optimizer_config
    expected = [config.learning_rate * config.factor(step, 8) for step in range(4, 8)]
    assert [rates[step] for step in range(4, 8)] == pytest.approx(expected)
