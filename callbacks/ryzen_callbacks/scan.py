"""Find anomalies in the log of a finished run: `python -m ryzen_callbacks.scan FILE.csv|TENSORBOARD_DIR`."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ryzen_callbacks.anomaly import Anomaly
from ryzen_callbacks.detector import AnomalyDetector, signals_of

# What logs call a value, and what it is called here. A leading "train/" is taken off first.
_NAMES = {
    "loss": ("loss", 1.0),
    "train_loss": ("loss", 1.0),
    "train_loss_step": ("loss", 1.0),
    "grad_norm": ("grad_norm", 1.0),
    "step_time": ("step_time_s", 1.0),
    "step_time_s": ("step_time_s", 1.0),
    "step_time_ms": ("step_time_s", 1e-3),
    "data_wait_s": ("data_wait_s", 1.0),
    "tokens_per_second": ("tokens_per_second", 1.0),
    "samples_per_second": ("samples_per_second", 1.0),
    "memory_bytes": ("memory_bytes", 1.0),
    "val_accuracy": ("accuracy", 1.0),
}

_EVENTS = "*tfevents*"
_EXPECTED = "expected a CSV file or a folder of TensorBoard events"

Rows = dict[int, dict[str, float]]


def scan(path: str | Path, plateau_steps: int | None = None) -> list[Anomaly]:
    """The anomalies in a log; see `read_log`."""
    rows = read_log(path)
    detector = AnomalyDetector(plateau_steps=plateau_steps)
    found = []
    for step in sorted(rows):
        values = rows[step]
        found += detector.update(step=step, **signals_of(values), accuracy=values.get("accuracy"))
    return found


def read_log(path: str | Path) -> Rows:
    """Values by name (as in `Step.values`, and `accuracy`) by step, of a CSV file (.csv or .csv.gz, with a
    `step` column) or a folder of TensorBoard events. A CSV file's last line is left out, with a note
    on stderr, if it has no line end: the run may have been killed while it wrote it.

    Raises:
        ValueError: it cannot be read, there is nothing there to look at, or a value is no number.
    """
    path = Path(path)
    rows = _read_tensorboard(path) if path.is_dir() else _read_csv(path)
    if not rows:
        known = ", ".join(_NAMES)
        raise ValueError(f"{path} has no values in a column or tag that is known here; known are {known}")
    return rows


def _read_csv(path: Path) -> Rows:
    rows: Rows = {}
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(_whole_lines(file, path), skipinitialspace=True)
            if "step" not in (reader.fieldnames or ()):
                raise ValueError(f"{path} has no column 'step'")
            for record in reader:
                try:
                    _put_record(rows, record)
                except ValueError as error:
                    raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"cannot read {path} as CSV ({error}), {_EXPECTED}") from error
    return rows


def _whole_lines(file: Iterable[str], path: Path) -> Iterator[str]:
    """The lines, without the last one if it may have been cut off, perhaps within a character."""
    for number, line in enumerate(file, 1):
        if number > 1 and not line.endswith(("\n", "\r")):
            note = "left out, as it has no line end: it may have been cut off"
            print(f"{path}, line {number}: {note}", file=sys.stderr)
            return
        try:
            yield line.encode("utf-8", "surrogateescape").decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: cannot read it as text ({error}), {_EXPECTED}"
            ) from error


def _put_record(rows: Rows, record: dict[str | Any, str | Any]) -> None:
    if None in record.values() or any(record.pop(None, ())):
        amount = "few" if None in record.values() else "many"
        raise ValueError(f"it has too {amount} values, expected {len(record)} as in the header")
    step = _step(record["step"])
    for column, text in record.items():
        _put(rows, step, column, text)


def _step(text: str) -> int:
    try:
        step = float(text)
        if step != int(step):
            raise ValueError
        return int(step)
    except (ValueError, OverflowError):
        raise ValueError(f"the step is {text!r}, expected a whole number") from None


def _read_tensorboard(path: Path) -> Rows:
    rows: Rows = {}
    if not any(path.glob(_EVENTS)):
        below = next(path.rglob(_EVENTS), None)
        hint = "expected a run's log folder" if below is None else f"there are some in {below.parent}"
        raise ValueError(f"{path} has no TensorBoard events in it; {hint}")
    events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            _put(rows, event.step, tag, event.value)
    return rows


def _put(rows: Rows, step: int, name: str, value: str | float) -> None:
    known = _NAMES.get(name.removeprefix("train/"))
    if known is None or value == "":
        return
    key, unit = known
    rows.setdefault(step, {}).setdefault(key, float(value) * unit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line an anomaly; the exit status is 0, or 2 if the log cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m ryzen_callbacks.scan", description=__doc__)
    parser.add_argument("path", help="a CSV file with a step column, or a folder of TensorBoard events")
    parser.add_argument("--plateau-steps", type=int, help="also report a loss that is flat for so many steps")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    options = parser.parse_args(arguments)
    try:
        found = scan(options.path, options.plateau_steps)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps([anomaly.row().model_dump(mode="json") for anomaly in found], indent=2))
        return 0
    for anomaly in found:
        print(f"{anomaly.step:>8}  {anomaly.kind:<16}  {anomaly.severity:<8}  {anomaly.message}")
    print(f"{len(found)} anomalies" if found else "no anomalies")
    return 0


if __name__ == "__main__":
    sys.exit(main())
