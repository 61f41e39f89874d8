"""The plan is the one with the most expected tokens a second."""

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ryzen_llm.decoding import Draft, Drafter, DraftSession
from ryzen_llm.decoding.adaptive import (
    IDLE,
    IDLE_INTERVAL,
    PROBE_INTERVAL,
    WORTHWHILE,
    DraftControl,
)
from ryzen_llm.decoding.draft_tree import DraftTree
from ryzen_llm.decoding.pass_times import PassTimes
from ryzen_llm.decoding.pauses import WINDOW

SECONDS = {1: 1.0, 4: 1.5, 8: 2.5}


def taught(rate: float, name: str = "a", signal: int = 0) -> DraftControl:
    """A control that has seen this rate often."""
    control = DraftControl(SECONDS)
    for i in range(400):
        right = int(i * rate) != int((i + 1) * rate)
        control.rates.learn((name, signal), right)
    return control


def draft(length: int, signal: int = 0) -> Draft:
    return Draft([5] * length, [signal] * length)


@settings(max_examples=200, deadline=None)
@given(st.floats(0.0, 1.0), st.integers(0, 9), st.tuples(*[st.floats(0.1, 9)] * 3))
def test_the_plan_is_the_best_of_all(rate: float, length: int, times: tuple[float, ...]) -> None:
    """Against trying every width with the formula written out."""
    control = taught(rate)
    control.times = PassTimes(dict(zip(SECONDS, sorted(times), strict=True)))
    learnt = control.rates["a", 0]
    plan = control.plan([{"a": draft(length)}])

    def tokens(width: int) -> float:
        return sum(learnt**n for n in range(min(width - 1, length) + 1))

    rates = {width: tokens(width) / control.times[width] for width in SECONDS}
    best = max(rates.values())
    assert rates[plan.width] == pytest.approx(best if best >= WORTHWHILE * rates[1] else rates[1])
    assert plan.expected == pytest.approx(tokens(plan.width))
    assert len(plan.drafts[0].tokens) == min(plan.width - 1, length)


@pytest.mark.parametrize(("rate", "width"), [(0.1, 1), (0.6, 4), (0.99, 8)])
def test_drafts_are_longer_the_better_they_hold(rate: float, width: int) -> None:
    assert taught(rate).plan([{"a": draft(7)}]).width == width


class Sure(Drafter):
    """Knows how likely its guesses are: its signal in hundredths; fails at none."""

    name = "a"

    def likelihood(self, signal: int) -> float:
        if not signal:
            raise ZeroDivisionError
        return signal / 100

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        raise AssertionError("only its guesses are judged here")


@pytest.mark.parametrize(("percent", "width"), [(10, 1), (60, 4), (99, 8)])
def test_before_it_was_tried_a_guess_is_as_likely_as_its_drafter_says(percent: int, width: int) -> None:
    control = DraftControl(SECONDS, [Sure()])
    assert control.plan([{"a": draft(7, signal=percent)}]).width == width
    control.rates.learn(("a", percent), True)
    assert control.rates["a", percent] == pytest.approx((2 * percent / 100 + 1) / 3)
    for nonsense in (0, -5, 250):  # which may cost speed, and nothing else
        assert control.rates["a", nonsense] == 0.5


def test_the_draft_that_promises_more_is_taken() -> None:
    control = taught(0.9, "good")
    for _ in range(100):
        control.rates.learn(("bad", 0), False)
    other = Draft([6] * 7, [0] * 7)
    assert control.plan([{"bad": other, "good": draft(3)}]).names[0] == ["good"] * 3
    assert control.plan([{"bad": other}, {"good": draft(7)}]).names[1] == ["good"] * 3


TREES = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.integers(1, 9)), max_size=7).map(
    lambda rows: Draft(
        [token for token, _, _ in rows],
        [signal for _, signal, _ in rows],
        [max(index - back, -1) for index, (_, _, back) in enumerate(rows)],
    )
)


@settings(max_examples=300, deadline=None)
@given(st.lists(TREES, min_size=1, max_size=2), st.lists(st.floats(0.0, 1.0), min_size=4, max_size=4))
def test_the_best_part_of_a_tree_is_read(drafts: list[Draft], rates: list[float]) -> None:
    """Against trying every part of the drafts that hangs together, or every text in them."""
    known: dict[tuple[int, ...], float] = {(): 1.0}
    for each in drafts:
        texts: list[tuple[int, ...]] = []
        for token, parent in zip(each.tokens, each.follows, strict=True):
            texts.append((*(texts[parent] if parent >= 0 else ()), token))
        for text, signal in zip(texts, each.signals, strict=True):
            known[text] = max(known.get(text, 0.0), rates[signal])

    def chance(text: tuple[int, ...]) -> float:
        return math.prod(known[text[:size]] for size in range(1, len(text) + 1))

    named = {str(number): each for number, each in enumerate(drafts)}
    texts = [text for text in known if text]
    for count in range(4):
        trees = [
            part
            for part in itertools.combinations(texts, min(count, len(texts)))
            if all(text[:-1] in part or len(text) == 1 for text in part)
        ]
        best = max(1 + sum(map(chance, part)) for part in trees)
        tree = DraftTree(named, lambda _, signal: rates[signal], branching=True, most=4)
        assert tree.gains[count] == pytest.approx(best)
        assert expected_of(tree.first(count)[0], known) == pytest.approx(best)
        longest = max(
            sum(chance(text[:size]) for size in range(len(text) + 1)) for text in known if len(text) <= count
        )
        one = DraftTree(named, lambda _, signal: rates[signal], branching=False, most=4)
        assert one.gains[count] == pytest.approx(longest)
        assert expected_of(one.first(count)[0], known) == pytest.approx(longest)
        assert list(one.first(count)[0].follows) == list(range(-1, len(one.first(count)[0].tokens) - 1))


def expected_of(draft: Draft, known: dict[tuple[int, ...], float]) -> float:
    """Tokens that reading a draft is expected to give, by the rates of the texts that it makes."""
    texts: list[tuple[int, ...]] = []
    found: list[float] = []
    for token, parent in zip(draft.tokens, draft.follows, strict=True):
        texts.append((*(texts[parent] if parent >= 0 else ()), token))
        found.append(known[texts[-1]] * (found[parent] if parent >= 0 else 1.0))
    return 1 + sum(found)


def test_siblings_are_learnt_from_and_what_follows_the_right_one() -> None:
    control = DraftControl(SECONDS)
    tree = Draft([1, 2, 5, 5, 6], [0, 1, 2, 3, 4], [-1, -1, 0, 1, 3])
    control.learn("a", tree, [2, 5, 9])
    rates = [control.rates["a", signal] for signal in range(5)]
    assert rates == pytest.approx([1 / 3, 2 / 3, 1 / 2, 2 / 3, 1 / 3]), "5 after 1 was not tried"


def test_rates_follow_a_text_that_changes() -> None:
    control = taught(0.95)
    assert control.plan([{"a": draft(7)}]).width == 8
    for _ in range(150):
        control.learn("a", draft(7), [6])
    assert control.plan([{"a": draft(7)}]).width == 1
    for _ in range(150):
        control.learn("a", draft(7), [5] * 7)
    assert control.plan([{"a": draft(7)}]).width == 8


def test_only_tokens_after_right_ones_are_learnt_from() -> None:
    control = DraftControl(SECONDS)
    before = control.rates["a", 3]
    control.learn("a", Draft([1, 2, 3], [1, 2, 3]), [1, 9, 3])
    assert control.rates["a", 1] > 0.5 > control.rates["a", 2]
    assert control.rates["a", 3] == before


def test_a_costly_drafter_is_asked_if_it_pays_and_now_and_then() -> None:
    """By what its drafts have made of plans, less what they cost."""
    good, bad = taught(0.9), taught(0.1)
    plan = good.plan([{}])
    for control in (good, bad):
        for most in (7, 3):
            assert control.worth_asking("a", plan), "not tried yet"
            control.proposed("a", most, 0.14 * most)
            control.gained("a", most, plan, control.plan([{"a": draft(most)}]))
    assert good.worth_asking("a", plan) == 3, "3.4 tokens in 1.5 and 0.4; 5.7 in 2.5 and 1"
    asked = [bool(bad.worth_asking("a", plan)) for _ in range(PROBE_INTERVAL)]
    assert asked == [False] * (PROBE_INTERVAL - 1) + [True]
    for _ in range(5):
        good.proposed("a", 3, 7.0)
        good.proposed("a", 7, 7.0)
        bad.proposed("a", 7, 1e-5)
    assert not good.worth_asking("a", plan), "a draft now costs as much as several steps"
    assert bad.worth_asking("a", plan) == 7, "it costs next to nothing"


def test_a_drafter_is_not_asked_where_another_does_as_well() -> None:
    """What it adds to a plan counts, not what it is worth alone."""
    control = taught(0.9)
    for _ in range(400):
        control.rates.learn(("b", 0), True)
    alone, beside = control.plan([{}]), control.plan([{"b": draft(7)}])
    for most in (3, 7) * 20:
        control.proposed("a", most, 0.1)
        control.gained("a", most, alone, control.plan([{"a": draft(most)}]))
        control.gained("a", most, beside, control.plan([{"b": draft(7), "a": draft(most)}]))
    assert control.worth_asking("a", alone)
    assert not control.worth_asking("a", beside)


def test_the_cost_of_a_draft_is_known_by_its_length() -> None:
    """Heads take nearly as long for one token as for three, a model three times as long."""
    control = DraftControl(SECONDS)
    assert control.cost("a", 3) == 0
    for seconds in (9.0, 0.3, 0.5, 0.4):  # the first compiles
        control.proposed("a", 3, seconds)
    assert control.cost("a", 3) == control.cost("a", 1) == pytest.approx(0.45)
    assert control.cost("a", 7) == pytest.approx(0.45 * 7 / 3)
    control.proposed("a", 1, 2.0)
    assert control.cost("a", 1) == pytest.approx(0.45), "one slow try does not say that less takes longer"
    for _ in range(2):
        control.proposed("a", 1, 0.1)
    assert control.cost("a", 1) == 0.1
    assert control.cost("a", 2) == pytest.approx(0.45)


def test_a_cheap_drafter_whose_drafts_are_not_read_is_asked_less_until_one_is() -> None:
    control = taught(0.1)
    control.proposed("a", 7, 1e-5)

    def asked(steps: int) -> int:
        count = 0
        for _ in range(steps):
            plan = control.plan([{}])
            if control.worth_asking("a", plan):
                control.proposed("a", 7, 1e-5)
                control.settled(["a"], control.plan([{"a": draft(7)}]))
                count += 1
        return count

    assert asked(IDLE) == IDLE
    assert asked(400) == 400 // IDLE_INTERVAL
    for _ in range(150):
        control.learn("a", draft(7), [5] * 7)
    assert asked(40) == 40 - (IDLE_INTERVAL - 1), "from the first that is read on at every step"


def test_what_plans_expect_follows_what_came_of_them() -> None:
    """The best of many guesses is often a lucky one; what plain steps give says nothing of it."""
    control = taught(0.9)
    control.times = PassTimes(dict.fromkeys(SECONDS, 1.0))  # the widest pays at any rate
    first = control.plan([{"a": draft(7)}])
    for _ in range(1000):
        control.passed(control.plan([{"a": draft(7)}]), 3, 0.0, 1.0)
    assert first.expected > 5
    assert control.plan([{"a": draft(7)}]).expected == pytest.approx(3.0, rel=0.01)
    for _ in range(5000):
        control.passed(control.plan([{}]), 1, 0.0, 1.0)
    later = control.plan([{"a": draft(7)}]).expected
    assert later == pytest.approx(first.expected, rel=0.01), "that was of another text, long ago"


def test_a_step_that_was_interrupted_does_not_end_drafting() -> None:
    control = taught(0.99)
    for step in range(WINDOW):
        plan = control.plan([{"a": draft(7)}])
        control.passed(plan, 8, 0.0, 1000.0 if step == 3 else SECONDS[8])
    assert not control.pauses.left
    for _ in range(WINDOW):
        control.passed(plan, 8, 0.0, 1000.0)
    assert not control.pauses.left, "the machine is slower: plain decoding would be, too"
    for _ in range(WINDOW):
        control.passed(plan, 8, 1000.0, 2.5)
    assert control.pauses.left, "drafting takes longer than it gains"


def test_drafting_never_costs_more_than_it_is_expected_to_give() -> None:
    """At any rate, the plan's time a token is at most that of a pass without a draft."""
    for rate, length in itertools.product((0.0, 0.2, 0.4, 0.6, 0.8, 1.0), range(8)):
        plan = taught(rate).plan([{"a": draft(length)}])
        assert SECONDS[plan.width] / plan.expected <= SECONDS[1] * (1 + math.ulp(1.0))
