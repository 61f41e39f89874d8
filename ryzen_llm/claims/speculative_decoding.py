"""The claim that speculative decoding is faster."""

from __future__ import annotations

from ryzen_callbacks import Claim

from ryzen_llm.claims.context import ClaimContext


def claim(context: ClaimContext) -> Claim:
    """Generating the same tokens with a drafter against without one."""
    return Claim.not_built(
        "speculative_decoding",
        "the drafters and their verification are not built yet"
        if context.enabled.enable_speculative_decoding
        else "switched off by enable_speculative_decoding: false",
        measure="time",
        quantity="speedup",
        threshold=context.thresholds.speculation_speedup_min,
        description="greedy generation, with a drafter against without",
    )
