"""Trying the forms of one op: each is checked, then all that passed are timed side by side."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from pydantic import BaseModel
from torch import Tensor

from ryzen_llm.kernels import CANDIDATES, Workload
from ryzen_llm.kernels.regions import REGIONS
from ryzen_llm.training.op_clock import Clock, op_clock

MOST_ROUNDS = 15
FEWEST_ROUNDS = 3
SECONDS_PER_OP = 1.0
"""For timing all forms of an op, unless that were fewer than `FEWEST_ROUNDS`."""

CLEARLY_FASTER = 0.97
"""A form has to need less than this share of the time of one listed before it to be preferred."""

LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 2**-5}
"""Of outputs and gradients, as |difference| / |fp32 reference|; room for TF32, and for a few roundings."""


OUT_OF_TIME = "no time was left to try it"


class Trial(BaseModel):
    """One form of an op: how fast and how exact it was here, or why it was not used."""

    name: str
    milliseconds: float | None = None
    """Median of forward and backward, its neighbours in the block included."""
    relative_error: float | None = None
    excluded: str | None = None


def try_all(
    op: str,
    work: Workload,
    on_trial: Callable[[str | None], None],
    fatal: str | None = None,
    deadline: float = math.inf,
) -> list[Trial]:
    """Check and time every form of `op`, the plainest first; an excluded one has its reason.

    `on_trial` is told the name of each form before it runs for the first time, and None after the last: if
    the process ends in between, that form ended it. `fatal` names one that did. After `deadline`, on
    `time.perf_counter`, no other form is tried. No exception of a form gets out.
    """
    trials, arms = [], {}
    expected = reference(op, work)
    for name, candidate in CANDIDATES[op].items():
        trial = Trial(name=name, excluded=candidate.unsuited(work))
        if name == fatal:
            trial.excluded = "the process ended while it was tried"
        trials.append(trial)
        if not trial.excluded and time.perf_counter() > deadline:
            trial.excluded = OUT_OF_TIME
        if trial.excluded:
            continue
        on_trial(name)
        try:
            arm = make_arm(op, work, candidate.function)
            trial.relative_error = largest_error(arm(), expected)
            limit = LARGEST_ERROR[work.dtype]
            if not trial.relative_error <= limit:  # also where it is NaN
                trial.excluded = (
                    f"wrong: off by {trial.relative_error:.2g} of the reference, more than {limit:.2g}"
                )
                continue
            arms[name] = arm
        except Exception as error:
            trial.excluded = _why(error)
    on_trial(None)
    times, failures = _time(arms, op_clock(work.device))
    for trial in trials:
        if trial.name in failures:
            trial.excluded = failures[trial.name]
        elif trial.name in times:
            trial.milliseconds = 1000 * statistics.median(times[trial.name])
    return trials


def _why(error: Exception) -> str:
    gc.collect()
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def fastest(trials: list[Trial]) -> str | None:
    """The fastest's name, or that of one before it that is hardly slower; None where all are excluded."""
    best: Trial | None = None
    for trial in trials:
        if trial.milliseconds is None:
            continue
        assert best is None or best.milliseconds is not None
        if best is None or trial.milliseconds < CLEARLY_FASTER * best.milliseconds:  # type: ignore[operator]
            best = trial
    return best.name if best else None


Arm = Callable[[], list[Tensor]]
"""Forward and backward: outputs, then gradients by the inputs."""


def make_arm(op: str, work: Workload, function: Callable[..., object]) -> Arm:
    """Forward and backward of `op` in the form `function`, among its neighbours as `work` runs them."""
    region = REGIONS[op]
    inputs = region.inputs(work, torch.Generator().manual_seed(0))

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return region.run(function, work, list(inputs))

    call = torch.compile(forward) if work.compiled and region.in_block else forward
    return _forward_and_backward(call, inputs, _autocast(work, region.autocast))


def reference(op: str, work: Workload) -> list[Tensor]:
    """Outputs and gradients of the plainest form that suits, from the same numbers in fp32."""
    region = REGIONS[op]
    plainest = next(form.function for form in CANDIDATES[op].values() if not form.unsuited(work))
    inputs = region.inputs(work, torch.Generator().manual_seed(0))
    inputs = [x.float() if x.is_floating_point() else x for x in inputs]
    return _forward_and_backward(
        lambda *inputs: region.run(plainest, work, list(inputs)), inputs, _autocast(work, False)
    )()


def _autocast(work: Workload, enabled: bool) -> AbstractContextManager[object]:
    bf16 = enabled and work.dtype == torch.bfloat16
    return torch.autocast(work.device.type, torch.bfloat16, enabled=bf16)


def _forward_and_backward(
    call: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], autocast: AbstractContextManager[object]
) -> Arm:
    leaves = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    upstream: list[Tensor] = []

    def run() -> list[Tensor]:
        with torch.enable_grad(), autocast:
            outputs = call(*inputs)
        if not upstream:
            draw = torch.Generator().manual_seed(1)
            upstream.extend(torch.randn(y.shape, generator=draw).to(y) for y in outputs)
        return [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]

    return run


def largest_error(results: list[Tensor], expected: list[Tensor]) -> float:
    """Largest |result - expected| / |expected| over pairs of tensors."""
    errors = []
    for result, exact in zip(results, expected, strict=True):
        difference = (result.detach().float() - exact.detach().float()).norm()
        errors.append(difference / exact.detach().float().norm().clamp(min=1e-30))
    return float(torch.stack(errors).max())  # NaN if one of them is


def _time(arms: dict[str, Arm], clock: Clock) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each run, in rounds of all arms whose order turns around, and why some failed."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    failures: dict[str, str] = {}
    rounds, done = FEWEST_ROUNDS, 0
    while done < rounds:
        names = [name for name in arms if name not in failures]
        for name in names if done % 2 == 0 else reversed(names):
            try:
                times[name].append(clock(arms[name]))
            except Exception as error:
                failures[name] = _why(error)
        done += 1
        if done == 1 and len(failures) < len(arms):
            whole = sum(seconds[0] for seconds in times.values() if seconds)
            rounds = max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(SECONDS_PER_OP / whole)))
    return times, failures
