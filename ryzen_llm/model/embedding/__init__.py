"""Embedding kinds. A new kind is one file beside dense.py, and one line in `EMBEDDINGS`."""

import inspect

from ryzen_llm.errors import InputError
from ryzen_llm.model.config import ModelConfig
from ryzen_llm.model.embedding.base import CompressedEmbedding, Embedding, LinearLoss
from ryzen_llm.model.embedding.calibration import Calibration
from ryzen_llm.model.embedding.dense import DenseEmbedding
from ryzen_llm.model.embedding.factorized import FactorizedEmbedding
from ryzen_llm.model.embedding.hashed import HashedEmbedding
from ryzen_llm.model.embedding.product import ProductEmbedding
from ryzen_llm.model.embedding.quantized import CODES, QuantizedEmbedding
from ryzen_llm.model.embedding.tiers import allocate_bits

EMBEDDINGS: dict[str, type[Embedding]] = {
    kind.kind: kind
    for kind in (DenseEmbedding, FactorizedEmbedding, HashedEmbedding, ProductEmbedding, QuantizedEmbedding)
}


def build_embedding(config: ModelConfig) -> Embedding:
    """The embedding that `config.embedding` names, with `config.embedding_settings`.

    Raises InputError for an unknown name or setting, and for values that cannot work.
    """
    if config.embedding not in EMBEDDINGS:
        raise InputError(
            f"model.embedding is {config.embedding!r}, expected one of {', '.join(sorted(EMBEDDINGS))}"
        )
    kind, settings = EMBEDDINGS[config.embedding], config.embedding_settings or {}
    known = list(inspect.signature(kind).parameters)[2:]
    if unknown := sorted(set(settings) - set(known)):
        raise InputError(
            f"unknown model.embedding_settings.{unknown[0]}: {config.embedding} takes "
            f"{', '.join(known) or 'none'}"
        )
    return kind(config.vocab_size, config.hidden_size, **settings)


__all__ = [
    "CODES",
    "EMBEDDINGS",
    "Calibration",
    "CompressedEmbedding",
    "DenseEmbedding",
    "Embedding",
    "FactorizedEmbedding",
    "HashedEmbedding",
    "LinearLoss",
    "ProductEmbedding",
    "QuantizedEmbedding",
    "allocate_bits",
    "build_embedding",
]
