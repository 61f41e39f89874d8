"""The example projects run as they stand, and their reports say what their first lines promise."""

import importlib.util
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[3] / "examples"


def run(name: str, output_dir: Path, report: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(["--output-dir", str(output_dir)])
    return json.loads((output_dir / report).read_text())


def test_every_example_is_tried_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"classifier", "gan", "own_claim"}


def test_the_classifier_learns_and_its_spoilt_batch_is_found(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="the loss jumped to"):
        report = run("classifier", tmp_path, "training_metrics_report.json")
    assert [row["epoch"] for row in report["epochs"]] == [0, 1]
    assert report["epochs"][1]["accuracy"] > 0.9
    timing = {"stall", "throughput_drop", "data_wait_growth"}  # on a busy machine there may be some
    first = next(row for row in report["anomalies"] if row["kind"] not in timing)
    assert (first["kind"], first["step"]) == ("loss_spike", 161)
    assert len((tmp_path / "training_metrics_report.csv").read_text().splitlines()) == 1 + 40


def test_the_gan_makes_one_step_a_batch(tmp_path: Path) -> None:
    report = run("gan", tmp_path, "training_metrics_report.json")
    assert report["statistics"]["loss"]["count"] == 200
    assert report["statistics"]["learning_rate"]["mean"] == pytest.approx(1e-3)
    assert report["statistics"]["learning_rate_1"]["mean"] == pytest.approx(2e-3)
    assert report["statistics"]["critic_loss"]["count"] > 0


def test_the_claims_are_measured_and_those_that_are_exact_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = run("own_claim", tmp_path, "validation_report.json")
    timed, weights, loss = report["results"]
    assert (weights["status"], weights["measured"]) == ("PASS", 0.5)
    assert loss["status"] == "PASS"
    # What a timing says of a busy machine is its own affair; that it was taken is not.
    samples = timed["samples"]
    logs = [math.log(a / b) for a, b in zip(samples["baseline"], samples["optimized"], strict=True)]
    assert len(logs) == 12
    assert timed["measured"] == pytest.approx(math.exp(statistics.median(logs)))
    assert "bfloat16 weights: saving 50.0%" in capsys.readouterr().out
