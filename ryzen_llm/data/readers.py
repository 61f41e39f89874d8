"""Read the documents of one file, as a stream: constant memory, whatever the size of the file."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ryzen_llm.errors import InputError

# A .txt file has no documents of its own. Pieces of a few pages let one big file be split into train, val
# and test, and are long enough for any usual context. Sources and Markdown are documents, and stay whole
# unless one would be a burden to hold in memory.
TXT_PIECE = 8 * 1024
DOCUMENT_PIECE = 1024 * 1024
_CHUNK = 1024 * 1024
_BLANK_LINE = re.compile(r"\n[ \t]*\r?\n")


def read_documents(path: Path, text_field: str) -> Iterator[str]:
    """Yield the non-empty documents of a file in order.

    A .txt file is cut at blank lines into pieces of about 8 KiB; .md, .rst and .py are one document each (in
    pieces of about 1 MiB if larger); a row of .jsonl, .jsonl.gz or .parquet is one document.

    Raises:
        InputError: the file cannot be read, is binary or not UTF-8, or a row has no text in `text_field`.
    """
    suffix = supported_suffix(path)
    if suffix is None:
        raise InputError(f"{path}: file type not supported; expected {', '.join(_READERS)}")
    try:
        yield from (text for text in _READERS[suffix](path, text_field) if text)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the file and its permissions") from error


def supported_suffix(path: Path) -> str | None:
    """Return the suffix that decides how the file is read, or None for a type that is not supported."""
    return next((suffix for suffix in _READERS if path.name.lower().endswith(suffix)), None)


def text_of_row(row: object, text_field: str, where: str) -> str:
    """Return the text of a row of a dataset; `where` names the row in the error."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with a field {text_field!r}, got {type(row).__name__}")
    if text_field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise InputError(f"{where}: no field {text_field!r}; set text_field to one of: {fields}")
    text = row[text_field]
    if not isinstance(text, str):
        raise InputError(f"{where}: field {text_field!r} holds {type(text).__name__}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        raise InputError(f"{where}: field {text_field!r} is not valid Unicode ({error.reason})") from error
    return text


def cut(chunks: Iterator[str], size: int) -> Iterator[str]:
    """Cut a stream of text into pieces that concatenate to it, none longer than 2 * size characters.

    A piece ends at the first blank line after `size` characters, else at the first line end, else it is cut
    at 2 * size. Where the cuts fall does not depend on how the stream was chunked.
    """
    buffer = ""
    for chunk in chunks:
        buffer += chunk
        start = 0
        while len(buffer) - start > 2 * size:
            end = _end_of_piece(buffer, start, size)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    while len(buffer) > size:
        end = _end_of_piece(buffer, 0, size)
        yield buffer[:end]
        buffer = buffer[end:]
    if buffer:
        yield buffer


def _end_of_piece(buffer: str, start: int, size: int) -> int:
    limit = min(start + 2 * size, len(buffer))
    if blank := _BLANK_LINE.search(buffer, start + size - 1, limit):
        return blank.end()
    return buffer.find("\n", start + size - 1, limit) + 1 or limit


def _decoded(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            yield _decode(decoder.decode, chunk, not chunk, path, offset)
            if not chunk:
                return
            offset += len(chunk)


def _decode(decode: Callable[[bytes, bool], str], data: bytes, final: bool, path: Path, offset: int) -> str:
    """Decode `data`, which starts at byte `offset` of the file, or say where the fault is."""
    nul = data.find(b"\0")
    if nul >= 0:
        raise InputError(f"{path}: binary file (NUL byte at offset {offset + nul}), expected UTF-8 text")
    try:
        return decode(data, final)
    except UnicodeDecodeError as error:
        # The decoder may have kept bytes of earlier data: count from the end, which both share.
        fault = offset + len(data) - len(error.object) + error.start
        raise InputError(
            f"{path}: not UTF-8 text (byte at offset {fault}: {error.reason}); convert the file to UTF-8"
        ) from error


def _txt(path: Path, text_field: str) -> Iterator[str]:
    return cut(_decoded(path), TXT_PIECE)


def _document(path: Path, text_field: str) -> Iterator[str]:
    return cut(_decoded(path), DOCUMENT_PIECE)


def _jsonl(path: Path, text_field: str) -> Iterator[str]:
    offset = 0
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            text = _decode(lambda data, final: data.decode(), line, True, path, offset)
            if number == 1:
                text = text.removeprefix("\ufeff")  # a byte order mark
            offset += len(line)
            if not text.strip():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:  # also a number too long, or too deep in each other
                reason = error.msg if isinstance(error, json.JSONDecodeError) else error
                raise InputError(f"{path}, line {number}: not valid JSON ({reason})") from error
            yield text_of_row(row, text_field, f"{path}, line {number}")


def _parquet(path: Path, text_field: str) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path}: reading .parquet needs pyarrow: pip install 'ryzen-llm[datasets]'"
        ) from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            fields = file.schema_arrow.names
            columns = [text_field] if text_field in fields else None
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield text_of_row(row, text_field, f"{path}, row {number}")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text after row {number} ({error.reason})") from error
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file ({error})") from error


_READERS: dict[str, Callable[[Path, str], Iterator[Any]]] = {
    ".txt": _txt,
    ".md": _document,
    ".rst": _document,
    ".py": _document,
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl,
    ".parquet": _parquet,
}
