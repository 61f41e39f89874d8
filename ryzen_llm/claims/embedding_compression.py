"""The claims that the compressed embedding is smaller, and that predictions stay as good with it."""

from __future__ import annotations

import copy
import functools

import torch
from ryzen_callbacks import Claim

from ryzen_llm.claims.context import ClaimContext
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import QuantizedEmbedding, allocate_bits
from ryzen_llm.training import calibrate, with_embedding

SWITCHED_OFF = "switched off by enable_embedding_compression: false"
UNTIED = "the model's output head is not tied to its embedding"


def claim(context: ClaimContext) -> Claim:
    """Bytes of the dense embedding in bf16 against those of the compressed one."""
    threshold = context.thresholds.compression_ratio_min
    description = f"resident bytes of lookup and head, {_how(context)}, against dense bf16"
    if reason := _reason(context):
        return Claim.not_built(
            "embedding_compression",
            reason,
            measure="bytes",
            quantity="ratio",
            threshold=threshold,
            description=description,
        )
    config = context.model.config
    return Claim(
        name="embedding_compression",
        baseline=lambda: 2 * config.vocab_size * config.hidden_size,
        optimized=lambda: _compressed(context).embedding.to(torch.bfloat16).bytes_resident,
        measure="bytes",
        quantity="ratio",
        threshold=threshold,
        baseline_name="dense, bf16",
        optimized_name=_how(context),
        description=description,
    )


def claim_quality(context: ClaimContext) -> Claim:
    """Validation loss with the compressed embedding against that with the dense one it was made from."""
    threshold = context.thresholds.accuracy_loss_max
    description = f"loss of the same blocks on {len(context.val_batches)} validation batches, {_how(context)}"
    reason = _reason(context)
    if not reason and context.model.config.embedding != "dense":
        reason = "trained with a compressed embedding: there is no dense one to compare with in this run"
    if reason:
        return Claim.not_built(
            "embedding_compression_quality",
            reason,
            measure="loss",
            threshold=threshold,
            description=description,
        )
    return Claim(
        name="embedding_compression_quality",
        baseline=lambda: _losses(context, context.model),
        optimized=lambda: _losses(context, _compressed(context)),
        measure="loss",
        threshold=threshold,
        baseline_name="dense",
        optimized_name=_how(context),
        description=description,
    )


def _reason(context: ClaimContext) -> str:
    if not context.enabled.enable_embedding_compression:
        return SWITCHED_OFF
    return "" if context.model.config.tie_embeddings else UNTIED


def _how(context: ClaimContext) -> str:
    kind = context.model.config.embedding
    if kind != "dense":
        return f"trained as {kind}"
    return f"quantised after training to {context.enabled.embedding_ratio}x, calibrated on training text"


@functools.lru_cache(maxsize=1)  # the two claims measure the same
def _made(model: Transformer, ratio: float, batch: torch.Tensor) -> QuantizedEmbedding:
    calibration = calibrate(model, batch[:, :-1])
    weight = model.embedding.dense_weight().float()
    tiers = allocate_bits(weight, calibration, int(2 * weight.numel() / ratio))
    return QuantizedEmbedding.from_dense(weight, calibration, bits=tiers)


def _compressed(context: ClaimContext) -> Transformer:
    model = copy.deepcopy(context.model)
    if model.config.embedding != "dense":
        model.replace_embedding(model.embedding.compressed())
        return model
    made = _made(context.model, context.enabled.embedding_ratio, context.train_batches[0])
    return with_embedding(model, copy.deepcopy(made))


@torch.no_grad()
def _losses(context: ClaimContext, model: Transformer) -> list[float]:
    model = copy.deepcopy(model).to(context.device).eval()
    losses = []
    for batch in context.val_batches:
        ids = batch.to(context.device)
        losses.append(float(model.loss(ids[:, :-1], ids[:, 1:])[0]))
    return losses
