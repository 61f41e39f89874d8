"""Room on Python's stack for a loop that calls many small functions."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_SLOTS = 10_000
"""Of 8 bytes, for which Python takes 128 KiB; the 50 KiB left of these are for other frames."""


def with_frame_room(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, whose callees' frames lie in one piece of memory.

    Python keeps frames in pieces of 16 KiB, and gives a piece back to the system as soon as the last frame in
    it returns. At some depth of calls, which is chance, a loop that calls an op a hundred times a step then
    maps and unmaps memory a hundred times: measured, 4 of 15 ms. A frame that asks for more gets a larger
    piece.
    """

    def roomy(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=_SLOTS)
    return functools.wraps(function)(roomy)
