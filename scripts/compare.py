"""Two runs side by side: settings, machine, training, and each claim with its interval."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from ryzen_llm.errors import InputError
from ryzen_llm.pipeline import exit_with
from ryzen_llm.pipeline.compare import Run, compare


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="compare.py", description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, metavar="OUT", help="output directory of train.py")
    options = parser.parse_args(arguments)
    try:
        one, two = map(Run.read, options.runs)
    except InputError as error:
        return exit_with(error)
    compare(Console(), one, two)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
