"""The claims about everything together: train a little, then generate, against two baselines."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Literal

import torch
from ryzen_callbacks import Claim
from torch import Tensor

from ryzen_llm.claims.context import ClaimContext
from ryzen_llm.decoding import Generator
from ryzen_llm.kernels import PLAIN, shared_compilations
from ryzen_llm.training import OptimizerConfig, build_adamw

Arm = Callable[[], object]
Recipe = Literal["naive", "strong", "ours"]

STEPS = 2
PROMPT_TOKENS = 32
NEW_TOKENS = 32
_LEARNING_RATE = 1e-8  # the arms run many times, and should stay the model that was trained
_NAIVE = "naive: eager fp32, plain AdamW, fp32 decoding"


def claim(context: ClaimContext) -> Claim:
    """The run's recipe against the naive baseline."""
    return _claim(context, "end_to_end", "naive", _NAIVE, context.thresholds.e2e_speedup_target)


def claim_vs_strong(context: ClaimContext) -> Claim:
    """The run's recipe is no slower than plain PyTorch at its best."""
    precision = "bf16 autocast" if context.precision == "bf16-mixed" else "fp32"
    strong = f"strong: {precision}, torch.compile of the whole loss, fused AdamW, compiled decoding"
    return _claim(context, "end_to_end_vs_strong", "strong", strong, threshold=1.0, tolerance=0.05)


def _claim(
    context: ClaimContext,
    name: str,
    baseline: Recipe,
    baseline_name: str,
    threshold: float,
    tolerance: float = 0.0,
) -> Claim:
    @functools.cache
    def arms() -> tuple[Arm, Arm]:
        return _build(context, baseline), _build(context, "ours")

    batch = context.train_batches[0]
    prompt, new_tokens = _lengths(context)
    return Claim(
        name=name,
        baseline=lambda: arms()[0](),
        optimized=lambda: arms()[1](),
        measure="time",
        threshold=threshold,
        tolerance=tolerance,
        baseline_name=baseline_name,
        optimized_name=f"this run's recipe: {context.recipe}, fused AdamW, dense cache",
        description=(
            f"train on {STEPS * batch.shape[0] * (batch.shape[1] - 1):,} tokens ({STEPS} optimizer steps of "
            f"{batch.shape[0]} x {batch.shape[1] - 1}), then generate {new_tokens} tokens greedily from a "
            f"prompt of {prompt}, timed as one in both arms; generation uses the weights "
            "of before these steps, which does not affect its time; compilation is not timed"
        ),
    )


def _lengths(context: ClaimContext) -> tuple[int, int]:
    longest = context.model.config.max_position_embeddings
    prompt = min(PROMPT_TOKENS, context.val_batches[0].shape[1], longest - 1)
    return prompt, min(NEW_TOKENS, longest - prompt)


def _build(context: ClaimContext, recipe: Recipe) -> Arm:
    device = context.device
    optimised = recipe != "naive"
    bf16 = optimised and context.precision == "bf16-mixed"
    model = copy.deepcopy(context.model).to(device).train()
    if recipe != "ours":
        model.use_kernels(PLAIN)
    generator = Generator(
        model,
        weights="bf16" if bf16 else "fp32",
        compile=recipe == "strong" or (recipe == "ours" and context.compile),
    )
    if recipe == "ours" and context.compile:
        model.compile_blocks()
    loss: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = model.loss
    if recipe == "strong":
        loss = torch.compile(loss)
    optimizer = (
        build_adamw(model, OptimizerConfig(learning_rate=_LEARNING_RATE), fused=True)
        if optimised
        # PyTorch's default.
        else torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
    )
    batches = [context.train_batches[i % len(context.train_batches)].to(device) for i in range(STEPS)]
    prompt_tokens, new_tokens = _lengths(context)
    prompt = context.val_batches[0][:1, :prompt_tokens].to(device)

    def run() -> object:
        with shared_compilations():  # compiled in the first run, which is not timed
            with torch.enable_grad():
                for batch in batches:
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        mean_loss, _ = loss(batch[:, :-1], batch[:, 1:])
                    mean_loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
            return generator.generate(prompt, max_new_tokens=new_tokens)

    return run
