"""Over two processes the values are global, all ranks decide alike, and there is one report."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("two_process_run.py")


pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def run(folder: Path, name: str) -> list[dict[str, Any]]:
    """What the two ranks saw in the run `name` of two_process_run.py."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_a_fault_on_one_rank_stops_both_and_the_report_is_of_both(tmp_path: Path) -> None:
    ranks = run(tmp_path, "stop")
    assert [a[:2] for a in ranks[0]["anomalies"]] == [a[:2] for a in ranks[1]["anomalies"]]
    assert ranks[0]["anomalies"][0][:2] == [11, "non_finite"]
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


def test_both_ranks_go_back_together_with_whole_and_with_sharded_weights(tmp_path: Path) -> None:
    """The second rank's NaN is in both ranks' gradients from step 11 on; step 9 was the last good one.

    The two runs are the same training: norms of sharded gradients are those of the whole ones.
    """
    norms = {}
    for name in ("rollback", "sharded"):
        ranks = run(tmp_path / name, name)
        assert ranks[0]["rollbacks"] == ranks[1]["rollbacks"]
        assert ranks[0]["rollbacks"] == [{"at_step": 12, "to_step": 9, "anomaly_step": 11}]
        assert ranks[0]["weights"] == ranks[1]["weights"]
        assert all(math.isfinite(value) for value in ranks[0]["weights"])
        assert ranks[0]["steps"] == ranks[1]["steps"] == 5 * 8
        assert not list(tmp_path.rglob("*.ckpt"))
        report = json.loads((tmp_path / name / "training_metrics_report.json").read_text())
        norms[name] = [b["grad_norm"] for b in report["batches"]]
    assert norms["sharded"][10] is None  # NaN
    sound = [i for i in range(40) if i not in (10, 11)]
    assert [norms["sharded"][i] for i in sound] == pytest.approx(
        [norms["rollback"][i] for i in sound], rel=1e-4
    )


@pytest.mark.parametrize("name", ["rollback", "sharded"])
def test_a_full_disk_on_one_rank_ends_no_training_and_both_go_back_further(tmp_path: Path, name: str) -> None:
    """Those of the steps 6 and 9 cannot be written; neither rank may wait for the other for ever."""
    ranks = run(tmp_path, f"{name} on a full disk")
    assert ranks[0]["rollbacks"] == ranks[1]["rollbacks"]
    assert ranks[0]["rollbacks"] == [{"at_step": 12, "to_step": 3, "anomaly_step": 11}]
    assert ranks[0]["weights"] == ranks[1]["weights"]
    assert ranks[0]["steps"] == ranks[1]["steps"] == 5 * 8
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_validation_accuracy_that_only_one_rank_sees_fall_stops_both(tmp_path: Path) -> None:
    """The mean over the ranks falls from 0.9 to 0.7: were each to judge its own, they would part."""
    ranks = run(tmp_path, "accuracy")
    assert ranks[0]["anomalies"] == ranks[1]["anomalies"]
    assert [a[:2] for a in ranks[0]["anomalies"]] == [[24, "accuracy_drop"]]
    assert ranks[0]["anomalies"][0][2] == pytest.approx(0.7)
    assert ranks[0]["steps"] == ranks[1]["steps"] == 24
    report = json.loads((tmp_path / "training_metrics_report.json").read_text())
    assert report["epochs"][2]["accuracy"] == pytest.approx(0.7)
