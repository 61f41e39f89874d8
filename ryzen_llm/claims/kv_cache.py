"""The claim that the compressed key-value cache is smaller."""

from __future__ import annotations

from ryzen_callbacks import Claim

from ryzen_llm.claims.context import ClaimContext


def claim(context: ClaimContext) -> Claim:
    """Bytes of the dense cache in bf16 against those of the compressed one."""
    return Claim.not_built(
        "kv_cache",
        "the compressed key-value caches are not built yet"
        if context.enabled.enable_kv_cache_optimization
        else "switched off by enable_kv_cache_optimization: false",
        measure="bytes",
        quantity="saving",
        threshold=context.thresholds.kv_cache_memory_savings_min,
        description="allocated bytes, compressed cache against dense bf16",
    )
