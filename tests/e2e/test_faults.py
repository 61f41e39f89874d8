"""Faults of the machine and of the data: a clear message, valid reports, and --resume as if nothing had been.

Kills are in test_resume.py, a damaged token store in tests/unit/data/test_token_store.py, two runs in one
folder in tests/unit/pipeline/test_output_dir.py. docs/reliability.md lists them all.
"""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from outcomes import assert_same_outcome
from tiny import arguments, report, run_script

from ryzen_llm.training import LanguageModule

Train = Callable[[list[str]], int]

REPORTS = ("training_metrics_report", "validation_report", "integration_test_report", "phase2_final_report")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Any], Any]) -> None:
    """Let `act` have the loss of the step after `step` optimizer steps."""
    original = LanguageModule.training_step

    def training_step(self: LanguageModule, *given: Any) -> Any:
        loss = original(self, *given)
        return act(loss) if self.global_step == step else loss

    monkeypatch.setattr(LanguageModule, "training_step", training_step)


def test_the_folder_is_removed_while_it_trains(
    tmp_path: Path,
    corpus: Path,
    finished: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What was in it is gone: training fails at its next writing, says so, and can be started again."""
    out = tmp_path / "out"

    def remove(loss: Any) -> Any:
        shutil.rmtree(out)
        return loss

    with monkeypatch.context() as once:
        at_step(once, 10, remove)
        assert train(arguments(corpus, out)) == 1
    assert "No such file or directory" in capsys.readouterr().out
    final = report(out, "phase2_final_report")
    assert [phase["status"] for phase in final["phases"]] == ["done", "failed", "skipped", "skipped", "done"]
    assert train(arguments(corpus, out, resume=True)) == 0
    assert_same_outcome(out, finished)


def test_a_loss_that_is_not_a_number(
    tmp_path: Path,
    corpus: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It spoils the weights: training is said to have failed, and at which step it began."""
    out = tmp_path / "out"
    at_step(monkeypatch, 10, lambda loss: loss * float("nan"))
    with pytest.warns(UserWarning, match="step 11"):
        assert train(arguments(corpus, out, **{"trainer.max_epochs": 1})) == 1
    assert "the validation loss is nan" in capsys.readouterr().out
    final, training = (report(out, name) for name in ("phase2_final_report", "training_metrics_report"))
    assert [phase["status"] for phase in final["phases"]] == ["done", "failed", "skipped", "skipped", "done"]
    assert final["accuracy"]["val_loss"] is None
    first = training["anomalies"][0]
    assert (first["step"], first["kind"], first["value"]) == (11, "non_finite", None)
    assert "step 11" in (out / "report.html").read_text("utf-8")


def test_the_clock_is_set_back(
    tmp_path: Path, corpus: Path, finished: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a day, in mid-run: no duration is measured with it."""
    clock = time.time

    def set_back(loss: Any) -> Any:
        monkeypatch.setattr(time, "time", lambda: clock() - 86400)
        return loss

    at_step(monkeypatch, 10, set_back)
    assert train(arguments(corpus, tmp_path / "out", validation_rounds=1)) == 0
    final, training = (
        report(tmp_path / "out", name) for name in ("phase2_final_report", "training_metrics_report")
    )
    assert all(0 < phase["duration_s"] < 300 for phase in final["phases"])
    assert training["statistics"]["step_time_s"]["min"] > 0
    assert training["statistics"]["step_time_s"]["max"] < 300
    assert final["accuracy"] == report(finished, "phase2_final_report")["accuracy"]


@pytest.mark.slow
def test_a_loader_worker_is_killed(tmp_path: Path, corpus: Path, finished: Path, train: Train) -> None:
    """The oldest child is one of training's: one of validation's could be gone without being missed."""
    kill = """
import multiprocessing, os, signal
from ryzen_llm.training import LanguageModule
step = LanguageModule.training_step
def training_step(self, *a):
    if self.global_step == 10:
        os.kill(min(child.pid for child in multiprocessing.active_children()), signal.SIGKILL)
    return step(self, *a)
LanguageModule.training_step = training_step
"""
    command = arguments(corpus, tmp_path / "out", data__cache_dir=tmp_path / "cache", data__num_workers=2)
    failed = run_script("train", command, prelude=kill)
    assert failed.returncode == 1, failed.stderr
    assert "A DataLoader worker was probably ended" in failed.stdout
    assert "last checkpoint with --resume" in failed.stdout
    assert report(tmp_path / "out", "phase2_final_report")["phases"][1]["status"] == "failed"
    assert train([*command, "--resume=true"]) == 0
    assert_same_outcome(tmp_path / "out", finished)


def test_a_loader_worker_whose_pipe_breaks_first(
    tmp_path: Path,
    corpus: Path,
    train: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On a busy machine PyTorch raised this instead of naming the worker, in one of thirty kills."""

    def reset(loss: Any) -> Any:
        raise ConnectionResetError(104, "Connection reset by peer")

    at_step(monkeypatch, 10, reset)
    assert train(arguments(corpus, tmp_path / "out", data__num_workers=1, phases="training")) == 1
    screen = " ".join(capsys.readouterr().out.split())  # without its line ends
    assert "Connection reset by peer A DataLoader worker was probably ended" in screen


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB, which takes one checkpoint and not two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_the_disk_is_full(
    small_disk: Path, tmp_path: Path, corpus: Path, finished: Path, train: Train
) -> None:
    """With more room and --resume, the run ends as if there had always been enough."""
    out = small_disk / "out"
    command = arguments(corpus, out, data__cache_dir=tmp_path / "cache")
    failed = run_script("train", command)
    assert failed.returncode == 1, failed.stderr
    assert "No space left" in failed.stdout
    for name in REPORTS:
        if (out / f"{name}.json").exists():
            report(out, name)  # whole, or not there
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert train([*command, "--resume=true"]) == 0
    assert_same_outcome(out, finished)
