"""What to switch on or off on this machine, from what was measured on it."""

from __future__ import annotations

from ryzen_callbacks import ValidationResult
from ryzen_callbacks.verdict import bound_of, show

from ryzen_llm.pipeline.drawings import VS_STRONG
from ryzen_llm.pipeline.wording import show_quantity

_SWITCHES = {
    "kernel_performance": "enable_kernel_optimization",
    "embedding_compression": "enable_embedding_compression",
    "kv_cache": "enable_kv_cache_optimization",
    "speculative_decoding": "enable_speculative_decoding",
}
"""The key that switches what a claim is about. The claims on its quality (`_quality`) and against the strong
baseline (`_vs_strong`) have the same."""

_QUALITY = "_quality"
_REMEDIES = {
    "numerical_correctness": "train with --trainer.precision 32-true, or with --compile false",
    "accuracy_preservation": "train with --trainer.precision 32-true, or with --model.embedding dense",
}
"""What to change where such a claim fails."""
_FASTER_IN_BF16 = ("kernel_performance", "end_to_end")
_WITHOUT_BF16 = (
    "this hardware has no bf16 arithmetic, so both arms compute in fp32; measure again on a CPU with "
    "AVX512-BF16 or AMX, or on a GPU"
)


def recommend(results: list[ValidationResult], has_bf16: bool) -> list[str]:
    """One sentence for each switch, what it gains or would gain, and one for each claim without a switch that
    did not pass; `has_bf16` says whether the hardware that they were measured on has bf16 arithmetic.
    """
    by_name = {result.name: result for result in results}
    lines = [f"{switch}: {_advice(by_name, name)}" for name, switch in _SWITCHES.items() if name in by_name]
    others = [r for r in results if r.name.removesuffix(VS_STRONG).removesuffix(_QUALITY) not in _SWITCHES]
    lines += [f"{result.name}: {_remedy(result)}" for result in others if result.status != "PASS"]
    missed = [name for name in _FASTER_IN_BF16 if name in by_name and by_name[name].status == "FAIL"]
    return lines if has_bf16 or not missed else [*lines, f"{' and '.join(missed)}: {_WITHOUT_BF16}"]


def _advice(results: dict[str, ValidationResult], name: str) -> str:
    result = results[name]
    if result.measured is None:
        if "switched off" in result.message:
            return "is off, so nothing is known of it here; switch it on and measure with --phases validation"
        return f"no advice, {result.message}"
    for other in (results.get(f"{name}{_QUALITY}"), results.get(f"{name}{VS_STRONG}")):
        if other is not None and other.status == "FAIL":
            return f"switch it off here. {_gain(result)}, but {other.name} failed: {other.message}"
    effect = _effect(result)
    if effect < 0:
        return f"switch it off here. {_gain(result)}"
    if effect == 0:
        return f"makes no difference that {_rounds(result)} could tell. {_gain(result)}"
    missed = "" if result.status == "PASS" else f"; {_threshold(result)} is not shown to be reached"
    return f"keep it on. {_gain(result)}{missed}"


def _effect(result: ValidationResult) -> int:
    """1 where the whole interval is an improvement, -1 where it is a loss, 0 where it has both."""
    assert result.measured is not None
    low = result.measured if result.ci_low is None else result.ci_low
    high = result.measured if result.ci_high is None else result.ci_high
    no_change = 1.0 if result.metric in ("speedup", "ratio") else 0.0
    return (low > no_change) - (high < no_change)


def _gain(result: ValidationResult) -> str:
    """A sentence of the figure, its interval where it has one, and both arms."""
    assert result.measured is not None
    figure = show(result.metric, result.measured)
    if result.ci_low is not None and result.ci_high is not None and result.ci_low < result.ci_high:
        figure += f" ({show(result.metric, result.ci_low)} to {show(result.metric, result.ci_high)})"
    if result.baseline is None or result.optimized is None:
        return f"{result.metric.capitalize()} {figure}"
    return (
        f"{result.metric.capitalize()} {figure}: {show_quantity(result.optimized)} instead of "
        f"{show_quantity(result.baseline)} with {result.baseline.name}"
    )


def _remedy(result: ValidationResult) -> str:
    if result.status == "NOT_MEASURED":
        return result.message
    if result.status == "WARNING":
        return f"{result.message}; {_rounds(result)} could not settle it, more (--validation_rounds) may"
    if result.name in _REMEDIES:
        return f"{result.message}; {_REMEDIES[result.name]}"
    return f"misses its threshold here: {result.message}"


def _rounds(result: ValidationResult) -> str:
    return f"{result.rounds} rounds" if result.rounds else "this measurement"


def _threshold(result: ValidationResult) -> str:
    return f"{bound_of(result.metric)} {show(result.metric, result.threshold)}"
