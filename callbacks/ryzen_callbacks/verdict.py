"""From a measured figure to PASS, WARNING or FAIL, and the sentence that says so."""

from __future__ import annotations

import math
from numbers import Real
from typing import Literal

from ryzen_callbacks.reports import Status, ValidationResult

Bound = Literal["at least", "at most", "within"]

_BOUNDS: dict[str, Bound] = {"increase": "at most", "difference": "within"}
_UNITS = {"speedup": "x", "ratio": "x"}


def finite_number(figure: object) -> float | None:
    """`figure` as a float, of numpy too; None if it is not a finite number."""
    if isinstance(figure, bool) or not isinstance(figure, Real):
        return None
    try:
        number = float(figure)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def bound_of(metric: str) -> Bound:
    """On which side of its threshold `metric` should be; "within" is no further from 0 on either side."""
    return _BOUNDS.get(metric, "at least")


def line_to_meet(metric: str, threshold: float, tolerance: float) -> float:
    """The threshold, eased by the tolerance, which is a share of its size."""
    ease = tolerance * abs(threshold)
    return threshold - ease if bound_of(metric) == "at least" else threshold + ease


def interval_status(metric: str, low: float, high: float, line: float) -> Status:
    """PASS if the whole interval is on the right side of `line`, FAIL if on the wrong one, else WARNING."""
    bound = bound_of(metric)
    if bound == "at least":
        low, high, line = -high, -low, -line
    if high <= line and (bound != "within" or low >= -line):
        return "PASS"
    return "FAIL" if low > line or (bound == "within" and high < -line) else "WARNING"


def figure_result(
    name: str, metric: str, actual: float, expected: float, tolerance: float
) -> ValidationResult:
    """The verdict on a figure that somebody else measured.

    PASS if `actual` meets `expected`; WARNING if it misses it by no more than the relative `tolerance`; else
    FAIL.

    Raises:
        ValueError: a figure that is not a finite number, or a tolerance outside [0, 1).
    """
    figures = {"actual": actual, "expected": expected, "tolerance": tolerance}
    for label, figure in figures.items():
        if (number := finite_number(figure)) is None:
            raise ValueError(
                f"{name}: {label} is {figure!r}, expected a finite number; "
                "a figure that was not measured has no verdict, so leave the call out"
            )
        figures[label] = number
    actual, expected, tolerance = figures.values()
    if not 0 <= tolerance < 1:
        raise ValueError(f"{name}: tolerance is {tolerance}, expected 0 <= tolerance < 1")
    status: Status
    if interval_status(metric, actual, actual, expected) == "PASS":
        status, verdict = "PASS", "meets"
    elif interval_status(metric, actual, actual, line_to_meet(metric, expected, tolerance)) == "PASS":
        status, verdict = "WARNING", f"misses, within the tolerance of {tolerance:.0%},"
    else:
        status, verdict = "FAIL", "misses"
    target = f"{bound_of(metric)} {show(metric, expected)}"
    return ValidationResult(
        name=name,
        metric=metric,
        measured=actual,
        threshold=expected,
        tolerance=tolerance,
        status=status,
        message=f"{metric} {show(metric, actual)} {verdict} the expected {target}",
    )


def show(metric: str, value: float) -> str:
    """A figure as a person reads it: 3.21x, 25.0%, +0.42%."""
    if metric in ("increase", "difference"):
        return f"{value:+z.2%}"  # what rounds to zero has no minus
    if metric == "saving":
        return f"{value:.1%}"
    return f"{value:.3g}{_UNITS.get(metric, '')}"
