"""Cross-entropy of rows of logits on a GPU, and its gradient in their place: two passes over each row."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LARGEST_BLOCK = 8192


@triton.jit
def softmax_rows_kernel(
    logits_ptr,
    targets_ptr,
    row_weights_ptr,
    losses_ptr,
    predictions_ptr,
    stride,
    vocab,
    label_smoothing,
    z_loss,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row; the log-sum-exp is made online (Milakov & Gimelshein 2018, arXiv:1805.02867)."""
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    largest = float("-inf")
    total = 0.0
    sum_of_logits = 0.0
    target_logit = 0.0
    best = float("-inf")
    prediction = tl.full((), 0, tl.int64)
    for start in range(0, vocab, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < vocab
        x = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
        block_max, block_argmax = tl.max(x, 0, return_indices=True)
        prediction = tl.where(block_max > best, start + block_argmax, prediction)  # the first, as in PyTorch
        best = tl.maximum(best, block_max)
        new_largest = tl.maximum(largest, block_max)
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), 0)
        largest = new_largest
        sum_of_logits += tl.sum(tl.where(inside, x, 0.0), 0)
        target_logit += tl.sum(tl.where(columns == target, x, 0.0), 0)
    lse = largest + tl.log(total)
    loss = lse - (1 - label_smoothing) * target_logit - label_smoothing * sum_of_logits / vocab
    loss += z_loss * lse * lse
    # A kernel cannot raise; a target outside the vocabulary shows as NaN.
    loss = tl.where((target >= 0) & (target < vocab), loss, float("nan"))
    tl.store(losses_ptr + row, loss)
    tl.store(predictions_ptr + row, prediction)
    if GRADIENTS:
        weight = tl.load(row_weights_ptr + row)
        scale = 1 + 2 * z_loss * lse
        for start in range(0, vocab, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocab
            x = tl.load(logits_ptr + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - lse) * scale - label_smoothing / vocab
            gradient -= tl.where(columns == target, 1 - label_smoothing, 0.0)
            gradient *= weight
            tl.store(logits_ptr + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def softmax_rows(
    logits: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    label_smoothing: float,
    z_loss: float,
    gradients: bool,
    losses: Tensor,
    predictions: Tensor,
) -> None:
    """See `ryzen_llm.kernels.linear_cross_entropy.SoftmaxRows`; rows of logits are contiguous."""
    rows, vocab = logits.shape
    block = min(triton.next_power_of_2(vocab), LARGEST_BLOCK)
    with torch.cuda.device_of(logits):  # Triton starts kernels on the current device
        softmax_rows_kernel[(rows,)](
            logits,
            targets,
            row_weights,
            losses,
            predictions,
            logits.stride(0),
            vocab,
            label_smoothing,
            z_loss,
            GRADIENTS=gradients,
            BLOCK=block,
            num_warps=16 if block >= 4096 else 4,
        )
