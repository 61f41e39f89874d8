"""The claim that the compressed embedding is smaller."""

from __future__ import annotations

from ryzen_callbacks import Claim

from ryzen_llm.claims.context import ClaimContext


def claim(context: ClaimContext) -> Claim:
    """Bytes of the dense embedding in bf16 against those of the compressed one."""
    return Claim.not_built(
        "embedding_compression",
        "the compressed embeddings are not built yet"
        if context.enabled.enable_embedding_compression
        else "switched off by enable_embedding_compression: false",
        measure="bytes",
        quantity="ratio",
        threshold=context.thresholds.compression_ratio_min,
        description="resident bytes, compressed embedding against dense bf16",
    )
