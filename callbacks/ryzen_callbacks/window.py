"""Robust statistics of a sliding window."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any

_REFRESH = 16


class Window:
    """The last `size` values, with their median and spread."""

    def __init__(self, size: int) -> None:
        self._values: deque[float] = deque(maxlen=size)
        self._recent_median: float | None = None
        self._age = 0

    def __len__(self) -> int:
        return len(self._values)

    def push(self, value: float) -> None:
        """Take in a value; the oldest leaves when the window is full."""
        self._values.append(value)
        self._age += 1

    def extend(self, values: Sequence[float]) -> None:
        """Take in several values."""
        self._values.extend(values)
        self._age += len(values)

    def pushes_to_refresh(self) -> int:
        """For how many pushes `recent_median()` stays as it is, once it has been asked for."""
        return _REFRESH - self._age

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self._recent_median, self._age = None, 0

    def median(self) -> float:
        """The middle value."""
        return statistics.median(self._values)

    def recent_median(self) -> float:
        """The middle value as of one of the last 16 pushes: a first look that costs almost nothing."""
        if self._age >= _REFRESH or self._recent_median is None:
            self._recent_median, self._age = self.median(), 0
        return self._recent_median

    def spread(self) -> float:
        """Median absolute deviation, times 1.4826: the standard deviation if the values are normal."""
        middle = self.median()
        return 1.4826 * statistics.median(abs(v - middle) for v in self._values)

    def largest(self, rank: int) -> float:
        """The `rank`-th largest value, or the smallest if there are fewer."""
        return sorted(self._values, reverse=True)[: min(rank, len(self._values))][-1]

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state, enough to go on exactly."""
        return {"values": list(self._values), "recent_median": self._recent_median, "age": self._age}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self._values.clear()
        self._values.extend(state["values"])
        self._recent_median, self._age = state["recent_median"], state["age"]
