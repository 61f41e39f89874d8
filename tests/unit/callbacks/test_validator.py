"""Verdicts follow from what was measured, can be computed again from the report, and nothing is made up."""

import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ryzen_callbacks import Claim, OptimizationValidator, ValidationReport, ValidationResult, measurement
from ryzen_callbacks.intervals import median_interval
from ryzen_callbacks.paired import PairedTimes


def busy(seconds: float) -> Callable[[], None]:
    def run() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    return run


def one(claim: Claim, **settings: Any) -> ValidationResult:
    return OptimizationValidator([claim], **settings).validate().results[0]


def timed(threshold: float, **more: Any) -> Claim:
    return Claim(
        name="t",
        baseline=busy(2e-3),
        optimized=busy(1e-3),
        measure="time",
        threshold=threshold,
        **more,
    )


def sized(base: float, opt: float, threshold: float, **more: Any) -> Claim:
    return Claim(
        name="b", baseline=lambda: base, optimized=lambda: opt, measure="bytes", threshold=threshold, **more
    )


def lossy(base: list[float], opt: list[float], threshold: float, **more: Any) -> Claim:
    return Claim(
        name="l", baseline=lambda: base, optimized=lambda: opt, measure="loss", threshold=threshold, **more
    )


def planted(monkeypatch: pytest.MonkeyPatch, ratio: float, spread: float, control: float) -> None:
    """Timings with ratios around `ratio`, and the baseline's two timings `control` apart."""
    times = PairedTimes()
    for i in range(12):
        second = control ** (-1) ** (i + 1)  # against the alternating direction, so that it does not cancel
        base = (1.0 + second) / 2 / (ratio * spread ** (i / 11 - 0.5))
        times.baseline.append((1.0, second))
        times.optimized.append((base, base))
    monkeypatch.setattr(measurement, "measure_pair", lambda *a: times)


@pytest.mark.parametrize(
    ("ratio", "spread", "control", "status", "words"),
    [
        (3.5, 1.1, 1.0, "PASS", "speedup 3.5x"),
        (3.0, 1.1, 1.0, "WARNING", "the interval has the line inside it"),
        (2.5, 1.1, 1.0, "FAIL", "claimed: at least 3x"),
        (3.5, 1.1, 1.2, "WARNING", "differs from itself"),
        (2.5, 1.1, 1.2, "FAIL", "claimed: at least 3x"),
    ],
)
def test_a_timed_verdict(
    monkeypatch: pytest.MonkeyPatch, ratio: float, spread: float, control: float, status: str, words: str
) -> None:
    planted(monkeypatch, ratio, spread, control)
    result = one(timed(3.0))
    assert result.measured == pytest.approx(ratio)
    assert result.status == status
    assert words in result.message


def test_tolerance_moves_the_line_of_a_timed_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, 2.8, 1.01, 1.0)
    assert one(timed(3.0)).status == "FAIL"
    assert one(timed(3.0, tolerance=0.1)).status == "PASS"


@pytest.mark.parametrize(
    ("claim", "status"),
    [
        (lossy([1.0] * 8, [0.94] * 8, -0.05, tolerance=0.1), "PASS"),
        (lossy([1.0] * 8, [0.954] * 8, -0.05, tolerance=0.1), "PASS"),
        (lossy([1.0] * 8, [0.96] * 8, -0.05, tolerance=0.1), "FAIL"),
        (sized(100, 120, -0.2, quantity="saving"), "PASS"),
        (sized(100, 121, -0.2, quantity="saving", tolerance=0.1), "PASS"),
        (sized(100, 123, -0.2, quantity="saving", tolerance=0.1), "FAIL"),
    ],
)
def test_tolerance_eases_a_line_below_zero_too(claim: Claim, status: str) -> None:
    """To get better by 5%, or to take at most 20% more: a tolerance makes neither stricter."""
    assert one(claim).status == status


def test_every_figure_of_a_timed_claim_follows_from_its_samples() -> None:
    result = one(timed(1.5), rounds=7)
    samples = result.samples
    assert samples is not None
    assert result.rounds == len(samples.baseline) == len(samples.optimized) == len(samples.control) == 7
    logs = [math.log(a / b) for a, b in zip(samples.baseline, samples.optimized, strict=True)]
    interval = median_interval(logs)
    assert interval is not None
    assert result.measured == pytest.approx(math.exp(statistics.median(logs)))
    assert (result.ci_low, result.ci_high) == pytest.approx(tuple(map(math.exp, interval)))
    assert samples.baseline == pytest.approx([statistics.fmean(pair) for pair in samples.control])
    assert result.baseline is not None
    assert result.baseline.value == pytest.approx(statistics.median(samples.baseline))
    assert result.control is not None
    flipped = [math.log(a / b) * (-1) ** i for i, (a, b) in enumerate(samples.control)]
    assert result.control.ratio == pytest.approx(math.exp(statistics.median(flipped)))


def test_too_few_rounds_are_inconclusive_and_say_so() -> None:
    result = one(timed(1.0001, rounds=3))
    assert (result.status, result.ci_low, result.rounds) == ("WARNING", None, 3)
    assert "3 rounds are too few" in result.message


def test_a_noisy_control_forbids_a_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline's two timings differ by half either way: no bias, but no quiet machine either."""
    times = PairedTimes()
    for i in range(12):
        times.baseline.append((1.0, 1.5 if i % 4 < 2 else 1 / 1.5))
        times.optimized.append((0.1, 0.1))
    monkeypatch.setattr(measurement, "measure_pair", lambda *a: times)
    result = one(timed(3.0))
    assert (result.status, result.ci_low is not None and result.ci_low > 3.0) == ("WARNING", True)
    assert "too noisy" in result.message


@pytest.mark.parametrize(
    ("claim", "measured", "status"),
    [
        (sized(100, 50, 2.0), 2.0, "PASS"),
        (sized(100, 51, 2.0), 100 / 51, "FAIL"),
        (sized(100, 51, 2.0, tolerance=0.05), 100 / 51, "PASS"),
        (sized(100, 70, 0.25, quantity="saving"), 0.3, "PASS"),
        (sized(100, 80, 0.25, quantity="saving"), 0.2, "FAIL"),
    ],
)
def test_bytes_are_exact(claim: Claim, measured: float, status: str) -> None:
    result = one(claim)
    assert result.measured == pytest.approx(measured)
    assert result.ci_low == result.ci_high == result.measured
    assert result.status == status


@pytest.mark.parametrize(
    ("shift", "noise", "status"),
    [(0.0, 0.001, "PASS"), (0.005, 0.001, "PASS"), (0.03, 0.001, "FAIL"), (0.01, 0.05, "WARNING")],
)
def test_a_loss_is_judged_on_paired_batches(shift: float, noise: float, status: str) -> None:
    """The batches differ by far more than the arms: only pairing can tell an increase of 1%."""
    base = [1.0, 3.0] * 6
    opt = [v + 2 * shift + noise * (1 if i % 4 < 2 else -1) for i, v in enumerate(base)]
    result = one(lossy(base, opt, 0.01))
    assert result.measured == pytest.approx(shift)
    assert result.status == status


@pytest.mark.parametrize(
    ("shift", "noise", "status"),
    [
        (0.0, 0.001, "PASS"),
        (-0.005, 0.001, "PASS"),
        (-0.03, 0.001, "FAIL"),
        (0.03, 0.001, "FAIL"),
        (0.0, 0.1, "WARNING"),
    ],
)
def test_equivalence_wants_the_whole_interval_inside_the_margin_on_both_sides(
    shift: float, noise: float, status: str
) -> None:
    """The last one: no difference is found, and none is shown to be absent."""
    base = [1.0, 3.0] * 6
    opt = [v + 2 * shift + noise * (1 if i % 4 < 2 else -1) for i, v in enumerate(base)]
    result = one(lossy(base, opt, 0.01, quantity="difference"))
    assert result.status == status
    assert result.measured == pytest.approx(shift, abs=1e-12)
    assert ("within +1.00%" in result.message) == (result.metric == "difference")


def stand_in(monkeypatch: pytest.MonkeyPatch, now: int) -> dict[str, int]:
    """For an accelerator: the bytes that it holds, and their peak."""
    held = {"now": now, "peak": 0}
    device = "torch.accelerator"
    monkeypatch.setattr(f"{device}.is_available", lambda: True)
    monkeypatch.setattr(f"{device}.synchronize", lambda: None)
    monkeypatch.setattr(f"{device}.reset_peak_memory_stats", lambda: held.update(peak=held["now"]))
    monkeypatch.setattr(f"{device}.max_memory_allocated", lambda: held["peak"])
    return held


def test_peak_memory_is_what_the_accelerator_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in accelerator that counts what the arms ask of it."""
    held = stand_in(monkeypatch, now=100)

    def needs(count: int) -> Callable[[], None]:
        return lambda: held.update(peak=max(held["peak"], held["now"] + count))

    claim = Claim(name="m", baseline=needs(300), optimized=needs(100), measure="peak_memory", threshold=2.0)
    result = one(claim)
    assert (result.measured, result.status, result.metric) == (2.0, "PASS", "ratio")
    assert result.samples is not None
    assert result.samples.baseline == [400]


def test_what_one_arm_left_in_a_cycle_is_not_in_the_other_arms_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in accelerator whose memory is given back by the objects that hold it."""
    held = stand_in(monkeypatch, now=0)

    class Cycle:
        def __init__(self, count: int) -> None:
            self.count, self.itself = count, self
            held["now"] += count
            held["peak"] = max(held["peak"], held["now"])

        def __del__(self) -> None:
            held["now"] -= self.count

    arms = {"baseline": lambda: Cycle(400), "optimized": lambda: Cycle(100)}
    result = one(Claim(name="m", **arms, measure="peak_memory", threshold=2.0))
    assert (result.measured, result.status) == (4.0, "PASS")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator is here")
def test_peak_memory_is_not_measured_on_a_cpu() -> None:
    claim = Claim(name="m", baseline=fails, optimized=fails, measure="peak_memory", threshold=2.0)
    result = one(claim)
    assert result.status == "NOT_MEASURED"
    assert "no accelerator" in result.message


def test_a_loss_of_too_few_batches_is_inconclusive() -> None:
    result = one(lossy([1.0, 2.0], [1.0, 2.0], 0.01))
    assert result.status == "WARNING"
    assert "2 batches are too few" in result.message


def fails() -> Any:
    raise RuntimeError("no such device")


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (Claim.not_built("k", "comes later", measure="time", threshold=3), "comes later"),
        (Claim(name="k", baseline=fails, optimized=fails, measure="time", threshold=3), "no such device"),
        (sized(100, 0, 2.0), "expected a positive number"),
        (sized(math.nan, 1, 2.0), "expected a positive number"),
        (lossy([1.0], [1.0, 2.0], 0.01), "1 and 2 losses"),
        (lossy([1.0], [math.nan], 0.01), "not finite"),
    ],
)
def test_what_cannot_be_measured_says_why_and_the_others_go_on(claim: Claim, reason: str) -> None:
    sound = Claim(name="s", baseline=lambda: 4, optimized=lambda: 1, measure="bytes", threshold=2.0)
    report = OptimizationValidator([claim, sound]).validate()
    first, second = report.results
    assert (first.status, first.measured, first.samples) == ("NOT_MEASURED", None, None)
    assert reason in first.message
    assert second.status == "PASS"


def test_the_summary_counts_and_rates_only_what_was_measured(tmp_path: Path) -> None:
    claims = [
        sized(4, 1, 2.0),
        Claim(name="f", baseline=lambda: 1, optimized=lambda: 1, measure="bytes", threshold=2.0),
        lossy([1.0], [1.0], 0.1),
        Claim.not_built("n", "later", measure="bytes", threshold=2.0),
    ]
    path = tmp_path / "validation_report.json"
    OptimizationValidator(claims, path=path).validate()
    report = ValidationReport.model_validate(json.loads(path.read_text()))
    assert report.schema_version == 1
    assert report.summary.model_dump() == {
        "total": 4,
        "passed": 1,
        "failed": 1,
        "warnings": 1,
        "not_measured": 1,
        "pass_rate": pytest.approx(1 / 3),
    }


def test_with_nothing_measured_there_is_no_pass_rate() -> None:
    report = OptimizationValidator([Claim.not_built("n", "later", measure="time", threshold=2)]).validate()
    assert report.summary.pass_rate is None


def test_progress_is_told_round_by_round() -> None:
    seen: list[tuple[str, int, int]] = []
    claims = [
        timed(1.0),
        sized(4, 1, 2.0),
        Claim.not_built(
            "n",
            "later",
            measure="time",
            threshold=2,
        ),
    ]
    OptimizationValidator(claims, rounds=2, on_progress=lambda *a: seen.append(a)).validate()
    assert seen == [("t", 0, 2), ("t", 1, 2), ("t", 2, 2), ("b", 0, 1), ("b", 1, 1), ("n", 0, 2), ("n", 2, 2)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Claim(name="c", measure="time", threshold=2), "both be callables"),
        (lambda: sized(1, 1, math.nan), "threshold"),
        (lambda: sized(1, 1, "1.5"), "threshold is '1.5', expected a finite number"),  # type: ignore[arg-type]
        (lambda: sized(1, 1, None), "threshold is None"),  # type: ignore[arg-type]
        (lambda: sized(1, 1, 2, tolerance="0.1"), "tolerance is '0.1'"),
        (lambda: sized(1, 1, 2, tolerance=math.nan), "tolerance is nan"),
        (lambda: sized(1, 1, 2, tolerance=1.0), "tolerance"),
        (lambda: lossy([1.0], [1.0], -0.01, quantity="difference"), "threshold is -0.01, expected 0 or more"),
        (lambda: sized(1, 100, 0.0), "threshold is 0.0, expected more than 0"),
        (lambda: timed(-1.0), "threshold is -1.0, expected more than 0"),
        (lambda: sized(1, 1, 2, quantity="speedup"), "ratio or saving"),
        (lambda: sized(1, 1, 2, rounds=0), "rounds"),
        (
            lambda: Claim(name="c", baseline=fails, optimized=fails, measure="joy", threshold=2),
            "time, bytes, peak_memory, loss",
        ),
        (lambda: Claim.not_built("c", "", measure="time", threshold=2), "needs a reason"),
        (lambda: OptimizationValidator(rounds=0), "rounds"),
        (lambda: OptimizationValidator(warmup=-1), "warmup"),
        (lambda: OptimizationValidator(control_limit=1.0), "control_limit"),
        (lambda: OptimizationValidator(control_limit=math.nan), "control_limit"),
        (lambda: OptimizationValidator(every_n_validations=0), "every_n_validations"),
        (lambda: OptimizationValidator([sized(1, 1, 1), sized(1, 1, 1)]), "two claims"),
    ],
)
def test_bad_settings_are_refused_with_the_reason(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


AT_LEAST = ["kernel_performance", "embedding_compression", "kv_cache", "speculative_decoding", "end_to_end"]


@pytest.mark.parametrize("method", AT_LEAST)
@pytest.mark.parametrize(
    ("actual", "status"), [(3.2, "PASS"), (3.0, "PASS"), (2.8, "WARNING"), (2.6, "FAIL"), (-1.0, "FAIL")]
)
def test_a_given_figure_that_should_be_high(method: str, actual: float, status: str) -> None:
    validate = getattr(OptimizationValidator(), f"validate_{method}")
    result = validate(actual=actual, expected=3.0, tolerance=0.1)
    assert result.status == status
    assert result.message
    assert (result.measured, result.threshold, result.tolerance) == (actual, 3.0, 0.1)


@pytest.mark.parametrize(
    ("actual", "status"), [(-0.2, "PASS"), (0.01, "PASS"), (0.0105, "WARNING"), (0.02, "FAIL")]
)
def test_a_given_loss_increase_should_be_low(actual: float, status: str) -> None:
    result = OptimizationValidator().validate_numerical_correctness(actual, 0.01, tolerance=0.1)
    assert result.status == status


def test_figures_of_numpy_are_numbers(tmp_path: Path) -> None:
    """As a mean of float32 values is."""
    number: Any = np.float32
    result = OptimizationValidator().validate_kernel_performance(number(3.5), np.int64(3), number(0.5))
    assert (result.status, result.measured, result.threshold, result.tolerance) == ("PASS", 3.5, 3.0, 0.5)
    claim = sized(number(100), number(25), number(2))
    report = OptimizationValidator([claim], path=tmp_path / "report.json").validate()
    assert report.results[0].measured == 4.0
    assert json.loads((tmp_path / "report.json").read_text())["results"][0]["threshold"] == 2.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, "3", True, 10**400])
@pytest.mark.parametrize("position", ["actual", "expected", "tolerance"])
def test_a_figure_that_is_no_number_has_no_verdict(bad: Any, position: str) -> None:
    arguments = {"actual": 3.0, "expected": 3.0, "tolerance": 0.1, position: bad}
    with pytest.raises(ValueError, match=position):
        OptimizationValidator().validate_kernel_performance(**arguments)


def test_by_hand_a_report_that_cannot_be_written_is_noticed_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    ran: list[int] = []
    claim = Claim(
        name="c", baseline=lambda: ran.append(1), optimized=lambda: ran.append(2), measure="time", threshold=1
    )
    with pytest.raises(ValueError, match="is a folder, expected the path of a file"):
        OptimizationValidator([claim], path=tmp_path, rounds=1).validate()
    assert ran == []


def test_what_rounds_to_zero_has_no_minus() -> None:
    """-0.00% reads like a gain."""
    result = OptimizationValidator().validate_numerical_correctness(actual=-2e-5, expected=0.01)
    assert result.message == "increase +0.00% meets the expected at most +1.00%"
