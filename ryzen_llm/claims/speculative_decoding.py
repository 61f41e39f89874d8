"""The claim that speculative decoding is faster."""

from __future__ import annotations

import copy
import functools

import torch
from ryzen_callbacks import Claim
from torch import Tensor

from ryzen_llm.claims.context import ClaimContext
from ryzen_llm.decoding import Generator, SpeculativeDecoder
from ryzen_llm.interop import load_drafters

PROMPTS = 4
PROMPT_TOKENS = 32
NEW_TOKENS = 64


def claim(context: ClaimContext) -> Claim:
    """Generating the same tokens with drafters against without, by the same loop."""
    threshold = context.thresholds.speculation_speedup_min
    prompts, new_tokens = _work(context)
    description = (
        f"{new_tokens} tokens generated greedily after each of {len(prompts)} prompts of "
        f"{prompts[0].shape[1]} tokens of validation text, with drafters against without; compilation is not "
        "timed"
    )
    if not context.enabled.enable_speculative_decoding:
        return Claim.not_built(
            "speculative_decoding",
            "switched off by enable_speculative_decoding: false",
            measure="time",
            quantity="speedup",
            threshold=threshold,
            description=description,
        )

    @functools.cache
    def arms() -> tuple[Generator, SpeculativeDecoder]:
        model = copy.deepcopy(context.model).to(context.device)
        weights = "bf16" if context.precision == "bf16-mixed" else "fp32"
        generator = Generator(model, weights=weights, compile=context.compile)
        drafters = load_drafters(context.enabled.drafters, model, weights=weights, compile=context.compile)
        return generator, SpeculativeDecoder(generator, drafters)

    def plain() -> object:
        generator, _ = arms()
        return [generator.generate(prompt, max_new_tokens=new_tokens) for prompt in prompts]

    def speculative() -> object:
        _, decoder = arms()
        decoder.forget()  # the same texts, from the round before
        return [decoder.generate(prompt, max_new_tokens=new_tokens) for prompt in prompts]

    return Claim(
        name="speculative_decoding",
        baseline=plain,
        optimized=speculative,
        measure="time",
        threshold=threshold,
        baseline_name=f"plain decoding, {'compiled' if context.compile else 'not compiled'}",
        optimized_name=f"the same with drafters: {', '.join(context.enabled.drafters)}",
        description=description,
    )


def _work(context: ClaimContext) -> tuple[list[Tensor], int]:
    longest = context.model.config.max_position_embeddings
    texts = torch.cat(context.val_batches)[:PROMPTS].to(context.device)
    length = min(PROMPT_TOKENS, texts.shape[1], longest - 1)
    return [text[None, :length] for text in texts], min(NEW_TOKENS, longest - length)
