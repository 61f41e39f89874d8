"""Self-tests that fail count as a claim that does: by the share of those that ran."""

from pathlib import Path
from typing import Literal

import pytest

from ryzen_llm.pipeline import Orchestrator, parse
from ryzen_llm.selftest.report import IntegrationTestReport, TestResult

Status = Literal["passed", "failed", "error", "skipped"]


@pytest.mark.parametrize(
    ("statuses", "verdict"),
    [
        (["passed", "passed", "passed", "failed"], "PASS"),
        (["passed", "passed", "failed", "skipped"], "FAIL"),
        (["passed", "passed", "passed", "error", "skipped"], "PASS"),
        (["skipped"], "NOT_MEASURED"),
    ],
)
def test_the_verdict_is_by_test_pass_rate_min(statuses: list[Status], verdict: str, tmp_path: Path) -> None:
    run = Orchestrator(parse(["--test_pass_rate_min=0.75", f"--output_dir={tmp_path}"]))
    assert run._judged_tests() is None
    run.tests = IntegrationTestReport.of(
        [TestResult(name="x", category="unit", status=status, duration_s=0.0) for status in statuses], 0.0
    )
    judged = run._judged_tests() or {}
    assert (judged["status"], judged["threshold"], judged["total"]) == (verdict, 0.75, len(statuses))
