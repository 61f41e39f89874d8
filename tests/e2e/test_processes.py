"""Trained by several processes, a run is that of one process with the same global batch."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ROOT, arguments, load_script, report

from ryzen_llm.interop import load_pretrained

Train = Callable[[list[str]], int]

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
SHORT: dict[str, Any] = {
    "trainer.max_epochs": 2,
    "trainer.limit_train_batches": 8,
    "trainer.precision": "32-true",
    "validation_rounds": 1,
}


def start(command: list[str], cache: Path) -> subprocess.Popen[str]:
    """Lightning starts the script again for the other processes, so it has to be the script itself."""
    quick = {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "RYZEN_LLM_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *command],
        cwd=ROOT,
        env={**os.environ, **quick, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def shared(corpus: Path, output_dir: Path, strategy: str, processes: int, **changes: Any) -> list[str]:
    """The command line of a run whose global batch is 8 windows."""
    share = {"trainer.devices": processes, "trainer.strategy": strategy, "data.batch_size": 8 // processes}
    return arguments(corpus, output_dir, **{**SHORT, **share, **changes})


@pytest.mark.parametrize(
    ("strategy", "embedding", "processes"),
    [
        ("ddp", "dense", 2),
        ("fsdp", "dense", 2),
        ("ddp", "quantized", 2),  # rounded in its last steps
        pytest.param("ddp", "dense", 4, marks=pytest.mark.slow),
        pytest.param("fsdp", "dense", 4, marks=pytest.mark.slow),
    ],
)
def test_several_processes_train_the_model_that_one_would(
    strategy: str, embedding: str, processes: int, tmp_path: Path, corpus: Path, cache: Path, train: Train
) -> None:
    several, one = tmp_path / "several", tmp_path / "one"
    model = {"model.embedding": embedding}
    with start(shared(corpus, several, strategy, processes, **model), cache) as running:
        stdout, stderr = running.communicate(timeout=300)
    assert running.returncode == 0, stderr
    assert stdout.count("The model writes:") == 1
    assert train(arguments(corpus, one, **SHORT, **model, **{"data.batch_size": 8})) == 0

    checkpoint = several / "checkpoints" / "step=16.ckpt"
    assert len(list(checkpoint.glob("*.distcp"))) == (processes if strategy == "fsdp" else 0)
    loaded, alone = (load_pretrained(folder)[0] for folder in (several, one))
    saved = dict(loaded.named_parameters())
    for name, tensor in alone.named_parameters():
        torch.testing.assert_close(saved[name], tensor, atol=1e-4, rtol=1e-4, msg=name)

    assert {path.name for path in several.iterdir()} == {path.name for path in one.iterdir()}
    rows, same = (report(folder, "training_metrics_report")["batches"] for folder in (several, one))
    for row, other in zip(rows, same, strict=True):
        assert row["tokens"] == other["tokens"] == 8 * 16
        for name in ("loss", "grad_norm", "learning_rate"):
            assert row[name] == pytest.approx(other[name], rel=1e-3), (row["step"], name)
    final, other = (report(folder, "phase2_final_report") for folder in (several, one))
    assert final["status"] == "done"
    assert final["accuracy"]["val_loss"] == pytest.approx(other["accuracy"]["val_loss"], rel=1e-3)

    assert load_script("export").main(["--model", str(several), "--out", str(tmp_path / "exported")]) == 0
    exported, _ = load_pretrained(tmp_path / "exported")
    for name, tensor in exported.named_parameters():
        dense = name == "embedding.weight"  # there is no other in transformers' models
        assert torch.equal(tensor, loaded.embedding.dense_weight() if dense else saved[name]), name


def children(pid: int) -> list[int]:
    found = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_killed_process_ends_the_job_which_can_be_resumed(
    strategy: str, tmp_path: Path, corpus: Path, cache: Path
) -> None:
    """Within 60 s, with a message and reports; resumed, it ends as an undisturbed one."""
    out, undisturbed = tmp_path / "out", tmp_path / "undisturbed"
    long = {"trainer.limit_train_batches": 60, "trainer.max_epochs": 1}
    for folder, victim in ((undisturbed, False), (out, True)):
        with start(shared(corpus, folder, strategy, 2, **long), cache) as running:
            if victim:
                # When there is a second checkpoint, the first is whole: a sharded one is a folder that fills.
                while len(list((folder / "checkpoints").glob("step=*"))) < 2 and running.poll() is None:
                    time.sleep(0.05)
                killed = time.monotonic()
                os.kill(children(running.pid)[0], signal.SIGKILL)
            stdout, stderr = running.communicate(timeout=300)
        assert running.returncode == (1 if victim else 0), stdout + stderr
    assert time.monotonic() - killed < 60
    assert "One of the 2 processes may have ended" in stdout
    assert report(out, "phase2_final_report")["phases"][1]["status"] == "failed"
    assert report(out, "training_metrics_report")["metadata"]["status"] == "failed"

    with start([*shared(corpus, out, strategy, 2, **long), "--resume"], cache) as running:
        stdout, stderr = running.communicate(timeout=300)
    assert running.returncode == 0, stdout + stderr
    assert "resuming from step=" in stdout
    resumed, same = (dict(load_pretrained(folder)[0].named_parameters()) for folder in (out, undisturbed))
    for name, tensor in same.items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-6, rtol=1e-5, msg=name)
