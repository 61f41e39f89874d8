"""A smaller model with the same tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ryzen_llm.cache import build_cache
from ryzen_llm.decoding.drafters.base import Draft, Drafter, DraftSession, Step
from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer

CONFIDENCE_LEVELS = 8


class DraftModelDrafter(Drafter):
    """Proposes what `model` finds likeliest, token by token (Leviathan et al. 2022, arXiv:2211.17192).

    Its signal is how likely. Its weights are used as they are; `vocab_size` is that of the model it drafts
    for. Raises InputError for another vocabulary.
    """

    name = "draft_model"

    def __init__(self, model: Transformer, vocab_size: int) -> None:
        if model.config.vocab_size != vocab_size:
            raise InputError(
                f"draft_model: its vocabulary has {model.config.vocab_size} tokens, the model's "
                f"{vocab_size}: both must share a tokenizer"
            )
        self.model = model.eval()

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        """See `Drafter.begin`."""
        return _Session(self.model, tokens)


class _Session(DraftSession):
    def __init__(self, model: Transformer, tokens: Sequence[int]) -> None:
        self.model = model
        weight = next(model.parameters())
        self.device = weight.device
        self.cache = build_cache(
            "dense",
            model.config,
            batch_size=1,
            max_length=model.config.max_position_embeddings,
            dtype=weight.dtype,
            device=self.device,
        )
        self.text = list(tokens)
        self.read: list[int] = []  # what the cache holds: text, and then a draft

    @torch.inference_mode()
    def propose(self, most: int) -> Draft:
        common = min(len(self.read), len(self.text) - 1)  # what follows the last token is asked for anew
        while self.read[:common] != self.text[:common]:
            common -= 1
        self.cache.truncate(common)
        self.read = self.text[:common]
        most = min(most, self.model.config.max_position_embeddings - len(self.text))
        tokens: list[int] = []
        signals: list[int] = []
        unread = self.text[common:]
        for _ in range(most):
            hidden_states = self.model.hidden_states(torch.tensor([unread], device=self.device), self.cache)
            self.read += unread
            probability, token = self.model.logits(hidden_states[0, -1]).float().softmax(-1).max(-1)
            tokens.append(int(token))
            signals.append(min(int(probability * CONFIDENCE_LEVELS), CONFIDENCE_LEVELS - 1))
            unread = tokens[-1:]
        return Draft(tokens, signals)

    def update(self, step: Step) -> None:
        self.text += step.accepted
