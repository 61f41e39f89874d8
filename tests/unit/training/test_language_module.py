"""What is compiled for training and validation."""

import pytest
import torch
from lightning.pytorch import Trainer
from small_module import QUIET, build_module
from torch._dynamo.testing import CompileCounter

from ryzen_llm.data import TextDataModule
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
