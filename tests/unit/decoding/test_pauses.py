"""Drafting that turns out slower than plain decoding is left off, and tried again."""

import pytest

from ryzen_llm.decoding.pass_times import PassTimes
from ryzen_llm.decoding.pauses import LONGEST, SHORTEST, STALE, TIMING, TIMING_COST, WINDOW, Pauses


def run(pauses: Pauses, steps: int, tokens: float, seconds: float, width: int = 8) -> list[bool]:
    """Which of the steps were drafted; those that were not take a second, a token of plain decoding."""
    drafted = []
    for _ in range(steps):
        drafted.append(not pauses.left)
        pauses.times.passed(width if drafted[-1] else 1, pauses.times[width if drafted[-1] else 1])
        pauses.passed(*((tokens, seconds) if drafted[-1] else (1.0, 1.0)))
    return drafted


def paused() -> Pauses:
    return Pauses(PassTimes({1: 1.0, 8: 2.5}))


def test_what_loses_is_left_off_for_longer_and_longer_in_a_text() -> None:
    pauses = paused()
    expected: list[bool] = []
    length = SHORTEST
    for _ in range(5):
        expected += [True] * WINDOW + [False] * length
        length = min(2 * length, LONGEST)
    assert run(pauses, len(expected), tokens=2.4, seconds=2.5) == expected
    pauses.begin_text()
    assert run(pauses, WINDOW + SHORTEST + 1, 2.4, 2.5) == [True] * WINDOW + [False] * SHORTEST + [True]


@pytest.mark.parametrize("loss", [0.03, 0.2])
def test_it_costs_a_fraction_of_what_drafting_would(loss: float) -> None:
    """Of a long text four fifths are plain."""
    steps = run(paused(), 2000, tokens=1.0, seconds=1 + loss)
    assert loss * sum(steps) / len(steps) < 0.23 * loss


def test_what_gains_goes_on_but_for_timing_plain_decoding() -> None:
    """Which costs no more than the part of the time that it may."""
    steps = run(paused(), 4000, tokens=3.0, seconds=2.5)
    pauses = [i for i, drafted in enumerate(steps) if not drafted]
    assert pauses[0] >= STALE
    lost = len(pauses) * (1 - 2.5 / 3.0)
    assert 0.5 * TIMING_COST < lost / (2.5 * (len(steps) - len(pauses))) <= TIMING_COST
    runs = "".join("01"[drafted] for drafted in steps).strip("1").split("1")
    assert {len(run) for run in runs if run} == {TIMING}


def test_plain_decoding_is_not_timed_where_it_is_known() -> None:
    """Where steps without a draft are the most, they tell."""
    assert all(run(paused(), 1000, tokens=1.1, seconds=1.0, width=1))


def test_a_gain_ends_longer_pauses() -> None:
    pauses = paused()
    run(pauses, 2 * WINDOW + SHORTEST + 2 * SHORTEST, 1.0, 1.1)
    assert all(run(pauses, WINDOW, tokens=3.0, seconds=2.5))
    assert run(pauses, WINDOW + SHORTEST + 1, 1.0, 1.1) == [True] * WINDOW + [False] * SHORTEST + [True]


def test_with_one_width_there_is_nothing_to_compare_with() -> None:
    """Such a run reads drafts at every step, whatever they cost."""
    pauses = Pauses(PassTimes({4: 1.0}))
    assert all(run(pauses, 100, tokens=1.0, seconds=5.0, width=4))
