"""A tiny module, its data and a quiet Trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from tiny_run import Tiny, loader
from torch.utils.data import DataLoader


@pytest.fixture
def tiny() -> Tiny:
    return Tiny()


@pytest.fixture
def make_loader() -> Callable[..., DataLoader[Any]]:
    return loader


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    """A Trainer on the CPU that writes below `tmp_path`; keyword arguments override."""

    def make(**settings: Any) -> Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 3,
            "default_root_dir": tmp_path,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "logger": False,
        }
        return Trainer(**{**defaults, **settings})

    return make
