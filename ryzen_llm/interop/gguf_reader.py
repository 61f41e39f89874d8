"""The container format of GGUF files (llama.cpp's `docs/gguf.md`), memory-mapped, nothing in it trusted.

`gguf.GGUFReader` makes an array for every token of the vocabulary (15 s for Gemma's), and a count that lies
makes it loop until the memory is full. So this reads the container, and the `gguf` package decodes tensors.
"""

from __future__ import annotations

import importlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ryzen_llm.errors import InputError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_QUANTISATIONS = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
_SMALLEST_ENTRY = 13  # bytes of a key's length, a type and a value; a tensor takes more
_MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `shape` as in PyTorch, `start` and `end` in bytes of the file."""

    shape: tuple[int, ...]
    quantisation: str
    start: int
    end: int


class GGUFFile:
    """A GGUF file of version 2 or 3, little-endian.

    Raises InputError for a file that cannot be read, is none or truncated, or claims what does not fit in it.

    Attributes:
        metadata: Keys and values; arrays are lists.
        tensors: By name; no two share a byte.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._gguf: Any = importlib.import_module("gguf")
        except ImportError as error:
            raise InputError(
                f"{path}: reading GGUF needs the gguf package: pip install 'ryzen-llm[pretrained]'"
            ) from error
        self.path = path
        try:
            if path.stat().st_size < 24:
                raise InputError(f"{path}: truncated or no GGUF file")
            self._bytes: npt.NDArray[np.uint8] = np.memmap(path, dtype=np.uint8, mode="r")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        self._position = 0
        if bytes(self._bytes[:4]) != b"GGUF":
            raise InputError(f"{path}: no GGUF file, it does not begin with GGUF")
        self._position = 4
        version: int = self._scalar("I")
        if version not in (2, 3):
            raise InputError(f"{path}: GGUF version {version} is expected 2 or 3, little-endian")
        num_tensors, num_keys = self._count(_SMALLEST_ENTRY), self._count(_SMALLEST_ENTRY)
        self.metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in self.metadata:
                raise InputError(f"{path}: the key {key[:100]!r} is there twice")
            self.metadata[key] = self._value(self._scalar("I"))
        self.tensors = self._read_tensors(num_tensors)

    def read(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor, dequantised."""
        info = self.tensors[name]
        data = self._bytes[info.start : info.end]
        if info.quantisation in ("F32", "F16"):
            return data.view({"F32": "<f4", "F16": "<f2"}[info.quantisation]).reshape(info.shape)
        rows = data.reshape(*info.shape[:-1], -1)
        kind = self._gguf.GGMLQuantizationType[info.quantisation]
        dequantised: npt.NDArray[np.float32] = self._gguf.quants.dequantize(rows, kind)
        return dequantised.reshape(info.shape)

    def _read_tensors(self, num_tensors: int) -> dict[str, TensorInfo]:
        found: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        for _ in range(num_tensors):
            name = self._string()
            if name in found:
                raise InputError(f"{self.path}: the tensor {name[:100]!r} is there twice")
            found[name] = self._read_tensor(name)
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise InputError(f"{self.path}: general.alignment is {alignment!r}, expected a positive number")
        data = -(-self._position // alignment) * alignment
        tensors = {}
        end = data
        for name, (shape, kind, offset, size) in sorted(found.items(), key=lambda item: item[1][2]):
            start = data + offset
            if start < end or start % alignment:
                raise InputError(f"{self.path}: the tensor {name[:100]!r} is misplaced")
            end = start + size
            if end > len(self._bytes):
                raise InputError(
                    f"{self.path}: truncated: the tensor {name[:100]!r} would end at byte {end}, "
                    f"the file has {len(self._bytes)}"
                )
            tensors[name] = TensorInfo(shape, kind, start, end)
        return tensors

    def _read_tensor(self, name: str) -> tuple[tuple[int, ...], str, int, int]:
        """Shape, quantisation, offset and size in bytes."""
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= _MOST_DIMENSIONS:
            raise InputError(f"{self.path}: the tensor {name[:100]!r} has {num_dimensions} dimensions")
        shape = tuple(reversed([self._scalar("Q") for _ in range(num_dimensions)]))
        number, offset = self._scalar("I"), self._scalar("Q")
        kinds = self._gguf.GGMLQuantizationType
        kind = kinds(number).name if number in {one.value for one in kinds} else str(number)
        if kind not in _QUANTISATIONS:
            raise InputError(
                f"{self.path}: the tensor {name[:100]!r} is of type {kind}, expected one of "
                f"{', '.join(_QUANTISATIONS)}"
            )
        block, block_bytes = self._gguf.GGML_QUANT_SIZES[kinds[kind]]
        if not all(shape) or shape[-1] % block:
            raise InputError(
                f"{self.path}: the tensor {name[:100]!r} of shape {list(shape)} is not in blocks of {block}"
            )
        return shape, kind, offset, math.prod(shape) // block * block_bytes

    def _take(self, size: int) -> memoryview:
        end = self._position + size
        if end > len(self._bytes):
            raise InputError(
                f"{self.path}: truncated, or a size in it is wrong: {size} bytes at {self._position} pass "
                f"the end at {len(self._bytes)}"
            )
        taken = self._bytes[self._position : end].data
        self._position = end
        return taken

    def _scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self._take(struct.calcsize("<" + code)))[0]

    def _count(self, smallest: int) -> int:
        """A number of things that take at least `smallest` bytes each."""
        count: int = self._scalar("Q")
        left = len(self._bytes) - self._position
        if count * smallest > left:
            raise InputError(f"{self.path}: truncated, or wrong: {count} entries in {left} bytes")
        return count

    def _string(self) -> str:
        content = self._take(self._scalar("Q"))
        try:
            return str(content, "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.path}: a text before byte {self._position} is not UTF-8") from error

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != _ARRAY:
            raise InputError(f"{self.path}: a value before byte {self._position} is of unknown type {kind}")
        kind = self._scalar("I")
        if kind == _STRING:
            return [self._string() for _ in range(self._count(8))]
        if kind not in _SCALARS:
            raise InputError(f"{self.path}: an array before byte {self._position} is of type {kind}")
        code = _SCALARS[kind]
        count = self._count(struct.calcsize("<" + code))
        return list(struct.unpack(f"<{count}{code}", self._take(count * struct.calcsize("<" + code))))
