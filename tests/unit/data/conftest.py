"""A small corpus of several documents, and a cache of its own for each test."""

from collections.abc import Callable
from pathlib import Path

import pytest
from random_text import random_text


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes `count` documents of `words` words, one a file, and returns their folder."""

    def make(count: int = 60, words: int = 120) -> Path:
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        for number in range(count):
            (folder / f"{number:04}.md").write_text(random_text(number, words), encoding="utf-8")
        return folder

    return make


@pytest.fixture(autouse=True)
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder of the test, also the default one."""
    monkeypatch.setenv("RYZEN_LLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
