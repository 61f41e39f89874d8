"""Copying what followed the same words before: in this text, or in a corpus given beforehand."""

from collections.abc import Sequence

from torch import Tensor

from ryzen_llm.decoding.drafters.base import Draft, Drafter, DraftSession, Step
from ryzen_llm.decoding.drafters.suffix_automaton import SuffixAutomaton

_SIGNAL_BY_LENGTH = [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 8]
_CORPUS_SIGNALS = 16
_LIKELY = (0.0, 0.2, 0.4, 0.5, 0.65, 0.75, 0.8, 0.95, 0.97)
"""By signal: how often, about, SmolLM2's texts went on as before (a corpus is taken for as good)."""


class SuffixDrafter(Drafter):
    """Finds the longest suffix of the text that occurred before and proposes what came after it.

    Hu et al. 2024, "SAM Decoding" (arXiv:2411.10666). Its signal is the length of the match, which grows with
    each token that holds.

    Args:
        corpus: Ids of text like that to come; where its match is longer than the text's own, it is copied.
    """

    name = "suffix"

    def __init__(self, corpus: Sequence[int] = ()) -> None:
        self.corpus = SuffixAutomaton(corpus) if corpus else None

    def likelihood(self, signal: int) -> float:
        """See `Drafter.likelihood`."""
        return _LIKELY[signal % _CORPUS_SIGNALS]

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        """See `Drafter.begin`."""
        return _Session(tokens, self.corpus)


class _Session(DraftSession):
    def __init__(self, tokens: Sequence[int], corpus: SuffixAutomaton | None) -> None:
        self.text = SuffixAutomaton()
        self.corpus = corpus
        self.match = 0, -1
        self.state, self.corpus_length = 0, 0
        self._extend(tokens)

    def propose(self, most: int) -> Draft:
        length, end = self.match
        source, first_signal = self.text.tokens, 0
        if self.corpus is not None and self.corpus_length > length:
            length, end = self.corpus_length, self.corpus.end[self.state]
            source, first_signal = self.corpus.tokens, _CORPUS_SIGNALS
        if not length:
            return Draft()
        tokens = source[end + 1 : end + 1 + most]
        if source is self.text.tokens:
            # The copy may run into its own end, and goes on with what it has just written: a repetition.
            while len(tokens) < most:
                tokens = tokens + tokens[: most - len(tokens)]
        longest = len(_SIGNAL_BY_LENGTH) - 1
        return Draft(
            tokens,
            [first_signal + _SIGNAL_BY_LENGTH[min(length + i, longest)] for i in range(len(tokens))],
        )

    def update(self, step: Step) -> None:
        self._extend(step.accepted)

    def _extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self.text.append(token)
            self.match = self.text.earlier()
            if self.corpus is not None:
                self.state, self.corpus_length = self.corpus.step(self.state, self.corpus_length, token)
