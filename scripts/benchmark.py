"""Measure one capability on this machine, beside baselines and peers.

Usage: python scripts/benchmark.py NAME [--help | settings]
"""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

from ryzen_llm.errors import InputError
from ryzen_llm.pipeline import exit_with

ROOT = Path(__file__).parents[1]


def benchmarks() -> dict[str, str]:
    """The first line of each module in benchmarks/ that has a `main`, by the module's name."""
    found = {}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body):
            found[path.stem] = (ast.get_docstring(tree) or "").partition("\n")[0]
    return found


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input."""
    known = benchmarks()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        for name, what in known.items():
            print(f"  {name:12} {what}")
        return 0
    name, *rest = arguments
    try:
        if name not in known:
            raise InputError(f"unknown benchmark {name!r}, expected one of {', '.join(known)}")
        sys.path.insert(0, str(ROOT))
        importlib.import_module(f"benchmarks.{name}").main(rest)
    except InputError as error:
        return exit_with(error)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
