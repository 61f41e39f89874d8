"""Several ways to do the same work, timed side by side: every round runs them all, in changing order."""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.progress import Progress
from ryzen_callbacks.intervals import median_interval
from torch.profiler import ProfilerActivity

from ryzen_llm.training.op_clock import Clock, host_seconds


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds of a ratio of times, and its 95% interval (None below 6 rounds)."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]"
        return f"{self.value:.3g}{interval}"


Times = Mapping[str, list[float]]
"""Seconds of each run of each arm, by round."""


def time_arms(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    settle: bool = False,
    clock: Clock = host_seconds,
) -> Times:
    """Time every arm once a round by `clock`; the caller has warmed them up.

    With `settle` each runs once more, untimed, before it is timed: as in a loop of its own, it then finds its
    own memory, not what the arm before it has left or given back.
    """
    names = list(arms)
    times: dict[str, list[float]] = {name: [] for name in names}
    with Progress(transient=True) as progress:
        for name in progress.track(interleaved(names, rounds), rounds * len(names), description="measuring"):
            if settle:
                arms[name]()
            times[name].append(clock(arms[name]))
    return times


def interleaved(names: Sequence[str], rounds: int) -> Iterator[str]:
    """Every name once a round.

    The order moves on by one and turns around from round to round, so that none always follows the same one,
    and whatever slows the machine for longer than a round slows all alike.
    """
    for index in range(rounds):
        shift = index % len(names)
        order = [*names[shift:], *names[:shift]]
        yield from order if index % 2 == 0 else reversed(order)


def speedup(times: Times, baseline: str, other: str) -> Ratio:
    """How many times as fast as `baseline` the arm `other` is, paired by round."""
    logs = [math.log(a / b) for a, b in zip(times[baseline], times[other], strict=True)]
    interval = median_interval(logs)
    low, high = (math.exp(interval[0]), math.exp(interval[1])) if interval else (None, None)
    return Ratio(math.exp(statistics.median(logs)), low, high)


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensors that `run` had allocated at its peak above what was allocated before.

    On CUDA the allocator's own figure; elsewhere the sum of the allocations and releases that the profiler
    records, in which the scratch memory of libraries (oneDNN) is missing.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_bytes())["traceEvents"]
    changes = sorted((float(e["ts"]), int(e["args"]["Bytes"])) for e in events if e.get("name") == "[memory]")
    return max(itertools.accumulate((change for _, change in changes), initial=0))


def settings_of(options: argparse.Namespace) -> dict[str, str]:
    """What a benchmark was called with, in words; of files the names, for others have them elsewhere."""

    def in_words(value: object) -> str:
        if isinstance(value, list):
            return ", ".join(map(in_words, value))
        text = str(value)
        return Path(text).name if Path(text).is_file() else text

    return {key: in_words(value) for key, value in vars(options).items() if key != "out"}
