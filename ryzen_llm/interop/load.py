"""`load_pretrained`: a model and its tokenizer from wherever they are kept."""

from __future__ import annotations

from pathlib import Path

import torch

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop.gguf_model import load_gguf
from ryzen_llm.interop.hf_directory import CONFIG, load_directory
from ryzen_llm.interop.weights import dtype_named
from ryzen_llm.model import Transformer
from ryzen_llm.training import is_sharded, load_checkpoint, newest_checkpoint


def load_pretrained(path: str | Path, dtype: str = "fp32") -> tuple[Transformer, Tokenizer]:
    """The model (on the CPU, in eval mode) and tokenizer at `path`.

    `path` is a Hugging Face directory (config.json, safetensors, tokenizer.json), a GGUF file, a checkpoint
    of this project, or the output directory of a run, of which the newest checkpoint is taken. Nothing
    in them is executed. The weights become `dtype`, "fp32", "bf16" or "fp16", one tensor at a time: the peak
    is little more than their size. Raises InputError for anything else, for a model with an architecture or
    option that is not supported, and for a damaged file.
    """
    target = dtype_named(dtype)
    try:
        path = Path(path).expanduser()
        found = path.exists()
    except (OSError, RuntimeError) as error:  # a name that is too long, or ~ of nobody
        raise InputError(f"model {path}: {getattr(error, 'strerror', error)}") from error
    if not found:
        raise InputError(f"model {path}: no such file or directory")
    if path.is_file() or is_sharded(path):
        return load_gguf(path, target) if path.suffix == ".gguf" else _checkpoint(path, target)
    if (path / CONFIG).is_file():
        return load_directory(path, target)
    newest = newest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if newest is None:
        raise InputError(
            f"model {path}: holds no model; expected a Hugging Face directory, a .gguf file, a .ckpt file or "
            "the output directory of scripts/train.py"
        )
    return _checkpoint(newest, target)


def _checkpoint(path: Path, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    model, tokenizer = load_checkpoint(path)
    return model.to(dtype), tokenizer
