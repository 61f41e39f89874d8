"""report.html stands alone, shows what the reports hold, and lets nothing in them act."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ryzen_callbacks import ValidationReport, ValidationResult
from ryzen_callbacks.reports import Quantity

from ryzen_llm.pipeline.html_report import write_html_report
from ryzen_llm.pipeline.report import Accuracy, FinalReport, Phase

HOSTILE = "<script>alert('x')</script><img src=//evil.example/a onerror=\"x\"> {{ 7 * 7 }} &amp; \"'>"
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "pre", "br", "b", "small"),
    *("div", "span", "ul", "li", "dl", "dt", "dd", "svg", "polyline"),
}


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def claim_result(**changes: Any) -> ValidationResult:
    values = {"name": "c", "metric": "speedup", "threshold": 1.0, "status": "PASS", "message": "m"}
    return ValidationResult(**{**values, **changes})


def final_report(**changes: Any) -> FinalReport:
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


def training_data(**changes: Any) -> dict[str, Any]:
    metadata = {"model": "tiny", "started_at": "2026-01-01", "environment": {"cpu": "a cpu"}}
    values = {"metadata": metadata, "batches": [], "epochs": [], "anomalies": [], "batches_every_n_steps": 10}
    return {**values, **changes}


def rows(losses: dict[int, float | None], name: str = "loss") -> list[dict[str, float | None]]:
    return [{"step": step, name: loss} for step, loss in losses.items()]


def render(
    folder: Path,
    report: FinalReport,
    training: dict[str, Any] | None = None,
    results: list[ValidationResult] | None = None,
) -> Page:
    training_report = folder / "training_metrics_report.json"
    if training is not None:
        training_report.write_text(json.dumps(training))
    validation = ValidationReport.of(results, {}) if results else None
    page = write_html_report(folder / "report.html", report, validation, training_report).read_text("utf-8")
    assert [path.name for path in folder.iterdir() if path != training_report] == ["report.html"]
    return Page(page)


def points_of(page: Page) -> list[tuple[float, ...]]:
    """Of the loss curve, in percent from the left and from the top."""
    (points,) = [value for name, value in page.attributes if name == "points"]
    return [tuple(float(part) for part in point.split(",")) for point in points.split()]


def test_hostile_text_is_only_shown(tmp_path: Path) -> None:
    """Wherever text from the model, the data or an error can come in."""
    report = final_report(
        phases=[Phase(name="training", status="failed", duration_s=None, error=HOSTILE)],
        sample=HOSTILE,
        recommendations=[HOSTILE],
        accuracy=Accuracy(reason=HOSTILE),
    )
    metadata = {"model": HOSTILE, "started_at": HOSTILE, "environment": {HOSTILE: HOSTILE}}
    training = training_data(
        metadata=metadata,
        batches=rows({1: 2.0, 2: 1.0}),
        anomalies=[{"step": 1, "message": HOSTILE}],
    )
    side = Quantity(name=HOSTILE, value=1.0, unit="s")
    result = claim_result(
        name=HOSTILE, description=HOSTILE, message=HOSTILE, measured=1.0, baseline=side, optimized=side
    )
    page = render(tmp_path, report, training, [result])
    shown = HOSTILE.replace("_", " ")
    assert page.text.replace("_", " ").count(shown) == 14
    assert page.tags <= ALLOWED
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    training = training_data(batches=rows({1: 3.0, 2: 2.0}), epochs=rows({2: 2.5}, "val_loss"))
    render(
        tmp_path, final_report(sample="x"), training, [claim_result(measured=1.5, ci_low=1.2, ci_high=1.7)]
    )
    page = (tmp_path / "report.html").read_text("utf-8")
    for outside in ("http", "//", "url(", "@import", "<script", "<link"):
        assert outside not in page.lower(), outside


def test_the_curve_has_a_point_for_every_loss(tmp_path: Path) -> None:
    """Higher is up, later is right, and a step without a loss has no point."""
    training = training_data(
        batches=rows({10: 4.0, 20: None, 30: 3.0, 50: 2.0}),
        epochs=rows({40: 2.5, 50: None}, "val_loss"),
        anomalies=[{"step": 30, "message": "a spike"}],
    )
    page = render(tmp_path, final_report(), training)
    assert points_of(page) == [(20, 0), (60, 50), (100, 100)]
    titles = [value for name, value in page.attributes if name == "title"]
    assert titles == ["step 30: a spike", "step 40: 2.500"]
    assert ("style", "left:80.0%;top:75.0%") in page.attributes
    assert "step 30: a spike" in page.text


def test_the_interval_is_drawn_to_scale(tmp_path: Path) -> None:
    """Interval 2 to 4 around 3, claimed 1.5: no change at 1 is the left end, 4 the right, 8% kept free."""
    result = claim_result(measured=3.0, ci_low=2.0, ci_high=4.0, threshold=1.5)
    page = render(tmp_path, final_report(), results=[result])
    low, high = 1 - 0.08 * 3, 4 + 0.08 * 3

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    styles = [value for name, value in page.attributes if name == "style"]
    bar = f"left:{place(2)}%;width:{place(4) - place(2)}%"
    assert styles[:4] == [f"left:{place(1)}%", f"left:{place(1.5)}%", bar, f"left:{place(3)}%"]
    assert "line to meet: at least 1.5x" in page.text


def test_a_claim_without_a_figure_has_no_drawing(tmp_path: Path) -> None:
    page = render(
        tmp_path, final_report(), results=[claim_result(status="NOT_MEASURED", message="not built")]
    )
    assert "not built" in page.text
    assert "line to meet" not in page.text


@pytest.mark.parametrize("losses", [{}, {1: 3.0}, {1: 3.0, 2: None}, {1: None, 2: None}])
def test_no_curve_of_less_than_two_losses(losses: dict[int, float | None], tmp_path: Path) -> None:
    assert "svg" not in render(tmp_path, final_report(), training_data(batches=rows(losses))).tags


def test_equal_losses_are_a_flat_curve(tmp_path: Path) -> None:
    page = render(tmp_path, final_report(), training_data(batches=rows({1: 2.0, 2: 2.0})))
    assert points_of(page) == [(50, 0), (100, 0)]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """Not even a training report, and no figure in the final one."""
    page = render(tmp_path, final_report(phases=[Phase(name="testing", status="skipped", duration_s=None)]))
    assert "No claim was measured" in page.text
    assert "No validation loss: training did not finish." in page.text
    assert "None" not in page.text
