"""The screen at the end says what the report says, whatever characters are in it."""

import io
from pathlib import Path

import pytest
from made_reports import final_report
from pydantic import ValidationError
from rich.console import Console

from ryzen_llm.pipeline.report import Component, FinalReport, Phase
from ryzen_llm.pipeline.screen import show_summary

MARKUP = "size [/tensor] of [batch, time] is [red]wrong[/red]"


def screen(report: FinalReport, folder: str = "/runs/out", width: int = 200, *to_generate: str) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show_summary(console, report, Path(folder), to_generate)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("status", ["PASS", "FAIL", "WARNING", "NOT_MEASURED"])
def test_every_verdict_has_its_line(status: str) -> None:
    found = Component(
        status=status, measured=None, ci_low=None, ci_high=None, threshold=1.0, message=f"because {MARKUP}"
    )
    (line,) = [
        line
        for line in screen(final_report(optimizations={"a claim": found})).splitlines()
        if "a claim" in line
    ]
    assert [cell.strip() for cell in line.strip("│ ").split("│")] == ["a claim", status, f"because {MARKUP}"]


def test_square_brackets_are_text() -> None:
    shown = screen(
        final_report(
            phases=[Phase(name="training", status="failed", duration_s=1.0, error=MARKUP)],
            sample=f"x = {MARKUP}",
        ),
        folder="/runs/[red]/out",
    )
    assert f"training failed: {MARKUP}" in shown
    assert f"x = {MARKUP}" in shown
    assert "tensorboard --logdir /runs/[red]/out/tensorboard" in shown


def test_what_is_to_be_copied_is_not_broken_into_lines() -> None:
    folder = "/a/long/path" * 12 + "/out"
    shown = screen(final_report(), folder, 60, "--model", folder).splitlines()
    assert f"curves:  tensorboard --logdir {folder}/tensorboard" in shown
    assert f'text:    python scripts/generate.py --model {folder} --prompt "..."' in shown


def test_what_is_missing_is_left_out() -> None:
    shown = screen(final_report())
    assert "None" not in shown
    assert "validation loss" not in shown
    assert "self-tests" not in shown
    assert "generate.py" not in shown


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ("PASS", "self-tests: 9 passed, 1 failed, 0 errors, 2 skipped"),
        ("FAIL", "self-tests: 9 passed, 1 failed, 0 errors, 2 skipped: FAIL, at least 95.0% have to pass"),
    ],
)
def test_too_few_self_tests_that_passed_are_a_verdict(status: str, line: str) -> None:
    counts = {"passed": 9, "failed": 1, "errors": 0, "skipped": 2}
    shown = screen(final_report(tests={**counts, "threshold": 0.95, "status": status}))
    assert line in shown.splitlines()


def test_a_report_holds_its_fields_and_no_others() -> None:
    report = final_report(sample="text")
    assert FinalReport.model_validate_json(report.model_dump_json()) == report
    for wrong in ({"extra": 1}, {"status": "fine"}, {"phases": [{"name": "setup", "status": "passed"}]}):
        with pytest.raises(ValidationError):
            FinalReport(**{**report.model_dump(), **wrong})
