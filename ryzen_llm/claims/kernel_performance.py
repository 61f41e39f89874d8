"""The claims that the optimised kernels are faster: forward and backward of one batch, without optimizer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Literal

import torch
from ryzen_callbacks import Claim
from torch import Tensor

from ryzen_llm.claims.context import ClaimContext
from ryzen_llm.kernels import PLAIN, shared_compilations

_NAIVE = "naive: eager fp32, PyTorch's attention, all logits at once"


def claim(context: ClaimContext) -> Claim:
    """The run's kernels against eager fp32 ones."""
    return _claim(context, "kernel_performance", "naive", _NAIVE, context.thresholds.kernel_speedup_min)


def claim_vs_strong(context: ClaimContext) -> Claim:
    """The run's kernels are no slower than what torch.compile makes of plain PyTorch."""
    precision = "bf16 autocast" if context.precision == "bf16-mixed" else "fp32"
    strong = f"strong: {precision}, torch.compile of the whole loss, all logits at once"
    return _claim(context, "kernel_performance_vs_strong", "strong", strong, threshold=1.0, tolerance=0.05)


def _claim(
    context: ClaimContext,
    name: str,
    baseline: Literal["naive", "strong"],
    baseline_name: str,
    threshold: float,
    tolerance: float = 0.0,
) -> Claim:
    rows, tokens = context.train_batches[0].shape
    description = f"forward and backward of {rows} x {tokens - 1} tokens; compilation is not timed"
    if not context.enabled.enable_kernel_optimization:
        return Claim.not_built(
            name,
            "switched off by enable_kernel_optimization: false",
            measure="time",
            threshold=threshold,
            description=description,
        )

    @functools.cache
    def arms() -> tuple[Callable[[], None], Callable[[], None]]:
        return _build(context, baseline), _build(context, "ours")

    return Claim(
        name=name,
        baseline=lambda: arms()[0](),
        optimized=lambda: arms()[1](),
        measure="time",
        threshold=threshold,
        tolerance=tolerance,
        baseline_name=baseline_name,
        optimized_name=f"this run's kernels: {context.recipe}, fused output head and loss",
        description=description,
    )


def _build(context: ClaimContext, recipe: Literal["naive", "strong", "ours"]) -> Callable[[], None]:
    model = copy.deepcopy(context.model).to(context.device).train()
    batch = context.train_batches[0].to(context.device)
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = model.loss
    if recipe != "ours":
        model.use_kernels(PLAIN)
    elif context.compile:
        model.compile_blocks()
    if recipe == "strong":
        loss = torch.compile(loss)
    bf16 = recipe != "naive" and context.precision == "bf16-mixed"

    def run() -> None:
        with torch.enable_grad(), shared_compilations():
            with torch.autocast(context.device.type, torch.bfloat16, enabled=bf16):
                value, _ = loss(batch[:, :-1], batch[:, 1:])
            value.backward()  # type: ignore[no-untyped-call]
            model.zero_grad()

    return run
