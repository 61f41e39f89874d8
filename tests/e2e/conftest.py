"""One finished run, shared by the tests that only look at it."""

from pathlib import Path

import pytest
from tiny import arguments, run_script, write_corpus


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
