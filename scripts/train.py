"""Train a language model, measure what the optimisations gain, and write the reports."""

from __future__ import annotations

import sys

from ryzen_llm.errors import InputError
from ryzen_llm.pipeline import DrafterOrchestrator, Orchestrator, exit_with, parse


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 1 a phase failed, 2 bad input, 3 with --strict a verdict is FAIL, 130 Ctrl-C."""
    try:
        config = parse(arguments)
        report = (DrafterOrchestrator if config.drafter.target else Orchestrator)(config).run()
    except InputError as error:
        return exit_with(error)
    except KeyboardInterrupt:
        return 130  # before training; from then on the reports are still written
    if report.status != "done":
        return 130 if report.status == "interrupted" else 1
    verdicts = [result.status for result in report.optimizations.values()]
    if report.tests:
        verdicts.append(report.tests["status"])
    return 3 if config.options.strict and "FAIL" in verdicts else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
