"""All substrings of a growing text, in linear space."""

from collections.abc import Sequence

RECENT_LINKS = 8
"""How many suffixes of the text's end have their last occurrence brought up to date at each token."""


class SuffixAutomaton:
    """Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text", built online.

    Every state stands for the substrings that end at the same places. `length` is that of the longest, `link`
    the state of its longest suffix that also ends elsewhere, `end` the position of one of its last tokens.
    Adding a token takes constant time on average.
    """

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens: list[int] = []
        self.next: list[dict[int, int]] = [{}]
        self.link = [-1]
        self.length = [0]
        self.end = [-1]
        self.last = 0
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Make the text one token longer."""
        following, link, length = self.next, self.link, self.length
        position = len(self.tokens)
        self.tokens.append(token)
        new = self._state({}, position + 1, position)
        state = self.last
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        if state < 0:
            link[new] = 0
        else:
            target = following[state][token]
            if length[state] + 1 != length[target]:
                copy = self._state(dict(following[target]), length[state] + 1, self.end[target])
                link[copy] = link[target]
                link[target] = copy
                while state >= 0 and following[state].get(token) == target:
                    following[state][token] = copy
                    state = link[state]
                target = copy
            link[new] = target
        self.last = new

    def earlier(self) -> tuple[int, int]:
        """How long the longest suffix that occurred before is, and where its last token was then.

        The place is the latest one where that suffix was the longest itself; (0, -1) if there is none.
        """
        state = self.link[self.last]
        if state <= 0:
            return 0, -1
        found = self.length[state], self.end[state]
        now = len(self.tokens) - 1
        for _ in range(RECENT_LINKS):
            if state <= 0:
                break
            self.end[state] = now
            state = self.link[state]
        return found

    def step(self, state: int, length: int, token: int) -> tuple[int, int]:
        """For another text: the state and the length of its longest suffix in this one, one token on."""
        while state and token not in self.next[state]:
            state = self.link[state]
            length = self.length[state]
        if token in self.next[state]:
            return self.next[state][token], length + 1
        return 0, 0

    def _state(self, following: dict[int, int], length: int, end: int) -> int:
        self.next.append(following)
        self.link.append(0)
        self.length.append(length)
        self.end.append(end)
        return len(self.next) - 1
