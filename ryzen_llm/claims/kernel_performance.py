"""The claim that the optimised kernels are faster."""

from __future__ import annotations

from ryzen_callbacks import Claim

from ryzen_llm.claims.context import ClaimContext


def claim(context: ClaimContext) -> Claim:
    """A training step with the optimised kernels against the same step with plain ones."""
    return Claim.not_built(
        "kernel_performance",
        "the optimised kernels are not built yet"
        if context.enabled.enable_kernel_optimization
        else "switched off by enable_kernel_optimization: false",
        measure="time",
        quantity="speedup",
        threshold=context.thresholds.kernel_speedup_min,
        description="training step, optimised kernels against eager PyTorch ones",
    )
