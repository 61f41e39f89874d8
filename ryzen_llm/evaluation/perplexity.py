"""Perplexity of a text in overlapping or disjoint windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer

_USUAL_CONTEXT = 2048
_TOKENS_AT_A_TIME = 4096
_NOT_SCORED = -100
_MOST_NATS = 700.0
"""Beyond it `math.exp` overflows."""


@dataclass(frozen=True)
class Perplexity:
    """What was measured, and how: figures of other contexts, strides or tokenizers do not compare.

    Attributes:
        perplexity: exp of `loss`.
        loss: Mean cross-entropy in nats per scored token.
        bits_per_byte: Bits per UTF-8 byte of the scored text, which does compare between tokenizers.
        accuracy: Share of scored tokens that had the largest logit.
        scored_tokens: Tokens that a prediction was made for: all but the first one.
        windows: Runs of the model.
        context: Longest input in tokens.
        stride: Tokens from one window's beginning to the next one's. A token is predicted from at least
            context - stride + 1 tokens, or from all before it.
        beginning: The token that the tokenizer puts before a text, once; None if it does not.
        vocab_size: Of the tokenizer, which is the model's own.
    """

    perplexity: float
    loss: float
    bits_per_byte: float
    accuracy: float
    scored_tokens: int
    windows: int
    context: int
    stride: int
    beginning: str | None
    vocab_size: int


@torch.inference_mode()
def measure_perplexity(
    model: Transformer,
    tokenizer: Tokenizer,
    text: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Perplexity of `model` on `text`, every token but the first predicted once.

    This is the sliding window of transformers' guide "Perplexity of fixed-length models", with one token more
    a window, so that with disjoint windows no token goes unpredicted.

    Args:
        model: On any device, in any dtype, in which it is run.
        tokenizer: Its own.
        text: The text, encoded as a whole.
        context: Longest input in tokens; if not given, what the model allows, up to 2048.
        stride: From window to window, at most `context`; if not given, `context`, which is disjoint windows.
        on_progress: Called with the windows done and all of them.

    Raises InputError for a context or stride out of range, a text too short, ids beyond the model's, and a
    loss that is no number or too large for a perplexity.
    """
    most = model.config.max_position_embeddings
    context = min(most, _USUAL_CONTEXT) if context is None else context
    stride = context if stride is None else stride
    if not 1 <= context <= most:
        raise InputError(f"context is {context}, expected 1 to the model's longest sequence, {most}")
    if not 1 <= stride <= context:
        raise InputError(f"stride is {stride}, expected 1 to the context, {context}")
    ids = tokenizer.encode_prompt(text)
    begins = ids[:1] != tokenizer.encode(text)[:1]
    if len(ids) < 2:
        raise InputError("the text is too short: a token to predict and one before it are needed")
    if max(ids) >= model.config.vocab_size:
        raise InputError(
            f"the tokenizer gives ids up to {max(ids)}, the model has {model.config.vocab_size}: "
            "is it the model's own?"
        )
    device = next(model.parameters()).device
    nats = correct = 0.0
    done = 0
    count = math.ceil(max(len(ids) - 1 - context, 0) / stride) + 1
    for inputs, targets in _batches(torch.tensor(ids), context, stride):
        loss, hits = model.loss(inputs.to(device), targets.to(device))
        nats += float(loss) * int((targets != _NOT_SCORED).sum())
        correct += int(hits)
        done += len(inputs)
        if on_progress is not None:
            on_progress(done, count)
    scored = len(ids) - 1
    if not nats / scored < _MOST_NATS:
        raise InputError(
            f"the model's loss is {nats / scored:.1f} nats a token, expected less than {_MOST_NATS:.0f}: its "
            "weights are damaged, or too large for their dtype"
        )
    num_bytes = len(text.encode()) - (0 if begins else _bytes_of_first(tokenizer, ids))
    return Perplexity(
        perplexity=math.exp(nats / scored),
        loss=nats / scored,
        bits_per_byte=nats / math.log(2) / max(num_bytes, 1),
        accuracy=correct / scored,
        scored_tokens=scored,
        windows=count,
        context=context,
        stride=stride,
        beginning=tokenizer.decode(ids[:1]) if begins else None,
        vocab_size=tokenizer.vocab_size,
    )


def _bytes_of_first(tokenizer: Tokenizer, ids: list[int]) -> int:
    """UTF-8 bytes of the first token, which may end within a character."""
    count = 1  # tokens up to the end of that character
    while (known := tokenizer.decode(ids[:count])).endswith("\ufffd") and count < len(ids):
        count += 1
    rest = tokenizer.decode(ids[1:count])
    whole = rest.lstrip("\ufffd")  # of what begins within a character, each byte became one of these
    return len(known.encode()) - (len(rest) - len(whole)) - len(whole.encode())


def _batches(ids: Tensor, context: int, stride: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, (windows, tokens) int64; targets scored in an earlier window are -100."""
    rows: list[tuple[Tensor, Tensor]] = []
    scored = 0  # targets so far
    last = len(ids) - 1
    for start in range(0, last, stride):
        end = min(start + context, last)
        targets = ids[start + 1 : end + 1].clone()
        targets[: scored - start] = _NOT_SCORED
        scored = end
        if rows and len(targets) < context:  # the last one, shorter
            yield _stacked(rows)
            rows = []
        rows.append((ids[start:end], targets))
        if (len(rows) + 1) * context > _TOKENS_AT_A_TIME or end == last:
            yield _stacked(rows)
            rows = []
        if end == last:
            return


def _stacked(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*rows, strict=True)
    return torch.stack(inputs), torch.stack(targets)
