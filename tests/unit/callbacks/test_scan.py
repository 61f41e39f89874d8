"""The log of a finished run is judged like a live one, whoever wrote it; a bad log gets one clear line."""

import gzip
import json
import math
import random
from pathlib import Path

import pytest
from ryzen_callbacks.scan import main, scan
from torch.utils.tensorboard import SummaryWriter

SPIKE, SLOW = 300, 400


def series() -> list[tuple[int, float, float]]:
    """Step, loss and seconds; a spike and a stall planted."""
    rng = random.Random(1)
    return [
        (step, 3 + rng.gauss(0, 0.05) + (step == SPIKE), 3.0 if step == SLOW else 0.1)
        for step in range(1, 501)
    ]


def write_csv(path: Path) -> Path:
    lines = ["step,epoch,loss,step_time_ms", *(f"{s},0,{v},{t * 1000}" for s, v, t in series())]
    text = "\n".join(lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


def write_events(path: Path) -> Path:
    with SummaryWriter(str(path)) as writer:
        for step, loss, seconds in series():
            writer.add_scalar("train/loss", loss, step)
            writer.add_scalar("train/step_time_s", seconds, step)
            writer.add_scalar("something/else", math.nan, step)
    return path


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "events"])
def test_planted_faults_are_found_in_every_kind_of_log(tmp_path: Path, name: str) -> None:
    path = write_events(tmp_path / name) if name == "events" else write_csv(tmp_path / name)
    assert [(a.step, a.kind) for a in scan(path)] == [(SPIKE, "loss_spike"), (SLOW, "stall")]


def test_lightnings_csv_log_has_a_values_row_and_an_epochs_row_for_one_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    rows = [f"{step},{3.0 + (step == 150)},\n{step},,0.9" for step in range(200)]
    path.write_text("\n".join(["step,train_loss_step,val_accuracy", *rows]))
    assert [(a.step, a.kind) for a in scan(path)] == [(150, "loss_spike")]


def test_the_command_prints_a_line_for_each_anomaly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_csv(tmp_path / "log.csv")
    assert main([str(path)]) == 0
    first, second, count = capsys.readouterr().out.splitlines()
    assert first.split()[:3] == ["300", "loss_spike", "critical"]
    assert second.split()[:2] == ["400", "stall"]
    assert count == "2 anomalies"
    assert main([str(path), "--json"]) == 0
    assert [a["step"] for a in json.loads(capsys.readouterr().out)] == [SPIKE, SLOW]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.csv", None, "cannot read"),
        ("binary.csv", b"\xff\xfe\x00\x01", "cannot read"),
        ("broken.csv.gz", b"no gzip", "cannot read"),
        ("nostep.csv", b"loss\n1.0\n", "no column 'step'"),
        ("unknown.csv", b"step,joy\n1,2\n", "no column or tag that is known"),
        ("words.csv", b"step,loss\n1,high\n", "high"),
        ("empty.csv", b"", "no column 'step'"),
    ],
)
def test_a_bad_log_ends_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
