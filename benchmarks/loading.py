"""Loading a model: seconds and peak memory, beside transformers, each load in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json

from benchmarks.load_once import DTYPES, LOADERS
from benchmarks.side_by_side import interleaved
from ryzen_llm.errors import InputError
from ryzen_llm.interop import export_pretrained, load_pretrained

MOST_SECONDS, MOST_TIMES_SIZE = 10.0, 2.5


def main(arguments: list[str]) -> None:
    """Load with each loader, from each form, in each dtype, in interleaved rounds; print it, write JSON."""
    parser = argparse.ArgumentParser(prog="benchmark.py loading", description=__doc__)
    parser.add_argument("--model", required=True, help="what load_pretrained takes, e.g. a GGUF file")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=3, help="loads of each arm (default: 3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loading.json"))
    options = parser.parse_args(arguments)
    console = Console()
    loaders = [name for name in LOADERS if importlib.util.find_spec(name)]
    for name in LOADERS.keys() - loaders:
        console.print(f"{name} is not installed: left out")

    with tempfile.TemporaryDirectory() as folder:
        forms = {"safetensors, fp32": str(export_pretrained(*load_pretrained(options.model), f"{folder}/hf"))}
        if options.model.endswith(".gguf"):
            forms["GGUF"] = str(Path(options.model).absolute())
        arms = [(form, dtype, loader) for form in forms for dtype in options.dtypes for loader in loaders]
        runs: dict[str, list[dict[str, Any]]] = {json.dumps(arm): [] for arm in arms}
        for key in track(
            list(interleaved(list(runs), options.rounds)), "loading", console=console, transient=True
        ):
            form, dtype, loader = json.loads(key)
            runs[key].append(_load(loader, forms[form], dtype))

    rows = [_row(json.loads(key), found) for key, found in runs.items()]
    console.print(_table(rows, options.rounds))
    ours = [row for row in rows if row["loader"] == "ryzen_llm"]
    held = all(row["load_seconds"] < MOST_SECONDS for row in ours)
    console.print(f"ryzen_llm loads in under {MOST_SECONDS:g} s: {'yes' if held else 'NO'}")
    ratios = [row["peak_times_size"] for row in ours if row["peak_times_size"] is not None]
    held = max(ratios, default=0) < MOST_TIMES_SIZE
    verdict = ("yes" if held else "NO") if ratios else "not measured, it needs Linux"
    console.print(
        f"and its peak is under {MOST_TIMES_SIZE:g} times the model's size in that dtype: {verdict}"
    )
    write_json(
        options.out,
        {
            "benchmark": "loading",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": {
                "model": Path(options.model).name,
                "rounds": options.rounds,
                "peak": "resident bytes above those after the imports, mapped files included",
                "files": "read before, so in the page cache",
                "tokenizer": "loaded too",
            },
            "reason_of_null": "the peak is measured on Linux only",
            "arms": rows,
            "environment": describe_environment(),
        },
    )
    console.print(f"written: {options.out}")


def _load(loader: str, path: str, dtype: str) -> dict[str, Any]:
    """What a fresh process measures."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.load_once", loader, path, dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise InputError(f"{loader} cannot load {Path(path).name}: {(done.stderr.splitlines() or ['?'])[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _row(arm: list[str], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds, and the rounds."""
    row: dict[str, Any] = dict(zip(("form", "dtype", "loader"), arm, strict=True))
    for name in found[0]:
        values = [one[name] for one in found]
        row[name] = None if None in values else statistics.median(values)
    peak = row["first_logits_peak_bytes"]
    row["peak_times_size"] = None if peak is None else peak / row["model_bytes"]
    return row | {"rounds": found}


def _table(rows: list[dict[str, Any]], rounds: int) -> Table:
    table = Table(title=f"medians of {rounds} loads", box=box.SIMPLE)
    for heading in ("from", "dtype", "loader", "load s", "first logits s", "peak MB", "times size"):
        table.add_column(heading, justify="left" if heading in ("from", "loader") else "right", no_wrap=True)
    for row in rows:
        peak, ratio = row["first_logits_peak_bytes"], row["peak_times_size"]
        table.add_row(
            row["form"],
            row["dtype"],
            row["loader"],
            f"{row['load_seconds']:.2f}",
            f"{row['first_logits_seconds']:.2f}",
            "null" if peak is None else f"{peak / 1e6:.0f}",
            "null" if ratio is None else f"{ratio:.2f}",
        )
    return table
