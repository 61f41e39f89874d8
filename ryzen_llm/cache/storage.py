"""A prompt's cache on disk, so that it need not be read again by the model (prompt caching)."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ryzen_llm.cache.kv_cache import KVCache
from ryzen_llm.errors import InputError

VERSION = 4
_HEADER = "ryzen_llm_cache"


def save_cache(cache: KVCache, path: str | Path, *, model_hash: str) -> None:
    """Write the tokens in `cache` to `path`, a safetensors file, atomically.

    `model_hash` says which weights computed them (`Transformer.content_hash`). Raises InputError for an empty
    cache.
    """
    if not cache.length:
        raise InputError("cache: it is empty, expected tokens to save")
    path = Path(path)
    tensors = {
        name: tensor[:, :, :slots].cpu().contiguous() for name, (tensor, slots) in _used(cache).items()
    }
    header = {
        "version": VERSION,
        "model": model_hash,
        "lengths": cache.lengths,
        "longest": cache.longest,
        "layers": _layout(cache),
    }
    header["sha256"] = _digest(header, tensors)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, temporary, metadata={_HEADER: json.dumps(header)})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_cache(cache: KVCache, path: str | Path, *, model_hash: str) -> None:
    """Fill `cache`, built as the saved one was, with the tokens in `path`; it forgets what it held.

    Raises InputError, and changes nothing, for a file that is missing, damaged or of another version, and for
    one from other weights or another kind or size of cache.
    """
    header, tensors = _read(Path(path))
    if header["model"] != model_hash:
        raise InputError(f"cache {path}: was computed by other weights: read the prompt again with these")
    lengths = header["lengths"]
    if header["layers"] != _layout(cache) or len(lengths) != len(cache.lengths):
        raise InputError(
            f"cache {path}: is of another kind or size, {header['layers'][0]} for {len(lengths)} texts, "
            f"expected {_layout(cache)[0]} for {len(cache.lengths)}: build the cache as it was"
        )
    if max(lengths) > cache.max_length:
        raise InputError(
            f"cache {path}: holds {max(lengths)} tokens, more than max_length = {cache.max_length}"
        )
    cache.resize(lengths, header["longest"])
    for name, (tensor, slots) in _used(cache).items():
        tensor[:, :, :slots].copy_(tensors[name])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise InputError(f"cache {path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_HEADER, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError) as error:
        raise InputError(f"cache {path}: damaged, or not a saved cache ({error})") from error
    if not isinstance(header, dict) or header.get("version") != VERSION:
        found = header.get("version") if isinstance(header, dict) else None
        raise InputError(f"cache {path}: has version {found}, this program reads version {VERSION}")
    if header.pop("sha256", None) != _digest(header, tensors):
        raise InputError(f"cache {path}: damaged, its content does not have its hash: read the prompt again")
    return header, tensors


def _used(cache: KVCache) -> dict[str, tuple[Tensor, int]]:
    """Every tensor by name, and how many of its slots are in use."""
    used: dict[str, tuple[Tensor, int]] = {}
    for index, layer in enumerate(cache.layers):
        slots = min(cache.length, layer.most_slots)
        for kind, stored in (("keys", layer.keys), ("values", layer.values)):
            for part, tensor in stored._asdict().items():
                if tensor is not None:
                    used[f"{index}.{kind}.{part}"] = tensor, slots
        for kind, tensor in zip(("keys", "values"), () if layer.sinks is None else layer.sinks, strict=False):
            used[f"{index}.sinks.{kind}"] = tensor, min(slots, layer.format.sinks)
    return used


def _layout(cache: KVCache) -> list[list[Any]]:
    """What must be the same for one cache's bytes to mean something in another: per layer, in plain types."""
    return [
        [
            type(layer.format.keys).__name__,
            type(layer.format.values).__name__,
            layer.format.keys.rotated,
            layer.format.values.rotated,
            layer.format.sinks,
            *layer.keys.codes.shape[1::2],
            layer.head_dim,
            layer.window,
            layer.ring,
            *(
                hashlib.sha256(part.cpu().contiguous().numpy().data).hexdigest()
                for part in layer.key_transform
            ),
            str((layer.keys.codes if layer.sinks is None else layer.sinks).dtype),
        ]
        for layer in cache.layers
    ]


def _digest(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
