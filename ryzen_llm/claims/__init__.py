"""What this project claims about itself, as measurable claims. A new one is a file here and a line below."""

from ryzen_callbacks import Claim

from ryzen_llm.claims import (
    accuracy_preservation,
    embedding_compression,
    end_to_end,
    kernel_performance,
    kv_cache,
    numerical_correctness,
    speculative_decoding,
)
from ryzen_llm.claims.context import ClaimContext, Optimizations, Thresholds


def build_claims(context: ClaimContext) -> list[Claim]:
    """Every claim, in the order of the report; nothing is copied, compiled or run yet."""
    return [
        kernel_performance.claim(context),
        kernel_performance.claim_vs_strong(context),
        embedding_compression.claim(context),
        embedding_compression.claim_quality(context),
        kv_cache.claim(context),
        kv_cache.claim_quality(context),
        speculative_decoding.claim(context),
        end_to_end.claim(context),
        end_to_end.claim_vs_strong(context),
        numerical_correctness.claim(context),
        accuracy_preservation.claim(context),
    ]


__all__ = ["ClaimContext", "Optimizations", "Thresholds", "build_claims"]
