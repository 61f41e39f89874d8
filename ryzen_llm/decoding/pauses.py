"""Steps without drafts: where drafting turns out slower than plain decoding, and to time plain decoding."""

from ryzen_llm.decoding.pass_times import SETTLED, PassTimes

WINDOW = 16
"""Steps by whose time drafting is judged."""
SHORTEST, LONGEST = 16, 64
"""Steps of a pause: after each window in a row that lost, twice as many."""
TIMING = SETTLED + 1
"""Steps of a pause that times plain decoding."""
STALE = 32
"""Passes after which that may be due."""
TIMING_COST = 0.01
"""The part of its time that it may cost."""


class Pauses:
    """Compares what steps took, with all that comes with drafts, with as many tokens of plain decoding.

    `DraftControl` chooses what should be fastest, by what it knows of passes and drafts; this looks at what
    came of it. A text's first window is always drafted.

    Args:
        times: Of passes, kept up to date elsewhere.

    Attributes:
        left: How many of the next steps are to have no drafts.
    """

    def __init__(self, times: PassTimes) -> None:
        self.times = times
        self._unspent = 0.0  # seconds that timing may cost
        self.begin_text()

    def begin_text(self) -> None:
        """Forget what came of other texts."""
        self.left, self._length = 0, SHORTEST  # of this pause and of the next
        self._begin_window()

    def _begin_window(self) -> None:
        self._steps, self._tokens, self._seconds = 0, 0.0, 0.0

    def passed(self, tokens: float, seconds: float) -> None:
        """Take in the tokens that a step gave each text on average, and what it took with its drafting."""
        if self.times.narrowest > 1:  # no plain decoding to compare with
            return
        if self.left:
            self.left -= 1
            return
        self._steps += 1
        self._tokens += tokens
        self._seconds += seconds
        self._unspent += TIMING_COST * seconds
        if self._steps < WINDOW:
            return
        plain = self.times[self.times.narrowest]
        lead = self._tokens * plain / self._seconds
        self._begin_window()
        if lead < 1:
            self.left, self._length = self._length, min(2 * self._length, LONGEST)
            return
        self._length = SHORTEST
        if self.times.since_narrow >= STALE and TIMING * plain * (1 - 1 / lead) <= self._unspent:
            self.left, self._unspent = TIMING, 0.0
