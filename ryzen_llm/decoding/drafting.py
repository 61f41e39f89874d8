"""All drafters at work on a batch of texts."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from torch import Tensor

from ryzen_llm.decoding.adaptive import DraftControl, Plan
from ryzen_llm.decoding.drafters import Draft, Drafter, DraftSession, Step

T = TypeVar("T")

MOST_DRAFTED = 128
"""Tokens of a tree; what a drafter proposes beyond is not looked at."""


@dataclass
class SpeculationStatistics:
    """What became of the drafts in one call of `generate`, all texts together.

    Attributes:
        passes: How many passes of the model had which width.
        steps: Those passes, counted for each text that had not ended.
        tokens: What these steps gave.
        drafted: Tokens that were drafted and verified, by drafter.
        accepted: Those of them that stood.
        drafting_seconds: Time that drafters took.
        failures: Why a drafter was dropped, by drafter.
    """

    passes: dict[int, int] = field(default_factory=dict)
    steps: int = 0
    tokens: int = 0
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    drafting_seconds: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)


class Drafting:
    """Asks the drafters that may pay, and drops one that fails: that costs speed and nothing else.

    Args:
        drafters: Whom to ask.
        control: What decides.
        vocab_size: Ids beyond are garbage.
        texts: The tokens of each text, its first new one included.
        hidden_states: Of the model at the last token of each prompt, (batch, hidden_size).
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        control: DraftControl,
        vocab_size: int,
        texts: Sequence[Sequence[int]],
        hidden_states: Tensor,
    ) -> None:
        self.control = control
        self.vocab_size = vocab_size
        self.statistics = SpeculationStatistics()
        self._sessions: dict[str, list[DraftSession]] = {}
        self._asked: list[dict[str, Draft]] = []
        self._missed: list[tuple[Sequence[int], Sequence[Step]]] = []  # what the drafters have not seen
        self._started = self._planned = 0.0
        control.pauses.begin_text()
        for drafter in drafters:
            self._sessions[drafter.name] = []  # there to be dropped
            begin = functools.partial(self._begin, drafter, texts, hidden_states)
            self._guarded(drafter.name, begin)

    def plan(self, rows: Sequence[int], room: Sequence[int], branching: bool) -> Plan:
        """Drafts for the texts of these `rows`, each of at most `room` tokens in a row.

        `branching` says whether the pass can read a tree of tokens.
        """
        self._started = time.perf_counter()
        self._asked = [{} for _ in rows]
        best = self.control.plan(self._asked, branching)
        if not self.control.pauses.left:
            self.catch_up()
            best = self._plan(best, rows, room, branching)
        self._planned = time.perf_counter()
        self.statistics.drafting_seconds += self._planned - self._started
        return best

    def _plan(self, best: Plan, rows: Sequence[int], room: Sequence[int], branching: bool) -> Plan:
        unplanned = False  # whether there are drafts that `best` does not know of
        for name in sorted(self._sessions, key=lambda name: self.control.cost(name, 1)):
            cheap = self.control.is_cheap(name)
            if unplanned and not cheap:  # whether it pays depends on what there is
                best = self.control.plan(self._asked, branching)
                unplanned = False
            most = self.control.worth_asking(name, best)
            if not most:
                continue
            asked_at = time.perf_counter()
            drafts = self._guarded(name, functools.partial(self._ask, name, rows, room, most))
            if drafts is None:
                continue
            self.control.proposed(name, most, time.perf_counter() - asked_at)
            for asked, draft in zip(self._asked, drafts, strict=True):
                asked[name] = draft
            if cheap:
                unplanned = True
                continue
            before, best = best, self.control.plan(self._asked, branching)
            self.control.gained(name, most, before, best)
        if unplanned:
            best = self.control.plan(self._asked, branching)
        self.control.settled(self._asked[0], best)
        return best

    def learn(self, rows: Sequence[int], plan: Plan, steps: Sequence[Step]) -> None:
        """Take in what a pass showed of each of `rows`."""
        started = time.perf_counter()
        statistics = self.statistics
        statistics.passes[plan.width] = statistics.passes.get(plan.width, 0) + 1
        for asked, names, step in zip(self._asked, plan.names, steps, strict=True):
            statistics.steps += 1
            statistics.tokens += len(step.accepted)
            for index, name in enumerate(names, start=1):
                statistics.drafted[name] = statistics.drafted.get(name, 0) + 1
                statistics.accepted[name] = statistics.accepted.get(name, 0) + (index in step.stood)
            for each, drafted in asked.items():
                self.control.learn(each, drafted, step.accepted)
        self._missed.append((rows, steps))
        ended = time.perf_counter()
        statistics.drafting_seconds += ended - started
        tokens = sum(len(step.accepted) for step in steps)
        self.control.passed(plan, tokens, self._planned - self._started, ended - self._planned)

    def rested(self, steps: Sequence[Step], seconds: float) -> None:
        """Take in the steps of a pause, of the only text, and what they took on average."""
        statistics = self.statistics
        plan = self.control.plan([{}])
        statistics.passes[plan.width] = statistics.passes.get(plan.width, 0) + len(steps)
        statistics.steps += len(steps)
        statistics.tokens += len(steps)
        for step in steps:
            self._missed.append(([0], [step]))
            self.control.passed(plan, 1, 0.0, seconds)

    def catch_up(self) -> None:
        """Show the drafters the steps that they have not seen: the last one or, after a pause, more."""
        for name in list(self._sessions):
            for rows, steps in self._missed:
                if name in self._sessions:
                    self._guarded(name, functools.partial(self._update, name, rows, steps))
        self._missed.clear()

    def _begin(self, drafter: Drafter, texts: Sequence[Sequence[int]], hidden_states: Tensor) -> None:
        self._sessions[drafter.name] = [
            drafter.begin(list(tokens), hidden) for tokens, hidden in zip(texts, hidden_states, strict=True)
        ]

    def _update(self, name: str, rows: Sequence[int], steps: Sequence[Step]) -> None:
        for row, step in zip(rows, steps, strict=True):
            self._sessions[name][row].update(step)

    def _ask(self, name: str, rows: Sequence[int], room: Sequence[int], most: int) -> list[Draft]:
        sessions = self._sessions[name]
        return [
            self._checked(sessions[row].propose(min(most, fits)), min(most, fits)) if fits else Draft()
            for row, fits in zip(rows, room, strict=True)
        ]

    def _checked(self, draft: Draft, most: int) -> Draft:
        longest = most if draft.parents is None else MOST_DRAFTED
        tokens, signals = (list(islice(part, longest)) for part in (draft.tokens, draft.signals))
        parents = (
            range(-1, len(tokens) - 1) if draft.parents is None else list(islice(draft.parents, longest))
        )
        if not len(tokens) == len(signals) == len(parents) or not all(
            type(number) is int for number in (*tokens, *signals, *parents)
        ):
            raise ValueError("tokens, signals and parents are not as many, or not all int")
        if not all(0 <= token < self.vocab_size for token in tokens):
            raise ValueError(f"a token is not from 0 to {self.vocab_size - 1}")
        if not all(-1 <= parent < index for index, parent in enumerate(parents)):
            raise ValueError("a token follows one that does not come before it")
        return (
            Draft(tokens, signals) if draft.parents is None else _cut(Draft(tokens, signals, parents), most)
        )

    def _guarded(self, name: str, work: Callable[[], T]) -> T | None:
        """The result of a drafter's work; None, without that drafter from here on, if it fails."""
        try:
            return work()
        except Exception as error:
            del self._sessions[name]
            self.statistics.failures[name] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"drafter {name} is dropped from this text, which is not changed by it: "
                f"{self.statistics.failures[name]}",
                stacklevel=2,
            )
            return None


def _cut(draft: Draft, most: int) -> Draft:
    """What is at most `most` tokens from the text."""
    kept: list[tuple[int, int, int]] = []
    places, depths = [-1], [0]  # by index, one more than the token's
    for token, signal, parent in zip(draft.tokens, draft.signals, draft.follows, strict=True):
        depths.append(depths[parent + 1] + 1)
        places.append(len(kept))
        if depths[-1] <= most:
            kept.append((token, signal, places[parent + 1]))
    tokens, signals, parents = zip(*kept, strict=True) if kept else ((), (), ())
    return Draft(tokens, signals, parents)
