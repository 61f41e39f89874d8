"""The claims that the compressed key-value cache is smaller, and that predictions stay as good with it."""

from __future__ import annotations

import copy

import torch
from ryzen_callbacks import Claim
from torch import Tensor

from ryzen_llm.cache import KVCache, build_cache
from ryzen_llm.claims.context import ClaimContext
from ryzen_llm.model import Transformer

SWITCHED_OFF = "switched off by enable_kv_cache_optimization: false"


def claim(context: ClaimContext) -> Claim:
    """Bytes of the dense cache in bf16 against those of the chosen one, both filled with validation text."""
    threshold = context.thresholds.kv_cache_memory_savings_min
    tokens = _tokens(context).shape[1]
    description = f"allocated bytes after {tokens} tokens of validation text, against dense bf16"
    if not context.enabled.enable_kv_cache_optimization:
        return Claim.not_built(
            "kv_cache",
            SWITCHED_OFF,
            measure="bytes",
            quantity="saving",
            threshold=threshold,
            description=description,
        )
    return Claim(
        name="kv_cache",
        baseline=lambda: _filled(context, "dense").bytes_allocated,
        optimized=lambda: _filled(context, context.enabled.kv_cache).bytes_allocated,
        measure="bytes",
        quantity="saving",
        threshold=threshold,
        baseline_name="dense, bf16",
        optimized_name=context.enabled.kv_cache,
        description=description,
    )


def claim_quality(context: ClaimContext) -> Claim:
    """Validation loss with the chosen cache against that with the dense one."""
    threshold = context.thresholds.accuracy_loss_max
    description = f"loss of the same weights on {len(context.val_batches)} validation batches, with a cache"
    if not context.enabled.enable_kv_cache_optimization:
        return Claim.not_built(
            "kv_cache_quality", SWITCHED_OFF, measure="loss", threshold=threshold, description=description
        )
    return Claim(
        name="kv_cache_quality",
        baseline=lambda: _losses(context, "dense"),
        optimized=lambda: _losses(context, context.enabled.kv_cache),
        measure="loss",
        threshold=threshold,
        baseline_name="dense",
        optimized_name=context.enabled.kv_cache,
        description=description,
    )


def _model(context: ClaimContext) -> Transformer:
    return copy.deepcopy(context.model).to(context.device).eval()


def _tokens(context: ClaimContext) -> Tensor:
    return context.val_batches[0][:1, :-1]


@torch.inference_mode()
def _filled(context: ClaimContext, name: str) -> KVCache:
    """A cache that holds the first validation text, in bf16 where it is not quantised."""
    ids = _tokens(context).to(context.device)
    cache = _cache(context, name, ids, torch.bfloat16)
    _model(context)(ids, cache)
    return cache


@torch.inference_mode()
def _losses(context: ClaimContext, name: str) -> list[float]:
    model = _model(context)
    losses = []
    for batch in context.val_batches:
        ids = batch.to(context.device)
        cache = _cache(context, name, ids[:, :-1], torch.float32)
        logits = model(ids[:, :-1], cache)
        losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
    return losses


def _cache(context: ClaimContext, name: str, ids: Tensor, dtype: torch.dtype) -> KVCache:
    return build_cache(
        name,
        context.model.config,
        batch_size=ids.shape[0],
        max_length=ids.shape[1],
        dtype=dtype,
        device=context.device,
    )
