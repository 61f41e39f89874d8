"""report.html stands alone, shows what the reports hold, and lets nothing in them act."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from ryzen_llm.pipeline.html_report import write_html_report
from ryzen_llm.pipeline.report import Accuracy, Component, FinalReport, Phase

HOSTILE = "<script>alert('x')</script><img src=//evil.example/a onerror=\"x\"> {{ 7 * 7 }} &amp; \"'>"
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre"),
    *("table", "tr", "th", "td", "ul", "li", "svg", "polyline"),
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


def component(**changes: Any) -> Component:
    values = {
        "status": "PASS",
        "measured": 1.0,
        "ci_low": 1.0,
        "ci_high": 1.0,
        "threshold": 1.0,
        "message": "m",
    }
    return Component(**{**values, **changes})


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


def render(folder: Path, report: FinalReport, training: Any = None) -> Page:
    training_report = folder / "training_metrics_report.json"
    if training is not None:
        training_report.write_text(json.dumps(training))
    page = write_html_report(folder / "report.html", report, training_report).read_text("utf-8")
    assert [path.name for path in folder.iterdir() if path != training_report] == ["report.html"]
    return Page(page)


def test_hostile_text_is_only_shown(tmp_path: Path) -> None:
    """Wherever text from the model, the data or an error can come in."""
    report = final_report(
        phases=[Phase(name="training", status="failed", duration_s=None, error=HOSTILE)],
        optimizations={HOSTILE: component(message=HOSTILE)},
        sample=HOSTILE,
        recommendations=[HOSTILE],
        accuracy=Accuracy(reason=HOSTILE),
    )
    page = render(tmp_path, report, {"batches": [], "anomalies": [{"step": 3, "message": HOSTILE}]})
    assert page.text.count(HOSTILE) == 7
    assert page.tags <= ALLOWED
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    batches = [{"step": step, "loss": float(step)} for step in range(3)]
    render(tmp_path, final_report(sample="x"), {"batches": batches, "anomalies": []})
    page = (tmp_path / "report.html").read_text("utf-8")
    for outside in ("http", "//", "url(", "@import", "<script", "<link"):
        assert outside not in page.lower(), outside


def test_the_curve_has_a_point_for_every_loss(tmp_path: Path) -> None:
    """Higher is up, later is right, and a step without a loss has no point."""
    losses = {10: 4.0, 20: None, 30: 3.0, 50: 2.0}
    batches = [{"step": step, "loss": loss} for step, loss in losses.items()]
    page = render(tmp_path, final_report(), {"batches": batches, "anomalies": []})
    (points,) = [value for name, value in page.attributes if name == "points"]
    assert points == "0.0,0.0 360.0,120.0 720.0,240.0"
    assert "Training loss, 4.00 to 2.00 nats, steps 10 to 50." in page.text


@pytest.mark.parametrize("losses", [[], [3.0], [3.0, None], [None, None]])
def test_no_curve_of_less_than_two_losses(losses: list[float | None], tmp_path: Path) -> None:
    batches = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    assert "svg" not in render(tmp_path, final_report(), {"batches": batches, "anomalies": []}).tags


def test_equal_losses_are_a_flat_curve(tmp_path: Path) -> None:
    page = render(
        tmp_path, final_report(), {"batches": [{"step": s, "loss": 2.0} for s in (1, 2)], "anomalies": []}
    )
    assert "Training loss, 2.00 to 2.00 nats" in page.text


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """Not even a training report, and no figure in the final one."""
    page = render(tmp_path, final_report(phases=[Phase(name="testing", status="skipped", duration_s=None)]))
    assert "No claim was measured" in page.text
    assert "No validation loss: training did not finish." in page.text
    assert "None" not in page.text
