"""The drafts of several drafters for one text, as one tree of tokens."""

from collections.abc import Callable, Mapping
from itertools import accumulate

from ryzen_llm.decoding.drafters import Draft


class DraftTree:
    """Tokens that may come next, each once after what it follows, whoever proposes it.

    Args:
        drafts: By the drafter's name.
        rate: From a drafter's name and a signal, how likely such a token is if what it follows is right.
        branching: Whether a pass can read a tree: otherwise it reads one text of it.
        most: Tokens that a pass can read.

    Attributes:
        gains: Tokens that a pass is expected to give, by how many drafted tokens it reads, from 0 to `most`.
    """

    def __init__(
        self, drafts: Mapping[str, Draft], rate: Callable[[str, int], float], *, branching: bool, most: int
    ) -> None:
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.names: list[str] = []
        self._rates: list[float] = []
        found: dict[tuple[int, int], int] = {}
        for name, draft in drafts.items():
            places: list[int] = []
            for token, signal, parent in zip(draft.tokens, draft.signals, draft.follows, strict=True):
                key = places[parent] if parent >= 0 else -1, token
                place = found.setdefault(key, len(self.tokens))
                likely = rate(name, signal)
                if place == len(self.tokens):
                    self.tokens.append(token)
                    self.parents.append(key[0])
                    self.names.append(name)
                    self._rates.append(likely)
                elif likely > self._rates[place]:
                    self._rates[place], self.names[place] = likely, name
                places.append(place)
        self.branching = branching
        self._chances: list[float] = []  # of a token with all that it follows
        for parent, likely in zip(self.parents, self._rates, strict=True):
            self._chances.append(likely * (self._chances[parent] if parent >= 0 else 1.0))
        if branching:
            # What a token follows is no less likely, and comes first where they are as likely.
            self._order = sorted(range(len(self.tokens)), key=self._chances.__getitem__, reverse=True)[:most]
            self.gains = list(accumulate((self._chances[i] for i in self._order), initial=1.0))
            self.gains += self.gains[-1:] * (most + 1 - len(self.gains))
        else:
            self._find_text(most)

    def first(self, count: int) -> tuple[Draft, list[str]]:
        """The `count` tokens most worth reading, and whose each is; their signals are of no more use."""
        chosen = self._order[:count] if self.branching else self._path(self._ends[count])
        places = {-1: -1} | {token: place for place, token in enumerate(chosen)}
        tokens = [self.tokens[token] for token in chosen]
        parents = [places[self.parents[token]] for token in chosen]
        return Draft(tokens, [0] * len(tokens), parents), [self.names[token] for token in chosen]

    def _find_text(self, most: int) -> None:
        """The text that promises most, of each length."""
        self.gains, self._ends = [1.0], [-1]
        depths: list[int] = []
        worth: list[float] = []
        best = [(1.0, -1)] * (most + 1)
        for index, (parent, chance) in enumerate(zip(self.parents, self._chances, strict=True)):
            depths.append(1 + (depths[parent] if parent >= 0 else 0))
            worth.append(chance + (worth[parent] if parent >= 0 else 1.0))
            if depths[index] <= most and worth[index] >= best[depths[index]][0]:
                best[depths[index]] = worth[index], index
        for depth in range(1, most + 1):
            gain, end = max(best[depth], (self.gains[-1], self._ends[-1]), key=lambda each: each[0])
            self.gains.append(gain)
            self._ends.append(end)

    def _path(self, end: int) -> list[int]:
        path: list[int] = []
        while end >= 0:
            path.append(end)
            end = self.parents[end]
        return path[::-1]
