"""The claim that the run's recipe costs no accuracy."""

from __future__ import annotations

import copy

import torch
from ryzen_callbacks import Claim

from ryzen_llm.claims.context import ClaimContext
from ryzen_llm.kernels import PLAIN, shared_compilations


def claim(context: ClaimContext) -> Claim:
    """Validation loss of the trained weights, the run's recipe against eager fp32, on the same batches."""
    return Claim(
        name="numerical_correctness",
        baseline=lambda: _losses(context, as_trained=False),
        optimized=lambda: _losses(context, as_trained=True),
        measure="loss",
        threshold=context.thresholds.accuracy_loss_max,
        baseline_name="eager fp32",
        optimized_name=context.recipe,
        description=f"loss of the same weights on {len(context.val_batches)} validation batches",
    )


def _losses(context: ClaimContext, as_trained: bool) -> list[float]:
    model = copy.deepcopy(context.model).to(context.device).eval()
    if not as_trained:
        model.use_kernels(PLAIN)
    elif context.compile:
        model.compile_blocks()
    losses = []
    for batch in context.val_batches:
        ids = batch.to(context.device)
        autocast = context.autocast() if as_trained else torch.autocast(context.device.type, enabled=False)
        with shared_compilations(), autocast:
            losses.append(float(model.evaluation_loss(ids[:, :-1], ids[:, 1:])[0]))
    return losses
