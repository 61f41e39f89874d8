"""What a text says about a model's embedding, and how good another embedding is on a text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import Calibration, Embedding

FEWEST_TOKENS = 16
_ROWS = 4
_OCCURRING = 0.35
"""Weight of how often tokens occur. The rest is of how often they are predicted, of which a text says more:
tokens that do not occur in it are predicted, too."""
_FLATTEN = 0.85
"""Power of the frequencies: a short text overstates how uneven they are on the next one. (Both are where the
expected loss of SmolLM2 on held-out text is least, calibrated on 9216 and on 36864 tokens.)"""


def check_text(input_ids: Tensor, vocab_size: int, name: str) -> None:
    """Raise InputError unless these are enough token ids, (batch, time) int64."""
    if input_ids.dim() != 2 or input_ids.dtype != torch.int64 or input_ids.shape[-1] < 2:
        raise InputError(
            f"{name} is {tuple(input_ids.shape)} {input_ids.dtype}, expected token ids (batch, time) int64, "
            "2 or more a row"
        )
    if input_ids.numel() < FEWEST_TOKENS:
        raise InputError(f"{name} has {input_ids.numel()} tokens, expected {FEWEST_TOKENS} or more")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"{name} has ids from {low} to {high}, expected 0 to {vocab_size - 1}: is this the model's own "
            "tokenizer?"
        )


def calibrate(
    model: Transformer, input_ids: Tensor, more_text: Tensor | None = None, seed: int = 0
) -> Calibration:
    """The `Calibration` of a model with a tied embedding, from one pass forward and backward over a text.

    The gradients are those of targets drawn from the model's own predictions, so that their second moment is
    the Fisher matrix (Kunstner et al. 2019, arXiv:1905.12558). `input_ids` is (batch, time) int64. So is
    `more_text`, of which tokens are counted only: that takes no pass, and a longer text knows more of them.
    Raises InputError for a text that cannot work, an untied model and one that is damaged.
    """
    config = model.config
    check_text(input_ids, config.vocab_size, "calibration")
    counted = torch.cat([text.flatten() for text in (input_ids, more_text) if text is not None])
    check_text(counted[None], config.vocab_size, "more_text")
    if model.head is not None:
        raise InputError("the model's output head is not tied to its embedding: there is nothing to compress")
    if input_ids.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"calibration has rows of {input_ids.shape[1]} tokens, expected at most the model's longest "
            f"sequence, {config.max_position_embeddings}"
        )
    device = next(model.parameters()).device
    draw = torch.Generator(device).manual_seed(seed)
    size, embedding = config.hidden_size, model.embedding
    head = torch.zeros(size, size, device=device)
    lookup = torch.zeros(size, size, device=device)
    predicted = torch.zeros(config.vocab_size, device=device)
    for rows in torch.split(input_ids.to(device), _ROWS):
        embedded = embedding.lookup(rows).detach().requires_grad_()
        with torch.enable_grad():
            states = model.run_embedded(embedded, torch.arange(rows.shape[1], device=device))
        flat = states.detach().flatten(0, 1)
        gradient = torch.empty_like(flat)
        # Few rows of logits at a time, as the vocabulary is large.
        for part in torch.split(torch.arange(len(flat), device=device), 256):
            with torch.no_grad():
                p = embedding.logits(flat[part]).float().softmax(-1)
                weights = 1 - p.square().sum(-1, keepdim=True)
                if not weights.isfinite().all():
                    raise InputError("calibration is not finite: the text or the model is damaged")
                drawn = torch.multinomial(p, 1, generator=draw)
                predicted += (p * (1 - p)).sum(0)
                head += (flat[part].float() * weights).T @ flat[part].float()
                p.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=p.dtype))
            with torch.enable_grad():
                leaf = flat[part].requires_grad_()
                (gradient[part],) = torch.autograd.grad(embedding.logits(leaf), leaf, p.to(leaf.dtype))
        (upstream,) = torch.autograd.grad(states, embedded, gradient.view_as(states))
        upstream = upstream.float().flatten(0, 1)
        lookup += upstream.T @ upstream
    tokens = input_ids.numel()
    occurring = torch.bincount(counted.to(device), minlength=config.vocab_size) / len(counted)
    mixed = _OCCURRING * occurring + (1 - _OCCURRING) * predicted / tokens
    frequencies = (mixed + 1e-10) ** _FLATTEN
    return Calibration(
        frequencies=(frequencies / frequencies.sum()).cpu(),
        head_hessian=(head / predicted.sum()).cpu(),
        input_hessian=(lookup / tokens).cpu(),
    )


@dataclass(frozen=True)
class Quality:
    """What an embedding costs against the dense one, on a text.

    Attributes:
        perplexity: With this embedding; infinite where the loss is more than 709 nats a token, as that of
            damaged weights may be.
        perplexity_increase: Relative to the dense one's.
        kl: Mean divergence of the predictions from the dense model's, in nats a token.
        top1_agreement: Share of positions with the same most likely token.
    """

    perplexity: float
    perplexity_increase: float
    kl: float
    top1_agreement: float


@torch.no_grad()
def measure(model: Transformer, others: Mapping[str, Transformer], input_ids: Tensor) -> dict[str, Quality]:
    """Each of `others` beside the reference `model` on a text (batch, time) int64."""
    check_text(input_ids, model.config.vocab_size, "text")
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in others}
    for row in input_ids.to(model.norm.weight.device):
        reference = model.hidden_states(row[None])[0, :-1]
        states = {name: other.hidden_states(row[None])[0, :-1] for name, other in others.items()}
        for at in torch.split(torch.arange(len(reference), device=row.device), 256):
            log_p, targets = model.logits(reference[at]).float().log_softmax(-1), row[1:][at]
            for name, other in others.items():
                log_q = other.logits(states[name][at]).float().log_softmax(-1)
                found = (
                    F.nll_loss(log_p, targets, reduction="sum"),
                    F.nll_loss(log_q, targets, reduction="sum"),
                    F.kl_div(log_q, log_p, log_target=True, reduction="sum"),
                    (log_p.argmax(-1) == log_q.argmax(-1)).sum(),
                )
                sums[name] += torch.stack([x.double().cpu() for x in found])
    tokens = input_ids.shape[0] * (input_ids.shape[1] - 1)
    qualities = {}
    for name, total in sums.items():
        dense, loss, kl, same = total / tokens
        perplexity, increase = loss.exp(), (loss - dense).exp() - 1  # a tensor's may be infinite
        qualities[name] = Quality(*torch.stack((perplexity, increase, kl, same)).tolist())
    return qualities


def with_embedding(model: Transformer, embedding: Embedding) -> Transformer:
    """A model of the same blocks (their memory is shared) and another embedding, in the blocks' dtype."""
    with torch.device("meta"):
        other = Transformer(model.config, model.kernels)
    other.blocks, other.norm, other.head = model.blocks, model.norm, model.head
    other.document_separator = model.document_separator
    other.replace_embedding(embedding.to(model.norm.weight.device, model.norm.weight.dtype))
    return other.train(model.training)
