"""From logits to the next token."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ryzen_llm.errors import InputError

SMALLEST = torch.finfo(torch.float32).tiny
"""In the place of a temperature or top_p that would be 0 in fp32, and take the last token."""
SEEDS = range(-(2**63), 2**64)
"""Those that PyTorch takes."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Raises InputError for a value out of range.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep the k most likely tokens; None keeps all.
        top_p: Then keep the fewest tokens whose probabilities add up to p (Holtzman et al. 2019,
            arXiv:1904.09751); None keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature is {self.temperature}, expected 0 (greedy) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}, expected at least 1, or null to keep every token")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}, expected a number above 0 and up to 1, or null")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The exact distribution that `sample` draws from: fp32, shaped like `logits` (..., vocab)."""
        if self.temperature == 0:
            return torch.zeros_like(logits, dtype=torch.float32).scatter(
                -1, logits.argmax(-1, keepdim=True), 1.0
            )
        logits = logits.float()
        # The largest becomes 0, so that a very small temperature cannot overflow.
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, SMALLEST)
        if self.top_k is None and self.top_p is None:
            return logits.softmax(-1)
        vocab_size = logits.shape[-1]
        top_logits, token_ids = logits.topk(min(self.top_k or vocab_size, vocab_size))
        kept = top_logits.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            probability_above = kept.cumsum(-1) - kept
            kept = kept.masked_fill(probability_above >= max(self.top_p, SMALLEST), 0.0)
            kept = kept / kept.sum(-1, keepdim=True)
        return torch.zeros_like(logits).scatter(-1, token_ids, kept)

    def sample(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token id for each row of `logits` (batch, vocab), as (batch,) int64."""
        if self.temperature == 0:
            return logits.argmax(-1)
        # From above 0 up to the sum: a token of probability 0 cannot be drawn, nor one beyond the last. In
        # fp64, since sums of thousands in fp32 lose the least likely. torch.multinomial draws a number for
        # every token of the vocabulary, which takes twenty times as long on a CPU.
        sums = self.probabilities(logits).double().cumsum(-1)
        drawn = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device, generator=generator)
        token_ids = torch.searchsorted(sums, (1 - drawn) * sums[:, -1:]).squeeze(-1)
        return token_ids.clamp(max=logits.shape[-1] - 1)  # of NaN; whoever decodes looks for these


def seed_generator(rng: torch.Generator, seed: int | None) -> int:
    """Seed `rng`, for None with a new one; the seed. Raises InputError for one that PyTorch cannot take."""
    if seed is None:
        return rng.seed()
    if seed not in SEEDS:
        raise InputError(f"seed is {seed}, expected a number of 64 bits")
    return rng.manual_seed(seed).initial_seed()
