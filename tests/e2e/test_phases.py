"""Phases run alone give what they give in a whole run, and leave the other phases' reports alone."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ryzen_callbacks import write_json
from tiny import arguments, load_script, report

import ryzen_llm.pipeline.orchestrator as orchestrator
from ryzen_llm.training.checkpoint import load_checkpoint

Train = Callable[[list[str]], int]


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def alone(corpus: Path, output_dir: Path, phases: str, **changes: Any) -> list[str]:
    return arguments(corpus, output_dir, phases=phases, validation_rounds=1, **changes)


def contents(folder: Path, *names: str) -> list[bytes]:
    return [(folder / name).read_bytes() for name in names]


def test_testing_alone_keeps_what_else_was_measured(
    copied: Path, finished: Path, corpus: Path, train: Train
) -> None:
    kept = ("validation_report.json", "training_metrics_report.json", "config.yaml")
    (copied / "integration_test_report.json").unlink()
    assert train(alone(corpus, copied, "testing")) == 0
    assert contents(copied, *kept) == contents(finished, *kept)
    final, before = (report(folder, "phase2_final_report") for folder in (copied, finished))
    assert final["tests"]["passed"] == before["tests"]["passed"]
    for part in (
        "status",
        "checkpoint",
        "optimizations",
        "accuracy",
        "sample",
        "artifacts",
        "recommendations",
    ):
        assert final[part] == before[part], part
    for index in (1, 2):  # training and validation: as they went then
        assert final["phases"][index] == before["phases"][index]
    assert "No claim was measured" not in (copied / "report.html").read_text("utf-8")


def test_validation_alone_measures_the_trained_model(
    copied: Path, finished: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its loss is that at the end of training, and nothing is added to training's curves."""
    monkeypatch.setattr(orchestrator, "build_claims", lambda context: [])
    curves = sorted((copied / "tensorboard").iterdir())
    (copied / "phase2_final_report.json").unlink()  # as after a kill
    assert train(alone(corpus, copied, "validation")) == 0
    final, before = (report(folder, "phase2_final_report") for folder in (copied, finished))
    assert final["accuracy"]["val_loss"] == pytest.approx(before["accuracy"]["val_loss"], rel=1e-6)
    assert final["sample"] == before["sample"]
    assert sorted((copied / "tensorboard").iterdir()) == curves
    assert {p["name"]: p["status"] for p in final["phases"]} == {
        "setup": "done",
        "training": "skipped",
        "validation": "done",
        "testing": "skipped",
        "reporting": "done",
    }
    assert report(copied, "validation_report")["results"] == []


def test_masked_documents_reach_the_loss_and_the_claims(
    copied: Path, finished: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that see less are predicted otherwise; claims are of a model that masks, too."""
    separators: list[int | None] = []

    def build_claims(context: Any) -> list[Any]:
        separators.append(context.model.document_separator)
        return []

    monkeypatch.setattr(orchestrator, "build_claims", build_claims)
    assert train(alone(corpus, copied, "validation", mask_documents=True)) == 0
    _, tokenizer = load_checkpoint(finished / "checkpoints" / "step=40.ckpt")
    assert separators == [tokenizer.end_of_text_id]
    final, before = (report(folder, "phase2_final_report") for folder in (copied, finished))
    assert final["accuracy"]["val_loss"] != pytest.approx(before["accuracy"]["val_loss"], rel=1e-5)


def test_a_checkpoint_from_elsewhere_is_measured_in_a_folder_of_its_own(
    finished: Path, corpus: Path, train: Train, tmp_path: Path
) -> None:
    checkpoint = finished / "checkpoints" / "step=40.ckpt"
    assert (
        train(
            alone(
                corpus, tmp_path / "own", "testing", checkpoint=checkpoint, data__cache_dir=tmp_path / "cache"
            )
        )
        == 0
    )
    final = report(tmp_path / "own", "phase2_final_report")
    assert final["checkpoint"] == str(checkpoint)
    assert final["tests"]["passed"] == 16
    assert final["accuracy"]["val_loss"] is None
    assert final["accuracy"]["reason"] == "neither training nor validation is in --phases"


def test_training_alone_can_be_followed_by_the_rest(
    tmp_path: Path, corpus: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both report the validation loss of the weights that they name."""
    monkeypatch.setattr(orchestrator, "build_claims", lambda context: [])
    out = tmp_path / "out"
    # Ends in an epoch, so that the validation within training is of earlier weights.
    short = {"trainer.max_steps": 12, "trainer.limit_train_batches": 8}
    assert train(alone(corpus, out, "training", **short)) == 0
    first = report(out, "phase2_final_report")
    assert first["checkpoint"] == "checkpoints/step=12.ckpt"
    assert [phase["status"] for phase in first["phases"]] == ["done", "done", "skipped", "skipped", "done"]
    assert train(alone(corpus, out, "validation,testing", **short)) == 0
    second = report(out, "phase2_final_report")
    assert [phase["status"] for phase in second["phases"]] == ["done"] * 5
    assert second["phases"][1] == first["phases"][1]
    assert second["accuracy"]["val_loss"] == pytest.approx(first["accuracy"]["val_loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "naming"),
    [
        ({"phases": "validation,tests"}, "phases has 'tests', expected some of training, validation"),
        ({"phases": "training", "checkpoint": "x.ckpt"}, "to go on with a run --resume"),
        ({"phases": "testing"}, "holds no checkpoint: give --checkpoint"),
        ({"phases": "testing", "checkpoint": "nowhere.ckpt"}, "nowhere.ckpt: no such file"),
    ],
)
def test_what_cannot_be_is_refused(
    changes: dict[str, str],
    naming: str,
    tmp_path: Path,
    corpus: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(arguments(corpus, tmp_path / "out", **changes)) == 2
    assert naming in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_runs_reports_are_not_mixed_with_these(
    copied: Path, finished: Path, corpus: Path, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished / "checkpoints" / "step=40.ckpt"
    before = contents(copied, "phase2_final_report.json", "report.html")
    assert train(alone(corpus, copied, "testing", checkpoint=other)) == 2
    assert "choose another output_dir" in capsys.readouterr().err
    assert contents(copied, "phase2_final_report.json", "report.html") == before


def test_two_runs_are_compared(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against itself nothing differs; with another figure, setting and machine, these do."""
    monkeypatch.setenv("COLUMNS", "300")
    compare = load_script("compare").main
    assert compare([str(finished), str(copied)]) == 0
    same = capsys.readouterr().out
    assert "no difference" in same
    assert "in the second" not in same

    config = copied / "config.yaml"
    config.write_text(config.read_text("utf-8").replace("batch_size: 4", "batch_size: 16"), "utf-8")
    training, validation = (report(copied, f"{n}_report") for n in ("training_metrics", "validation"))
    training["metadata"]["environment"]["cpu"] = "another"
    for result in validation["results"]:
        if result["ci_low"] is not None:
            result["ci_low"], result["ci_high"] = result["ci_low"] + 9, result["ci_high"] + 9
    write_json(copied / "training_metrics_report.json", training)
    write_json(copied / "validation_report.json", validation)
    assert compare([str(finished), str(copied)]) == 0
    different = capsys.readouterr().out
    for text in ("data.batch_size", "16", "another", "higher in the second"):
        assert text in different, text
    assert compare([str(finished), str(copied / "checkpoints")]) == 2
    assert "has no phase2_final_report.json" in capsys.readouterr().err
