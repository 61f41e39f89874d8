"""Embedding kinds. A new kind is one file beside dense.py, and one line in `EMBEDDINGS`."""

from collections.abc import Callable

from ryzen_llm.errors import InputError
from ryzen_llm.model.config import ModelConfig
from ryzen_llm.model.embedding.base import Embedding
from ryzen_llm.model.embedding.dense import DenseEmbedding

EMBEDDINGS: dict[str, Callable[[ModelConfig], Embedding]] = {
    "dense": lambda config: DenseEmbedding(config.vocab_size, config.hidden_size),
}


def build_embedding(config: ModelConfig) -> Embedding:
    """The embedding that `config.embedding` names. Raises InputError for an unknown name."""
    if config.embedding not in EMBEDDINGS:
        raise InputError(
            f"model.embedding is {config.embedding!r}, expected one of {', '.join(sorted(EMBEDDINGS))}"
        )
    return EMBEDDINGS[config.embedding](config)


__all__ = ["EMBEDDINGS", "DenseEmbedding", "Embedding", "build_embedding"]
