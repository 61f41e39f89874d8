"""Faults found and false alarms of the anomaly detector beside other projects' rules."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ryzen_callbacks import AnomalyDetector, describe_environment, write_json
from ryzen_callbacks.detector import signals_of
from ryzen_callbacks.scan import read_log

from benchmarks.fault_runs import FAULTS, SINGLE, STEPS_AFTER, Row, train
from benchmarks.spike_rules import KillLossSpike, SixSigma, SpikeDetection, SpikeRule, ZClip
from ryzen_llm.errors import InputError

OURS = "AnomalyDetector"
OTHERS: dict[str, Callable[[], SpikeRule]] = {
    "KillLossSpike": KillLossSpike,
    "SpikeDetection": SpikeDetection,
    "6 sigma": SixSigma,
    "ZClip": ZClip,
}
WARM_UP = 200
"""Steps at a run's start that are not scored, for any rule."""
MERGED = 20
"""Flags outside of faults that are no further apart make one false alarm."""

# Labels of the published curves, by the start of the file's name: steps of strong spikes, and of weak ones
# that a rule may report or not. A curve without a label is only counted on.
STRONG = {"valueembed": (918, 946)}
WEAK = {"valueembed": (523, 740, 1105)}
CLEAN = ("pythia",)
UNLABELLED = "published curves without labels"


@dataclass(frozen=True)
class Event:
    """A fault at `step`; an alarm within `window` steps has found it."""

    step: int
    window: int
    what: str
    kinds: frozenset[str] = frozenset()


@dataclass
class Run:
    """A log with what is known about it; whether a rule reports what is `optional` does not count."""

    rows: dict[int, Row]
    events: list[Event] = field(default_factory=list)
    optional: list[Event] = field(default_factory=list)


@dataclass
class Score:
    """What a rule made of some runs."""

    found: dict[str, int] = field(default_factory=dict)
    planted: dict[str, int] = field(default_factory=dict)
    named: int = 0
    names: bool = False
    """Whether the rule says what it found."""
    delays: list[int] = field(default_factory=list)
    false_alarms: int = 0
    clean_steps: int = 0

    def add(self, run: Run, flags: dict[int, set[str]]) -> None:
        """Count a run's events, found and missed, and the flags that belong to none."""
        scored = {step: kinds for step, kinds in flags.items() if step >= WARM_UP}
        for event in run.events:
            self.planted[event.what] = self.planted.get(event.what, 0) + 1
            inside = [step for step in scored if event.step <= step <= event.step + event.window]
            if inside:
                self.found[event.what] = self.found.get(event.what, 0) + 1
                self.delays.append(min(inside) - event.step)
                self.names |= any(scored[step] for step in inside)
                self.named += any(scored[step] & event.kinds for step in inside)
        known = [*run.events, *run.optional]
        last = -MERGED - 1
        for step in sorted(scored):
            if any(event.step <= step <= event.step + event.window for event in known):
                continue
            self.false_alarms += step - last > MERGED
            last = step
        taken = {s for event in known for s in range(event.step, event.step + event.window + 1)}
        self.clean_steps += sum(step >= WARM_UP and step not in taken for step in run.rows)

    def figures(self) -> dict[str, Any]:
        """Precision, recall, F1, delay and false alarms; None where there is nothing to divide by."""
        found, planted = sum(self.found.values()), sum(self.planted.values())
        alarms = found + self.false_alarms
        return {
            "planted": planted,
            "found": found,
            "found_and_named_rightly": self.named if self.names else None,
            "false_alarms": self.false_alarms,
            "clean_steps": self.clean_steps,
            "recall": found / planted if planted else None,
            "precision": found / alarms if alarms and planted else None,
            "f1": 2 * found / (alarms + planted) if planted else None,
            "median_delay_steps": statistics.median(self.delays) if self.delays else None,
            "false_alarms_per_10000_steps": 1e4 * self.false_alarms / self.clean_steps
            if self.clean_steps
            else None,
            "recall_by_fault": {what: self.found.get(what, 0) / n for what, n in self.planted.items()},
        }


def main(arguments: list[str]) -> None:
    """Train runs with planted faults, read the curves, judge all of them by every rule; write JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py anomalies",
        description=__doc__,
        epilog="Nothing here is tuned: the detector has its defaults, the other rules their projects' own.",
    )
    parser.add_argument("--data", type=Path, help="a folder of loss curves, .csv or .csv.gz (default: none)")
    parser.add_argument("--runs", type=int, default=20, help="of each fault, and clean (default: 20)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/anomalies.json"))
    options = parser.parse_args(arguments)
    if options.runs < 1:
        raise InputError(f"--runs is {options.runs}, expected 1 or more")
    curves = dict(_curves(options.data)) if options.data is not None else {}
    groups = {**_injected(options.runs), **_published(curves)}

    console = Console()
    pooled = {name: Score() for name in (OURS, *OTHERS)}
    scores = {}
    for group, runs in groups.items():
        rules = {name: Score() for name in (OURS, *OTHERS)}
        for run in track(runs, f"judging: {group}", console=console, transient=True):
            for name, score in rules.items():
                flags = _our_flags(run) if name == OURS else _flags(run, OTHERS[name]())
                score.add(run, flags)
                if group != UNLABELLED:
                    pooled[name].add(run, flags)
        scores[group] = {name: score.figures() for name, score in rules.items()}
        console.print(_table(f"{group}: {len(runs)} runs", scores[group]))
    scores["all with labels"] = {name: score.figures() for name, score in pooled.items()}
    console.print(_table("all with labels", scores["all with labels"]))
    console.print(
        f"delay: median, in steps; false: alarms where nothing is known to be wrong, and per 10,000 steps.\n"
        f"{OURS} gave {pooled[OURS].named} of {sum(pooled[OURS].found.values())} faults a name that fits."
    )
    write_json(
        options.out,
        {
            "benchmark": "anomalies",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": {
                "runs_of_each_fault": options.runs,
                "curves": sorted(curves),
                "tuned_on": "no curve and no seed: every rule has its defaults",
                "warm_up_steps_not_scored": WARM_UP,
                "flags_merged_within_steps": MERGED,
                "labels": {"strong": STRONG, "weak, not scored": WEAK, "clean": CLEAN},
                "faults": {name: {"shows_in": f.shows_in, "window": f.window} for name, f in FAULTS.items()},
            },
            "scores": scores,
            "environment": describe_environment(),
        },
    )
    console.print(f"written: {options.out}")


def _injected(count: int) -> dict[str, list[Run]]:
    """Runs with faults, by where the faults show, and clean ones."""
    groups: dict[str, list[Run]] = {}
    torch.set_num_threads(1)
    plan = [name for name in FAULTS for _ in range(count)]
    for seed, name in track(list(enumerate(plan)), "training", transient=True):
        fault = FAULTS[name]
        rows, at = train(seed=seed, fault=name)
        # What is reported after a fault's window is a consequence of it: neither another find nor false.
        rest = Event(at, STEPS_AFTER, "aftermath")
        run = Run(dict(enumerate(rows)), [Event(at, fault.window, name, fault.kinds)], [rest])
        groups.setdefault(f"injected faults of the {fault.shows_in}", []).append(run)
    clean = [Run(dict(enumerate(train(len(plan) + seed, None)[0]))) for seed in range(count)]
    return {**groups, "clean runs": clean}


def _published(curves: dict[str, dict[int, Row]]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for name, rows in curves.items():
        prefix = next((p for p in STRONG if name.startswith(p)), None)
        if prefix is not None:
            events = [
                Event(step, SINGLE, "strong spike", frozenset({"loss_spike"})) for step in STRONG[prefix]
            ]
            weak = [Event(step, SINGLE, "weak spike") for step in WEAK[prefix]]
            groups.setdefault("published curves with spikes", []).append(Run(rows, events, weak))
        elif name.startswith(CLEAN):
            groups.setdefault("published clean curves", []).append(Run(rows))
        else:
            groups.setdefault(UNLABELLED, []).append(Run(rows))
    return groups


def _curves(folder: Path) -> Iterator[tuple[str, dict[int, Row]]]:
    paths = sorted(p for p in folder.glob("*") if p.name.endswith((".csv", ".csv.gz")))
    if not paths:
        raise InputError(f"--data {folder}: no .csv or .csv.gz file there; give a folder of loss curves")
    for path in paths:
        try:
            yield path.name.partition(".")[0], read_log(path)
        except ValueError as error:
            raise InputError(str(error)) from error


def _our_flags(run: Run) -> dict[int, set[str]]:
    detector = AnomalyDetector()
    flags: dict[int, set[str]] = {}
    for step in sorted(run.rows):
        for anomaly in detector.update(step=step, **signals_of(run.rows[step])):
            flags.setdefault(step, set()).add(anomaly.kind)
    return flags


def _flags(run: Run, rule: SpikeRule) -> dict[int, set[str]]:
    flags: dict[int, set[str]] = {}
    for step in sorted(run.rows):
        row = run.rows[step]
        if "loss" in row and rule.flags(row["loss"], row.get("grad_norm")):
            flags[step] = set()
    return flags


def _table(title: str, scores: dict[str, dict[str, Any]]) -> Table:
    table = Table(title=title, box=box.SIMPLE)
    for heading in ("rule", "found", "recall", "precision", "F1", "delay", "false", "per 10,000"):
        table.add_column(heading, justify="left" if heading == "rule" else "right", no_wrap=True)
    for name, s in scores.items():
        shares = ("" if s[key] is None else f"{s[key]:.3f}" for key in ("recall", "precision", "f1"))
        delay = "" if s["median_delay_steps"] is None else f"{s['median_delay_steps']:g}"
        rate = s["false_alarms_per_10000_steps"]
        table.add_row(
            name,
            f"{s['found']}/{s['planted']}",
            *shares,
            delay,
            str(s["false_alarms"]),
            "" if rate is None else f"{rate:.2f}",
        )
    return table
