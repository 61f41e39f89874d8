"""A smaller model with the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ryzen_llm.decoding.drafters.base import Draft, Drafter, DraftSession, Step
from ryzen_llm.errors import InputError

if TYPE_CHECKING:
    from ryzen_llm.decoding.generator import Generator

CONFIDENCE_LEVELS = 8


class DraftModelDrafter(Drafter):
    """Proposes what another model finds likeliest, token by token (Leviathan et al. 2022, arXiv:2211.17192).

    Its signal is how likely. `generator` has that model, and how to decode it; `vocab_size` is that of the
    model it drafts for. Compiles before anyone takes the time. Raises InputError for another vocabulary.
    """

    name = "draft_model"

    def __init__(self, generator: Generator, vocab_size: int) -> None:
        if generator.model.config.vocab_size != vocab_size:
            raise InputError(
                f"draft_model: its vocabulary has {generator.model.config.vocab_size} tokens, the model's "
                f"{vocab_size}: both must share a tokenizer"
            )
        self.generator = generator
        if generator.compile:
            _Session(generator, [0]).propose(2)

    def likelihood(self, signal: int) -> float:
        """See `Drafter.likelihood`: what the smaller model said it is."""
        return (signal + 0.5) / CONFIDENCE_LEVELS

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        """See `Drafter.begin`."""
        return _Session(self.generator, tokens)


class _Session(DraftSession):
    def __init__(self, generator: Generator, tokens: Sequence[int]) -> None:
        self.generator = generator
        self.longest = generator.model.config.max_position_embeddings
        self.cache = generator.new_cache(1, self.longest)
        self.text = list(tokens)
        self.read: list[int] = []  # what the cache holds: text, and then a draft

    @torch.inference_mode()
    def propose(self, most: int) -> Draft:
        common = min(len(self.read), len(self.text) - 1)  # what follows the last token is asked for anew
        while self.read[:common] != self.text[:common]:
            common -= 1
        self.cache.truncate(common)
        self.read = self.text[:common]
        most = min(most, self.longest - len(self.text))
        tokens: list[int] = []
        signals: list[int] = []
        unread = self.text[common:]
        for _ in range(most):
            probability, token = self._after(unread).float().softmax(-1).max(-1)
            tokens.append(int(token))
            signals.append(min(int(probability * CONFIDENCE_LEVELS), CONFIDENCE_LEVELS - 1))
            unread = tokens[-1:]
        return Draft(tokens, signals)

    def _after(self, unread: Sequence[int]) -> Tensor:
        """Read these tokens; the logits of what follows, (vocab_size,)."""
        generator = self.generator
        first = not self.read
        self.read += unread
        if first:
            prompt = torch.tensor(unread, device=generator.device)
            return generator.model.logits(generator.read_prompts([prompt], self.cache))[0]
        for token in unread:
            outcome = generator.fixed_width(torch.tensor([[token]], device=generator.device), self.cache)
        return outcome.logits[0, 0]

    def update(self, step: Step) -> None:
        self.text += step.accepted
