"""Confidence intervals: of a median by order statistics, of a mean by Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """A distribution-free interval for the median: two order statistics, as the sign test gives them.

    The k-th smallest and k-th largest of n values, k the largest with 2 P(Binomial(n, 1/2) < k) <= 1 -
    `confidence`, so that the coverage is at least `confidence` for any continuous distribution (David and
    Nagaraja, Order Statistics, 3rd ed., 7.1). None where n is too small (below 6 at 95%).
    """
    count = len(values)
    tail, rank, mass = 0.0, 0, 0.5**count
    for k in range(count // 2):
        tail += mass
        if 2 * tail > (1 - confidence) * (1 + 1e-12):
            break
        rank = k + 1
        mass = mass * (count - k) / (k + 1)
    if rank == 0:
        return None
    ordered = sorted(values)
    return ordered[rank - 1], ordered[count - rank]


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Student's t interval for the mean of independent values; None below 6 of them."""
    count = len(values)
    if count < 6:
        return None
    half = student_t_quantile((1 + confidence) / 2, count - 1) * statistics.stdev(values) / math.sqrt(count)
    mean = statistics.fmean(values)
    return mean - half, mean + half


def student_t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t, for 5 degrees of freedom or more.

    The expansion of Abramowitz and Stegun 26.7.5, right to 3e-4 at 5 degrees and 95% two-sided, and better
    above.
    """
    if degrees < 5:
        raise ValueError(f"the expansion needs 5 degrees of freedom or more, got {degrees}")
    z = statistics.NormalDist().inv_cdf(probability)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / degrees**power for power, term in enumerate(terms))
