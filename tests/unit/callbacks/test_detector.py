"""Planted faults are found, at their step and under their name; clean and merely odd runs raise nothing."""

import json
import math
import random
from collections.abc import Iterable
from typing import Any

import pytest
from ryzen_callbacks import Anomaly, AnomalyDetector


def clean_losses(steps: int, seed: int = 0, noise: float = 0.05) -> list[float]:
    """A power-law fall with normal noise, as of a small language model."""
    rng = random.Random(seed)
    return [3.0 + 8.0 * (step + 10) ** -0.5 + rng.gauss(0, noise) for step in range(steps)]


def run(detector: AnomalyDetector, losses: Iterable[float], **more: Any) -> list[Anomaly]:
    return [a for step, loss in enumerate(losses) for a in detector.update(step=step, loss=loss, **more)]


def test_twenty_thousand_clean_steps_raise_nothing() -> None:
    found = []
    for seed in range(10):
        rng = random.Random(100 + seed)
        detector = AnomalyDetector()
        for step, loss in enumerate(clean_losses(2000, seed)):
            norm = math.exp(rng.gauss(0, 0.2))
            time = 0.1 * math.exp(abs(rng.gauss(0, 0.1)))
            found += detector.update(step=step, loss=loss, grad_norm=norm, step_time=time)
    assert found == []


@pytest.mark.parametrize("seed", range(5))
def test_loss_spikes_are_found_at_their_steps(seed: int) -> None:
    losses = clean_losses(1000, seed)
    for step in (300, 301, 600, 900):
        losses[step] += 1.0
    found = run(AnomalyDetector(), losses)
    # 301 belongs to the event of 300: one event, one report.
    assert [(a.kind, a.step) for a in found] == [("loss_spike", s) for s in (300, 600, 900)]
    for anomaly in found:
        assert anomaly.value == losses[anomaly.step]
        assert anomaly.expected[1] is not None
        assert anomaly.expected[1] < anomaly.value
        assert str(anomaly.step) in anomaly.message


def test_a_small_bump_over_a_quiet_curve_is_no_spike() -> None:
    """Nine standard deviations, but a tenth of a nat: the absolute floor holds."""
    losses = clean_losses(1000, noise=0.01)
    losses[700] += 0.1
    assert run(AnomalyDetector(), losses) == []


def test_a_spike_does_not_hide_the_next_one() -> None:
    """Were spikes let into the window, ten large ones would raise its deviation over the eleventh."""
    losses = clean_losses(1000)
    for step in range(500, 720, 20):
        losses[step] += 3.0
    found = run(AnomalyDetector(), losses)
    assert [a.step for a in found if a.kind == "loss_spike"] == list(range(500, 720, 20))


def test_a_loss_that_jumps_and_stays_is_a_spike_once_and_then_a_divergence() -> None:
    losses = clean_losses(1000)
    losses[600:] = [loss + 1.0 for loss in losses[600:]]
    kinds = [(a.kind, a.step) for a in run(AnomalyDetector(), losses)]
    assert kinds[0] == ("loss_spike", 600)
    assert [k for k, _ in kinds] == ["loss_spike", "divergence"]
    assert 600 < kinds[1][1] <= 600 + 3 * 32


def test_a_slow_rise_is_a_divergence() -> None:
    losses = clean_losses(1000)
    losses[500:] = [loss + 0.005 * i for i, loss in enumerate(losses[500:])]
    found = run(AnomalyDetector(), losses)
    assert found[0].kind == "divergence"
    assert 500 < found[0].step < 700


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_found_and_enters_no_window(bad: float) -> None:
    losses = clean_losses(600)
    losses[300:303] = [bad] * 3
    losses[450] += 2.0
    found = run(AnomalyDetector(), losses)
    assert [(a.kind, a.step) for a in found] == [("non_finite", 300), ("loss_spike", 450)]
    json.dumps(found[0].row().model_dump(mode="json"))


def test_a_gradient_spike_is_judged_on_the_logarithm() -> None:
    rng = random.Random(3)
    detector, found = AnomalyDetector(), []
    for step in range(500):
        norm = math.exp(rng.gauss(0, 0.2)) * (30 if step == 400 else 1)
        found += detector.update(step=step, grad_norm=norm)
    assert [(a.kind, a.step) for a in found] == [("grad_norm_spike", 400)]


def test_one_slow_step_is_a_stall() -> None:
    detector, found = AnomalyDetector(), []
    for step in range(400):
        found += detector.update(step=step, step_time=2.0 if step == 300 else 0.1)
    assert [(a.kind, a.step) for a in found] == [("stall", 300)]


def test_a_slow_step_after_steps_too_short_for_the_clock_is_a_stall() -> None:
    """The usual time is then zero, by which nothing can be divided."""
    detector, found = AnomalyDetector(), []
    for step in range(101):
        found += detector.update(step=step, step_time=1.0 if step == 100 else 0.0)
    assert [(a.kind, a.step) for a in found] == [("stall", 100)]


@pytest.mark.parametrize("period", [5, 10, 100])
def test_slow_steps_that_come_back_are_no_stalls_once_they_are_known(period: int) -> None:
    """An optimizer that works every tenth step, a checkpoint every hundredth: the third is the last news."""
    detector, found = AnomalyDetector(), []
    for step in range(1, 2001):
        found += detector.update(step=step, step_time=0.6 if step % period == 0 else 0.1)
    assert all(a.step <= 3 * period for a in found)


def test_a_slow_step_of_a_millisecond_model_is_no_stall() -> None:
    detector, found = AnomalyDetector(), []
    for step in range(400):
        found += detector.update(step=step, step_time=0.05 if step == 300 else 0.001)
    assert found == []


def test_a_detector_goes_on_from_its_state_as_if_never_interrupted() -> None:
    rng = random.Random(5)
    stream = []
    for step, loss in enumerate(clean_losses(1500, 7)):
        spike = 2.0 if rng.random() < 0.01 else 0.0
        stream.append({"step": step, "loss": loss + spike, "grad_norm": math.exp(rng.gauss(0, 0.6))})
        stream[-1]["step_time"] = 0.1 + (rng.random() < 0.01)
        stream[-1]["throughput"] = rng.uniform(50, 100)
        stream[-1]["accuracy"] = rng.uniform(0.5, 0.7)
    whole = AnomalyDetector(plateau_steps=100)
    for values in stream:
        whole.update(**values)
    assert len(whole.anomalies) > 5
    for cut in (1, 63, 700, 1111):
        first, second = AnomalyDetector(plateau_steps=100), AnomalyDetector(plateau_steps=100)
        for values in stream[:cut]:
            first.update(**values)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        for values in stream[cut:]:
            second.update(**values)
        assert second.anomalies == whole.anomalies
        assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(("before", "after"), [(100, None), (None, 100)])
def test_a_run_can_be_resumed_with_plateaus_asked_for_or_no_more(
    before: int | None, after: int | None
) -> None:
    """A rule without a state begins anew, a state without a rule is of no use; the others go on."""
    first, second = AnomalyDetector(plateau_steps=before), AnomalyDetector(plateau_steps=after)
    run(first, clean_losses(300))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    old, new = first.state_dict()["rules"], second.state_dict()["rules"]
    assert set(old) ^ set(new) == {"plateau of loss"}
    assert all(new[name] == old[name] for name in set(old) & set(new))


SIGNAL_FAULTS = {
    # signal: usual value, faulty value, kind
    "throughput": (1000.0, 600.0, "throughput_drop"),
    "data_wait_share": (0.05, 0.4, "data_wait_growth"),
    "memory": (1e9, 1.6e9, "memory_growth"),
    "accuracy": (0.8, 0.7, "accuracy_drop"),
}


@pytest.mark.parametrize("signal", SIGNAL_FAULTS)
def test_a_lasting_change_for_the_worse_is_reported_once_and_one_for_the_better_never(signal: str) -> None:
    usual, faulty, kind = SIGNAL_FAULTS[signal]
    rng = random.Random(11)

    def feed(before: float, after: float) -> list[Anomaly]:
        detector, found = AnomalyDetector(), []
        for step in range(600):
            level = before if step < 300 else after
            found += detector.update(step=step, **{signal: level * math.exp(rng.gauss(0, 0.005))})
        return found

    (anomaly,) = feed(usual, faulty)
    assert anomaly.kind == kind
    assert 300 <= anomaly.step <= 300 + 3 * 32
    assert anomaly.value == pytest.approx(faulty, rel=0.02)
    low, high = anomaly.expected
    assert (low is None) != (high is None)
    assert anomaly.value > high if high is not None else anomaly.value < (low or 0)
    assert feed(faulty, usual) == []


def test_a_passing_dip_of_the_throughput_is_no_drop() -> None:
    detector, found = AnomalyDetector(), []
    for step in range(600):
        found += detector.update(step=step, throughput=300.0 if 200 <= step < 240 else 1000.0)
    assert found == []


def test_a_plateau_is_reported_only_if_asked_for_and_only_while_the_loss_is_flat() -> None:
    falling = [3.0 - 0.001 * step for step in range(1000)]
    losses = falling + [2.0] * 2000
    assert run(AnomalyDetector(), losses) == []
    found = run(AnomalyDetector(plateau_steps=500), losses)
    assert {a.kind for a in found} == {"plateau"}
    assert 1500 <= found[0].step <= 1500 + 2 * 32
    assert len(found) == 3  # at about 1,500, 2,000 and 2,500


def test_an_unknown_signal_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown signal 'los'"):
        AnomalyDetector().update(step=1, los=1.0)


@pytest.mark.parametrize("name", ["plateau_steps", "checkpoint_every_n_steps", "max_rollbacks"])
def test_a_count_below_one_is_refused(name: str) -> None:
    settings: dict[str, Any] = {name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0"):
        AnomalyDetector(**settings)


def test_the_list_of_anomalies_is_bounded_and_the_rest_counted() -> None:
    detector = AnomalyDetector()
    for step in range(2400):
        detector.update(step=step, loss=math.nan if step % 2 else 1.0)
    assert len(detector.anomalies) == 1000
    assert detector.not_kept == 200


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        ({"plateau": "stop"}, "plateau needs plateau_steps"),
        ({"loss_spikes": "stop"}, "unknown kind"),
        ({"stall": "explode"}, "expected one of record, warn, stop, rollback"),
    ],
)
def test_unknown_kinds_and_actions_that_can_never_be_taken_are_refused(actions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AnomalyDetector(actions)
