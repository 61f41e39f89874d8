"""The distribution needs nothing of ryzen_llm, and no triton."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[3]

SCRIPT = """
import sys
for name in ("ryzen_llm", "triton"):
    sys.modules[name] = None  # importing it raises ImportError
import ryzen_callbacks, ryzen_callbacks.compare, ryzen_callbacks.scan
collector = ryzen_callbacks.TrainingMetricsCollector()
collector.record_batch_metric({"loss": 0.5})
assert collector.statistics()["loss"].mean == 0.5
"""


def test_it_imports_and_works_where_the_rest_of_the_project_is_not_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={"PYTHONPATH": str(ROOT / "callbacks")},
        cwd=ROOT / "callbacks",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_it_asks_for_nothing_heavy() -> None:
    project = tomllib.loads((ROOT / "callbacks" / "pyproject.toml").read_text())["project"]
    names = {requirement.partition(">=")[0] for requirement in project["dependencies"]}
    assert names == {"torch", "lightning", "torchmetrics", "tensorboard", "numpy", "pydantic"}
