"""Trained by two processes, a run is that of one process with batches twice as large."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import arguments, report

# Lightning starts this file once more, for the second process.
KEEPING_WEIGHTS = """
import sys, torch
from tiny import load_script
import ryzen_llm.pipeline.orchestrator as orchestrator
train = orchestrator.train
def train_and_keep(trainer, module, *rest):
    train(trainer, module, *rest)
    torch.save(module.state_dict(), f"{folder}/rank{{trainer.global_rank}}.pt")
orchestrator.train = train_and_keep
sys.exit(load_script("train").main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_two_processes_train_the_model_that_one_would(
    tmp_path: Path, corpus: Path, cache: Path, train: Callable[[list[str]], int]
) -> None:
    short = {"trainer.max_epochs": 2, "trainer.limit_train_batches": 8, "trainer.precision": "32-true"}
    short["validation_rounds"] = 1
    two, one = tmp_path / "two", tmp_path / "one"
    script = tmp_path / "train_and_keep.py"
    script.write_text(KEEPING_WEIGHTS.format(folder=tmp_path))
    command = arguments(corpus, two, **short, trainer__devices=2, trainer__strategy="ddp")
    search = os.pathsep.join(path for path in sys.path if path)
    fast = {"PYTHONPATH": search, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), *command],
        env={**os.environ, **fast, "RYZEN_LLM_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The model writes:") == 1
    assert train(arguments(corpus, one, **short, data__batch_size=8)) == 0

    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    expected = torch.load(one / "checkpoints" / "step=16.ckpt", weights_only=True)["state_dict"]
    saved = torch.load(two / "checkpoints" / "step=16.ckpt", weights_only=True)["state_dict"]
    assert first.keys() == second.keys() == saved.keys() == expected.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert torch.equal(tensor, saved[name]), name
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)

    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    rows, same = (report(folder, "training_metrics_report")["batches"] for folder in (two, one))
    for row, other in zip(rows, same, strict=True):
        assert row["tokens"] == other["tokens"] == 8 * 16
        for name in ("loss", "grad_norm", "learning_rate"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), (row["step"], name)
    final, alone = (report(folder, "phase2_final_report") for folder in (two, one))
    assert final["status"] == "done"
    assert final["accuracy"]["val_loss"] == pytest.approx(alone["accuracy"]["val_loss"], rel=1e-3)
