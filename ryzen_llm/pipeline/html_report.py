"""report.html: one self-contained page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from ryzen_callbacks.atomic_file import write_text

from ryzen_llm.pipeline.report import FinalReport

_WIDTH, _HEIGHT = 720, 240


def write_html_report(path: Path, report: FinalReport, training_report: Path) -> Path:
    """Write the page atomically; `training_report` may be missing where training failed early."""
    training = json.loads(training_report.read_text(encoding="utf-8")) if training_report.exists() else None
    # Autoescaped: the sample and the messages come from data.
    environment = Environment(loader=PackageLoader("ryzen_llm.pipeline", "."), autoescape=True)
    page = environment.get_template("report.html.jinja").render(
        report=report, training=training, curve=_curve(training["batches"]) if training else None
    )
    return write_text(path, page)


def _curve(batches: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The sampled losses as the points of an SVG polyline, with the ends of both axes."""
    points = [(row["step"], row["loss"]) for row in batches if row.get("loss") is not None]
    if len(points) < 2:
        return None
    steps, losses = [step for step, _ in points], [loss for _, loss in points]
    low, high = min(losses), max(losses)
    across, up = (steps[-1] - steps[0]) or 1, (high - low) or 1
    return {
        "points": " ".join(
            f"{_WIDTH * (step - steps[0]) / across:.1f},{_HEIGHT * (high - loss) / up:.1f}"
            for step, loss in points
        ),
        "width": _WIDTH,
        "height": _HEIGHT,
        "low": low,
        "high": high,
        "first": steps[0],
        "last": steps[-1],
    }
