"""What a run shows before and after its work."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ryzen_llm.pipeline.parts import Part
from ryzen_llm.pipeline.report import FinalReport

_COLOURS = {"PASS": "green", "FAIL": "red", "WARNING": "yellow", "NOT_MEASURED": "dim"}


def show_parts(console: Console, parts: Sequence[Part]) -> None:
    """What the run uses and why."""
    table = Table("part", "used here", "why", box=box.SIMPLE)
    for part in parts:
        table.add_row(*map(escape, part))
    console.print(table)


def show_summary(
    console: Console, report: FinalReport, output_dir: Path, to_generate: Sequence[str] = ()
) -> None:
    """Verdicts, how good the model is, a sample of its text, and where everything lies.

    `to_generate` are the options with which generate.py uses what was trained, none where nothing was.
    """
    console.rule("report")
    if report.optimizations:
        table = Table("claim", "verdict", "why")
        for name, result in report.optimizations.items():
            table.add_row(name, f"[{_COLOURS[result.status]}]{result.status}[/]", escape(result.message))
        console.print(table)
    accuracy = report.accuracy
    if accuracy.val_loss is not None and accuracy.unigram_entropy is not None:
        before = accuracy.initial_val_loss
        console.print(
            f"validation loss {accuracy.val_loss:.3f} nats per token"
            f"{'' if before is None else f', before training {before:.3f}'}; "
            f"unigram entropy of the corpus {accuracy.unigram_entropy:.3f}"
        )
    if report.tests:
        counts = ", ".join(f"{report.tests[key]} {key}" for key in ("passed", "failed", "errors", "skipped"))
        missed = report.tests["status"] == "FAIL"
        verdict = f": [red]FAIL[/], at least {report.tests['threshold']:.1%} have to pass" if missed else ""
        console.print(f"self-tests: {counts}{verdict}")
    if report.sample:
        console.print(f"\n[bold]The model writes:[/bold]\n{escape(report.sample)}\n")
    for phase in report.phases:
        if phase.status != "done":
            console.print(f"[red]{phase.name} {phase.status}[/red]: {escape((phase.error or '').strip())}")
    folder = escape(str(output_dir))
    # In one line whatever the width, to be copied.
    console.print(f"reports: {folder}/report.html and the .json files beside it", soft_wrap=True)
    console.print(f"curves:  tensorboard --logdir {folder}/tensorboard", soft_wrap=True)
    if to_generate:
        options = escape(shlex.join(to_generate))
        console.print(f'text:    python scripts/generate.py {options} --prompt "..."', soft_wrap=True)
