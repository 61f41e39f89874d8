"""K-quantised tensors are decoded as ggml's format says, and as ggml itself decodes them."""

import ctypes
import importlib.util
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from k_quants import BLOCKS, VALUES

from ryzen_llm.interop.gguf_reader import GGUFFile

ROWS, BLOCKS_A_ROW = 3, 2


def written(kind: str, path: Path) -> bytes:
    """A file with one tensor of random bytes of that kind, their scales finite; returns the bytes."""
    size, halves, _ = BLOCKS[kind]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (ROWS * BLOCKS_A_ROW, size), dtype=np.uint8)
    for at in halves:
        scales = generator.normal(0, 0.01, len(blocks)).astype("<f2")
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(-1, 2)
    writer = gguf.GGUFWriter(path, "llama")
    packed = blocks.reshape(ROWS, BLOCKS_A_ROW * size)
    writer.add_tensor("t", packed, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks.tobytes()


def read(path: Path) -> npt.NDArray[np.float32]:
    values = GGUFFile(path).read("t")
    assert values.shape == (ROWS, BLOCKS_A_ROW * VALUES)
    return values


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_value_is_what_the_format_says(kind: str, tmp_path: Path) -> None:
    content = written(kind, tmp_path / "t.gguf")
    size, _, values_of = BLOCKS[kind]
    blocks = [content[at : at + size] for at in range(0, len(content), size)]
    expected = np.array([list(values_of(block)) for block in blocks])
    found = read(tmp_path / "t.gguf").astype(np.float64).reshape(expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-7 * np.abs(expected).max())
    assert np.unique(found).size > 100


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_value_is_what_ggml_makes_of_it(kind: str, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("needs the ggml library of llama-cpp-python: pip install llama-cpp-python")
    library = ctypes.CDLL(str(next((Path(spec.origin).parent / "lib").glob("libggml-base.*"))))
    dequantise = getattr(library, f"dequantize_row_{kind[:2].lower()}_K")
    dequantise.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int64]
    content = written(kind, tmp_path / "t.gguf")
    expected = np.empty((ROWS, BLOCKS_A_ROW * VALUES), np.float32)
    dequantise(content, expected.ctypes.data, expected.size)
    np.testing.assert_allclose(
        read(tmp_path / "t.gguf"), expected, rtol=0, atol=2e-7 * np.abs(expected).max()
    )
