"""Two commands are compared by the same method as claims."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ryzen_callbacks.compare import main

SLEEP = f"{sys.executable} -S -c 'import time; time.sleep({{}})'"


def test_the_slower_command_fails_a_claimed_speed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """B takes a tenth of a second more than A: it is nowhere near twice as fast, whatever the noise."""
    report = tmp_path / "report.json"
    status = main(
        [SLEEP.format(0), SLEEP.format(0.1), "--threshold", "2", "--rounds", "6", "--report", str(report)]
    )
    assert status == 0
    assert capsys.readouterr().out.startswith("FAIL: speedup 0.")
    (result,) = json.loads(report.read_text())["results"]
    assert result["measured"] < 1
    assert len(result["samples"]["baseline"]) == 6
    assert result["optimized"]["name"] == SLEEP.format(0.1)


@pytest.mark.parametrize(
    ("report", "words"),
    [
        ("file/report.json", "cannot write report.json in"),
        ("folder", "folder is a folder, expected the path of a file; give one in it, or beside it"),
        ("fifo", "fifo is no regular file, and a report would take its place; give another path"),
        ("r" * 250, "File name too long"),
    ],
)
def test_a_report_that_cannot_be_written_is_noticed_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: str, words: str
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    marks = f'{sys.executable} -S -c "open({str(tmp_path / "ran")!r}, chr(119))"'
    assert main([marks, marks, "--rounds", "1", "--report", str(tmp_path / report)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "ran").exists()


def test_the_verdict_is_told_even_if_its_report_cannot_be_written_after_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder takes the place of the report while the commands run."""
    report = tmp_path / "report.json"
    assert main([f"mkdir -p {report}", "true", "--rounds", "1", "--report", str(report)]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("WARNING: speedup")
    assert "the report was not written" in captured.err


def test_ctrl_c_ends_it_with_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("subprocess.run", interrupted)
    assert main(["true", "true"]) == 130


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-program", "true"], "NOT_MEASURED: not measured: measuring raised FileNotFoundError"),
        (["false", "true"], "NOT_MEASURED: not measured: measuring raised CalledProcessError"),
        (["", "true"], "a command is empty"),
        (["true 'x", "true"], 'cannot split the command "true \'x" into words (No closing quotation)'),
        (["true && true", "true"], "has '&&', which is for a shell; give sh -c '...', or quote it"),
        (["true", "true > out"], "has '>', which is for a shell"),
        (["true", "true", "--rounds", "0"], "rounds is 0"),
        (["true", "true", "--threshold", "nan"], "threshold is nan"),
        (["true", "true", "--threshold", "0"], "threshold is 0.0"),
    ],
)
def test_what_cannot_be_compared_says_why(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.out + captured.err


def test_a_quoted_operator_is_an_argument_like_any_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test '|' = '|'", "sh -c 'true && true'", "--rounds", "1"]) == 0
    assert capsys.readouterr().out.startswith("WARNING: speedup")
