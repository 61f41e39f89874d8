"""Measure one claim and judge it."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ryzen_callbacks.claim import Claim
from ryzen_callbacks.intervals import mean_interval
from ryzen_callbacks.paired import Ratio, measure_pair
from ryzen_callbacks.reports import Control, Quantity, Samples, Status, ValidationResult
from ryzen_callbacks.verdict import bound_of, interval_status, line_to_meet, show

OnRound = Callable[[int, int], None]


def measure_claim(
    claim: Claim, rounds: int, warmup: int, control_limit: float, on_round: OnRound = lambda done, total: None
) -> ValidationResult:
    """The verdict on `claim`. An arm that raises makes it NOT_MEASURED, with the error as the reason."""
    if claim.not_measured_because:
        return not_measured(claim, claim.not_measured_because)
    try:
        if claim.measure == "time":
            return _measure_time(claim, claim.rounds or rounds, warmup, control_limit, on_round)
        if claim.measure in ("bytes", "peak_memory"):
            return _measure_bytes(claim, warmup)
        return _measure_loss(claim)
    except Exception as error:
        return not_measured(claim, f"measuring raised {type(error).__name__}: {error}")


def not_measured(claim: Claim, reason: str) -> ValidationResult:
    """The result of a claim that could not be measured."""
    return ValidationResult(
        name=claim.name,
        description=claim.description,
        metric=_metric(claim),
        threshold=claim.threshold,
        tolerance=claim.tolerance,
        status="NOT_MEASURED",
        message=f"not measured: {reason}",
    )


def _measure_time(
    claim: Claim, rounds: int, warmup: int, control_limit: float, on_round: OnRound
) -> ValidationResult:
    baseline, optimized = _arms(claim)
    times = measure_pair(baseline, optimized, rounds, warmup, on_round)
    control = times.control()
    base_seconds = [statistics.fmean(pair) for pair in times.baseline]
    opt_seconds = [statistics.fmean(pair) for pair in times.optimized]
    return _judge(
        claim,
        times.speedup(),
        "the median of paired rounds",
        doubt=_doubt(control, control_limit),
        too_few=f"{rounds} rounds are too few for a 95% interval (6 or more are needed)",
        baseline=Quantity(name=claim.baseline_name, value=statistics.median(base_seconds), unit="s"),
        optimized=Quantity(name=claim.optimized_name, value=statistics.median(opt_seconds), unit="s"),
        rounds=rounds,
        samples=Samples(baseline=base_seconds, optimized=opt_seconds, control=times.baseline),
        control=Control(ratio=control.value, ci_low=control.ci_low, ci_high=control.ci_high),
    )


def _doubt(control: Ratio, limit: float) -> str:
    """Why the timings are not to be trusted, judging by the baseline against itself; empty if they are."""
    if control.ci_low is None or control.ci_high is None:
        return ""
    span = f"{control.ci_low:.3g}x to {control.ci_high:.3g}x"
    if not control.ci_low <= 1 <= control.ci_high:
        return f"the baseline differs from itself (interval {span} of its two timings excludes 1)"
    if control.ci_high / control.ci_low > limit:
        return f"the machine is too noisy (the baseline against itself spans {span}, wider than {limit:g}x)"
    return ""


def _measure_bytes(claim: Claim, warmup: int) -> ValidationResult:
    def count(label: str, arm: Callable[[], Any]) -> float:
        value = float(_peak_memory(arm, warmup) if claim.measure == "peak_memory" else arm())
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the arm {label!r} gave {value} bytes, expected a positive number")
        return value

    baseline, optimized = (count(label, arm) for label, arm in _named_arms(claim))
    value = baseline / optimized if claim.quantity == "ratio" else 1 - optimized / baseline
    # A count of bytes is exact: its interval is the figure itself.
    return _judge(
        claim,
        Ratio(value, value, value),
        "counted",
        baseline=Quantity(name=claim.baseline_name, value=baseline, unit="bytes"),
        optimized=Quantity(name=claim.optimized_name, value=optimized, unit="bytes"),
        samples=Samples(baseline=[baseline], optimized=[optimized]),
    )


def _peak_memory(arm: Callable[[], Any], warmup: int) -> int:
    """Most bytes that tensors held at any time while `arm` ran, those that were there before it included."""
    if not torch.accelerator.is_available():
        raise RuntimeError(
            "no accelerator here to ask for its peak memory; on a CPU, count bytes and give measure='bytes'"
        )
    for _ in range(warmup):
        arm()
    gc.collect()  # what the other arm has left in cycles is not this one's
    torch.accelerator.synchronize()
    torch.accelerator.reset_peak_memory_stats()
    arm()
    torch.accelerator.synchronize()
    return torch.accelerator.max_memory_allocated()


def _measure_loss(claim: Claim) -> ValidationResult:
    (_, baseline_arm), (_, optimized_arm) = _named_arms(claim)
    baseline, optimized = _losses(baseline_arm()), _losses(optimized_arm())
    if len(baseline) != len(optimized) or not baseline:
        raise ValueError(
            f"the arms of {claim.name!r} returned {len(baseline)} and {len(optimized)} losses; "
            "expected one for each batch of the same batches"
        )
    if not all(map(math.isfinite, baseline + optimized)):
        raise ValueError(f"an arm of {claim.name!r} returned a loss that is not finite")
    base_mean = statistics.fmean(baseline)
    if base_mean <= 0:
        raise ValueError(f"the baseline's mean loss is {base_mean}; a relative increase needs a positive one")
    differences = [(b - a) / base_mean for a, b in zip(baseline, optimized, strict=True)]
    interval = mean_interval(differences)
    low, high = interval if interval else (None, None)
    return _judge(
        claim,
        Ratio(statistics.fmean(differences), low, high),
        f"the mean of {len(differences)} paired batches",
        too_few=f"{len(differences)} batches are too few for a 95% interval (6 or more are needed)",
        baseline=Quantity(name=claim.baseline_name, value=base_mean, unit="loss"),
        optimized=Quantity(name=claim.optimized_name, value=statistics.fmean(optimized), unit="loss"),
        samples=Samples(baseline=baseline, optimized=optimized),
    )


def _losses(values: Sequence[Any]) -> list[float]:
    return [float(value) for value in values]


def _judge(
    claim: Claim,
    estimate: Ratio,
    how: str,
    *,
    doubt: str = "",
    too_few: str = "",
    **fields: Any,
) -> ValidationResult:
    metric = _metric(claim)
    line = line_to_meet(metric, claim.threshold, claim.tolerance)
    low, high = estimate.ci_low, estimate.ci_high
    status: Status = "WARNING" if low is None or high is None else interval_status(metric, low, high, line)
    message = f"{metric} {show(metric, estimate.value)} ({how}"
    if low is not None and high is not None and low != high:
        message += f", 95% interval {show(metric, low)} to {show(metric, high)}"
    message += f"); claimed: {bound_of(metric)} {show(metric, claim.threshold)}"
    if claim.tolerance:
        message += f" with a tolerance of {claim.tolerance:.0%}"
    if low is None:
        message += f"; inconclusive: {too_few}"
    elif status == "WARNING":
        message += "; inconclusive: the interval has the line inside it"
    elif status == "PASS" and doubt:
        status, message = "WARNING", f"{message}; inconclusive: {doubt}"
    return ValidationResult(
        name=claim.name,
        description=claim.description,
        metric=metric,
        measured=estimate.value,
        ci_low=low,
        ci_high=high,
        threshold=claim.threshold,
        tolerance=claim.tolerance,
        status=status,
        message=message,
        **fields,
    )


def _metric(claim: Claim) -> str:
    assert claim.quantity is not None  # set in __post_init__
    return claim.quantity


def _arms(claim: Claim) -> tuple[Callable[[], Any], Callable[[], Any]]:
    assert claim.baseline is not None  # checked in Claim.__post_init__
    assert claim.optimized is not None
    return claim.baseline, claim.optimized


def _named_arms(claim: Claim) -> tuple[tuple[str, Callable[[], Any]], tuple[str, Callable[[], Any]]]:
    baseline, optimized = _arms(claim)
    return (claim.baseline_name, baseline), (claim.optimized_name, optimized)
