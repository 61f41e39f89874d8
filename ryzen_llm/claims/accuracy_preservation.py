"""The claim that training as the run does reaches what training plainly does: two twins, step by step."""

from __future__ import annotations

import dataclasses
from typing import Literal

import torch
from ryzen_callbacks import Claim

from ryzen_llm.claims.context import ClaimContext
from ryzen_llm.kernels import PLAIN, shared_compilations
from ryzen_llm.model import Transformer
from ryzen_llm.training import build_adamw

_CLIP = 1.0


def claim(context: ClaimContext) -> Claim:
    """Validation loss of a twin trained by the run's recipe against one trained plainly, from scratch."""
    steps = len(context.twin_batches)
    description = (
        f"validation loss after {steps} optimizer steps from the same new weights, on the same batches "
        f"with the same schedule and clipping at {_CLIP:g}, on {len(context.val_batches)} validation batches"
    )
    threshold = context.thresholds.accuracy_loss_max
    if not steps:
        return Claim.not_built(
            "accuracy_preservation",
            "no twins are trained: twin_steps is 0",
            measure="loss",
            threshold=threshold,
            description=description,
        )
    return Claim(
        name="accuracy_preservation",
        baseline=lambda: _losses(context, "naive"),
        optimized=lambda: _losses(context, "ours"),
        measure="loss",
        threshold=threshold,
        baseline_name="eager fp32, a dense embedding, PyTorch's AdamW",
        optimized_name=f"{context.recipe}, a {context.model.config.embedding} embedding, fused AdamW",
        description=description,
    )


def _twin(context: ClaimContext, recipe: Literal["naive", "ours"]) -> Transformer:
    """A new model; the same weights in both, but for an embedding that only one of them has."""
    config = context.model.config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ours = Transformer(config, context.model.kernels)
        if recipe == "ours":
            return ours
        naive = Transformer(dataclasses.replace(config, embedding="dense", embedding_settings={}), PLAIN)
    blocks = {n: x for n, x in ours.state_dict().items() if not n.startswith("embedding.")}
    naive.load_state_dict(ours.state_dict() if config.embedding == "dense" else naive.state_dict() | blocks)
    return naive


def _losses(context: ClaimContext, recipe: Literal["naive", "ours"]) -> list[float]:
    model = _twin(context, recipe).to(context.device).train()
    model.document_separator = context.model.document_separator
    optimised = recipe == "ours"
    if optimised and context.compile:
        model.compile_blocks()
    optimizer = build_adamw(model, context.optimizer, fused=optimised)
    steps = len(context.twin_batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: context.optimizer.factor(step, steps)
    )
    device = context.device
    with shared_compilations():
        for step, batch in enumerate(context.twin_batches):
            model.embedding.at_step(step, steps)
            ids = batch.to(device)
            with torch.enable_grad():
                with context.autocast() if optimised else torch.autocast(device.type, enabled=False):
                    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
                loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    plain = Transformer(model.config, PLAIN).to(device).eval()  # each is judged in eager fp32
    plain.load_state_dict(model.state_dict())
    plain.document_separator = model.document_separator
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return [
            float(plain.loss(ids[:, :-1], ids[:, 1:])[0])
            for ids in (batch.to(device) for batch in context.val_batches)
        ]
