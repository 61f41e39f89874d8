"""The store holds exactly the corpus, is found again, and survives kills, races and damage."""

import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from random_text import random_text
from tokenizers import models, pre_tokenizers

from ryzen_llm.data import token_store
from ryzen_llm.data.corpus import Corpus, open_corpus
from ryzen_llm.data.splits import SPLITS, split_of
from ryzen_llm.data.token_store import Recipe, TokenStore, open_store
from ryzen_llm.data.tokenizer import Tokenizer
from ryzen_llm.errors import InputError

RECIPE = Recipe(tokenizer=280, val_fraction=0.2, test_fraction=0.2)


class GeneratedCorpus(Corpus):
    """Documents that exist only while they are read."""

    num_bytes = None

    def __init__(self, count: int, words: int = 100) -> None:
        self.count, self.words, self.reads = count, words, 0

    def documents(self) -> Iterator[str]:
        for i in range(self.count):
            self.reads += 1
            yield random_text(i, self.words)

    def fingerprint(self, memo: Path | None = None) -> str:
        return f"{self.count} {self.words}"

    def describe(self) -> str:
        return "generated"


def content(store: TokenStore) -> dict[str, list[int]]:
    return {split: store.tokens(split).tolist() for split in SPLITS}


def test_each_split_is_its_documents_with_end_of_text_after_each(cache_dir: Path) -> None:
    """Token for token, in corpus order, against encoding the documents one by one."""
    corpus = GeneratedCorpus(80)
    store = open_store(corpus, RECIPE, cache_dir)
    for split in SPLITS:
        texts = [text for text in corpus.documents() if split_of(text, 0.2, 0.2) == split]
        expected = [
            token
            for text in texts
            for token in [*store.tokenizer.encode(text), store.tokenizer.end_of_text_id]
        ]
        assert store.tokens(split).tolist() == expected
        assert store.num_tokens(split) == len(expected)
        assert store.num_documents(split) == len(texts)
        assert store.num_bytes(split) == sum(len(text.encode()) for text in texts)


def test_tokenizer_is_trained_on_the_train_split_only(cache_dir: Path) -> None:
    """Held-out text must not shape the vocabulary."""
    corpus = GeneratedCorpus(80)
    texts = [text for text in corpus.documents() if split_of(text, 0.2, 0.2) == "train"]
    assert open_store(corpus, RECIPE, cache_dir).tokenizer.to_json() == Tokenizer.train(texts, 280).to_json()


def test_tokenizer_sample_is_bounded_and_from_all_over(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus above the byte budget gives a sample within it, taken from its beginning, middle and end."""
    corpus = GeneratedCorpus(400)
    corpus.num_bytes = sum(len(text.encode()) for text in corpus.documents())  # type: ignore[assignment]
    monkeypatch.setattr(token_store, "TRAINING_SAMPLE_BYTES", corpus.num_bytes // 4)  # type: ignore[operator]
    sample: list[str] = []
    train = Tokenizer.train

    def spy(documents: Iterator[str], vocab_size: int) -> Tokenizer:
        sample.extend(documents)
        return train(sample, vocab_size)

    monkeypatch.setattr(Tokenizer, "train", spy)
    open_store(corpus, RECIPE, cache_dir)
    positions = [int(text.split()[1].rstrip(":")) for text in sample]
    assert sum(len(text.encode()) for text in sample) < corpus.num_bytes / 4 * 1.05  # type: ignore[operator]
    assert {position // 100 for position in positions} == {0, 1, 2, 3}


def test_unigram_entropy_is_that_of_the_train_tokens(cache_dir: Path) -> None:
    """H = -Σ p ln p, counted in plain Python, end-of-text included."""
    store = open_store(GeneratedCorpus(80), RECIPE, cache_dir)
    counts = Counter(store.tokens("train").tolist())
    total = sum(counts.values())
    expected = -math.fsum(count / total * math.log(count / total) for count in counts.values())
    assert store.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_duplicates_land_in_one_split(tmp_path: Path, cache_dir: Path) -> None:
    """A text in training that comes again elsewhere never counts as held out."""
    for i in range(60):
        (tmp_path / f"{i}.md").write_text(random_text(i % 3, 50))
    store = open_store(open_corpus(str(tmp_path / "*.md")), Recipe(260, 0.3, 0.3), cache_dir)
    assert all(store.num_documents(split) % 20 == 0 for split in SPLITS)
    assert sum(store.num_documents(split) for split in SPLITS) == 60


def test_large_vocabularies_are_stored_as_uint32(cache_dir: Path) -> None:
    """Ids above 65535 survive."""
    backend = tokenizers.Tokenizer(models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])

    class TwoWords(GeneratedCorpus):
        def documents(self) -> Iterator[str]:
            yield "w69999 w1"

    store = open_store(TwoWords(1), Recipe(backend.to_str(), 0.0, 0.0), cache_dir)
    assert store.tokens("train").dtype == np.dtype("<u4")
    assert store.tokens("train").tolist() == [69_999, 1, 70_000]
    assert store.tokens("val").tolist() == []


def test_second_start_reads_no_document(cache_dir: Path) -> None:
    """What is in the store is never encoded again."""
    first, second = GeneratedCorpus(40), GeneratedCorpus(40)
    built = open_store(first, RECIPE, cache_dir)
    opened = open_store(second, RECIPE, cache_dir)
    assert (first.reads > 0, second.reads) == (True, 0)
    assert content(opened) == content(built)


def test_key_changes_with_all_that_the_content_follows_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Corpus, tokenizer, either fraction, and the version of the library that encodes."""
    keys = [
        RECIPE.key("a"),
        RECIPE.key("b"),
        Recipe("280", 0.2, 0.2).key("a"),
        Recipe(281, 0.2, 0.2).key("a"),
    ]
    keys += [Recipe(280, 0.1, 0.2).key("a"), Recipe(280, 0.2, 0.1).key("a")]
    assert RECIPE.key("a") == Recipe(280, 0.2, 0.2).key("a")
    monkeypatch.setattr(tokenizers, "__version__", "0.0")
    keys.append(RECIPE.key("a"))
    assert len(set(keys)) == len(keys)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "short tokens": lambda store: truncate(store / "train.bin"),
    "other tokens": lambda store: (store / "train.bin").write_bytes(
        bytes(reversed((store / "train.bin").read_bytes()))
    ),
    "missing tokens": lambda store: (store / "val.bin").unlink(),
    "missing meta": lambda store: (store / "meta.json").unlink(),
    "cut meta": lambda store: truncate(store / "meta.json"),
    "foreign meta": lambda store: (store / "meta.json").write_text('{"a": 1}'),
    "list as meta": lambda store: (store / "meta.json").write_text("[]"),
    "cut tokenizer": lambda store: truncate(store / "tokenizer.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_store_is_built_again_with_a_warning(cache_dir: Path, damage: str) -> None:
    """Never an exception from deep inside, never wrong tokens."""
    store = open_store(GeneratedCorpus(40), RECIPE, cache_dir)
    expected = content(store)
    DAMAGE[damage](store.path)
    with pytest.warns(UserWarning, match="is damaged"):
        again = open_store(GeneratedCorpus(40), RECIPE, cache_dir)
    assert content(again) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_store(GeneratedCorpus(40), RECIPE, cache_dir)


def test_a_failed_build_leaves_nothing(tmp_path: Path, cache_dir: Path) -> None:
    """A binary file late in the corpus stops the build; no store, no half store."""
    for i in range(30):
        (tmp_path / f"{i:02}.md").write_text(random_text(i, 50))
    (tmp_path / "99.md").write_bytes(b"\0")
    tokenizer = Tokenizer.train([random_text(1, 50)], 260).to_json()
    with pytest.raises(InputError, match="binary file"):
        open_store(open_corpus(str(tmp_path / "*.md")), Recipe(tokenizer, 0.1, 0.1), cache_dir)
    assert [path.name for path in cache_dir.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("below", [".", "cache"])
def test_an_unusable_cache_folder_is_one_clear_error(tmp_path: Path, below: str) -> None:
    """Here a file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cache_dir: cannot use"):
        open_store(GeneratedCorpus(5), RECIPE, tmp_path / "file" / below)


def test_an_empty_corpus_is_one_clear_error(tmp_path: Path, cache_dir: Path) -> None:
    """Rather than a complaint about the vocabulary."""
    (tmp_path / "empty.md").write_text("")
    with pytest.raises(InputError, match="no text in"):
        open_store(open_corpus(str(tmp_path / "empty.md")), RECIPE, cache_dir)


def test_memory_of_a_build_does_not_grow_with_the_corpus(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight times the corpus, the same peak: documents and tokens pass through in batches."""
    monkeypatch.setattr(token_store, "_BATCH_CHARACTERS", 50_000)
    tokenizer = Tokenizer.train([random_text(1, 1000)], 280).to_json()

    def peak(count: int) -> int:
        tracemalloc.start()
        try:
            open_store(GeneratedCorpus(count, words=400), Recipe(tokenizer, 0.1, 0.1), cache_dir)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(60)  # imports and caches of the first build
    assert peak(800) < 1.25 * peak(100)


STALLING_BUILD = """
import sys, time
from pathlib import Path
from ryzen_llm.data.corpus import FileCorpus
from ryzen_llm.data.token_store import Recipe, open_store

name, folder, cache = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])

class Stalling(FileCorpus):
    def documents(self):
        for number, text in enumerate(super().documents()):
            if number == 20:
                (folder / f"{name}.reading").touch()
                while not (folder / "go").exists():
                    time.sleep(0.01)
            yield text

corpus = Stalling(sorted(folder.glob("*.md")), "text", "x")
(folder / f"{name}.opening").touch()
store = open_store(corpus, Recipe(TOKENIZER, 0.2, 0.2), cache)
print(store.key, store.num_tokens("train"))
"""


def start_build(name: str, folder: Path, cache: Path) -> subprocess.Popen[str]:
    """Start a build that stops in the middle until there is a file `go`."""
    tokenizer = Tokenizer.train([random_text(1, 300)], 270).to_json()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    program = STALLING_BUILD.replace("TOKENIZER", repr(tokenizer))
    arguments = [sys.executable, "-c", program, name, str(folder), str(cache)]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the other process did not get there within a minute"
        time.sleep(0.02)


def test_a_killed_build_leaves_no_store_and_the_next_one_is_whole(
    make_corpus: Callable[..., Path], cache_dir: Path
) -> None:
    """SIGKILL while tokens are written; the next build cleans up and gives what an undisturbed one gives."""
    folder = make_corpus()
    process = start_build("killed", folder, cache_dir)
    wait_for(lambda: (folder / "killed.reading").exists())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (left,) = [path for path in cache_dir.iterdir() if path.is_dir()]
    assert left.suffix == ".building"
    (folder / "go").touch()
    output, _ = start_build("second", folder, cache_dir).communicate(timeout=60)
    key, num_tokens = output.split()
    assert [path.name for path in cache_dir.iterdir() if path.is_dir()] == [key]
    recipe = Recipe(Tokenizer.train([random_text(1, 300)], 270).to_json(), 0.2, 0.2)
    undisturbed = open_store(open_corpus(str(folder / "*.md")), recipe, cache_dir.with_name("other"))
    assert content(TokenStore(cache_dir / key)) == content(undisturbed)
    assert undisturbed.num_tokens("train") == int(num_tokens)


def test_two_processes_at_once_build_one_store(make_corpus: Callable[..., Path], cache_dir: Path) -> None:
    """The second waits while the first builds, then uses that store without reading a document."""
    folder = make_corpus()
    first = start_build("first", folder, cache_dir)
    wait_for(lambda: (folder / "first.reading").exists())
    second = start_build("second", folder, cache_dir)
    wait_for(lambda: (folder / "second.opening").exists())
    time.sleep(0.5)  # to reach the lock; were it too short, the test would prove less but not fail
    assert second.poll() is None
    (folder / "go").touch()
    outputs = [process.communicate(timeout=60)[0] for process in (first, second)]
    assert outputs[0] == outputs[1] != ""
    assert not (folder / "second.reading").exists()
    assert (
        json.loads((cache_dir / outputs[0].split()[0] / "meta.json").read_text())["num_documents"]["train"]
        > 0
    )
