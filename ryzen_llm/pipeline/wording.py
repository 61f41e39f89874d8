"""Figures in words: with units, and how each was measured."""

from __future__ import annotations

from ryzen_callbacks import ValidationResult
from ryzen_callbacks.reports import Quantity

_BYTE_UNITS = ("bytes", "KB", "MB", "GB", "TB")
_SECOND_UNITS = ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs"))


def show_quantity(quantity: Quantity) -> str:
    """An arm's figure as a person reads it: 0.408 s, 12.3 ms, 1.50 MB, loss 3.779."""
    value = quantity.value
    if value is None:
        return "not measured"
    if quantity.unit == "bytes":
        index = 0
        while abs(value) >= 1000 and index < len(_BYTE_UNITS) - 1:
            value, index = value / 1000, index + 1
        return f"{value:.3g} {_BYTE_UNITS[index]}"
    if quantity.unit == "s":
        factor, unit = next((factor, unit) for least, factor, unit in _SECOND_UNITS if abs(value) >= least)
        return f"{value * factor:.3g} {unit}"
    if quantity.unit == "loss":
        return f"loss {value:.4g}"
    return f"{value:.4g} {quantity.unit}".rstrip()


def show_duration(seconds: float) -> str:
    """How long a phase took: 5.1 s, 12 min 5 s, 3 h 25 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def how_measured(result: ValidationResult) -> str:
    """How the figure of a claim came about, in a sentence or two; empty where there is none."""
    if result.measured is None:
        return ""
    if result.metric == "speedup":
        sentences = [
            f"Median of {result.rounds} paired rounds, each timing both arms twice in turn (A B B A, then "
            "B A A B), after a run that is not timed; 95% order-statistic interval."
        ]
        if (control := result.control) is not None:
            span = "" if control.ci_low is None else f" ({control.ci_low:.3g}x to {control.ci_high:.3g}x)"
            sentences.append(f"The baseline against itself: {control.ratio:.3g}x{span}.")
        return " ".join(sentences)
    if result.metric in ("ratio", "saving"):
        return "Counted, not sampled: the figure is exact."
    batches = len(result.samples.baseline) if result.samples else 0
    return f"Mean over {batches} batches, both arms on the same ones; 95% interval of Student's t."
