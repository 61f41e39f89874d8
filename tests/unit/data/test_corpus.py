"""What a source means, that order and fingerprint are stable, and that an unusable one is one clear error."""

import json
import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from ryzen_llm.data.corpus import open_corpus
from ryzen_llm.errors import InputError


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def documents(source: str | list[str] | Path) -> list[str]:
    return list(open_corpus(source if isinstance(source, list) else str(source)).documents())


def test_folder_is_read_in_sorted_order_without_hidden_entries_or_loops(tmp_path: Path) -> None:
    """Hidden folders and files, other types, empty files and links that lead in a circle are left out."""
    write(tmp_path / "b.md", "second")
    write(tmp_path / "a" / "z.py", "first")
    write(tmp_path / "empty.md", "")
    write(tmp_path / "image.png", "no text")
    write(tmp_path / ".git" / "c.md", "hidden")
    write(tmp_path / ".hidden.md", "hidden")
    (tmp_path / "a" / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "broken.md").symlink_to(tmp_path / "nowhere.md")
    assert documents(tmp_path) == ["first", "second"]


def test_glob_takes_the_supported_files_that_match(tmp_path: Path) -> None:
    """`**` goes down, a matching folder is read whole, and no file comes twice."""
    write(tmp_path / "x" / "1.md", "one")
    write(tmp_path / "x" / "y" / "2.md", "two")
    write(tmp_path / "x" / "3.png", "no text")
    assert documents(tmp_path / "**" / "*.md") == ["one", "two"]
    assert documents(tmp_path / "x" / "*") == ["one", "two"]
    assert documents(tmp_path / "**") == ["one", "two"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    """`notes [1].md` exists and must be read as it is spelt."""
    assert documents(write(tmp_path / "notes [1].md", "text")) == ["text"]


def test_list_joins_sources_in_its_order(tmp_path: Path) -> None:
    """Order is the user's; the size is known if all sizes are."""
    second, first = write(tmp_path / "a.md", "é"), write(tmp_path / "b.md", "two")
    rows = write(tmp_path / "c.jsonl", json.dumps({"text": "three"}))
    assert documents([str(first), str(second)]) == ["two", "é"]
    assert open_corpus([str(first), str(second)]).num_bytes == 5
    assert open_corpus([str(first), str(rows)]).num_bytes is None


def test_stdlib_is_this_pythons_sources_and_help_topics() -> None:
    """It holds real modules and topics in a fixed order; no tests, packages or tables of characters."""
    corpus = open_corpus("stdlib")
    texts = list(corpus.documents())
    assert Path(json.__file__).read_text(encoding="utf-8") in texts
    assert any("The ``if`` statement" in text or 'The "if" statement' in text for text in texts)
    assert texts == list(corpus.documents())
    names = [str(path) for path in corpus.files]  # type: ignore[attr-defined]
    left_out = ("site-packages", "test", "encodings")
    assert not any(f"{os.sep}{part}{os.sep}" in name for name in names for part in left_out)
    assert corpus.num_bytes == sum(len(text.encode()) for text in texts)
    assert corpus.num_bytes > 5_000_000


def test_fingerprint_follows_content_only(tmp_path: Path) -> None:
    """A copy elsewhere has the same fingerprint; one changed byte, another field or type has not."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        write(folder / "a.md", "one")
        write(folder / "b.md", "two")
    same = open_corpus(str(here)).fingerprint()
    assert open_corpus(str(there)).fingerprint() == same
    assert open_corpus(str(there), "body").fingerprint() != same
    (there / "b.md").rename(there / "b.txt")  # read in other pieces
    assert open_corpus(str(there)).fingerprint() != same
    write(here / "b.md", "twO")
    assert open_corpus(str(here)).fingerprint() != same


def test_fingerprint_sees_where_one_file_ends(tmp_path: Path) -> None:
    """Moving text from one file to the next makes other documents of the same bytes."""
    write(tmp_path / "a.md", "one"), write(tmp_path / "b.md", "two")
    before = open_corpus(str(tmp_path)).fingerprint()
    write(tmp_path / "a.md", "onet"), write(tmp_path / "b.md", "wo")
    assert open_corpus(str(tmp_path)).fingerprint() != before


def test_memo_spares_reading_unchanged_files(tmp_path: Path) -> None:
    """A remembered digest is used for a file of the same path, size and time, and only for it."""
    file, memo = write(tmp_path / "a.md", "one"), tmp_path / "memo.json"
    first = open_corpus(str(file)).fingerprint(memo)
    stat = file.stat()
    file.write_text("two")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert open_corpus(str(file)).fingerprint(memo) == first  # not read: this is what makes it instant
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_corpus(str(file)).fingerprint(memo) == open_corpus(str(file)).fingerprint() != first


@pytest.mark.parametrize("content", ["", "{broken", "[1]", "\xff"])
def test_a_damaged_memo_is_rebuilt(tmp_path: Path, content: str) -> None:
    """The memo is a convenience: nothing may fail for it."""
    file, memo = write(tmp_path / "a.md", "one"), tmp_path / "memo.json"
    memo.write_bytes(content.encode("latin-1"))
    assert open_corpus(str(file)).fingerprint(memo) == open_corpus(str(file)).fingerprint()
    assert len(json.loads(memo.read_text())) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.md", "does not exist"),
        ("*.md", "no file matches '*.md'"),
        ("pictures", "no file of a supported type in 'pictures'; expected .txt"),
        ("pictures/*", "no file of a supported type"),
        ("*.txt", "no file of a supported type"),
        ("pictures/a.png", "file type not supported; expected .txt"),
        ([], "source: [] is empty"),
        (["texts/readme.md", ""], "source: '' is empty"),
        ("hf:", "no dataset named"),
    ],
)
def test_a_source_with_nothing_to_read_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, message: str
) -> None:
    """The error says what the source was and what would do."""
    monkeypatch.setitem(sys.modules, "datasets", types.ModuleType("datasets"))
    write(tmp_path / "pictures" / "a.png", "no text")
    write(tmp_path / "texts" / "readme.md", "text")
    (tmp_path / "broken.txt").symlink_to("nowhere")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as caught:
        open_corpus(source)
    assert message in str(caught.value)


class TestHubCorpus:
    """The adapter to `datasets`, against a stand-in with the same two functions."""

    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
        module = types.ModuleType("datasets")
        module.calls = []  # type: ignore[attr-defined]
        module.revision = "r1"  # type: ignore[attr-defined]

        def load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
            if name == "nobody/nothing":
                raise FileNotFoundError("Dataset doesn't exist on the Hub")
            module.calls.append((name, config, split, streaming))  # type: ignore[attr-defined]
            return iter([{"text": "one", "id": 1}, {"text": ""}, {"text": "two", "id": 2}])

        def load_dataset_builder(name: str, config: str | None) -> Any:
            return types.SimpleNamespace(hash=module.revision)  # type: ignore[attr-defined]

        module.load_dataset = load_dataset  # type: ignore[attr-defined]
        module.load_dataset_builder = load_dataset_builder  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "datasets", module)
        return module

    @pytest.mark.parametrize(
        ("source", "call"),
        [
            ("hf:me/tiny", ("me/tiny", None, "train", True)),
            ("hf:me/tiny:en", ("me/tiny", "en", "train", True)),
            ("hf:me/tiny:en:test", ("me/tiny", "en", "test", True)),
            ("hf:me/tiny::test", ("me/tiny", None, "test", True)),
        ],
    )
    def test_rows_are_streamed(self, stand_in: Any, source: str, call: tuple[Any, ...]) -> None:
        """Name, configuration and split reach `datasets`, which streams."""
        assert documents(source) == ["one", "two"]
        assert stand_in.calls == [call]

    def test_fingerprint_changes_with_revision_and_split(self, stand_in: Any) -> None:
        """New content on the Hub, or another split, must make another store."""
        first = open_corpus("hf:me/tiny").fingerprint()
        assert open_corpus("hf:me/tiny::test").fingerprint() != first
        stand_in.revision = "r2"
        assert open_corpus("hf:me/tiny").fingerprint() != first

    def test_errors_are_clear(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A missing dataset, field or library: one line each."""
        with pytest.raises(InputError, match="hf:nobody/nothing: cannot be read"):
            documents("hf:nobody/nothing")
        with pytest.raises(
            InputError, match="hf:me/tiny, row 1: no field 'body'; set text_field to one of: text"
        ):
            list(open_corpus("hf:me/tiny", "body").documents())
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(InputError, match=r"pip install 'ryzen-llm\[datasets\]'"):
            open_corpus("hf:me/tiny")
