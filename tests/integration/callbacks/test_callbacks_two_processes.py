"""Over two processes the values are global, all ranks decide alike, and there is one report."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_process_run.py")


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_a_fault_on_one_rank_stops_both_and_the_report_is_of_both(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0]["anomalies"] == ranks[1]["anomalies"]
    assert ranks[0]["anomalies"][0] == [11, "non_finite"]
    assert ranks[0]["steps"] == ranks[1]["steps"] == 12

    assert len(list(tmp_path.rglob("*_report.json"))) == 2
    report = json.loads((tmp_path / "training_metrics_report.json").read_text())
    batches = report["batches"]
    means = [statistics.fmean(pair) for pair in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert [b["loss"] for b in batches[:10]] == pytest.approx(means[:10], rel=1e-5)
    assert batches[10]["loss"] is None
    assert {b["tokens"] for b in batches} == {2 * 4 * 8}
    timed = [b for b in batches if "step_time_s" in b]
    assert timed
    for b in timed:
        assert b["tokens_per_second"] == pytest.approx(b["tokens"] / b["step_time_s"])
