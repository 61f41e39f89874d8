"""report.html and report.md: everything that the JSON reports hold, for people."""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from ryzen_callbacks import ValidationReport
from ryzen_callbacks.atomic_file import write_text
from ryzen_callbacks.verdict import bound_of, line_to_meet, show

from ryzen_llm.pipeline.drawings import bars, fractions, interval, loss_curve
from ryzen_llm.pipeline.report import FinalReport
from ryzen_llm.pipeline.wording import how_measured, show_duration, show_quantity
from ryzen_llm.selftest import IntegrationTestReport

_MOST_ANOMALIES = 50


@dataclass(frozen=True)
class RunResults:
    """What the pages show; a part is None where its phase did not get to write it."""

    report: FinalReport
    validation: ValidationReport | None = None
    tests: IntegrationTestReport | None = None
    training: dict[str, Any] | None = None
    """The content of training_metrics_report.json."""


def read_training_report(path: Path) -> dict[str, Any] | None:
    """The content of training_metrics_report.json; None where there is none."""
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_html_report(path: Path, run: RunResults) -> Path:
    """One self-contained page, written atomically; returns `path`."""
    # Autoescaped: the sample and the messages come from data.
    environment = _environment(autoescape=True)
    results = run.validation.results if run.validation else []
    return _write(
        environment,
        path,
        run,
        curve=loss_curve(run.training) if run.training else None,
        speed=bars(results, "s"),
        memory=bars(results, "bytes"),
        interval=interval,
        bound_of=bound_of,
        line_to_meet=line_to_meet,
        fraction_of_time=fractions([phase.duration_s or 0.0 for phase in run.report.phases]),
    )


def write_markdown_report(path: Path, run: RunResults) -> Path:
    """The same in Markdown, without the drawings, written atomically; returns `path`."""
    environment = _environment(autoescape=False)
    environment.filters |= {"text": markdown_text, "block": markdown_block}
    return _write(environment, path, run)


def markdown_text(value: object) -> str:
    """`value` on one line of Markdown that shows it as it is: no markup in it has any effect."""
    line = html.escape(" ".join(str(value).split()), quote=False)
    line = re.sub(r"([\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)
    return re.sub(r"^([#+\-=]|\d+[.)])", lambda found: f"{found[0][:-1]}\\{found[0][-1]}", line)


def markdown_block(value: object) -> str:
    """`value` as a fenced block, its fence longer than any row of backticks inside."""
    fence = "`" * max(3, *(len(row) + 1 for row in re.findall(r"`+", str(value))), 3)
    return f"{fence}text\n{str(value).rstrip()}\n{fence}"


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("ryzen_llm.pipeline", "."),
        autoescape=autoescape,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {
        "show": show,
        "show_quantity": show_quantity,
        "show_duration": show_duration,
        "how_measured": how_measured,
    }
    return environment


def _write(environment: Environment, path: Path, run: RunResults, **more: Any) -> Path:
    template = environment.get_template(f"report{path.suffix}.jinja")
    training, validation = run.training, run.validation
    anomalies = training["anomalies"] if training else []
    page = template.render(
        report=run.report,
        results=validation.results if validation else [],
        summary=validation.summary if validation else None,
        tests=run.tests,
        training=training,
        anomalies=anomalies[:_MOST_ANOMALIES],
        more_anomalies=len(anomalies[_MOST_ANOMALIES:]),
        environment=training["metadata"]["environment"]
        if training
        else (validation.environment if validation else {}),
        **more,
    )
    return write_text(path, page)
