"""A tiny model, a corpus for it, and a trained checkpoint of both."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from small_module import QUIET, build_module

from ryzen_llm.data import TextDataModule
from ryzen_llm.training import LanguageModule


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty documents of random words; the splits are drawn by their hash."""
    folder = tmp_path_factory.mktemp("corpus")
    chooser = random.Random(0)
    for number in range(60):
        words = chooser.choices(["alpha", "beta", "gamma", "return x", "\n\n", "naïve"], k=100)
        (folder / f"{number:02}.txt").write_text(f"document {number} " + " ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Token stores go to a folder of the test run, not to the user's cache."""
    before = os.environ.get("RYZEN_LLM_CACHE")
    os.environ["RYZEN_LLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("RYZEN_LLM_CACHE")
    if before is not None:
        os.environ["RYZEN_LLM_CACHE"] = before


@pytest.fixture
def data(corpus: Path) -> TextDataModule:
    return TextDataModule(
        str(corpus), vocab_size=280, context=16, batch_size=8, val_fraction=0.2, test_fraction=0.2
    )


@pytest.fixture
def checkpoint(data: TextDataModule, tmp_path: Path) -> tuple[Path, LanguageModule]:
    """A checkpoint file of six steps, and the module it was saved from."""
    module = build_module(data)
    trainer = Trainer(**QUIET, max_steps=6, limit_val_batches=0, enable_checkpointing=False)
    trainer.fit(module, datamodule=data)
    path = tmp_path / "checkpoints" / "step=6.ckpt"
    trainer.save_checkpoint(path)
    return path, module
