"""Drafters for speculative decoding. A new one is a file beside recycling.py, and one line in `DRAFTERS`."""

from collections.abc import Callable, Sequence

from ryzen_llm.decoding.drafters.base import Draft, Drafter, DraftSession, Step
from ryzen_llm.decoding.drafters.draft_model import DraftModelDrafter
from ryzen_llm.decoding.drafters.recycling import RecyclingDrafter
from ryzen_llm.decoding.drafters.suffix import SuffixDrafter
from ryzen_llm.errors import InputError

DRAFTERS: dict[str, Callable[[], Drafter]] = {"suffix": SuffixDrafter, "recycling": RecyclingDrafter}
"""Those that need nothing to start with."""


def build_drafters(choice: str | Drafter | Sequence[str | Drafter]) -> list[Drafter]:
    """The drafters by name or as they are given. Raises InputError for an unknown or a repeated name."""
    drafters = []
    for each in [choice] if isinstance(choice, str | Drafter) else choice:
        if isinstance(each, str) and each not in DRAFTERS:
            raise InputError(
                f"unknown drafter {each!r}: choose of {', '.join(DRAFTERS)}, or give a Drafter "
                "(DraftModelDrafter, HeadsDrafter)"
            )
        drafters.append(DRAFTERS[each]() if isinstance(each, str) else each)
    names = [drafter.name for drafter in drafters]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"drafter {name} is there {names.count(name)} times, expected once")
    return drafters


__all__ = [
    "DRAFTERS",
    "Draft",
    "DraftModelDrafter",
    "DraftSession",
    "Drafter",
    "RecyclingDrafter",
    "Step",
    "SuffixDrafter",
    "build_drafters",
]
