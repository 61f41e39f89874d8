"""How long a draft, and whose, gives the most tokens a second: decided at every step, from measurements."""

import math
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from ryzen_llm.decoding.draft_tree import DraftTree
from ryzen_llm.decoding.drafters import Draft, Drafter
from ryzen_llm.decoding.pass_times import FARTHEST, PassTimes
from ryzen_llm.decoding.pauses import Pauses

MEMORY = 64
"""How many of its latest tries a kind of guess is judged by, about."""
FIRST_TRIES = 2.0
"""As how many of them what a drafter says of it counts."""
PROBE_INTERVAL = 32
"""A drafter that costs more than it seems to be worth is asked again after so many steps."""
CHEAP = 0.01
"""A drafter that takes less than this part of a step is asked at every step while its drafts are read."""
IDLE = 32
"""Drafts in a row of which none was read, after which such a drafter is asked at every fourth step only."""
IDLE_INTERVAL = 4
WORTHWHILE = 1.02
"""How many times the tokens a second of the narrowest pass a wider one has to promise: times and rates are
no better known."""
GAIN_SMOOTHING = 0.1
"""How far what a drafter is known to gain follows one draft of it."""
FIRST_KEPT = 16.0
"""Tokens by which what plans expect is first taken for right."""
LEAST_KEPT = 0.05
"""The least part of what plans expect that is taken to come true."""


class AcceptanceRates:
    """How often each kind of guess, a drafter's name and a signal, was right where all before it were.

    Args:
        drafters: Whose `likelihood` counts as some tries of each of their kinds.
    """

    def __init__(self, drafters: Iterable[Drafter] = ()) -> None:
        self._likelihoods = {drafter.name: drafter.likelihood for drafter in drafters}
        self._known: dict[tuple[str, int], tuple[float, float]] = {}  # right, of tries

    def __getitem__(self, kind: tuple[str, int]) -> float:
        """Between 0 and 1."""
        right, tries = self._known.get(kind) or self._first(kind)
        return right / tries

    def learn(self, kind: tuple[str, int], right: bool) -> None:
        """Take in one try."""
        before, tries = self._known.get(kind) or self._first(kind)
        kept = min(1.0, MEMORY / tries)
        self._known[kind] = before * kept + right, tries * kept + 1

    def _first(self, kind: tuple[str, int]) -> tuple[float, float]:
        name, signal = kind
        try:
            likely = float(self._likelihoods[name](signal))
        except Exception:  # whatever a drafter does costs speed only
            likely = math.nan
        if not 0 <= likely <= 1:  # half right: what has not been tried is worth trying
            likely = 0.5
        return FIRST_TRIES * likely, FIRST_TRIES


@dataclass(frozen=True)
class Plan:
    """What the next pass reads.

    Attributes:
        width: Of the pass.
        drafts: For each text the draft that fits it best.
        names: Whose each token of it is.
        expected: The tokens that it should give, all texts together.
    """

    width: int
    drafts: Sequence[Draft]
    names: Sequence[Sequence[str]]
    expected: float


class DraftControl:
    """Chooses drafts and width by expected tokens over measured seconds.

    Args:
        seconds: Of a pass of each width that there is, measured.
        drafters: Whose drafts it will choose from.
    """

    def __init__(self, seconds: Mapping[int, float], drafters: Iterable[Drafter] = ()) -> None:
        self.times = PassTimes(seconds)
        self.widths = self.times.widths
        self.rates = AcceptanceRates(drafters)
        self._given, self._promised = FIRST_KEPT, FIRST_KEPT
        self.pauses = Pauses(self.times)
        self._latest: dict[tuple[str, int], deque[float]] = defaultdict(lambda: deque(maxlen=5))
        self._costs: dict[str, dict[int, float]] = defaultdict(dict)
        self._gains: dict[tuple[str, int, int], float] = {}
        self._since_asked: dict[str, int] = defaultdict(int)
        self._unread: dict[str, int] = defaultdict(int)

    def passed(self, plan: Plan, tokens: int, drafting: float, seconds: float) -> None:
        """Take in the tokens that a step gave, and the seconds that it took to draft and then.

        A quarter more than a pass usually takes is counted at most: interruptions are no measure.
        """
        texts = len(plan.drafts)
        self.times.passed(plan.width, seconds)
        usual = self.times[plan.width] * math.exp(FARTHEST)
        self.pauses.passed(tokens / texts, drafting + min(seconds, usual))
        if plan.width > self.widths[0]:
            promised = (plan.expected - texts) / texts / self._kept
            self._given += tokens / texts - 1 - self._given / MEMORY
            self._promised += promised - self._promised / MEMORY
        else:  # little by little what was found of other texts is forgotten
            self._given += (self._promised - self._given) / (8 * MEMORY)

    @property
    def _kept(self) -> float:
        """What came of the tokens that plans expected: the best of many guesses is often a lucky one."""
        return max(self._given / self._promised, LEAST_KEPT)

    def proposed(self, name: str, most: int, seconds: float) -> None:
        """Take in how long a drafter took when it was asked for `most` tokens of every text."""
        latest = self._latest[name, most]
        latest.append(seconds)
        self._costs[name][most] = median(latest)  # the first call may have compiled something
        self._since_asked[name] = 0

    def cost(self, name: str, most: int) -> float:
        """Seconds that a drafter takes if it is asked for `most` tokens; 0 if it has not been asked yet.

        No longer than for a larger number that it has been asked for; beyond the largest, in proportion.
        """
        costs = self._costs[name]
        if not costs:
            return 0.0
        largest = max(costs)
        return min((costs[each] for each in costs if each >= most), default=costs[largest] * most / largest)

    def settled(self, asked: Collection[str], plan: Plan) -> None:
        """Take in which plan was made of the drafts of those that were asked."""
        for name in asked:
            read = any(name in names for names in plan.names)
            self._unread[name] = 0 if read else self._unread[name] + 1

    def learn(self, name: str, draft: Draft, truth: Sequence[int]) -> None:
        """Take in what the text's next tokens were, as far as they tell; a draft need not have been used."""
        last = -1
        for true in truth:
            right = None
            for index, parent in enumerate(draft.follows):
                if parent == last:
                    if draft.tokens[index] == true:
                        right = index
                    self.rates.learn((name, draft.signals[index]), draft.tokens[index] == true)
            if right is None:
                break
            last = right

    def worth_asking(self, name: str, plan: Plan) -> int:
        """How many tokens in a row to ask a drafter for beside a plan: 0 if that does not pay."""
        most = self.widths[-1] - 1
        if not most or not self._costs[name]:
            return most
        self._since_asked[name] += 1
        if self.is_cheap(name):
            due = self._unread[name] < IDLE or self._since_asked[name] >= IDLE_INTERVAL
            return most if due else 0
        level = _level(plan)
        pays = {
            most: self._gains.get((name, most, level), math.inf)
            / (1 + self.cost(name, most) / self.times[plan.width])
            for most in (width - 1 for width in reversed(self.widths) if width > 1)
        }
        most = max(pays, key=pays.__getitem__)
        due = self._since_asked[name] >= PROBE_INTERVAL
        return most if due or pays[most] > 1 else 0

    def is_cheap(self, name: str) -> bool:
        """Whether a drafter is asked whatever it may gain."""
        most = self.widths[-1] - 1
        return bool(self._costs[name]) and self.cost(name, most) < CHEAP * self.times[self.widths[0]]

    def gained(self, name: str, most: int, before: Plan, after: Plan) -> None:
        """Take in what a drafter that was asked for `most` tokens made of a plan."""
        worse, better = (plan.expected / self.times[plan.width] for plan in (before, after))
        kind = name, most, _level(before)
        known = self._gains.get(kind, better / worse)
        self._gains[kind] = known + GAIN_SMOOTHING * (better / worse - known)

    def plan(self, candidates: Sequence[Mapping[str, Draft]], branching: bool = False) -> Plan:
        """The best plan for the drafts by name that there are for each text.

        `branching` says whether a pass can read a tree of tokens.
        """
        texts = len(candidates)
        narrowest = self.widths[0]
        if not any(draft.tokens for drafts in candidates for draft in drafts.values()):  # yet
            return Plan(narrowest, [Draft()] * texts, [()] * texts, float(texts))
        most = self.widths[-1] - 1
        trees = [
            DraftTree(drafts, lambda *kind: self.rates[kind], branching=branching, most=most)
            for drafts in candidates
        ]
        kept = self._kept
        expected = {
            width: texts + kept * sum(tree.gains[width - 1] - 1 for tree in trees) for width in self.widths
        }
        rates = {width: expected[width] / self.times[width] for width in self.widths}
        width = max(self.widths, key=rates.__getitem__)
        whole = expected[width] / (self.times[width] + self.times.entering)
        if width > narrowest and whole < WORTHWHILE * rates[narrowest]:
            width = narrowest
        drafts, names = zip(*(tree.first(width - 1) for tree in trees), strict=True)
        return Plan(width, drafts, names, expected[width])


def _level(plan: Plan) -> int:
    """How good a plan is without another drafter: half tokens that it expects of a text, up to 8."""
    return min(int(2 * plan.expected / len(plan.drafts)), 16)
