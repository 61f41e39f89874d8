"""The intervals cover what they say they cover."""

import math
import statistics
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ryzen_callbacks.intervals import mean_interval, median_interval, student_t_quantile


def coverage(rank: int, count: int) -> Fraction:
    """P(rank-th smallest < median < rank-th largest), exactly: each value is above with chance 1/2."""
    inside = sum(math.comb(count, above) for above in range(rank, count - rank + 1))
    return Fraction(inside, 2**count)


@given(st.integers(6, 200))
def test_the_median_interval_is_the_narrowest_that_covers_95_percent(count: int) -> None:
    interval = median_interval(list(range(count)))
    assert interval is not None
    low, high = interval
    rank = int(low) + 1
    assert high == count - rank
    assert coverage(rank, count) >= Fraction(95, 100) > coverage(rank + 1, count)


def test_coverage_by_brute_force_over_all_orders_of_signs() -> None:
    """All 2^8 ways in which 8 values can lie below or above the true median 0."""
    magnitudes = [0.5 + i for i in range(8)]
    covered = 0
    for signs in product((-1, 1), repeat=8):
        interval = median_interval([s * m for s, m in zip(signs, magnitudes, strict=True)])
        assert interval is not None
        covered += interval[0] < 0 < interval[1]
    assert covered / 2**8 == float(coverage(1, 8))


@pytest.mark.parametrize("count", range(6))
def test_below_six_values_there_is_no_95_percent_interval(count: int) -> None:
    assert median_interval([1.0] * count) is None
    assert mean_interval([1.0] * count) is None


# Two-sided 95% points of Student's t, from the printed table (Fisher and Yates, Table III).
T_TABLE = {5: 2.5706, 6: 2.4469, 8: 2.3060, 10: 2.2281, 15: 2.1314, 20: 2.0860, 30: 2.0423, 120: 1.9799}


@pytest.mark.parametrize(("degrees", "expected"), T_TABLE.items())
def test_student_t_equals_the_table(degrees: int, expected: float) -> None:
    assert student_t_quantile(0.975, degrees) == pytest.approx(expected, abs=4e-4)


def test_student_t_refuses_degrees_where_its_expansion_is_wrong() -> None:
    with pytest.raises(ValueError, match="5 degrees"):
        student_t_quantile(0.975, 4)


def test_mean_interval_by_hand() -> None:
    values = [2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0, 3.0, 6.0, 8.0]
    half = 2.2281 * statistics.stdev(values) / math.sqrt(11)
    interval = mean_interval(values)
    assert interval == pytest.approx(
        (statistics.fmean(values) - half, statistics.fmean(values) + half), rel=1e-4
    )
