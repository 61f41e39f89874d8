"""Reusing the model's predictions, those at rejected tokens included."""

from collections.abc import Sequence

from torch import Tensor

from ryzen_llm.decoding.drafters.base import Draft, Drafter, DraftSession, Step

CONTEXTS = (3, 2, 1)
"""Tokens that an entry is found by; the longest that is known is taken."""
MOST_ENTRIES = 1 << 18
_SURE = 3
_LIKELY = {1: (0.2, 0.35, 0.5), 2: (0.45, 0.75, 0.75), 3: (0.65, 0.85, 0.98)}
"""By the length of context and how often running: how often, about, SmolLM2 said so again."""

Table = dict[tuple[int, ...], tuple[int, int]]
"""By the last tokens: what the model predicted after them last, and how often running (up to 3)."""


class RecyclingDrafter(Drafter):
    """Follows a table of which token the model predicted after which others, filled as it runs.

    After Luo et al. 2024, "Turning Trash into Treasure: Accelerating Inference of Large Language Models with
    Token Recycling" (arXiv:2408.08696). There the table is by single tokens with eight successors for a tree;
    here it is by one to three tokens with the latest successor, for a chain. It is kept from text to text,
    the oldest entries making room.
    """

    name = "recycling"

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """See `Drafter.forget`."""
        self.tables: list[Table] = [{} for _ in CONTEXTS]

    def likelihood(self, signal: int) -> float:
        """See `Drafter.likelihood`."""
        order, times = divmod(signal, _SURE + 1)
        return _LIKELY[order][times - 1]

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        """See `Drafter.begin`."""
        return _Session(self.tables, tokens)


class _Session(DraftSession):
    def __init__(self, tables: list[Table], tokens: Sequence[int]) -> None:
        self.tables = tables
        self.recent = list(tokens[-max(CONTEXTS) :])

    def propose(self, most: int) -> Draft:
        context = list(self.recent)
        tokens, signals = [], []
        for _ in range(most):
            for order, table in zip(CONTEXTS, self.tables, strict=True):
                entry = table.get(tuple(context[-order:]))
                if entry is not None:
                    break
            else:
                break
            token, times = entry
            tokens.append(token)
            signals.append(order * (_SURE + 1) + times)
            context.append(token)
        return Draft(tokens, signals)

    def update(self, step: Step) -> None:
        contexts: list[list[int]] = []
        for token, parent, prediction in zip(step.inputs, step.parents, step.predictions, strict=False):
            before = self.recent[:-1] if parent < 0 else contexts[parent][-max(CONTEXTS) + 1 :]
            context = [*before, token]
            contexts.append(context)
            for order, table in zip(CONTEXTS, self.tables, strict=True):
                if len(context) >= order:
                    _note(table, tuple(context[-order:]), prediction)
        self.recent = [*self.recent, *step.accepted][-max(CONTEXTS) :]


def _note(table: Table, key: tuple[int, ...], prediction: int) -> None:
    known, times = table.pop(key, (prediction, 0))
    table[key] = prediction, min(times + 1, _SURE) if known == prediction else 1
    if len(table) > MOST_ENTRIES:
        del table[next(iter(table))]
