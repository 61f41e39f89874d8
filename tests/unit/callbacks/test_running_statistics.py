"""Streaming statistics equal those of the whole list, however the stream is cut, and survive bad values."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ryzen_callbacks import RunningStatistics

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


def of(values: list[float]) -> RunningStatistics:
    running = RunningStatistics()
    for value in values:
        running.push(value)
    return running


@given(numbers)
def test_equals_numpy(values: list[float]) -> None:
    running = of(values)
    scale = max(map(abs, values)) + 1e-9
    assert running.count == len(values)
    assert (running.min, running.max) == (min(values), max(values))
    assert (running.first, running.last) == (values[0], values[-1])
    assert running.mean == pytest.approx(np.mean(values), abs=1e-9 * scale)
    if len(values) > 1:
        assert running.std == pytest.approx(np.std(values, ddof=1), rel=1e-7, abs=1e-7 * scale)


@given(numbers, st.integers(0, 60))
def test_merging_two_halves_equals_the_whole(values: list[float], cut: int) -> None:
    merged, whole = of(values[:cut]).merge(of(values[cut:])), of(values)
    scale = max(map(abs, values)) + 1e-9
    for name in ("count", "min", "max", "first", "last"):
        assert getattr(merged, name) == getattr(whole, name)
    assert merged.mean == pytest.approx(whole.mean, abs=1e-9 * scale)
    assert merged.sum_of_squares == pytest.approx(whole.sum_of_squares, rel=1e-7, abs=1e-7 * scale**2)


def test_a_large_offset_does_not_eat_the_deviation() -> None:
    """The textbook sum-of-squares formula gives 0 or a negative number here."""
    assert of([1e9 + 4, 1e9 + 7, 1e9 + 13, 1e9 + 16]).std == pytest.approx(math.sqrt(30))


def test_values_that_are_not_finite_are_counted_and_nothing_else() -> None:
    clean, dirty = of([1.0, 2.0, 4.0]), of([1.0, math.nan, 2.0, math.inf, 4.0])
    assert dirty.non_finite == 2
    dirty.non_finite = 0
    assert dirty == clean


def test_the_deviation_of_one_value_is_not_known() -> None:
    assert math.isnan(of([3.0]).std)


@given(numbers, numbers)
def test_goes_on_from_its_state_bit_for_bit(before: list[float], after: list[float]) -> None:
    state = json.loads(json.dumps(of(before).state_dict()))
    resumed = RunningStatistics.from_state_dict(state)
    for value in after:
        resumed.push(value)
    assert resumed == of(before + after)
