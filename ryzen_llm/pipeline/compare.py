"""Two runs side by side, from their reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from ryzen_callbacks.verdict import show

from ryzen_llm.errors import InputError
from ryzen_llm.pipeline.orchestrator import FINAL_REPORT, VALIDATION_REPORT
from ryzen_llm.pipeline.training import CONFIG, TRAINING_REPORT

_MACHINE = ("cpu", "device", "threads", "torch", "python")


@dataclass(frozen=True)
class Run:
    """A run's reports as they are on disk; empty where there is none."""

    path: Path
    final: dict[str, Any]
    validation: dict[str, Any]
    training: dict[str, Any]
    config: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> Run:
        """The reports in `path`. Raises InputError where there is no final report, or one is damaged."""
        if not (path / FINAL_REPORT).is_file():
            raise InputError(
                f"{path}: has no {FINAL_REPORT}; expected the output directory of scripts/train.py"
            )
        names = (FINAL_REPORT, VALIDATION_REPORT, TRAINING_REPORT, CONFIG)
        return cls(path, *(_read(path / name) for name in names))


def compare(console: Console, one: Run, two: Run) -> None:
    """Print what differs in configuration and machine, then every figure of both runs."""
    differences = [*_differences(_flat(one.config), _flat(two.config)), *_machines(one, two)]
    console.print(_table("configuration and machine", one, two, differences, "no difference"))
    console.print(_table("training", one, two, _training(one, two), "nothing measured"))
    table = Table("claim", str(one.path), str(two.path), "difference", title="claims")
    for row in _claims(one, two):
        table.add_row(*map(escape, row))
    console.print(table)


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds {type(content).__name__}, expected keys and values")
    return content


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _differences(one: dict[str, Any], two: dict[str, Any]) -> list[tuple[str, str, str]]:
    keys = [key for key in {**one, **two} if key != "output_dir" and one.get(key) != two.get(key)]
    return [(key, str(one.get(key)), str(two.get(key))) for key in keys]


def _machines(one: Run, two: Run) -> list[tuple[str, str, str]]:
    def machine(run: Run) -> dict[str, Any]:
        found = run.training.get("metadata", {}).get("environment", {})
        return {key: found.get(key) for key in _MACHINE}

    return _differences(machine(one), machine(two))


def _training(one: Run, two: Run) -> list[tuple[str, str, str]]:
    def figures(run: Run) -> dict[str, str]:
        accuracy, statistics = run.final.get("accuracy", {}), run.training.get("statistics", {})
        found = {
            "status": run.final.get("status"),
            "validation loss": accuracy.get("val_loss"),
            "validation accuracy": accuracy.get("val_accuracy"),
            "steps": statistics.get("loss", {}).get("count"),
            "tokens per second (mean)": statistics.get("tokens_per_second", {}).get("mean"),
            "anomalies": len(run.training.get("anomalies", [])),
            "self-tests passed": (run.final.get("tests") or {}).get("passed"),
        }
        return {
            key: "not measured" if v is None else f"{v:.5g}" if isinstance(v, float) else str(v)
            for key, v in found.items()
        }

    return [(key, value, figures(two)[key]) for key, value in figures(one).items()]


def _claims(one: Run, two: Run) -> list[tuple[str, str, str, str]]:
    ours, theirs = (
        {result["name"]: result for result in run.validation.get("results", [])} for run in (one, two)
    )
    return [
        (name, _figure(ours.get(name)), _figure(theirs.get(name)), _verdict(ours.get(name), theirs.get(name)))
        for name in {**ours, **theirs}
    ]


def _figure(result: dict[str, Any] | None) -> str:
    if result is None or result["measured"] is None:
        return "not measured"
    figure = show(result["metric"], result["measured"])
    if result["ci_low"] is not None and result["ci_low"] != result["ci_high"]:
        low, high = (show(result["metric"], result[key]) for key in ("ci_low", "ci_high"))
        figure += f" ({low} to {high})"
    return f"{figure} {result['status']}"


def _verdict(one: dict[str, Any] | None, two: dict[str, Any] | None) -> str:
    """Only intervals that have nothing in common are called a difference."""
    if any(result is None or result["ci_low"] is None for result in (one, two)):
        return "cannot be told"
    assert one is not None
    assert two is not None
    if one["ci_high"] < two["ci_low"]:
        return "higher in the second"
    if two["ci_high"] < one["ci_low"]:
        return "lower in the second"
    return "none: the intervals overlap"


def _table(title: str, one: Run, two: Run, rows: list[tuple[str, str, str]], nothing: str) -> Table:
    table = Table("", str(one.path), str(two.path), title=title)
    for row in rows:
        table.add_row(*map(escape, row))
    if not rows:
        table.caption = nothing
    return table
