"""What is drawn in report.html, as places in percent of a drawing's width and height."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ryzen_callbacks import ValidationResult
from ryzen_callbacks.reports import Quantity
from ryzen_callbacks.verdict import bound_of, line_to_meet

from ryzen_llm.pipeline.wording import show_quantity

VS_STRONG = "_vs_strong"
"""How the name of a claim ends that measures against the strong baseline what another measures against the
naive one."""


@dataclass(frozen=True)
class Scale:
    """From a figure to its place on an axis, in percent of its length."""

    low: float
    high: float

    def __call__(self, value: float) -> float:
        """The place of `value`."""
        return round(100 * (value - self.low) / ((self.high - self.low) or 1), 2)


@dataclass(frozen=True)
class Interval:
    """Where interval, figure and "no change" lie on one axis, and the line to meet or, "within" it, both."""

    low: float
    width: float
    measured: float
    lines: list[float]
    no_change: float


def interval(result: ValidationResult) -> Interval | None:
    """The drawing of one claim; None without a figure."""
    if result.measured is None:
        return None
    low = result.measured if result.ci_low is None else result.ci_low
    high = result.measured if result.ci_high is None else result.ci_high
    no_change = 1.0 if result.metric in ("speedup", "ratio") else 0.0
    line = line_to_meet(result.metric, result.threshold, result.tolerance)
    lines = [-line, line] if bound_of(result.metric) == "within" else [line]
    shown = (low, high, *lines, no_change)
    margin = 0.08 * ((max(shown) - min(shown)) or 1)
    place = Scale(min(shown) - margin, max(shown) + margin)
    return Interval(
        low=place(low),
        width=round(place(high) - place(low), 2),
        measured=place(result.measured),
        lines=[place(each) for each in lines],
        no_change=place(no_change),
    )


@dataclass(frozen=True)
class Curve:
    """Losses over steps; `train` is an SVG polyline's points, the others have a place and words for it."""

    train: str
    val: list[dict[str, Any]]
    anomalies: list[dict[str, Any]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def loss_curve(training: dict[str, Any]) -> Curve | None:
    """The curve of training_metrics_report.json; None with fewer than two losses."""
    train = [(row["step"], row["loss"]) for row in training["batches"] if row.get("loss") is not None]
    val = [(row["step"], row["val_loss"]) for row in training["epochs"] if row["val_loss"] is not None]
    if len(train) < 2:
        return None
    steps, losses = zip(*train, *val, strict=True)
    # An anomaly may lie beyond the last step that was kept.
    last = max(*steps, *(row["step"] for row in training["anomalies"]))
    x, y = Scale(0, last), Scale(max(losses), min(losses))
    return Curve(
        train=" ".join(f"{x(step)},{y(loss)}" for step, loss in train),
        val=[{"x": x(step), "y": y(loss), "title": f"step {step:,.0f}: {loss:.3f}"} for step, loss in val],
        anomalies=[
            {"x": x(row["step"]), "title": f"step {row['step']:,.0f}: {row['message']}"}
            for row in training["anomalies"]
        ],
        x_ticks=[(x(step), show_step(step, last)) for step in ticks(0, last) if step == round(step)],
        y_ticks=[(y(loss), f"{loss:,g}") for loss in ticks(min(losses), max(losses))],
    )


def show_step(step: float, last: float) -> str:
    """`step` on an axis up to `last`, short enough for seven of them on a phone: 2,000, 20k, 0.5M."""
    factor, unit = (1e6, "M") if last >= 1e6 else (1e3, "k") if last >= 1e4 else (1, "")
    return f"{step / factor:,g}{unit if step else ''}"


def ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = (high - low) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 3))
    step = next(factor * power for factor in (5, 2, 1) if span / (factor * power) >= 3)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Bar:
    """One arm of a claim beside others; `width` in percent of the longest of its group."""

    label: str
    value: str
    width: float
    ours: bool


def bars(results: list[ValidationResult], unit: str) -> dict[str, list[Bar]]:
    """Both arms of every measured claim whose figures are in `unit`, by claim.

    A claim against the strong baseline shares its group, and so its scale, with the one against the naive
    one; this run's own arm was measured beside each of the two, and is there once for each.
    """
    groups: dict[str, list[tuple[Quantity, bool]]] = {}
    for result in results:
        for arm, ours in ((result.baseline, False), (result.optimized, True)):
            if arm is not None and arm.unit == unit and arm.value is not None:
                groups.setdefault(result.name.removesuffix(VS_STRONG), []).append((arm, ours))
    return {name: _to_scale(arms) for name, arms in groups.items()}


def _to_scale(arms: list[tuple[Quantity, bool]]) -> list[Bar]:
    widths = fractions([arm.value or 0.0 for arm, _ in arms])
    return [
        Bar(arm.name, show_quantity(arm), width, ours)
        for (arm, ours), width in zip(arms, widths, strict=True)
    ]


def fractions(values: list[float]) -> list[float]:
    """Each value in percent of the largest."""
    return [round(100 * value / (max(values) or 1), 1) for value in values]
