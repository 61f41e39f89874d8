"""integration_test_report.json: its fields, as pydantic models."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict
from ryzen_callbacks import write_json

Category = Literal["unit", "integration", "end_to_end", "performance"]
TestStatus = Literal["passed", "failed", "error", "skipped"]
CATEGORIES: tuple[Category, ...] = get_args(Category)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class TestResult(_Part):
    """One check. `error` is one line: what went wrong, or why it was skipped."""

    __test__ = False  # not something for pytest to collect

    name: str
    category: Category
    status: TestStatus
    duration_s: float
    error: str | None = None
    traceback: str | None = None


class TestSummary(_Part):
    """How many checks came out how. `pass_rate` is passed / (passed + failed + errors), None if none ran."""

    __test__ = False

    total: int
    passed: int
    failed: int
    errors: int
    skipped: int
    pass_rate: float | None
    duration_s: float


class IntegrationTestReport(_Part):
    """integration_test_report.json."""

    schema_version: int = 1
    summary: TestSummary
    tests: list[TestResult]

    @classmethod
    def of(cls, tests: list[TestResult], duration_s: float) -> IntegrationTestReport:
        """The report of `tests`, with its summary counted from them."""
        count = {status: sum(test.status == status for test in tests) for status in get_args(TestStatus)}
        ran = len(tests) - count["skipped"]
        summary = TestSummary(
            total=len(tests),
            passed=count["passed"],
            failed=count["failed"],
            errors=count["error"],
            skipped=count["skipped"],
            pass_rate=count["passed"] / ran if ran else None,
            duration_s=duration_s,
        )
        return cls(summary=summary, tests=tests)

    def write(self, path: str | Path) -> Path:
        """Write the report as strict JSON, atomically; returns the path."""
        return write_json(path, self.model_dump(mode="python"))
