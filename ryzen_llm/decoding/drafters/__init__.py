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
    choices = [choice] if isinstance(choice, str | Drafter) else list(choice)
    check_drafters([each for each in choices if isinstance(each, str)])
    drafters = []
    for each in choices:
        if isinstance(each, str):
            name, _, path = each.partition(":")
            each = DRAFTERS[name](path, model, compile)
        drafters.append(each)
    _check_once([drafter.name for drafter in drafters])
    return drafters


def check_drafters(choices: Sequence[str]) -> None:
    """Raise InputError for a name that is not in `DRAFTERS`, or is there twice."""
    names = [each.partition(":")[0] for each in choices]
    for name in names:
        if name not in DRAFTERS:
            raise InputError(
                f"unknown drafter {name!r}: choose of {', '.join(DRAFTERS)}:PATH, or give a Drafter, such as "
                "DraftModelDrafter"
            )
    _check_once(names)


def _check_once(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"drafter {name} is there {names.count(name)} times, expected once")


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
    "check_drafters",
    "output_rows",
]
