"""One arm that fails takes nothing from the others."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import training
from benchmarks.training import Built


def working() -> Built:
    model = torch.nn.Embedding(8192, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    return model, lambda ids, targets: model(ids).square().mean(), optimizer, False


def failing() -> Built:
    raise torch.OutOfMemoryError("no room for it\nand more")


def test_the_others_have_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builders = {"ours": working, "naive": failing, "strong": working}
    monkeypatch.setattr(training, "_builders", lambda *_: (builders, {"litgpt": "not installed"}))
    monkeypatch.setattr(training, "matmul_peak", lambda *_: 1e12)
    path = tmp_path / "training.json"
    training.main(["--batch=2", "--context=8", "--rounds=1", "--device=cpu", f"--out={path}"])
    found = json.loads(path.read_text())
    assert [row["arm"] for row in found["arms"]] == ["ours", "strong"]
    assert found["absent"] == {
        "litgpt": "not installed",
        "naive": "failed: OutOfMemoryError: no room for it",
    }
    builders["ours"] = failing
    with pytest.raises(torch.OutOfMemoryError):
        training.main(["--batch=2", "--context=8", "--rounds=1", "--device=cpu", f"--out={path}"])
