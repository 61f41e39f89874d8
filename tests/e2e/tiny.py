"""Whole runs of the scripts, small enough for a test: what they train, and how to start one."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "docs" / "schemas"

MODEL = {
    "hidden_size": 16,
    "num_layers": 1,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
SETTINGS: dict[str, Any] = {
    "data.vocab_size": 270,
    "data.context": 16,
    "data.batch_size": 4,
    "data.val_fraction": 0.2,
    "data.test_fraction": 0.2,
    **{f"model.{name}": value for name, value in MODEL.items()},
    "optimizer.learning_rate": 0.01,
    "trainer.accelerator": "cpu",
    "trainer.max_epochs": 2,
    "trainer.limit_train_batches": 20,
    "trainer.log_every_n_steps": 5,
    "checkpoint_every_n_steps": 7,
    "sample_every_n_steps": 3,
    "validation_rounds": 9,
    "prompt": "alpha beta",
    "compile": False,
}
"""Two epochs of 20 steps of a model of 6,000 parameters."""


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """A hundred documents of random words, one a file."""
    folder.mkdir()
    chooser = random.Random(seed)
    for number in range(100):
        words = chooser.choices(["alpha", "beta", "gamma", "return", "def", "(x):\n    ", "\n\n"], k=120)
        (folder / f"{number:03}.md").write_text(f"document {number}: {' '.join(words)}", encoding="utf-8")
    return folder


def arguments(corpus: Path, output_dir: Path, **changes: Any) -> list[str]:
    """The command line of a run; in `changes`, `__` stands for a dot, and None leaves a setting out."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    settings = {"data.source": corpus, "output_dir": output_dir, **SETTINGS, **changes}
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def start_script(
    name: str, arguments: list[str], environment: dict[str, str] | None = None, prelude: str = ""
) -> subprocess.Popen[str]:
    """Start a script in a process of its own, after the Python code `prelude` in the same process.

    torch.compile is off altogether, also in the baselines, unless `environment` says otherwise: it would take
    half a minute.
    """
    script = ROOT / "scripts" / f"{name}.py"
    code = f"{prelude}\nimport runpy\nrunpy.run_path({str(script)!r}, run_name='__main__')"
    defaults = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, **defaults, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(
    name: str, arguments: list[str], environment: dict[str, str] | None = None, prelude: str = ""
) -> subprocess.CompletedProcess[str]:
    """`start_script`, to its end."""
    with start_script(name, arguments, environment, prelude) as running:
        try:
            stdout, stderr = running.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            running.kill()
            raise
        return subprocess.CompletedProcess(running.args, running.returncode, stdout, stderr)


def load_script(name: str) -> ModuleType:
    """A script as a module, to call its `main` in this process."""
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(output_dir: Path, name: str) -> Any:
    """A JSON report of a run, found valid against its published schema."""
    content, schema = (
        json.loads(path.read_text(encoding="utf-8"))
        for path in (output_dir / f"{name}.json", SCHEMAS / f"{name}.schema.json")
    )
    jsonschema.validate(content, schema)
    return content
