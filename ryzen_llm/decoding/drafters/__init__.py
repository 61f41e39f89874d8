"""Drafters for speculative decoding. A new one is a file beside recycling.py, and one line in `DRAFTERS`."""

import os
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
    "heads": lambda path, model, compile: HeadsDrafter(DraftHeads.load(_expanded(path)), model, compile),
}
"""By name: from what stands after a colon in it, the model that is drafted for, and whether to compile."""
DRAFT_MODEL = DraftModelDrafter.name
"""A name, too, before the path of a model, which `interop.load_drafters` reads."""
_WITH_PATH = ("heads", DRAFT_MODEL)
DRAFTER_NAMES = ", ".join(f"{name}:PATH" if name in _WITH_PATH else name for name in (*DRAFTERS, DRAFT_MODEL))
"""For messages."""


def build_drafters(
    choice: str | Drafter | Sequence[str | Drafter], model: Transformer, compile: bool
) -> list[Drafter]:
    """The drafters by name, "heads:PATH" for heads of that file, or as they are given.

    Raises InputError as `check_drafters` and the drafters do.
    """
    choices = [choice] if isinstance(choice, str | Drafter) else list(choice)
    check_drafters([each for each in choices if isinstance(each, str)])
    drafters = []
    for each in choices:
        if isinstance(each, str):
            name, _, path = each.partition(":")
            if name == DRAFT_MODEL:
                raise InputError(f"drafter {each}: give what interop.load_drafters makes of it")
            each = DRAFTERS[name](path, model, compile)
        drafters.append(each)
    _check_once([drafter.name for drafter in drafters])
    return drafters


def check_drafters(choices: Sequence[str]) -> None:
    """Raise InputError for a name that is unknown or there twice, and for a path where there is nothing."""
    for each in choices:
        name, colon, path = each.partition(":")
        if name not in (*DRAFTERS, DRAFT_MODEL):
            raise InputError(f"unknown drafter {name!r}: choose of {DRAFTER_NAMES}, or give a Drafter")
        if name in _WITH_PATH:
            if not path or not os.path.exists(_expanded(path)):
                raise InputError(f"drafter {each}: no such file; expected {name}:PATH")
        elif colon:
            raise InputError(f"drafter {each}: {name} takes no path")
    _check_once([each.partition(":")[0] for each in choices])


def _expanded(path: str) -> str:
    return os.path.expanduser(path)  # what follows a colon, shells leave as it is


def _check_once(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"drafter {name} is there {names.count(name)} times, expected once")


__all__ = [
    "DRAFTERS",
    "DRAFTER_NAMES",
    "DRAFT_MODEL",
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
