"""Judging many values at once is judging them one by one, wherever the cuts are."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ryzen_callbacks.rules import SIGNALS, default_rules


def without_cache(state: dict[str, Any]) -> dict[str, Any]:
    """A rule's state without its window's last look at the median, which NaN may put off by a value."""
    window = state.get("window", {})
    return {**state, "window": window.get("values")}


BATCHES = st.lists(
    st.tuples(
        st.integers(1, 60),
        st.sampled_from((1.0, 1.0, 1.0, 1.02, 1.5, 3.0, 30.0, 0.1, math.nan, math.inf, -math.inf, 0.0)),
        st.sampled_from((1, 2, 17, 40)),
    ),
    min_size=4,
    max_size=12,
)
"""Stretches of so many values around such a level, handed out in parts of so many."""


@given(BATCHES)
@settings(max_examples=60, deadline=None)
def test_many_values_at_once_give_what_they_give_one_by_one(stretches: list[tuple[int, float, int]]) -> None:
    together, single = default_rules(50), default_rules(50)
    step = 200
    warm_up = [1.0 + 0.01 * (i % 7) for i in range(step)]
    for one, other in zip(together, single, strict=True):
        one.update_all(range(step), warm_up)
        for i, value in enumerate(warm_up):
            other.update(i, value)
    for length, level, size in stretches:
        values = [level * (1 + 0.01 * (i % 5)) for i in range(length)]
        steps = range(step, step + length)
        step += length
        for one, other in zip(together, single, strict=True):
            found = [
                anomaly
                for start in range(0, length, size)
                for anomaly in one.update_all(steps[start : start + size], values[start : start + size])
            ]
            expected = [other.update(at, value) for at, value in zip(steps, values, strict=True)]
            assert repr(found) == repr([a for a in expected if a is not None])  # NaN is not equal to itself
            assert without_cache(one.state_dict()) == without_cache(other.state_dict())
    assert {rule.signal for rule in together} == set(SIGNALS)


@pytest.mark.parametrize(
    ("signal", "kind", "bad", "length"),
    [("loss", "non_finite", math.nan, 1), ("loss", "loss_spike", 9.0, 1), ("loss", "divergence", 9.0, 32)],
)
def test_a_rule_is_in_doubt_while_a_fault_goes_on_and_no_longer(
    signal: str, kind: str, bad: float, length: int
) -> None:
    """No checkpoint is taken for good in the meantime."""
    (rule,) = [r for r in default_rules(None) if (r.signal, r.kind) == (signal, kind)]
    rule.update_all(range(96), [1.0] * 96)
    assert not rule.in_doubt()
    rule.update_all(range(96, 96 + length), [bad] * length)
    assert rule.in_doubt()
    rule.update_all(range(200, 232), [1.0] * 32)
    assert not rule.in_doubt()


def test_no_two_rules_have_the_same_name_in_a_checkpoint() -> None:
    """One's state would be lost."""
    names = [(rule.kind, rule.signal) for rule in default_rules(100)]
    assert len(set(names)) == len(names)
