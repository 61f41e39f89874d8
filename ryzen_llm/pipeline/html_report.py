"""report.html: one self-contained page, its drawings as HTML and SVG computed here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from ryzen_callbacks import ValidationReport, ValidationResult
from ryzen_callbacks.atomic_file import write_text
from ryzen_callbacks.verdict import bound_of, line_to_meet, show

from ryzen_llm.pipeline.report import FinalReport


def write_html_report(
    path: Path, report: FinalReport, validation: ValidationReport | None, training_report: Path
) -> Path:
    """Write the page atomically; `training_report` may be missing where training failed early."""
    training = json.loads(training_report.read_text(encoding="utf-8")) if training_report.exists() else None
    # Autoescaped: the sample and the messages come from data.
    environment = Environment(
        loader=PackageLoader("ryzen_llm.pipeline", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        report=report,
        results=validation.results if validation else [],
        training=training,
        curve=_curve(training) if training else None,
        interval=_interval,
        bound_of=bound_of,
        line_to_meet=line_to_meet,
        show=show,
        fraction_of_time=_fractions([phase.duration_s or 0.0 for phase in report.phases]),
    )
    return write_text(path, page)


@dataclass(frozen=True)
class _Scale:
    """A figure's place on an axis, in percent of its length."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        return round(100 * (value - self.low) / ((self.high - self.low) or 1), 2)


def _interval(result: ValidationResult) -> dict[str, float] | None:
    """Where interval, figure, line to meet and "no change" lie on one axis; None without a figure."""
    if result.measured is None:
        return None
    low = result.measured if result.ci_low is None else result.ci_low
    high = result.measured if result.ci_high is None else result.ci_high
    no_change = 1.0 if result.metric in ("speedup", "ratio") else 0.0
    line = line_to_meet(result.metric, result.threshold, result.tolerance)
    shown = (low, high, line, no_change)
    margin = 0.08 * ((max(shown) - min(shown)) or 1)
    place = _Scale(min(shown) - margin, max(shown) + margin)
    return {
        "low": place(low),
        "width": place(high) - place(low),
        "measured": place(result.measured),
        "line": place(line),
        "no_change": place(no_change),
    }


def _curve(training: dict[str, Any]) -> dict[str, Any] | None:
    """Losses and anomalies, in percent of a plot of loss over step; None without losses."""
    train = [(row["step"], row["loss"]) for row in training["batches"] if row.get("loss") is not None]
    val = [(row["step"], row["val_loss"]) for row in training["epochs"] if row["val_loss"] is not None]
    if len(train) < 2:
        return None
    steps, losses = zip(*train, *val, strict=True)
    x, y = _Scale(0, max(steps)), _Scale(max(losses), min(losses))
    return {
        "train": " ".join(f"{x(step)},{y(loss)}" for step, loss in train),
        "val": [{"x": x(step), "y": y(loss), "title": f"step {step:.0f}: {loss:.3f}"} for step, loss in val],
        "anomalies": [
            {"x": x(row["step"]), "title": f"step {row['step']:.0f}: {row['message']}"}
            for row in training["anomalies"]
        ],
        "last_step": max(steps),
        "low": min(losses),
        "high": max(losses),
        "every": training["batches_every_n_steps"],
    }


def _fractions(values: list[float]) -> list[float]:
    """Each value in percent of the largest."""
    return [round(100 * value / (max(values) or 1), 1) for value in values]
