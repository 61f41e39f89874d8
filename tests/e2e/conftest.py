"""One finished run, shared by the tests that only look at it, and a way to run the script in this process."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import arguments, load_script, run_script, write_corpus


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in this process have the order that they have in `run_script`'s, so that weights can be equal."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of these tests keep their token stores."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, corpus: Path, cache: Path) -> Path:
    """The output directory of a run that nothing disturbed; its screen is in `screen.txt` beside it."""
    output_dir = tmp_path_factory.mktemp("finished") / "out"
    done = run_script("train", arguments(corpus, output_dir), {"RYZEN_LLM_CACHE": str(cache)})
    assert done.returncode == 0, done.stderr
    output_dir.with_name("screen.txt").write_text(done.stdout, encoding="utf-8")
    return output_dir


@pytest.fixture
def train(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[list[str]], int]]:
    """`main` of scripts/train.py in this process, which is quicker than a process of its own."""
    monkeypatch.setenv("RYZEN_LLM_CACHE", str(cache))
    monkeypatch.setenv("COLUMNS", "200")
    with torch._dynamo.config.patch(disable=True):
        yield load_script("train").main
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Lightning ignores it after the first
