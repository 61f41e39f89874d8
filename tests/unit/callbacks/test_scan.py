"""The log of a finished run is judged like a live one, whoever wrote it; a bad log gets one clear line."""

import gzip
import json
import math
import random
from pathlib import Path

import pytest
from ryzen_callbacks.scan import main, read_log, scan
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
    text = "".join(f"{line}\n" for line in lines)
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
    path.write_text("\n".join(["step,train_loss_step,val_accuracy", *rows, ""]))
    assert [(a.step, a.kind) for a in scan(path)] == [(150, "loss_spike")]


CUTS = (b"0,1", b'0,"3.', b"0,3.0,1", b"0,3.0,200", b"0,3.0e-", b"0,-,200", b"0,3.0,200,\xc3", b"\0" * 40)


@pytest.mark.parametrize("cut", CUTS)
def test_a_last_line_that_was_cut_off_is_left_out_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], cut: bytes
) -> None:
    """A run that was killed: the line may lack values, end in half a number, or be a wrong number."""
    path = tmp_path / "log.csv"
    rows = [f"0,{3.0 + (step == 150)},{step}\n" for step in range(200)]
    path.write_bytes("".join(["epoch,loss,step\n", *rows]).encode() + cut)
    assert main([str(path)]) == 0
    captured = capsys.readouterr()
    assert [line.split()[0] for line in captured.out.splitlines()] == ["150", "1"]
    assert captured.err == f"{path}, line 202: left out, as it has no line end: it may have been cut off\n"
    assert read_log(path)[1] == {"loss": 3.0}
    assert max(read_log(path)) == 199


def test_a_log_of_a_run_that_has_only_begun_is_no_unknown_one(tmp_path: Path) -> None:
    for text in ("step,loss", "step,loss\n", "step,loss\n1,2."):
        (tmp_path / "log.csv").write_text(text)
        with pytest.raises(ValueError, match=r"log\.csv has no values in a column"):
            read_log(tmp_path / "log.csv")


def test_a_byte_order_mark_does_not_belong_to_the_first_columns_name(tmp_path: Path) -> None:
    """Excel begins its CSV files with one."""
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbf" + b"step,loss\n1,2.5\n")
    assert read_log(path) == {1: {"loss": 2.5}}


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


BAD_LOGS: dict[str, tuple[bytes | None, str]] = {
    "missing.csv": (None, "cannot read"),
    "binary.csv": (b"\xff\xfe\x00\x01", "cannot read"),
    "broken.csv.gz": (b"no gzip", "cannot read"),
    "cut.csv.gz": (gzip.compress(b"step,loss\n" + b"1,1.0\n" * 99)[:-12], "cannot read"),
    "damaged.csv.gz": (gzip.compress(b"")[:10] + b"\xff" * 20, "cannot read"),
    "long.csv": (b"step,loss\n1," + b"1" * 200_000 + b"\n", "cannot read"),
    "nostep.csv": (b"loss\n1.0\n", "no column 'step'"),
    "unknown.csv": (b"step,joy\n1,2\n", "no values in a column or tag that is known"),
    "empty.csv": (b"", "no column 'step'"),
    "words.csv": (
        b"step,loss\n1,1.0\n2,high\n",
        "words.csv, line 3: could not convert string to float: 'high'",
    ),
    "gap.csv": (b"step,loss\n1,1.0\n,1.0\n", "gap.csv, line 3: the step is '', expected a whole number"),
    "short.csv": (b"loss,step\n1.0\n1.0,1\n", "short.csv, line 2: it has too few values, expected 2"),
    "damaged.csv": (b"step,loss\n1,1.0\n2\n3,1.0\n", "damaged.csv, line 3: it has too few values"),
    "grown.csv": (b"step,loss\n1,2.93,1.0\n4,1.0\n", "grown.csv, line 2: it has too many values, expected 2"),
    "last.csv": (b"step,loss\n1,1.0\n2\n", "last.csv, line 3: it has too few values"),
    "half.csv": (b"step,loss\n0.5,1.0\n", "half.csv, line 2: the step is '0.5', expected a whole number"),
    "word.csv": (b"step,loss\none,1.0\n", "word.csv, line 2: the step is 'one', expected"),
    "endless.csv": (b"step,loss\ninf,1.0\n", "endless.csv, line 2: the step is 'inf', expected"),
}


@pytest.mark.parametrize("name", BAD_LOGS)
def test_a_bad_log_ends_with_status_2_and_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path = tmp_path / name
    content, message = BAD_LOGS[name]
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_above_the_runs_says_where_the_events_are(tmp_path: Path) -> None:
    run, empty = write_events(tmp_path / "lightning_logs" / "version_0"), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=rf"no TensorBoard events in it; there are some in {run}"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match="no TensorBoard events in it; expected a run's log folder"):
        read_log(empty)


def test_a_space_after_a_comma_belongs_to_no_name(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("step, loss\n1, 2.5\n")
    assert read_log(path) == {1: {"loss": 2.5}}
