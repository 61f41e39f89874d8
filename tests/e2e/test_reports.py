"""Every figure of the reports can be computed again from what lies beside it."""

import html
import math
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import SETTINGS, report

from ryzen_llm.data import TextDataModule
from ryzen_llm.decoding import Generator
from ryzen_llm.interop import load_pretrained
from ryzen_llm.kernels import supports_bf16
from ryzen_llm.training import choose_precision

STEPS = 40
ROUNDS = SETTINGS["validation_rounds"]
T_975 = {7: 2.3646243}  # Student's t, 97.5%, by degrees of freedom; from tables


@pytest.fixture(scope="module")
def curves(finished: Path) -> dict[str, dict[int, float]]:
    """Every scalar of the TensorBoard log, by tag and step."""
    log = EventAccumulator(str(finished / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: {e.step: e.value for e in log.Scalars(tag)} for tag in log.Tags()["scalars"]}


def assert_statistics(found: dict[str, Any], values: list[float]) -> None:
    """`values` come from TensorBoard, which keeps 32 bits."""
    largest = max(map(abs, values))
    expected = {
        "count": len(values),
        "mean": math.fsum(values) / len(values),
        "min": min(values),
        "max": max(values),
        "std": statistics.stdev(values) if len(values) > 1 else None,
        "first": values[0],
        "last": values[-1],
        "non_finite": 0,
    }
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6 * largest)


def test_statistics_are_those_of_the_tensorboard_log(finished: Path, curves: dict[str, Any]) -> None:
    found = report(finished, "training_metrics_report")["statistics"]
    logged = {tag.removeprefix("train/"): curve for tag, curve in curves.items() if tag.startswith("train/")}
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "step_time_s"} <= set(logged)
    assert set(found) == set(logged)
    for name, curve in logged.items():
        assert_statistics(found[name], [curve[step] for step in sorted(curve)])
    for name in ("loss", "learning_rate", "grad_norm", "tokens"):
        assert list(logged[name]) == list(range(1, STEPS + 1)), name


def test_rates_follow_from_counts_and_times(curves: dict[str, Any]) -> None:
    for step, rate in curves["train/tokens_per_second"].items():
        assert curves["train/tokens"][step] == 4 * 16
        assert rate == pytest.approx(64 / curves["train/step_time_s"][step], rel=1e-5)


def test_epoch_rows_follow_from_the_log(finished: Path, curves: dict[str, Any]) -> None:
    rows = report(finished, "training_metrics_report")["epochs"]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 20), (1, 40)]
    before: dict[str, Any] | None = None
    for row in rows:
        steps = range(row["step"] - 19, row["step"] + 1)
        timed = [step for step in steps if step in curves["train/step_time_s"]]
        seconds = sum(curves["train/step_time_s"][step] for step in timed)
        # Lightning numbers what validation logs by the batches before it.
        val_loss = curves["val_loss"][row["step"] - 1]
        assert row["train_loss"] == pytest.approx(
            statistics.fmean(curves["train/loss"][step] for step in steps), rel=1e-6
        )
        assert row["val_loss"] == pytest.approx(val_loss, rel=1e-6)
        assert row["accuracy"] == pytest.approx(curves["val_accuracy"][row["step"] - 1], rel=1e-6)
        assert curves["val_perplexity"][row["step"] - 1] == pytest.approx(math.exp(val_loss), rel=1e-5)
        assert row["tokens_per_second"] == pytest.approx(64 * len(timed) / seconds, rel=1e-5)
        for name, found in row["metrics"].items():
            curve = curves[f"train/{name}"]
            assert_statistics(found, [curve[step] for step in steps if step in curve])
        if before is None:
            assert row["improvement"] is None
        else:
            expected = (before["val_loss"] - val_loss) / before["val_loss"]
            assert row["improvement"] == pytest.approx(expected, rel=1e-4)
        absent = {name for name, value in row.items() if value is None}
        assert absent == set(row["not_measured"])
        assert all(row["not_measured"].values())
        before = row


def test_sampled_steps_are_those_of_the_log(finished: Path, curves: dict[str, Any]) -> None:
    found = report(finished, "training_metrics_report")
    assert found["batches_every_n_steps"] == 3
    assert [row["step"] for row in found["batches"]] == list(range(3, STEPS + 1, 3))
    for row in found["batches"]:
        step = row.pop("step")
        logged = {
            tag.removeprefix("train/"): curve[step]
            for tag, curve in curves.items()
            if tag.startswith("train/") and step in curve
        }
        assert row == pytest.approx(logged, rel=1e-6)


def median_interval(values: list[float]) -> tuple[float, float]:
    """The k-th smallest and k-th largest, k the largest with 2 P(Binomial(n, 1/2) < k) <= 5%."""
    n = len(values)
    below = [sum(math.comb(n, i) for i in range(k)) / 2**n for k in range(n)]
    k = max(k for k in range(n) if 2 * below[k] <= 0.05)
    return sorted(values)[k - 1], sorted(values)[n - k]


def expected_status(result: dict[str, Any]) -> str:
    """The verdict that the interval, the threshold and the A/A control give, written out."""
    low, high, threshold, tolerance = (result[k] for k in ("ci_low", "ci_high", "threshold", "tolerance"))
    if result["metric"] == "speedup":
        line = threshold * (1 - tolerance)
        status = "PASS" if low >= line else "FAIL" if high < line else "WARNING"
        control = result["control"]
        sound = control["ci_low"] <= 1 <= control["ci_high"]
        quiet = control["ci_high"] / control["ci_low"] <= 1.5  # OptimizationValidator's control_limit
        return status if (sound and quiet) or status != "PASS" else "WARNING"
    if result["metric"] in ("saving", "ratio"):
        return "PASS" if low >= threshold * (1 - tolerance) else "FAIL"
    line = threshold * (1 + tolerance)
    return "PASS" if high <= line else "FAIL" if low > line else "WARNING"


def test_verdicts_follow_from_their_samples(finished: Path) -> None:
    results = report(finished, "validation_report")["results"]
    measured = [result for result in results if result["status"] != "NOT_MEASURED"]
    assert {"end_to_end", "end_to_end_vs_strong", "numerical_correctness", "kv_cache"} <= {
        r["name"] for r in measured
    }
    for result in measured:
        samples = result["samples"]
        pairs = list(zip(samples["baseline"], samples["optimized"], strict=True))
        if result["metric"] == "speedup":
            assert len(pairs) == result["rounds"] == ROUNDS
            logs = [math.log(baseline / optimized) for baseline, optimized in pairs]
            low, high = map(math.exp, median_interval(logs))
            expected = math.exp(statistics.median(logs)), low, high
            # The control is the baseline against itself: the same seconds, not yet averaged.
            assert [statistics.fmean(pair) for pair in samples["control"]] == pytest.approx(
                samples["baseline"], rel=1e-12
            )
            turned = [math.log(a / b) * (-1) ** i for i, (a, b) in enumerate(samples["control"])]
            assert result["control"]["ratio"] == pytest.approx(math.exp(statistics.median(turned)), rel=1e-9)
            control = map(math.exp, median_interval(turned))
            assert (result["control"]["ci_low"], result["control"]["ci_high"]) == pytest.approx(
                tuple(control), rel=1e-9
            )
            centre = statistics.median
        elif result["metric"] in ("saving", "ratio"):
            ((baseline, optimized),) = pairs
            ratio = baseline / optimized
            expected = (ratio if result["metric"] == "ratio" else 1 - 1 / ratio,) * 3
            centre = statistics.median
        else:
            mean = statistics.fmean(samples["baseline"])
            differences = [(optimized - baseline) / mean for baseline, optimized in pairs]
            half = T_975[len(pairs) - 1] * statistics.stdev(differences) / math.sqrt(len(pairs))
            middle = statistics.fmean(differences)
            expected = middle, middle - half, middle + half
            centre = statistics.fmean
        found = result["measured"], result["ci_low"], result["ci_high"]
        assert found == pytest.approx(
            expected, rel=1e-3 if result["metric"] != "speedup" else 1e-9, abs=1e-12
        )
        assert result["baseline"]["value"] == pytest.approx(centre(samples["baseline"]), rel=1e-9)
        assert result["optimized"]["value"] == pytest.approx(centre(samples["optimized"]), rel=1e-9)
        assert result["status"] == expected_status(result), result["message"]


def test_what_was_not_measured_has_no_figure_and_a_reason(finished: Path) -> None:
    for result in report(finished, "validation_report")["results"]:
        if result["status"] == "NOT_MEASURED":
            figures = [result[k] for k in ("measured", "ci_low", "ci_high", "baseline", "optimized")]
            assert figures == [None] * 5
            assert len(result["message"]) > len("not measured: ")


def test_the_summary_of_the_verdicts_is_their_count(finished: Path) -> None:
    found = report(finished, "validation_report")
    counts = dict.fromkeys(("PASS", "FAIL", "WARNING", "NOT_MEASURED"), 0)
    for result in found["results"]:
        counts[result["status"]] += 1
    ran = counts["PASS"] + counts["FAIL"] + counts["WARNING"]
    assert found["summary"] == {
        "total": len(found["results"]),
        "passed": counts["PASS"],
        "failed": counts["FAIL"],
        "warnings": counts["WARNING"],
        "not_measured": counts["NOT_MEASURED"],
        "pass_rate": pytest.approx(counts["PASS"] / ran),
    }


def test_the_summary_of_the_self_tests_is_their_count(finished: Path) -> None:
    found = report(finished, "integration_test_report")
    statuses = [test["status"] for test in found["tests"]]
    ran = len(statuses) - statuses.count("skipped")
    summary = found["summary"]
    assert len(statuses) == 16
    assert summary["total"] == 16
    assert summary["passed"] == statuses.count("passed")
    assert summary["failed"] == statuses.count("failed")
    assert summary["errors"] == statuses.count("error")
    assert summary["skipped"] == statuses.count("skipped")
    assert summary["pass_rate"] == pytest.approx(statuses.count("passed") / ran)
    assert sum(test["duration_s"] for test in found["tests"]) <= summary["duration_s"]
    for test in found["tests"]:
        assert (test["error"] is None) == (test["status"] == "passed"), test


def test_the_final_report_is_the_sum_of_its_parts(finished: Path) -> None:
    final, validation = report(finished, "phase2_final_report"), report(finished, "validation_report")
    assert final["status"] == "done"
    names = ["setup", "training", "validation", "testing", "reporting"]
    assert [(phase["name"], phase["status"]) for phase in final["phases"]] == [(n, "done") for n in names]
    assert all(phase["duration_s"] > 0 for phase in final["phases"])
    assert list(final["optimizations"]) == [result["name"] for result in validation["results"]]
    for result in validation["results"]:
        component = final["optimizations"][result["name"]]
        assert component == {name: result[name] for name in component}
    assert final["e2e_speedup"] == final["optimizations"]["end_to_end"]
    summary = report(finished, "integration_test_report")["summary"]
    assert final["tests"] == {**summary, "threshold": 0.95, "status": "PASS"}
    advised = [line.partition(":")[0] for line in final["recommendations"]]
    assert advised[:4] == [
        *("enable_kernel_optimization", "enable_embedding_compression"),
        *("enable_kv_cache_optimization", "enable_speculative_decoding"),
    ]
    of_no_switch = (
        *("end_to_end", "end_to_end_vs_strong"),
        *("numerical_correctness", "accuracy_preservation"),
    )
    expected = [n for n in of_no_switch if final["optimizations"][n]["status"] != "PASS"]
    bound = ("kernel_performance", "end_to_end")
    missed = [n for n in bound if final["optimizations"][n]["status"] == "FAIL"]
    if missed and not supports_bf16(torch.device("cpu")):
        expected.append(" and ".join(missed))
    assert advised[4:] == expected
    for artifact in final["artifacts"].values():
        assert (finished / artifact).exists(), artifact
    assert {path.name for path in finished.iterdir()} == {
        *final["artifacts"].values(),
        "phase2_final_report.json",
    }


def test_accuracy_is_that_of_the_last_validation_and_of_the_corpus(
    finished: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accuracy = report(finished, "phase2_final_report")["accuracy"]
    last = report(finished, "training_metrics_report")["epochs"][-1]
    assert accuracy["val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert accuracy["val_accuracy"] == pytest.approx(last["accuracy"], rel=1e-6)
    assert accuracy["initial_val_loss"] is None
    assert accuracy["reason"] == "initial_val_loss: training started from random weights"
    monkeypatch.setenv("RYZEN_LLM_CACHE", str(cache))
    data = TextDataModule(**yaml.safe_load((finished / "config.yaml").read_text())["data"])
    _, counts = np.unique(np.fromfile(data.store.path / "train.bin", dtype="<u2"), return_counts=True)
    shares = counts / counts.sum()
    assert accuracy["unigram_entropy"] == pytest.approx(-(shares * np.log(shares)).sum(), rel=1e-9)


def test_the_sample_is_what_the_last_checkpoint_writes(finished: Path) -> None:
    model, tokenizer = load_pretrained(finished)
    prompt = torch.tensor(tokenizer.encode(SETTINGS["prompt"]))
    room = SETTINGS["model.max_position_embeddings"] - len(prompt)
    out = Generator(model).generate(prompt, max_new_tokens=room, temperature=0.7, top_p=0.9, seed=0)
    assert report(finished, "phase2_final_report")["sample"] == tokenizer.decode(out.ids[0].tolist())


def test_the_screen_and_the_page_show_the_figures_of_the_reports(finished: Path) -> None:
    final = report(finished, "phase2_final_report")
    screen = finished.with_name("screen.txt").read_text("utf-8")
    page = (finished / "report.html").read_text("utf-8")
    cards = page.split('<div class="card">')[1:]
    for card, (name, component) in zip(cards, final["optimizations"].items(), strict=True):
        assert re.search(rf"{name}\W.*{component['status']}", screen), name
        assert name.replace("_", " ") in card
        assert f'class="badge {component["status"]}"' in card
        assert component["message"] in html.unescape(card)
    markdown = (finished / "report.md").read_text("utf-8")
    for text in (screen, page, markdown):
        assert f"{final['accuracy']['val_loss']:.3f}" in text
        assert f"{final['accuracy']['unigram_entropy']:.3f}" in text
        assert f"{final['tests']['passed']} passed" in text
    assert choose_precision(None, torch.device("cpu"))[0] in screen
    assert str(finished / "report.html") in screen
    assert "tensorboard --logdir" in screen
