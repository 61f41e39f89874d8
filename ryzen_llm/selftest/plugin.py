"""The pytest plugin that gives the checks their fixture and collects their results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest

from ryzen_llm.selftest.report import CATEGORIES, Category, TestResult, TestStatus
from ryzen_llm.selftest.trained import Trained

OnProgress = Callable[[str, int, int], None]


class ResultPlugin:
    """One run of pytest; afterwards `results` has every check, in the order run."""

    def __init__(self, trained: Trained, on_progress: OnProgress | None) -> None:
        self.results: list[TestResult] = []
        self.interrupted: BaseException | None = None
        self._trained = trained
        self._on_progress = on_progress
        self._total = 0
        self._reports: list[pytest.TestReport] = []

    @pytest.fixture(scope="session")
    def trained(self) -> Trained:
        """The trained model and what belongs to it."""
        return self._trained

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """Note how many checks there are."""
        self._total = len(session.items)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file of checks that cannot be imported is an error."""
        if report.failed:
            traceback = report.longreprtext
            self._add(report.nodeid, "error", 0.0, traceback.strip().splitlines()[-1], traceback)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a check up when its set-up, call and tear-down are done."""
        self._reports.append(report)
        if report.when != "teardown":
            return
        parts, self._reports = self._reports, []
        telling = next((part for part in parts if part.failed), None) or next(
            (part for part in parts if part.skipped), report
        )
        status: TestStatus = "passed"
        error = None
        if telling.failed:
            status = "failed" if telling.when == "call" else "error"
            crash = getattr(telling.longrepr, "reprcrash", None)
            error = (crash.message if crash else telling.longreprtext).strip().split("\n")[0]
        elif telling.skipped:
            status = "skipped"
            error = cast("tuple[str, int, str]", telling.longrepr)[2].removeprefix("Skipped: ")
        traceback = telling.longreprtext if telling.failed else None
        self._add(report.nodeid, status, sum(part.duration for part in parts), error, traceback)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Keep Ctrl-C for the runner to raise again; pytest ends with a mere exit status."""
        self.interrupted = excinfo.value

    def _add(
        self, nodeid: str, status: TestStatus, duration_s: float, error: str | None, traceback: str | None
    ) -> None:
        file, _, name = nodeid.partition("::")
        category = cast(Category, Path(file).stem)
        assert category in CATEGORIES
        self.results.append(
            TestResult(
                name=name or file,
                category=category,
                status=status,
                duration_s=duration_s,
                error=error,
                traceback=traceback,
            )
        )
        if self._on_progress is not None:
            self._on_progress(name or file, len(self.results), max(self._total, len(self.results)))
