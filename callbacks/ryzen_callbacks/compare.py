"""Is command B faster than command A? `python -m ryzen_callbacks.compare "A ..." "B ..."`."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ryzen_callbacks.claim import Claim
from ryzen_callbacks.report_path import why_not_writable
from ryzen_callbacks.validator import OptimizationValidator

_OPERATORS = ("&&", "||", "|", "&", ";", "<", ">", ">>", "2>", "&>", "2>&1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both commands in paired rounds, print the verdict; exit status 2 if they cannot be timed.

    It is 130 after Ctrl-C. A report that cannot be written gives 2, too: before anything is timed, if it can
    be known by then.
    """
    parser = argparse.ArgumentParser(prog="python -m ryzen_callbacks.compare", description=__doc__)
    parser.add_argument("baseline", help="command A, in quotes; run without a shell, its output thrown away")
    parser.add_argument("optimized", help="command B")
    parser.add_argument(
        "--threshold", type=float, default=1.0, help="claimed speed-up (default: 1, no slower)"
    )
    parser.add_argument("--rounds", type=int, default=12, help="rounds of two runs of each (default: 12)")
    parser.add_argument("--warmup", type=int, default=1, help="untimed runs of each (default: 1)")
    parser.add_argument("--report", type=Path, help="also write validation_report.json to this path")
    options = parser.parse_args(arguments)
    try:
        claim = Claim(
            name="B against A",
            baseline=_runner(options.baseline),
            optimized=_runner(options.optimized),
            measure="time",
            threshold=options.threshold,
            baseline_name=options.baseline,
            optimized_name=options.optimized,
        )
        validator = OptimizationValidator([claim], rounds=options.rounds, warmup=options.warmup)
        if options.report is not None and (fault := why_not_writable(options.report)):
            raise ValueError(fault)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        report = validator.validate()
    except KeyboardInterrupt:
        return 130
    (result,) = report.results
    print(f"{result.status}: {result.message}", flush=True)
    if options.report is not None:
        try:
            report.write(options.report)
        except OSError as error:
            print(f"the report was not written: {error}", file=sys.stderr)
            return 2
    return 2 if result.status == "NOT_MEASURED" else 0


def _runner(command: str) -> Callable[[], None]:
    try:
        words, as_written = shlex.split(command), shlex.split(command, posix=False)
    except ValueError as error:
        raise ValueError(f"cannot split the command {command!r} into words ({error})") from error
    if for_a_shell := [word for word in as_written if word in _OPERATORS]:
        found = f"the command {command!r} has {for_a_shell[0]!r}"
        raise ValueError(f"{found}, which is for a shell; give sh -c '...', or quote it")
    if not words:
        raise ValueError("a command is empty; give a program and its arguments, in quotes")

    def run() -> None:
        subprocess.run(
            words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    return run


if __name__ == "__main__":
    sys.exit(main())
