"""Claims are measured within a run: at its end, on the trained module, and as often as asked."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ryzen_callbacks import Claim, OptimizationValidator
from tiny_run import Tiny


class WithClaims(Tiny):
    """Its claim is measured at the end of training, on the trained weights and in the Trainer's hands."""

    def optimization_claims(self) -> list[Any]:
        def bytes_of(dtype: torch.dtype) -> int:
            assert self.trainer.global_step == 32
            return sum(p.to(dtype).nbytes for p in self.parameters())

        return [
            Claim(
                name="half precision",
                baseline=lambda: bytes_of(torch.float32),
                optimized=lambda: bytes_of(torch.bfloat16),
                measure="bytes",
                threshold=2.0,
            )
        ]


def test_the_modules_own_claims_are_measured_at_the_end(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    validator = OptimizationValidator()
    make_trainer(callbacks=[validator]).fit(WithClaims(), make_loader())
    report = json.loads((tmp_path / "validation_report.json").read_text())
    assert [(r["name"], r["status"], r["measured"]) for r in report["results"]] == [
        ("half precision", "PASS", 2.0)
    ]
    assert validator.report is not None


def test_measuring_after_every_second_validation_and_at_the_end_with_gradients(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """Lightning validates in inference mode; a claim about training needs to leave it."""
    measured_at: list[int] = []
    batch = next(iter(make_loader()))

    def train_step() -> int:
        tiny.loss(batch).backward()
        measured_at.append(tiny.trainer.global_step)
        return 1

    claim = Claim(name="c", baseline=train_step, optimized=lambda: 1, measure="bytes", threshold=1.0)
    validator = OptimizationValidator([claim], every_n_validations=2)
    make_trainer(callbacks=[validator], max_epochs=5).fit(tiny, make_loader(), make_loader(8))
    assert measured_at == [32, 64, 80]
    assert validator.report is not None
    assert validator.report.summary.passed == 1


class Dropped(Tiny):
    """Its training draws random numbers."""

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return super().loss((torch.nn.functional.dropout(x), y))


def test_measuring_in_between_leaves_the_training_as_it_is(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """The arms draw random numbers, too."""

    def losses(**settings: Any) -> list[float]:
        draws = halved(baseline=lambda: 2 * torch.rand(3).numel(), optimized=lambda: random.randrange(1, 4))
        module = Dropped()
        validator = OptimizationValidator([draws], **settings)
        make_trainer(callbacks=[validator]).fit(module, make_loader(), make_loader(8))
        return module.batch_losses

    assert losses(every_n_validations=1) == losses()


def halved(name: str = "halved", **arms: Any) -> Claim:
    return Claim(
        name=name, **{"baseline": lambda: 2, "optimized": lambda: 1, **arms}, measure="bytes", threshold=2.0
    )


def test_validating_by_hand_leaves_the_fits_report_alone(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    validator = OptimizationValidator([halved()])
    make_trainer(callbacks=[validator], max_epochs=1).fit(tiny, make_loader())
    of_the_fit = (tmp_path / "validation_report.json").read_text()
    assert validator.validate([]).results == []
    assert (tmp_path / "validation_report.json").read_text() == of_the_fit


class SameName(Tiny):
    def optimization_claims(self) -> list[Claim]:
        return [halved()]


class Raises(Tiny):
    def optimization_claims(self) -> list[Claim]:
        raise KeyError("planted")


class NoList(Tiny):
    def optimization_claims(self) -> None:
        """A `return` was forgotten."""


@pytest.mark.parametrize(
    ("module", "words"),
    [(SameName, "two claims are named 'halved'"), (Raises, "planted"), (NoList, "TypeError")],
)
def test_claims_that_cannot_be_had_from_the_module_do_not_fail_a_finished_run(
    module: type[Tiny],
    words: str,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """They are asked for when training is over: that is too late for an error."""
    trainer = make_trainer(callbacks=[OptimizationValidator([halved()])], max_epochs=1)
    with pytest.warns(UserWarning, match=f"optimization_claims.*{words}"):
        trainer.fit(module(), make_loader())
    report = json.loads((tmp_path / "validation_report.json").read_text())
    assert [(r["name"], r["status"]) for r in report["results"]] == [("halved", "PASS")]


def test_two_claims_of_a_name_are_an_error_before_training(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    validator = OptimizationValidator([halved()])
    validator.claims.append(halved())
    with pytest.raises(ValueError, match="two claims are named 'halved'"):
        make_trainer(callbacks=[validator]).fit(tiny, make_loader())
    assert tiny.batch_losses == []


def test_a_resumed_run_counts_validations_on(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """Every third validation: after two epochs and a resumption, the first one is the third."""
    measured_at: list[int] = []

    def fit(epochs: int, checkpoint: Path | None = None) -> Any:
        module = Tiny()

        def note() -> int:
            measured_at.append(module.current_epoch)
            return 2

        validators = [
            OptimizationValidator([halved(baseline=note)], every_n_validations=3),
            OptimizationValidator([halved("other")], tmp_path / "other.json"),
        ]
        trainer = make_trainer(callbacks=validators, max_epochs=epochs)
        trainer.fit(module, make_loader(), make_loader(8), ckpt_path=checkpoint)
        return trainer

    fit(2).save_checkpoint(tmp_path / "c.ckpt")
    measured_at.clear()
    fit(5, tmp_path / "c.ckpt")
    assert measured_at == [2, 5]
