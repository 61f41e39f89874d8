"""Whether a run that was disturbed ended as one that was not."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import report

LAST = "checkpoints/step=40.ckpt"


def weights(output_dir: Path) -> dict[str, torch.Tensor]:
    found = torch.load(output_dir / LAST, weights_only=True)["state_dict"]
    assert isinstance(found, dict)
    return found


def losses(output_dir: Path) -> list[tuple[int, float]]:
    """Every (step, loss) that was logged; a step run twice is there once if both gave the same loss."""
    log = EventAccumulator(str(output_dir / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return sorted({(event.step, event.value) for event in log.Scalars("train/loss")})


def assert_same_outcome(output_dir: Path, finished: Path) -> None:
    """The same batches in the same order to the same weights, and reports of the whole run."""
    # The weights are the same to the bit, so each loss is that of the same weights on the same batch.
    assert losses(output_dir) == losses(finished)
    resumed, undisturbed = weights(output_dir), weights(finished)
    assert resumed.keys() == undisturbed.keys()
    for name, tensor in undisturbed.items():
        assert torch.equal(resumed[name], tensor), name
    found, expected = (report(folder, "training_metrics_report") for folder in (output_dir, finished))
    assert [row["step"] for row in found["batches"]] == [row["step"] for row in expected["batches"]]
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        assert found["statistics"][name] == expected["statistics"][name], name
    assert found["metadata"]["status"] == "finished"
    final, same = (report(folder, "phase2_final_report") for folder in (output_dir, finished))
    assert final["status"] == "done"
    assert final["accuracy"] == same["accuracy"]
    assert final["sample"] == same["sample"]
