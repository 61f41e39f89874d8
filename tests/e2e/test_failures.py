"""A phase that fails or is interrupted: the others are reported all the same, and nothing is made up."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import arguments, report

import ryzen_llm.pipeline.orchestrator as orchestrator
from ryzen_llm.errors import InputError
from ryzen_llm.training import LanguageModule

Train = Callable[[list[str]], int]

SHORT = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 12, "validation_rounds": 1}


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("no space left on <device> [/dev/full]")


def statuses(output_dir: Path) -> dict[str, str]:
    phases = report(output_dir, "phase2_final_report")["phases"]
    for phase in phases:
        assert (phase["error"] is None) == (phase["status"] == "done"), phase
        assert (phase["duration_s"] is None) == (phase["status"] == "skipped"), phase
    return {phase["name"]: phase["status"] for phase in phases}


def in_step_eleven(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    step = LanguageModule.training_step

    def training_step(self: LanguageModule, *given: Any) -> Any:
        if self.global_step == 10:
            act()
        return step(self, *given)

    monkeypatch.setattr(LanguageModule, "training_step", training_step)


def assert_reports_of_ten_steps(output_dir: Path, status: str) -> None:
    """What training got to is reported; of what did not follow there is no figure and a reason."""
    assert statuses(output_dir) == {
        "setup": "done",
        "training": status,
        "validation": "skipped",
        "testing": "skipped",
        "reporting": "done",
    }
    final = report(output_dir, "phase2_final_report")
    assert final["status"] == status
    assert final["accuracy"] == {
        "val_loss": None,
        "val_accuracy": None,
        "unigram_entropy": None,
        "initial_val_loss": None,
        "reason": "training did not finish",
    }
    assert (final["optimizations"], final["e2e_speedup"], final["tests"], final["sample"]) == (
        {},
        None,
        None,
        None,
    )
    reasons = {phase["name"]: phase["error"] for phase in final["phases"]}
    assert reasons["validation"] == reasons["testing"] == f"training {status}"
    training = report(output_dir, "training_metrics_report")
    assert training["metadata"]["status"] == "failed"
    assert training["statistics"]["loss"]["count"] == 10
    page = (output_dir / "report.html").read_text("utf-8")
    assert f"run {status}" in page
    assert "No claim was measured" in page
    assert set(final["artifacts"]) == {"training", "html", "markdown", "tensorboard", "checkpoints", "config"}
    assert all((output_dir / name).exists() for name in final["artifacts"].values())


def test_training_fails(tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    in_step_eleven(monkeypatch, fail)
    assert train(arguments(corpus, tmp_path / "out", **SHORT)) == 1
    assert_reports_of_ten_steps(tmp_path / "out", "failed")
    error = report(tmp_path / "out", "phase2_final_report")["phases"][1]["error"]
    assert "OSError: no space left on <device> [/dev/full]" in error
    assert "in training_step" in error
    assert "no space left on &lt;device&gt;" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_ctrl_c_in_training(
    tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_step_eleven(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert train(arguments(corpus, tmp_path / "out", **SHORT)) == 130
    assert_reports_of_ten_steps(tmp_path / "out", "interrupted")
    assert "--resume goes on" in report(tmp_path / "out", "phase2_final_report")["phases"][1]["error"]


def test_ctrl_c_before_training(
    tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator, "choose_precision", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert train(arguments(corpus, tmp_path / "out", **SHORT)) == 130
    assert not (tmp_path / "out").exists()


def test_validation_fails(
    tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orchestrator, "build_claims", fail)
    assert train(arguments(corpus, tmp_path / "out", **SHORT)) == 1
    out = tmp_path / "out"
    assert statuses(out) == {
        "setup": "done",
        "training": "done",
        "validation": "failed",
        "testing": "done",
        "reporting": "done",
    }
    final = report(out, "phase2_final_report")
    assert (final["optimizations"], final["e2e_speedup"]) == ({}, None)
    assert final["accuracy"]["val_loss"] > 0
    assert final["tests"]["passed"] > 0
    assert "validation" not in final["artifacts"]


def test_a_sample_that_cannot_be_written_loses_no_report(
    tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where what it raises is an InputError, which in setup ends the call without reports."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise InputError("no room")

    monkeypatch.setattr(orchestrator, "Generator", refuse)
    assert train(arguments(corpus, tmp_path / "out", phases="training", **SHORT)) == 1
    final = report(tmp_path / "out", "phase2_final_report")
    assert (final["status"], final["sample"]) == ("failed", None)
    assert final["accuracy"]["val_loss"] > 0


def test_testing_fails(tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orchestrator.IntegrationTestRunner, "run", fail)
    assert train(arguments(corpus, tmp_path / "out", **SHORT)) == 1
    out = tmp_path / "out"
    assert statuses(out) == {
        "setup": "done",
        "training": "done",
        "validation": "done",
        "testing": "failed",
        "reporting": "done",
    }
    final = report(out, "phase2_final_report")
    assert final["tests"] is None
    assert final["e2e_speedup"]["measured"] > 0
    assert report(out, "validation_report")["summary"]["total"] == len(final["optimizations"])


def test_the_page_fails(tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON report does not depend on the page."""
    monkeypatch.setattr(orchestrator, "write_html_report", fail)
    monkeypatch.setattr(orchestrator, "build_claims", lambda context: [])
    assert train(arguments(corpus, tmp_path / "out", **SHORT)) == 1
    final = report(tmp_path / "out", "phase2_final_report")
    assert final["status"] == "failed"
    assert final["phases"][-1]["status"] == "failed"
    assert "html" not in final["artifacts"]


def test_reports_of_an_earlier_attempt_are_not_taken_for_this_one(
    tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resumed, with measuring failing this time: what was measured last time is not this run's."""
    out = tmp_path / "out"
    command = arguments(corpus, out, **SHORT, resume=True)
    assert train(command) == 0
    monkeypatch.setattr(orchestrator, "build_claims", fail)
    assert train(command) == 1
    final = report(out, "phase2_final_report")
    assert final["optimizations"] == {}
    assert "validation" not in final["artifacts"]
    assert not (out / "validation_report.json").exists()
