"""Tokens on disk: a corpus encoded once, memory-mapped for ever after.

A store is a folder `<cache>/<key>/` with `train.bin`, `val.bin` and `test.bin` (token ids, little-endian
uint16 or uint32, end-of-text after every document), `tokenizer.json` and `meta.json`. The key is a hash of
all that the content follows from, so a store is never stale. It appears by one rename, so it is never half
there.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tokenizers
from filelock import FileLock
from rich.console import Console
from rich.progress import Progress

from ryzen_llm.data.corpus import Corpus
from ryzen_llm.data.splits import SPLITS, Split, split_of, unit_hash
from ryzen_llm.data.tokenizer import Tokenizer
from ryzen_llm.errors import InputError

FORMAT_VERSION = 3
# A vocabulary learnt on this much text is as good as one learnt on more, and the trainer holds it in memory.
TRAINING_SAMPLE_BYTES = 32 * 1024 * 1024
# Read in whole when a store is opened, to find damage within; a larger one is checked by its sizes alone.
_LARGEST_VERIFIED_BYTES = 256 * 1024 * 1024
# Encoded at a time: enough to keep all cores busy, little enough to forget about its memory.
_BATCH_CHARACTERS = 1024 * 1024


@dataclass(frozen=True)
class Recipe:
    """All that the content of a store follows from, besides the corpus.

    Attributes:
        tokenizer: the content of a tokenizer.json, or the vocabulary size to train one with.
        val_fraction: share of documents held out for validation.
        test_fraction: share of documents held out for testing.
    """

    tokenizer: str | int
    val_fraction: float
    test_fraction: float

    def key(self, corpus_fingerprint: str) -> str:
        """Return the name of the store for this recipe and corpus."""
        identity = [FORMAT_VERSION, tokenizers.__version__, corpus_fingerprint, asdict(self)]
        return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class _Meta:
    format_version: int
    key: str
    corpus: str
    dtype: str
    num_tokens: dict[Split, int]
    num_documents: dict[Split, int]
    num_characters: dict[Split, int]
    num_bytes: dict[Split, int]
    digests: dict[Split, str]
    unigram_entropy: float
    created_by: str


class TokenStore:
    """A corpus as token ids, opened read-only.

    Attributes:
        path: the folder of the store.
        key: hash of the corpus, the tokenizer and the split fractions.
        tokenizer: the tokenizer that encoded it.
        corpus: what the corpus was, for people.
        unigram_entropy: -Σ p ln p over the tokens of the train split, in nats: the cross-entropy of the best
            model that ignores context. A model that has learnt anything about order is below it.
    """

    def __init__(self, path: Path) -> None:
        """Open a store; raises OSError, ValueError, TypeError or KeyError where it is damaged."""
        meta = _Meta(**json.loads((path / "meta.json").read_text(encoding="utf-8")))
        for split in SPLITS:
            expected = meta.num_tokens[split] * np.dtype(meta.dtype).itemsize
            size = (path / f"{split}.bin").stat().st_size
            if size != expected:
                raise ValueError(f"{split}.bin has {size} bytes, expected {expected}")
            if size <= _LARGEST_VERIFIED_BYTES and _digest(path / f"{split}.bin") != meta.digests[split]:
                raise ValueError(f"{split}.bin is not what was written")
        self.path = path
        self.tokenizer = Tokenizer.from_file(path / "tokenizer.json")
        self.key = meta.key
        self.corpus = meta.corpus
        self.unigram_entropy = meta.unigram_entropy
        self._meta = meta

    def num_tokens(self, split: Split) -> int:
        """Return the number of tokens of a split, end-of-text included."""
        return self._meta.num_tokens[split]

    def num_documents(self, split: Split) -> int:
        """Return the number of documents of a split."""
        return self._meta.num_documents[split]

    def num_bytes(self, split: Split) -> int:
        """Return the size in bytes of a split's text in UTF-8."""
        return self._meta.num_bytes[split]

    def tokens(self, split: Split) -> npt.NDArray[np.uint16 | np.uint32]:
        """Return the tokens of a split, memory-mapped, of shape (num_tokens,)."""
        if not self.num_tokens(split):  # an empty file cannot be mapped
            return np.empty(0, dtype=self._meta.dtype)
        return np.memmap(self.path / f"{split}.bin", dtype=self._meta.dtype, mode="r")


def default_cache_dir() -> Path:
    """Return $RYZEN_LLM_CACHE, or ~/.cache/ryzen_llm."""
    return Path(os.environ.get("RYZEN_LLM_CACHE") or "~/.cache/ryzen_llm").expanduser()


def open_store(corpus: Corpus, recipe: Recipe, cache_dir: Path, progress: bool | None = None) -> TokenStore:
    """Open the store of a corpus, building it first if it is not there.

    Several processes may call this at once: one builds, the others wait and use what it built. A process
    killed while building leaves no store, and what it left is removed by the next one. Memory stays bounded
    however large the corpus is.

    Args:
        corpus: the documents.
        recipe: tokenizer and splits.
        cache_dir: folder of the stores; made if missing.
        progress: show progress bars; None shows them on a terminal only.

    Raises:
        InputError: the cache folder cannot be written, or corpus or tokenizer are not usable.
    """
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        key = recipe.key(corpus.fingerprint(cache_dir / "file_digests.json"))
        store = _open_if_sound(cache_dir / key)
        if store is None:
            # The lock is the operating system's, so it is free again when its holder is killed.
            with FileLock(cache_dir / f"{key}.lock"):
                store = _open_if_sound(cache_dir / key) or _build(corpus, recipe, cache_dir / key, progress)
    except OSError as error:
        raise InputError(
            f"cache_dir: cannot use {cache_dir} ({error}); set it or RYZEN_LLM_CACHE to a writable folder"
        ) from error
    return store


def _open_if_sound(path: Path) -> TokenStore | None:
    if not path.exists():
        return None
    try:
        return TokenStore(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        warnings.warn(f"token store {path} is damaged ({error}); building it again", stacklevel=2)
        return None


def _build(corpus: Corpus, recipe: Recipe, path: Path, progress: bool | None) -> TokenStore:
    """Build the store beside its place and move it there; the caller holds the lock."""
    if next(corpus.documents(), None) is None:
        raise InputError(f"source: no text in {corpus.describe()}; use files that are not empty")
    building = path.with_suffix(".building")
    for left_over in (path, building):  # a damaged store, and what a killed builder left
        shutil.rmtree(left_over, ignore_errors=True)
    building.mkdir()
    console = Console(stderr=True)
    shown = console.is_terminal if progress is None else progress
    try:
        with Progress(console=console, disable=not shown) as bars:
            tokenizer = _tokenizer(corpus, recipe, bars)
            tokenizer.save(building / "tokenizer.json")
            meta = _encode(corpus, recipe, tokenizer, path.name, building, bars)
        (building / "meta.json").write_text(json.dumps(asdict(meta), indent=2), encoding="utf-8")
        building.rename(path)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return TokenStore(path)


def _tokenizer(corpus: Corpus, recipe: Recipe, bars: Progress) -> Tokenizer:
    if isinstance(recipe.tokenizer, str):
        return Tokenizer.from_json(recipe.tokenizer)
    return Tokenizer.train(_training_sample(corpus, recipe, bars), recipe.tokenizer)


def _training_sample(corpus: Corpus, recipe: Recipe, bars: Progress) -> Iterator[str]:
    """Yield up to 32 MB of train documents, from all over the corpus where its size is known."""
    share = TRAINING_SAMPLE_BYTES / max(corpus.num_bytes or 1, TRAINING_SAMPLE_BYTES)
    task = bars.add_task("Training the tokenizer", total=corpus.num_bytes)
    sampled = 0
    for text in corpus.documents():
        size = len(text.encode())
        bars.advance(task, size)
        split = split_of(text, recipe.val_fraction, recipe.test_fraction)
        if split == "train" and unit_hash(text, "sample") < share:
            yield text
            sampled += size
            if sampled >= TRAINING_SAMPLE_BYTES:
                return


def _encode(
    corpus: Corpus, recipe: Recipe, tokenizer: Tokenizer, key: str, folder: Path, bars: Progress
) -> _Meta:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    num_tokens, num_documents = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    num_characters, num_bytes = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    task = bars.add_task("Encoding the corpus", total=corpus.num_bytes)
    with ExitStack() as stack:
        files = {split: stack.enter_context((folder / f"{split}.bin").open("wb")) for split in SPLITS}
        for texts in _batches(corpus.documents()):
            for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
                split = split_of(text, recipe.val_fraction, recipe.test_fraction)
                tokens = np.array([*ids, tokenizer.end_of_text_id], dtype=dtype)
                files[split].write(tokens.tobytes())
                size = len(text.encode())
                num_tokens[split] += len(tokens)
                num_documents[split] += 1
                num_characters[split] += len(text)
                num_bytes[split] += size
                if split == "train":
                    np.add.at(counts, tokens, 1)
                bars.advance(task, size)
    digests: dict[Split, str] = {split: _digest(folder / f"{split}.bin") for split in SPLITS}
    probabilities = counts[counts > 0] / max(counts.sum(), 1)
    return _Meta(
        format_version=FORMAT_VERSION,
        key=key,
        corpus=corpus.describe(),
        dtype=dtype.str,
        num_tokens=num_tokens,
        num_documents=num_documents,
        num_characters=num_characters,
        num_bytes=num_bytes,
        digests=digests,
        unigram_entropy=float(-(probabilities * np.log(probabilities)).sum()),
        created_by=f"ryzen_llm, tokenizers {tokenizers.__version__}",
    )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    """Group documents into batches of about a million characters."""
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
