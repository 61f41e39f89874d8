"""How long a pass of each width takes, followed from pass to pass."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

SMOOTHING = 0.1
"""How far what is known follows one pass."""
FARTHEST = math.log(1.25)
"""As a logarithm, how far from the usual a pass counts at most: what is beyond may be an interruption."""
RECENT = 4
"""Passes after which a narrow one is too long ago to compare a wider one with: the machine's speed moves."""
SETTLED = 2
"""The narrow pass in a row from which on it takes as long as in plain decoding."""


class PassTimes:
    """Seconds of a pass of each width: the machine's speed, and how many times longer each takes.

    What slows one pass would have slowed one of another width, so each pass moves the speed; how many times
    longer a wider pass takes is learnt only where narrow ones were timed shortly before. The narrowest pass
    is timed among its like, as in plain decoding: just after a wider one it can take a tenth longer, which is
    what that wider pass costs beside its own time.

    Args:
        seconds: By width, measured.

    Attributes:
        widths: Ascending.
        narrowest: The first of them.
        since_narrow: Passes since that one was last timed among its like.
    """

    def __init__(self, seconds: Mapping[int, float]) -> None:
        self.widths: Sequence[int] = sorted(seconds)
        self.narrowest = self.widths[0]
        self._speed = math.log(seconds[self.narrowest])
        self._longer = {width: math.log(seconds[width]) - self._speed for width in self.widths}
        self._after = 0.0
        self._in_a_row = SETTLED  # narrow passes
        self.since_narrow = 0
        self._order()

    def __getitem__(self, width: int) -> float:
        return math.exp(self._speed + self._longer[width])

    @property
    def entering(self) -> float:
        """Seconds that the next pass costs beside its own if it is a wide one: none if the last one was."""
        return 0.0 if not self._in_a_row else self._after * self[self.narrowest]

    def passed(self, width: int, seconds: float) -> None:
        """Take in how long a pass took."""
        error = math.log(seconds) - self._speed - self._longer[width]
        error = min(max(error, -FARTHEST), FARTHEST)
        self.since_narrow += 1
        if width != self.narrowest:
            self._in_a_row = 0
            if self.since_narrow <= RECENT:
                self._longer[width] += SMOOTHING * error
                self._order()
            self._speed += SMOOTHING * error / 2
            return
        self._in_a_row += 1
        if self._in_a_row < SETTLED:
            self._after += SMOOTHING * (max(error, 0.0) - self._after)
            return
        self.since_narrow = 0
        self._speed += SMOOTHING * error

    def _order(self) -> None:
        """A pass over more tokens takes no less: one that seemed quicker was timed in a quieter moment."""
        for narrower, wider in pairwise(self.widths):
            self._longer[wider] = max(self._longer[wider], self._longer[narrower])
