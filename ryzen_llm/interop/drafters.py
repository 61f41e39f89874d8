"""Drafters by name, those that are models read from wherever they are kept."""

from collections.abc import Sequence

from ryzen_llm.decoding import DRAFT_MODEL, Drafter, DraftModelDrafter, Generator, check_drafters
from ryzen_llm.interop.load import load_pretrained
from ryzen_llm.model import Transformer


def load_drafters(
    choices: Sequence[str], model: Transformer, *, weights: str = "bf16", compile: bool = False
) -> list[str | Drafter]:
    """What `Generator` takes as `drafter` for these names; `load_pretrained` takes the path of a draft model.

    `model` is the one that is drafted for; a draft model decodes on its device, as `Generator` does with
    `weights` and `compile`. Raises InputError as `check_drafters` and `load_pretrained` do, and for a draft
    model with another vocabulary.
    """
    check_drafters(choices)
    device = next(model.parameters()).device
    drafters: list[str | Drafter] = []
    for each in choices:
        name, _, path = each.partition(":")
        if name == DRAFT_MODEL:
            small, _ = load_pretrained(path)
            generator = Generator(small.to(device), weights=weights, compile=compile)
            drafters.append(DraftModelDrafter(generator, model.config.vocab_size))
        else:
            drafters.append(each)
    return drafters
