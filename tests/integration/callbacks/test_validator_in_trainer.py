"""Claims are measured within a run: at its end, on the trained module, and as often as asked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
