"""Drafters that are wrong on purpose."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ryzen_llm.decoding import Draft, Drafter, DraftSession, Step

Propose = Callable[[list[int], int], Any]
"""The text so far and how many tokens are wanted -> a draft, or whatever."""


class Adversary(Drafter):
    """Proposes what a function says."""

    def __init__(self, name: str, propose: Propose, fail_in: str = "") -> None:
        self.name = name
        self.propose = propose
        self.fail_in = fail_in

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        if self.fail_in == "begin":
            raise RuntimeError("cannot begin")
        return _Session(self, list(tokens))


class _Session(DraftSession):
    def __init__(self, adversary: Adversary, text: list[int]) -> None:
        self.adversary = adversary
        self.text = text

    def propose(self, most: int) -> Any:
        return self.adversary.propose(self.text, most)

    def update(self, step: Step) -> None:
        if self.adversary.fail_in == "update":
            raise KeyError("cannot learn")
        self.text = [*self.text, *step.accepted]


def draft(tokens: Sequence[int]) -> Draft:
    return Draft(list(tokens), [0] * len(tokens))


def raises(text: list[int], most: int) -> Draft:
    raise ValueError("out of ideas")


def repeating(text: list[int], most: int) -> Draft:
    return draft(text[-1:] * most)


def always(token: int) -> Propose:
    return lambda text, most: draft([token] * most)


def oracle(truth: Sequence[int], shift: int = 0, vocab_size: int = 1 << 30) -> Propose:
    """The true continuation, or with `shift` one that is wrong at every token."""

    def propose(text: list[int], most: int) -> Draft:
        return draft([(token + shift) % vocab_size for token in truth[len(text) : len(text) + most]])

    return propose


FAILING: dict[str, Adversary] = {
    "raises": Adversary("raises", raises),
    "begin": Adversary("begin", repeating, fail_in="begin"),
    "update": Adversary("update", repeating, fail_in="update"),
    "none": Adversary("none", lambda text, most: None),
    "strings": Adversary("strings", lambda text, most: Draft(["a"] * most, [0] * most)),  # type: ignore[list-item]
    "floats": Adversary("floats", lambda text, most: Draft([1.0] * most, [0] * most)),  # type: ignore[list-item]
    "signals": Adversary("signals", lambda text, most: Draft([1] * most, [])),
    "no parents": Adversary("no parents", lambda text, most: Draft([1, 2], [0, 0], [-1])),
    "later parents": Adversary("later parents", lambda text, most: Draft([1, 2], [0, 0], [1, -1])),
    "parents that are none": Adversary("parents that are none", lambda text, most: Draft([1], [0], [-2])),
    "too large": Adversary("too large", always(101)),
    "negative": Adversary("negative", always(-1)),
}
"""For a vocabulary of 101."""
