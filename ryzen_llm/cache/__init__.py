"""Key-value caches. A new kind is one file beside dense.py, and one line in `CACHES`."""

from collections.abc import Callable

import torch

from ryzen_llm.cache.base import AttentionShape, KVCache, LayerCache
from ryzen_llm.cache.dense import DenseCache
from ryzen_llm.errors import InputError

CACHES: dict[str, Callable[..., KVCache]] = {"dense": DenseCache}


def build_cache(
    name: str,
    config: AttentionShape,
    *,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVCache:
    """An empty cache of the kind `name` for a model shaped like `config`.

    Raises InputError for an unknown name.
    """
    if name not in CACHES:
        raise InputError(f"unknown cache {name!r}: choose one of {', '.join(sorted(CACHES))}")
    return CACHES[name](config, batch_size=batch_size, max_length=max_length, dtype=dtype, device=device)


__all__ = ["CACHES", "AttentionShape", "DenseCache", "KVCache", "LayerCache", "build_cache"]
