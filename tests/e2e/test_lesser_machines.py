"""The whole run works on lesser machines: no CUDA, no Triton, no bf16; and with torch.compile on and off."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import arguments, report, run_script

NO_TRITON = """
import sys
sys.modules["triton"] = None  # as if it were not installed
"""
SHORT = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 8, "validation_rounds": 1}


def assert_done(output_dir: Path, recipe: str) -> None:
    """All phases ended well, and what was measured is the recipe that the run was to have."""
    final = report(output_dir, "phase2_final_report")
    assert {phase["name"]: phase["status"] for phase in final["phases"]} == dict.fromkeys(
        ("setup", "training", "validation", "testing", "reporting"), "done"
    )
    results = {result["name"]: result for result in report(output_dir, "validation_report")["results"]}
    for name in ("end_to_end", "end_to_end_vs_strong", "numerical_correctness"):
        assert results[name]["measured"] is not None, results[name]["message"]
        assert recipe in results[name]["optimized"]["name"]
    assert final["tests"]["failed"] == final["tests"]["errors"] == 0


def test_without_cuda_and_triton(tmp_path: Path, corpus: Path, cache: Path) -> None:
    """Nothing is said about a device, so Lightning and this project have to agree on the CPU."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "RYZEN_LLM_CACHE": str(cache)}
    command = arguments(corpus, tmp_path / "out", **SHORT, trainer__accelerator=None)
    done = run_script("train", command, hidden, prelude=NO_TRITON)
    assert done.returncode == 0, done.stderr
    assert "cpu (" in done.stdout
    assert_done(tmp_path / "out", "not compiled")


@pytest.mark.parametrize("requested", [None, "bf16-mixed"])
def test_on_a_processor_without_bf16(
    requested: str | None,
    tmp_path: Path,
    corpus: Path,
    train: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Training and decoding fall back to fp32; setup says so, once."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    assert train(arguments(corpus, tmp_path / "out", **SHORT, trainer__precision=requested)) == 0
    screen = " ".join(capsys.readouterr().out.split())  # a line may be wrapped
    assert "has no bf16 arithmetic" in screen
    assert ": 32-true;" in screen
    assert ("bf16-mixed falls back to fp32" in screen) == (requested is not None)
    assert_done(tmp_path / "out", "fp32, not compiled")
    increase = report(tmp_path / "out", "validation_report")["results"][-1]
    baseline, optimized = (increase["samples"][arm] for arm in ("baseline", "optimized"))
    assert baseline == pytest.approx(optimized, rel=1e-6), "fp32 on either side"


@pytest.mark.slow
@pytest.mark.parametrize("compile", [True, False])
def test_compiled_or_not(compile: bool, tmp_path: Path, corpus: Path, cache: Path) -> None:
    """With torch.compile for real, in either case in the strong baseline; on the CPU it needs no Triton."""
    settings = {"RYZEN_LLM_CACHE": str(cache), "TORCHDYNAMO_DISABLE": "0"}
    command = arguments(corpus, tmp_path / "out", **SHORT, compile=compile)
    done = run_script("train", command, settings, prelude=NO_TRITON)
    assert done.returncode == 0, done.stderr
    assert f"torch.compile {'on' if compile else 'off'}" in done.stdout
    assert_done(tmp_path / "out", "compiled blocks" if compile else "not compiled")
