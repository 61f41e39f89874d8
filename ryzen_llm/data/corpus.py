"""What documents there are: the standard library, files, folders, globs, or a Hugging Face dataset."""

import glob
import importlib
import json
import os
import platform
import sysconfig
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from ryzen_llm.data.atomic_write import write_atomically
from ryzen_llm.data.readers import read_documents, supported_suffix, text_of_row
from ryzen_llm.errors import InputError

# Other people's packages, tests, and tables of characters, which are an eighth of it and no text.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"})
_PLAIN_TEXT = {".txt", ".md", ".rst", ".py"}


class Corpus(ABC):
    """A collection of documents that can be read again and again, always in the same order."""

    num_bytes: int | None
    """UTF-8 bytes of all documents, or None where they are not known before reading (compressed, remote)."""

    @abstractmethod
    def documents(self) -> Iterator[str]:
        """Stream the non-empty documents."""

    @abstractmethod
    def fingerprint(self, memo: Path | None = None) -> str:
        """Return a hash of the content; `memo` is a JSON file that remembers digests of unchanged files."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words what the corpus is, for people."""


class FileCorpus(Corpus):
    """Documents in files, read in the order given."""

    def __init__(self, files: list[Path], text_field: str, name: str) -> None:
        self.files = files
        self.text_field = text_field
        self.name = name
        self.size_on_disk = sum(path.stat().st_size for path in files)
        plain = all(supported_suffix(path) in _PLAIN_TEXT for path in files)
        self.num_bytes = self.size_on_disk if plain else None

    def documents(self) -> Iterator[str]:
        """Stream the documents of each file in turn."""
        for path in self.files:
            yield from read_documents(path, self.text_field)

    def fingerprint(self, memo: Path | None = None) -> str:
        """Hash every file's content and how it is read; one of unchanged size and mtime is not read again."""
        known = _load_memo(memo)
        total = blake2b(self.text_field.encode(), digest_size=16)
        size_before = len(known)
        for path in self.files:
            try:
                stat = path.stat()
                key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
                if key not in known:
                    with path.open("rb") as file:
                        known[key] = file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()
            except OSError as error:
                raise InputError(f"{path}: cannot be read ({error.strerror}); check it is there") from error
            total.update(f"{supported_suffix(path)} {known[key]}\n".encode())
        if memo is not None and len(known) > size_before:
            write_atomically(memo, json.dumps(known))
        return total.hexdigest()

    def describe(self) -> str:
        """Name the source, the number of files and their size."""
        files = "1 file" if len(self.files) == 1 else f"{len(self.files)} files"
        return f"{self.name} ({files}, {self.size_on_disk / 1e6:.1f} MB)"


class StdlibCorpus(FileCorpus):
    """The running Python's standard library: its sources, text files and the topics of `help()`.

    Without its tests and its tables of characters.
    """

    def __init__(self) -> None:
        from pydoc_data.topics import topics

        root = Path(sysconfig.get_path("stdlib"))
        # topics.py holds the topics as one escaped literal; they are read as the text that it stands for.
        files = [path for path in _walk(root, _NOT_STDLIB) if path.name != "topics.py"]
        if not files:
            raise InputError(f"stdlib: no sources in {root}; set source to a file, folder or glob of text")
        super().__init__(files, "", f"standard library of Python {platform.python_version()}")
        self.topics = [topics[name] for name in sorted(topics)]
        assert self.num_bytes is not None
        self.num_bytes += sum(len(text.encode()) for text in self.topics)

    def documents(self) -> Iterator[str]:
        """Stream the files, then the help topics."""
        yield from super().documents()
        yield from self.topics

    def fingerprint(self, memo: Path | None = None) -> str:
        """Hash the files and the help topics."""
        topics = "\0".join(self.topics).encode()
        return blake2b(super().fingerprint(memo).encode() + topics, digest_size=16).hexdigest()


class HubCorpus(Corpus):
    """A Hugging Face dataset, streamed through the `datasets` library."""

    num_bytes = None

    def __init__(self, address: str, text_field: str) -> None:
        try:
            self._datasets: Any = importlib.import_module("datasets")
        except ImportError as error:
            raise InputError(
                f"hf:{address}: needs the datasets library: pip install 'ryzen-llm[datasets]'"
            ) from error
        name, _, rest = address.partition(":")
        config, _, split = rest.partition(":")
        if not name:
            raise InputError("hf: no dataset named; expected hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT")
        self.address, self.text_field = address, text_field
        self.name, self.config, self.split = name, config or None, split or "train"

    def documents(self) -> Iterator[str]:
        """Stream one document a row."""
        with self._clear_errors():
            rows = self._datasets.load_dataset(self.name, self.config, split=self.split, streaming=True)
            for number, row in enumerate(rows, start=1):
                if text := text_of_row(row, self.text_field, f"hf:{self.address}, row {number}"):
                    yield text

    def fingerprint(self, memo: Path | None = None) -> str:
        """Hash the dataset's name and the hash that `datasets` gives its files at the revision in use."""
        with self._clear_errors():
            builder = self._datasets.load_dataset_builder(self.name, self.config)
        identity = [self.name, self.config, self.split, self.text_field, builder.hash]
        return blake2b(json.dumps(identity).encode(), digest_size=16).hexdigest()

    def describe(self) -> str:
        """Name the dataset, its configuration and split."""
        return f"Hugging Face dataset {self.name}, {self.config or 'default'}, {self.split} split"

    @contextmanager
    def _clear_errors(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(
                f"hf:{self.address}: cannot be read ({error}); check the name and the network"
            ) from error


class JoinedCorpus(Corpus):
    """Several corpora, one after the other."""

    def __init__(self, parts: list[Corpus]) -> None:
        self.parts = parts
        sizes = [part.num_bytes for part in parts]
        self.num_bytes = None if None in sizes else sum(size for size in sizes if size is not None)

    def documents(self) -> Iterator[str]:
        """Stream the documents of each part in turn."""
        for part in self.parts:
            yield from part.documents()

    def fingerprint(self, memo: Path | None = None) -> str:
        """Hash the parts' fingerprints in order."""
        digests = " ".join(part.fingerprint(memo) for part in self.parts)
        return blake2b(digests.encode(), digest_size=16).hexdigest()

    def describe(self) -> str:
        """Describe each part."""
        return "; ".join(part.describe() for part in self.parts)


def open_corpus(source: str | list[str], text_field: str = "text") -> Corpus:
    """Open a corpus without reading it yet.

    Args:
        source: "stdlib"; a file, folder or glob of .txt .md .rst .py .jsonl .jsonl.gz .parquet;
            "hf:NAME[:CONFIG[:SPLIT]]"; or a list of these.
        text_field: the field that holds the text in .jsonl, .parquet and Hugging Face rows.

    Raises:
        InputError: nothing there that can be read.
    """
    if not source:
        raise InputError(f"source: {source!r} is empty; expected a file, folder, glob, hf:NAME or stdlib")
    if isinstance(source, list):
        return JoinedCorpus([open_corpus(part, text_field) for part in source])
    if source == "stdlib":
        return StdlibCorpus()
    if source.startswith("hf:"):
        return HubCorpus(source.removeprefix("hf:"), text_field)
    return FileCorpus(_find_files(source), text_field, source)


def _find_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        if supported_suffix(path) is None:
            raise InputError(f"source: {source}: file type not supported; {_expected()}")
        return [path]
    if path.is_dir():
        files = _walk(path)
    elif glob.has_magic(source):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise InputError(f"source: no file matches {source!r}")
        found = (_walk(match) if match.is_dir() else [match] for match in matches)
        files = sorted(
            {file for group in found for file in group if supported_suffix(file) and file.is_file()}
        )
    else:
        raise InputError(
            f"source: {source!r} does not exist; expected a file, folder, glob, hf:NAME or stdlib"
        )
    if not files:
        raise InputError(f"source: no file of a supported type in {source!r}; {_expected()}")
    return files


def _expected() -> str:
    return "expected .txt, .md, .rst, .py, .jsonl, .jsonl.gz or .parquet"


def _walk(root: Path, skip: frozenset[str] = frozenset()) -> list[Path]:
    """List the supported files below a folder, sorted. Hidden entries are skipped, and so are links to
    folders, which could lead in a circle."""
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        paths = (Path(folder, name) for name in names if not name.startswith("."))
        files += [path for path in paths if supported_suffix(path) and path.is_file()]
    return sorted(files)


def _load_memo(memo: Path | None) -> dict[str, str]:
    try:
        known = json.loads(memo.read_text()) if memo else {}
    except (OSError, ValueError):  # absent or damaged: the digests are computed again
        return {}
    return known if isinstance(known, dict) else {}
