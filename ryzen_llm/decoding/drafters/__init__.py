"""Drafters for speculative decoding. A new one is a file beside recycling.py, and one line in `DRAFTERS`."""

from collections.abc import Callable, Sequence

from ryzen_llm.decoding.drafters.base import Draft, Drafter, DraftSession, Step
from ryzen_llm.decoding.drafters.draft_model import DraftModelDrafter
from ryzen_llm.decoding.drafters.heads import DraftHeads, HeadsConfig, HeadsDrafter, output_rows
from ryzen_llm.decoding.drafters.recycling import RecyclingDrafter
from ryzen_llm.decoding.drafters.suffix import SuffixDrafter
from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer

DRAFTERS: dict[str, Callable[[str, Transformer, bool], Drafter]] = {
    "suffix": lambda path, model, compile: SuffixDrafter(),
    "recycling": lambda path, model, compile: RecyclingDrafter(),
    "heads": lambda path, model, compile: HeadsDrafter(DraftHeads.load(path), model, compile),
}
"""By name: from what stands after a colon in it, the model that is drafted for, and whether to compile."""


def build_drafters(
    choice: str | Drafter | Sequence[str | Drafter], model: Transformer, compile: bool
) -> list[Drafter]:
    """The drafters by name, "heads:PATH" for heads of that file, or as they are given.

    Raises InputError for an unknown or a repeated name, and as the drafters do.
    """
    drafters = []
    for each in [choice] if isinstance(choice, str | Drafter) else choice:
        if isinstance(each, str):
            name, _, path = each.partition(":")
            if name not in DRAFTERS:
                raise InputError(
                    f"unknown drafter {each!r}: choose of {', '.join(DRAFTERS)}:PATH, or give a Drafter, "
                    "such as DraftModelDrafter"
                )
            each = DRAFTERS[name](path, model, compile)
        drafters.append(each)
    names = [drafter.name for drafter in drafters]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"drafter {name} is there {names.count(name)} times, expected once")
    return drafters


__all__ = [
    "DRAFTERS",
    "Draft",
    "DraftHeads",
    "DraftModelDrafter",
    "DraftSession",
    "Drafter",
    "HeadsConfig",
    "HeadsDrafter",
    "RecyclingDrafter",
    "Step",
    "SuffixDrafter",
    "build_drafters",
    "output_rows",
]
