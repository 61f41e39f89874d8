"""Advice follows from the figures: what helps stays on, what harms goes off, what is unknown is said so."""

from typing import Any

import pytest
from ryzen_callbacks import ValidationResult
from ryzen_callbacks.reports import Quantity

from ryzen_llm.pipeline.recommendations import recommend


def result(name: str, **changes: Any) -> ValidationResult:
    values: dict[str, Any] = {
        "name": name,
        "metric": "speedup",
        "threshold": 3.0,
        "status": "PASS",
        "message": f"the message of {name}",
        "rounds": 9,
    }
    return ValidationResult(**{**values, **changes})


def seconds(baseline: float, ours: float) -> dict[str, Quantity]:
    return {
        "baseline": Quantity(name="naive: eager", value=baseline, unit="s"),
        "optimized": Quantity(name="ours", value=ours, unit="s"),
    }


def test_what_helps_stays_on_with_what_it_gains() -> None:
    (line,) = recommend(
        [result("kernel_performance", measured=4.0, ci_low=3.5, ci_high=4.5, **seconds(0.4, 0.1))],
        has_bf16=True,
    )
    assert line == (
        "enable_kernel_optimization: keep it on. Speedup 4x (3.5x to 4.5x): 100 ms instead of 400 ms with "
        "naive: eager"
    )


def test_what_helps_less_than_claimed_stays_on_too() -> None:
    (line,) = recommend(
        [result("kernel_performance", measured=2.0, ci_low=1.9, ci_high=2.1, status="FAIL")], has_bf16=True
    )
    assert line.startswith("enable_kernel_optimization: keep it on. Speedup 2x")
    assert line.endswith("; at least 3x is not shown to be reached")


def test_what_harms_goes_off() -> None:
    (line,) = recommend(
        [result("speculative_decoding", measured=0.8, ci_low=0.7, ci_high=0.9, status="FAIL")], has_bf16=True
    )
    assert line == "enable_speculative_decoding: switch it off here. Speedup 0.8x (0.7x to 0.9x)"


def test_no_difference_is_no_reason_to_switch() -> None:
    (line,) = recommend(
        [result("speculative_decoding", measured=1.0, ci_low=0.9, ci_high=1.2, status="WARNING")],
        has_bf16=True,
    )
    assert "makes no difference that 9 rounds could tell" in line
    assert "switch it off" not in line


@pytest.mark.parametrize(
    ("name", "other"),
    [("kv_cache", "kv_cache_quality"), ("kernel_performance", "kernel_performance_vs_strong")],
)
def test_a_gain_that_another_claim_spoils_is_no_gain(name: str, other: str) -> None:
    helping = result(name, measured=4.0, ci_low=3.5, ci_high=4.5)
    assert "keep it on" in recommend([helping, result(other, measured=1.0)], has_bf16=True)[0]
    (line,) = recommend([helping, result(other, measured=0.5, status="FAIL")], has_bf16=True)
    assert "switch it off here" in line
    assert f"{other} failed: the message of {other}" in line


def test_a_saving_counted_in_bytes_has_no_interval() -> None:
    (line,) = recommend(
        [result("kv_cache", metric="saving", measured=0.5, ci_low=0.5, ci_high=0.5)], has_bf16=True
    )
    assert line == "enable_kv_cache_optimization: keep it on. Saving 50.0%"


def test_what_is_off_or_unknown_gets_no_figure() -> None:
    off = result("embedding_compression", status="NOT_MEASURED", message="not measured: switched off by x")
    broken = result("kv_cache", status="NOT_MEASURED", message="not measured: measuring raised OSError")
    lines = recommend([off, broken], has_bf16=True)
    assert "switch it on and measure with --phases validation" in lines[0]
    assert lines[1] == "enable_kv_cache_optimization: no advice, not measured: measuring raised OSError"


def test_other_claims_are_there_only_where_they_did_not_pass() -> None:
    lines = recommend(
        [
            result("end_to_end", measured=2.0, status="FAIL"),
            result("end_to_end_vs_strong", measured=1.0, status="WARNING"),
            result("numerical_correctness", metric="increase", measured=0.5, status="FAIL"),
            result("accuracy_preservation", metric="increase", measured=0.5, status="FAIL"),
            result("another", measured=9.0),
        ],
        has_bf16=True,
    )
    assert lines == [
        "end_to_end: misses its threshold here: the message of end_to_end",
        "end_to_end_vs_strong: the message of end_to_end_vs_strong; 9 rounds could not settle it, more "
        "(--validation_rounds) may",
        "numerical_correctness: the message of numerical_correctness; train with --trainer.precision "
        "32-true, or with --compile false",
        "accuracy_preservation: the message of accuracy_preservation; train with --trainer.precision "
        "32-true, or with --model.embedding dense",
    ]


def test_what_bounds_products_without_bf16_is_said() -> None:
    failed = [result(n, measured=1.2, status="FAIL") for n in ("kernel_performance", "end_to_end")]
    passed = [result(n, measured=4.0) for n in ("kernel_performance", "end_to_end")]
    assert recommend(failed, has_bf16=False)[-1].startswith(
        "kernel_performance and end_to_end: this hardware has no bf16 arithmetic"
    )
    for results, has_bf16 in ((failed, True), (passed, False)):
        assert not any("no bf16" in line for line in recommend(results, has_bf16))


def test_nothing_measured_no_advice() -> None:
    assert recommend([], has_bf16=True) == []
