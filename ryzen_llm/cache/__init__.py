"""Key-value caches. A new format is one file beside int8.py, and one line in `CACHES`."""

from collections.abc import Sequence

import torch

from ryzen_llm.cache.base import AttentionShape, Format, LayerFormat, Transform
from ryzen_llm.cache.dense import Dense
from ryzen_llm.cache.fp8 import Fp8
from ryzen_llm.cache.int4 import Int4
from ryzen_llm.cache.int8 import Int8
from ryzen_llm.cache.kv_cache import BLOCK, KVCache
from ryzen_llm.cache.layer import LayerCache
from ryzen_llm.cache.storage import load_cache, save_cache
from ryzen_llm.errors import InputError

CACHES: dict[str, LayerFormat] = {
    "dense": LayerFormat(Dense(), Dense()),
    "int8": LayerFormat(Int8(rotated=True), Int8(), sinks=1),
    "k8v4": LayerFormat(Int8(rotated=True), Int4(), sinks=4),
    "int4": LayerFormat(Int4(), Int4()),
    "int4-sinks": LayerFormat(Int4(), Int4(), sinks=4),
    "fp8": LayerFormat(Fp8(), Fp8()),
}


def build_cache(
    kind: str | Sequence[str | LayerFormat],
    config: AttentionShape,
    *,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """An empty cache for a model shaped like `config`; `kind` is a name, or a name or format for each layer.

    Raises InputError for an unknown name, and as `KVCache` and its formats do.
    """
    kinds = [kind] * config.num_layers if isinstance(kind, str) else list(kind)
    check_names(kinds)
    return KVCache(
        config,
        [CACHES[each] if isinstance(each, str) else each for each in kinds],
        batch_size=batch_size,
        max_length=max_length,
        dtype=dtype,
        device=device,
    )


def check_names(kinds: Sequence[str | LayerFormat]) -> None:
    """Raise InputError for a name that is not in `CACHES`."""
    for name in kinds:
        if isinstance(name, str) and name not in CACHES:
            raise InputError(f"unknown cache {name!r}: choose one of {', '.join(sorted(CACHES))}")


__all__ = [
    "BLOCK",
    "CACHES",
    "AttentionShape",
    "Format",
    "Int4",
    "KVCache",
    "LayerCache",
    "LayerFormat",
    "Transform",
    "build_cache",
    "check_names",
    "load_cache",
    "save_cache",
]
