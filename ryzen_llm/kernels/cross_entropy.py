"""Next-token cross-entropy and how many predictions were right, from one pass over the logits."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of log-sum-exp(logits) - logits[target] over all targets but -100, in nats and fp32.

    `logits` is (..., vocab) of any floating dtype, `targets` (...) int64. Returns the loss, a scalar fp32
    tensor, and the number of targets that have the largest logit, a scalar int64 tensor.
    """
    logits, targets = logits.reshape(-1, logits.shape[-1]), targets.flatten()
    num_correct = (logits.detach().argmax(-1) == targets).sum()
    return F.cross_entropy(logits.float(), targets), num_correct
