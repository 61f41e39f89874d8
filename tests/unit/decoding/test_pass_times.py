"""Times of passes are followed, without being taken in by a machine that is slower for a while."""

import pytest

from ryzen_llm.decoding.pass_times import RECENT, SETTLED, PassTimes

SECONDS = {1: 1.0, 4: 1.5, 8: 2.5}


def ratios(times: PassTimes) -> list[float]:
    return [times[width] / times[1] for width in times.widths]


def test_an_interruption_does_not_upset_the_times() -> None:
    times = PassTimes(SECONDS)
    times.passed(4, 100.0)
    assert 1.5 < times[4] < 1.5 * 1.04


@pytest.mark.parametrize("width", SECONDS)
def test_a_slower_machine_moves_the_times_of_all_widths(width: int) -> None:
    """Else a burst of other work would leave the width that it met looking worse than the others for good."""
    times = PassTimes(SECONDS)
    for _ in range(100):
        times.passed(width, 2 * SECONDS[width])
    assert times[width] == pytest.approx(2 * SECONDS[width], rel=0.01)
    assert all(1.5 * SECONDS[each] < times[each] <= 2 * SECONDS[each] for each in SECONDS)
    for _ in range(200):
        times.passed(width, SECONDS[width])
    assert times[width] == pytest.approx(SECONDS[width], rel=0.01)


def test_how_much_longer_a_width_takes_is_learnt_beside_narrow_passes() -> None:
    times = PassTimes(SECONDS)
    true = {**SECONDS, 4: 2.2}
    for _ in range(60):
        for width in (1,) * SETTLED + (4, 8):
            times.passed(width, true[width])
    assert ratios(times) == pytest.approx([1.0, 2.2, 2.5], rel=0.02)
    for _ in range(RECENT):  # too long ago
        times.passed(8, 2.5)
    before = ratios(times)
    for _ in range(100):
        times.passed(8, 5.0)
    assert ratios(times) == pytest.approx(before)


def test_what_a_wide_pass_costs_afterwards_is_its_own() -> None:
    """A narrow pass just after it takes a fifth longer: plain decoding is not taken for so slow."""
    times = PassTimes(SECONDS)
    assert times.entering == 0.0
    for _ in range(100):
        times.passed(8, 2.5)
        assert times.entering == 0.0, "it was paid for by the first"
        times.passed(1, 1.2)
        for _ in range(SETTLED):
            times.passed(1, 1.0)
    assert ratios(times) == pytest.approx([1.0, 1.5, 2.5], rel=0.01)
    assert times.entering == pytest.approx(0.2, rel=0.15)


def test_a_wider_pass_is_not_taken_for_a_quicker_one() -> None:
    """Neither by how it was measured, nor because a narrower one has met slower moments since."""
    times = PassTimes({1: 1.0, 2: 0.9, 4: 0.95})
    assert times[1] <= times[2] <= times[4]
    for width in (1, 1, 1, 2, 4) * 50:
        times.passed(width, {1: 1.3, 2: 1.0, 4: 0.7}[width])
        assert times[1] <= times[2] <= times[4]


def test_it_is_known_how_long_ago_plain_decoding_was_timed() -> None:
    times = PassTimes(SECONDS)
    for since in range(1, 4):
        times.passed(8, 2.5)
        assert times.since_narrow == since
    for _ in range(SETTLED):
        assert times.since_narrow
        times.passed(1, 1.0)
    assert not times.since_narrow
