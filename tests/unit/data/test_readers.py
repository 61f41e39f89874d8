"""Every file type gives its documents unchanged, and every bad file one clear error."""

import gzip
import json
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzen_llm.data.readers import cut, read_documents
from ryzen_llm.errors import InputError

ROWS = [{"text": "first\r\nline"}, {"text": ""}, {"text": "東京 🚀\u2028x"}, {"text": "last", "id": 3}]
TEXTS = ["first\r\nline", "東京 🚀\u2028x", "last"]


def read(path: Path, text_field: str = "text") -> list[str]:
    return list(read_documents(path, text_field))


def test_jsonl_rows_are_documents(tmp_path: Path) -> None:
    """Empty rows and blank lines are skipped; a line separator inside JSON text ends no line."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS), encoding="utf-8")
    assert read(path) == TEXTS


def test_gzipped_jsonl_rows_are_documents(tmp_path: Path) -> None:
    """.jsonl.gz is read like .jsonl."""
    path = tmp_path / "rows.JSONL.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    assert read(path) == TEXTS


def test_parquet_rows_are_documents(tmp_path: Path) -> None:
    """Only the text column is needed, whatever else there is."""
    path = tmp_path / "rows.parquet"
    texts = [f"row {i}" for i in range(600)]  # more than one record batch
    table = pyarrow.table({"id": list(range(600)), "body": texts})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    assert read(path, "body") == texts


@pytest.mark.parametrize("suffix", [".md", ".py", ".rst"])
def test_a_source_file_is_one_document_byte_for_byte(tmp_path: Path, suffix: str) -> None:
    """Neither blank lines nor CRLF nor length below 1 MiB divides or changes it."""
    text = "a\r\n\r\nb\n\n\nc\té🚀\n" * 5000
    path = tmp_path / f"file{suffix}"
    path.write_bytes(text.encode())
    assert read(path) == [text]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """Editors on Windows put one in front of UTF-8."""
    rows = tmp_path / "bom.jsonl"
    rows.write_bytes(b"\xef\xbb\xbf" + b'{"text": "a"}\n{"text": "\xef\xbb\xbfb"}\n')
    assert read(rows) == ["a", "\ufeffb"]
    path = tmp_path / "bom.md"
    path.write_bytes(b"\xef\xbb\xbfhello")
    assert read(path) == ["hello"]


def test_txt_is_cut_at_blank_lines_into_pieces_of_about_8_kib(tmp_path: Path) -> None:
    """Pieces start a paragraph, add up to the file, and stay within twice the size."""
    text = "\r\n\r\n".join(f"Paragraph {i}. " + "word " * (i % 97) for i in range(3000))
    path = tmp_path / "book.txt"
    path.write_bytes(text.encode())
    pieces = read(path)
    assert "".join(pieces) == text
    assert all(piece.startswith("Paragraph") for piece in pieces)
    assert all(8192 <= len(piece) <= 16384 for piece in pieces[:-1])


@given(
    st.lists(st.text(alphabet="ab \n\r\té", max_size=40), max_size=30), st.integers(1, 30), st.integers(1, 17)
)
def test_pieces_add_up_and_do_not_depend_on_chunks(parts: list[str], size: int, step: int) -> None:
    """However a stream arrives, its pieces are the same, concatenate to it and respect the limit."""
    text = "".join(parts)
    chunks = [text[i : i + step] for i in range(0, len(text), step)]
    pieces = list(cut(iter(chunks), size))
    assert "".join(pieces) == text
    assert pieces == list(cut(iter([text]), size))
    assert all(0 < len(piece) <= 2 * size for piece in pieces)


@settings(max_examples=25)
@given(
    st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=("Cs",))), st.integers(0, 5)
)
def test_characters_across_chunk_borders_survive(
    tmp_path_factory: pytest.TempPathFactory, text: str, shift: int
) -> None:
    """A multi-byte character may lie across the border of two reads."""
    path = tmp_path_factory.mktemp("border") / "file.md"
    whole = "x" * (1024 * 1024 - shift) + "é" + text + "🚀"
    path.write_bytes(whole.encode())
    assert "".join(read(path)) == whole


BAD_FILES: dict[str, tuple[bytes, str, str]] = {
    "binary": (b"text\0more", ".txt", "binary file (NUL byte at offset 4)"),
    "latin-1": ("caf\xe9 au lait".encode("latin-1"), ".md", "not UTF-8 text (byte at offset 3"),
    "late fault": (b"a" * 1_500_000 + b"\xff", ".txt", "offset 1500000"),
    "half a character at the end": ("é".encode()[:1], ".py", "offset 0"),
    "fault across a border": (b"a" * (1024 * 1024 - 1) + b"\xc3(", ".txt", "offset 1048575"),
    "fault in jsonl": (b'{"text": "a"}\n{"text": "\xff"}', ".jsonl", "offset 24"),
    "not json": (b'{"text": "a"}\n{oops}', ".jsonl", "line 2: not valid JSON"),
    "no object": (b'["a"]', ".jsonl", "line 1: expected an object with a field 'text', got list"),
    "no such field": (
        b'{"body": "a", "id": 1}',
        ".jsonl",
        "line 1: no field 'text'; set text_field to one of: body, id",
    ),
    "null text": (b'{"text": null}', ".jsonl", "line 1: field 'text' holds NoneType"),
    "half a surrogate pair": (b'{"text": "\\ud800"}', ".jsonl", "line 1: field 'text' is not valid Unicode"),
    "no gzip": (b'{"text": "a"}', ".jsonl.gz", "cannot be read"),
    "cut gzip": (gzip.compress(b'{"text": "a"}' * 100)[:30], ".jsonl.gz", "cannot be read"),
    "damaged gzip": (gzip.compress(b"a" * 99)[:12] + b"\xff" * 20, ".jsonl.gz", "cannot be read"),
    "no parquet": (b"PAR1 but not really", ".parquet", "not a readable Parquet file"),
    "unsupported type": (b"x", ".docx", "file type not supported; expected .txt, .md"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    """The error names the file and the place."""
    content, suffix, message = BAD_FILES[case]
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_parquet_without_the_field_names_the_fields(tmp_path: Path) -> None:
    """The columns there are tell what to set text_field to."""
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"id": [1], "body": ["x"]}), path)
    with pytest.raises(InputError, match="row 1: no field 'text'; set text_field to one of: id, body"):
        read(path)


def test_parquet_that_is_not_utf8_is_one_clear_error(tmp_path: Path) -> None:
    """Writers that do not check what they call a string leave such files."""
    path = tmp_path / "rows.parquet"
    latin = pyarrow.array([b"sound", "caf\xe9".encode("latin-1")])
    column = pyarrow.StringArray.from_buffers(2, *latin.buffers()[1:])
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    with pytest.raises(InputError, match=r"rows\.parquet: not UTF-8 text"):
        read(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow is optional: the error says how to get it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'ryzen-llm\[datasets\]'"):
        read(tmp_path / "rows.parquet")
