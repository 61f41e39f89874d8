"""Reports for tests of what shows them."""

from typing import Any

from ryzen_llm.pipeline.report import Accuracy, FinalReport, Phase


def final_report(**changes: Any) -> FinalReport:
    """Of a run that did nothing, but for `changes`."""
    values: dict[str, Any] = {
        "status": "done",
        "phases": [Phase(name="setup", status="done", duration_s=1.25)],
        "optimizations": {},
        "e2e_speedup": None,
        "accuracy": Accuracy(reason="training did not finish"),
        "tests": None,
        "sample": None,
        "recommendations": [],
        "artifacts": {},
    }
    return FinalReport(**{**values, **changes})
