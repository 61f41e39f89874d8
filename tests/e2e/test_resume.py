"""Killed at any moment and started again with --resume, a run ends as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from outcomes import assert_same_outcome
from tiny import arguments, report, run_script, start_script, write_corpus

from ryzen_llm.training import newest_checkpoint

Train = Callable[[list[str]], int]

KILL = """
import os, signal
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
"""
# Lightning writes to a temporary file first, perhaps on another file system, where moving it is copying.
HALF_A_CHECKPOINT = """
from pathlib import Path
from fsspec.implementations.local import LocalFileOpener
commit = LocalFileOpener.commit
def half(self):
    if "step=14" in self.path:
        content = Path(self.temp).read_bytes()
        Path(self.path).write_bytes(content[: len(content) // 2])
        die()
    commit(self)
LocalFileOpener.commit = half
"""


def killed_at_step(step: int) -> str:
    """Killed there, before its gradients."""
    return f"""
from ryzen_llm.training import LanguageModule
step = LanguageModule.training_step
LanguageModule.training_step = lambda self, *a: die() if self.global_step == {step} else step(self, *a)
"""


MOMENTS = {
    "storing the corpus": "from ryzen_llm.data.tokenizer import Tokenizer as c; c.save = die",
    "the first step": "from ryzen_llm.training import LanguageModule as c; c.training_step = die",
    "between checkpoints": killed_at_step(17),
    "removing an old checkpoint": """
from lightning.pytorch.callbacks import ModelCheckpoint
ModelCheckpoint._remove_checkpoint = die
""",
    "validating within training": """
from ryzen_llm.training import LanguageModule
validate = LanguageModule.validation_step
LanguageModule.validation_step = lambda self, *a: die() if self.global_step == 40 else validate(self, *a)
""",
    "writing the training report": """
replace = os.replace
os.replace = lambda a, b: die() if str(b).endswith("training_metrics_report.json") else replace(a, b)
""",
    "measuring claims": "from ryzen_callbacks import OptimizationValidator as c; c.validate = die",
    "testing": "from ryzen_llm.selftest import IntegrationTestRunner as c; c.run = die",
    "reporting": "import ryzen_llm.pipeline.orchestrator as m; m.write_html_report = die",
}

SECONDS_OF_A_PHASE = {"setup": 2.0, "training": 2.0, "validation": 2.0, "testing": 2.0, "report": 0.3}
"""About; by the heading that a phase starts with."""


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_in(moment: str, command: list[str], environment: dict[str, str]) -> None:
    killed = run_script("train", command, environment, prelude=KILL + moment)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


def test_killed_while_it_writes_a_checkpoint(
    tmp_path: Path,
    corpus: Path,
    finished: Path,
    cache: Path,
    train: Train,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = arguments(corpus, tmp_path / "out")
    kill_in(HALF_A_CHECKPOINT, command, {"RYZEN_LLM_CACHE": str(cache)})
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == [
        "step=14.ckpt",
        "step=7.ckpt",
    ]
    with pytest.warns(UserWarning, match=r"step=14\.ckpt: truncated .* taking the one before"):
        assert train([*command, "--resume"]) == 0
    assert "resuming from step=7.ckpt" in capsys.readouterr().out
    assert_same_outcome(tmp_path / "out", finished)


def test_killed_where_an_embedding_begins_to_be_rounded(
    tmp_path: Path, corpus: Path, cache: Path, train: Train
) -> None:
    """The checkpoint of that step, 70% of 40, is not rounded yet: a resumed run begins to."""
    quantised = {"model.embedding": "quantized", "phases": "training"}
    assert train(arguments(corpus, tmp_path / "undisturbed", **quantised)) == 0
    command = arguments(corpus, tmp_path / "out", **quantised)
    kill_in(killed_at_step(28), command, {"RYZEN_LLM_CACHE": str(cache)})
    assert (tmp_path / "out" / "checkpoints" / "step=28.ckpt").exists()
    assert train([*command, "--resume"]) == 0
    assert_same_outcome(tmp_path / "out", tmp_path / "undisturbed")


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while(moment: str, tmp_path: Path, corpus: Path, finished: Path, train: Train) -> None:
    # A cache of its own, so that the corpus is stored anew.
    command = arguments(corpus, tmp_path / "out", data__cache_dir=tmp_path / "cache")
    kill_in(MOMENTS[moment], command, {})
    assert train([*command, "--resume"]) == 0
    assert_same_outcome(tmp_path / "out", finished)
    assert not list((tmp_path / "cache").glob("*.building"))


@pytest.mark.slow
@pytest.mark.parametrize(("phase", "seconds"), SECONDS_OF_A_PHASE.items())
def test_killed_at_random_moments_of(
    phase: str, seconds: float, tmp_path: Path, corpus: Path, finished: Path
) -> None:
    """Twenty times in a row, each time resumed; whatever report is there at any time is whole."""
    chooser = random.Random(phase)
    output_dir = tmp_path / "out"
    command = arguments(corpus, output_dir, data__cache_dir=tmp_path / "cache", resume=True)
    for _ in range(20):
        running = start_script("train", command)
        assert running.stdout is not None
        for line in running.stdout:
            if f" {phase} " in line:
                break
        time.sleep(chooser.uniform(0, seconds))
        running.kill()
        running.communicate()
        for path in output_dir.glob("*.json"):
            json.loads(path.read_text(encoding="utf-8"))
    done = run_script("train", command)
    assert done.returncode == 0, done.stderr
    assert_same_outcome(output_dir, finished)
    assert not list((tmp_path / "cache").glob("*.building"))


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def test_a_finished_run_is_measured_again_but_not_trained(
    copied: Path, corpus: Path, finished: Path, train: Train
) -> None:
    """Also: --strict turns a FAIL, here of an absurd target, into exit status 3."""
    command = arguments(
        corpus, copied, resume=True, strict=True, e2e_speedup_target=1000, validation_rounds=6
    )
    assert train(command) == 3
    assert_same_outcome(copied, finished)
    assert report(copied, "phase2_final_report")["e2e_speedup"]["status"] == "FAIL"
    assert report(copied, "phase2_final_report")["e2e_speedup"]["threshold"] == 1000


def test_a_damaged_newest_checkpoint_is_replaced(copied: Path, corpus: Path, train: Train) -> None:
    """By one of the same name, so that the folder can be read ever after."""
    damaged = copied / "checkpoints" / "step=40.ckpt"
    os.truncate(damaged, 5000)
    again = arguments(corpus, copied, resume=True, phases="training", checkpoint_every_n_steps=10)
    with pytest.warns(UserWarning, match=r"step=40\.ckpt: truncated .* taking the one before"):
        assert train(again) == 0
    assert not list(damaged.parent.glob("*-v*"))
    assert newest_checkpoint(damaged.parent) == damaged


@pytest.mark.parametrize(
    ("change", "naming"),
    [
        ({"model.hidden_size": 32}, "model.hidden_size is 32, was 16"),
        ({"optimizer.weight_decay": 0.2}, "optimizer.weight_decay is 0.2, was 0.1"),
        ({"data.batch_size": 8}, "data.batch_size is 8, was 4"),
        ({"data.seed": 1}, "data.seed is 1, was 0"),
        ({"data.val_fraction": 0.3}, "trained on other data"),
        ({"data.source": "{}"}, "trained on other data"),
    ],
)
def test_what_does_not_fit_the_checkpoint_is_refused_and_nothing_changes(
    change: dict[str, Any],
    naming: str,
    copied: Path,
    corpus: Path,
    train: Train,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if change.get("data.source"):
        change = {"data.source": write_corpus(tmp_path / "other", seed=1)}
    before = snapshot(copied)
    assert train(arguments(corpus, copied, resume=True, **change)) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert naming in error
    assert snapshot(copied) == before
