"""report.html stands alone; it and report.md show what the reports hold, and let nothing in them act."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from made_reports import final_report
from ryzen_callbacks import ValidationReport, ValidationResult
from ryzen_callbacks.reports import Quantity

from ryzen_llm.pipeline.drawings import loss_curve, ticks
from ryzen_llm.pipeline.pages import RunResults, write_html_report, write_markdown_report
from ryzen_llm.pipeline.report import Accuracy, FinalReport, Kernels, Phase
from ryzen_llm.pipeline.wording import show_duration
from ryzen_llm.selftest import IntegrationTestReport
from ryzen_llm.selftest.report import TestResult
from ryzen_llm.training import OpChoice

HOSTILE = "<script>alert('x')</script><img src=//evil.example/a onerror=\"x\"> {{ 7 * 7 }} &amp; \"'>"
ALLOWED = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "pre", "br", "b", "small"),
    *("div", "span", "ul", "li", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "polyline", "line", "rect", "circle", "text"),
}


class Page(HTMLParser):
    """Elements, attributes and text of a page, as a browser would see them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.elements: list[dict[str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        self.elements.append({name: value or "" for name, value in attrs})

    def handle_data(self, data: str) -> None:
        self.text += data

    def places_of(self, kind: str) -> list[tuple[float, float]]:
        """Where the drawn elements of a class are, in percent from the left and from the top."""
        found = [element for element in self.elements if element.get("class") == kind]
        return [(place(element, "x"), place(element, "y")) for element in found]


def place(element: dict[str, str], axis: str) -> float:
    """A drawn element's place on an axis, in percent."""
    given = (element[name] for name in (axis, f"{axis}1", f"c{axis}") if name in element)
    return float(next(given).removesuffix("%"))


def claim_result(**changes: Any) -> ValidationResult:
    values = {"name": "c", "metric": "speedup", "threshold": 1.0, "status": "PASS", "message": "m"}
    return ValidationResult(**{**values, **changes})


def training_data(**changes: Any) -> dict[str, Any]:
    metadata = {"model": "tiny", "started_at": "2026-01-01", "environment": {"cpu": "a cpu"}}
    values = {"metadata": metadata, "batches": [], "epochs": [], "anomalies": [], "batches_every_n_steps": 10}
    return {**values, **changes}


def rows(losses: dict[int, float | None], name: str = "loss") -> list[dict[str, float | None]]:
    return [{"step": step, name: loss} for step, loss in losses.items()]


def render(
    folder: Path,
    report: FinalReport,
    training: dict[str, Any] | None = None,
    results: list[ValidationResult] | None = None,
    tests: list[TestResult] | None = None,
) -> Page:
    page = write_html_report(folder / "report.html", run_of(report, training, results, tests))
    assert [path.name for path in folder.iterdir()] == ["report.html"]
    return Page(page.read_text("utf-8"))


def run_of(
    report: FinalReport,
    training: dict[str, Any] | None = None,
    results: list[ValidationResult] | None = None,
    tests: list[TestResult] | None = None,
) -> RunResults:
    return RunResults(
        report,
        ValidationReport.of(results, {}) if results else None,
        IntegrationTestReport.of(tests, 1.0) if tests else None,
        training,
    )


def points_of(page: Page) -> list[tuple[float, ...]]:
    """Of the loss curve, in percent from the left and from the top."""
    (points,) = [value for name, value in page.attributes if name == "points"]
    return [tuple(float(part) for part in point.split(",")) for point in points.split()]


def hostile_run() -> RunResults:
    """The same markup wherever text from the model, the data or an error can come in."""
    report = final_report(
        phases=[Phase(name="training", status="failed", duration_s=None, error=HOSTILE)],
        sample=HOSTILE,
        recommendations=[HOSTILE],
        accuracy=Accuracy(reason=HOSTILE),
    )
    metadata = {"model": HOSTILE, "started_at": HOSTILE, "environment": {HOSTILE: HOSTILE}}
    training = training_data(
        metadata=metadata,
        batches=rows({1: 2.0, 2: 1.0}),
        anomalies=[{"step": 1, "message": HOSTILE}],
    )
    baseline, ours = (Quantity(name=HOSTILE, value=value, unit="s") for value in (2.0, 1.0))
    result = claim_result(
        name=HOSTILE, description=HOSTILE, message=HOSTILE, measured=2.0, baseline=baseline, optimized=ours
    )
    test = TestResult(
        name=HOSTILE, category="unit", status="failed", duration_s=1, error=HOSTILE, traceback=HOSTILE
    )
    return run_of(report, training, [result], [test])


def test_hostile_text_is_only_shown(tmp_path: Path) -> None:
    page = Page(write_html_report(tmp_path / "report.html", hostile_run()).read_text("utf-8"))
    shown = HOSTILE.replace("_", " ")
    once = 6 + 2 + 2 + 3  # the report's and metadata's, environment, message and description, self-test
    # The anomaly's mark and line; the claim's name with card, bars and method; two arms with bars and method.
    assert page.text.replace("_", " ").count(shown) == once + 2 + 3 + 2 * 2
    assert page.tags <= ALLOWED
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href")]


def test_hostile_text_has_no_effect_in_markdown(tmp_path: Path) -> None:
    """Nothing of it is HTML, a link, a cell's end or the end of a block; inside blocks it is untouched."""
    hostile = f"{HOSTILE} | [a](javascript:b) ``` * # <b>"
    run = hostile_run()
    run.report.sample = hostile + "\n````\n<script>x</script>\n````\n"
    run.report.recommendations = [hostile]
    page = write_markdown_report(tmp_path / "report.md", run).read_text("utf-8")
    outside: list[str] = []
    fence = ""
    for line in page.splitlines():
        if fence:
            fence = "" if line == fence else fence
        elif line.startswith("```"):
            fence = line.removesuffix("text")
        else:
            outside.append(line)
    assert not fence
    text = "\n".join(outside)
    assert "<" not in text
    assert "javascript" in text
    assert not re.search(r"(?<!\\)\]\(", text)
    assert "alert" in text
    assert hostile in page  # in its block
    for line in outside:
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") in (3, 4, 5), line


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    training = training_data(batches=rows({1: 3.0, 2: 2.0}), epochs=rows({2: 2.5}, "val_loss"))
    render(
        tmp_path, final_report(sample="x"), training, [claim_result(measured=1.5, ci_low=1.2, ci_high=1.7)]
    )
    page = (tmp_path / "report.html").read_text("utf-8")
    for outside in ("http", "//", "url(", "@import", "<script", "<link"):
        assert outside not in page.lower(), outside


def test_the_curve_has_a_point_for_every_loss(tmp_path: Path) -> None:
    """Higher is up, later is right, and a step without a loss has no point."""
    training = training_data(
        batches=rows({10: 4.0, 20: None, 30: 3.0, 50: 2.0}),
        epochs=rows({40: 2.5, 50: None}, "val_loss"),
        anomalies=[{"step": 30, "message": "a spike"}],
    )
    page = render(tmp_path, final_report(), training)
    assert points_of(page) == [(20, 0), (60, 50), (100, 100)]
    assert [page.places_of(kind) for kind in ("val", "anomaly")] == [[(80, 75)], [(60, 0)]]
    assert "step 40: 2.500" in page.text
    assert page.text.count("step 30: a spike") == 2


@pytest.mark.parametrize(("evaluations", "radius"), [(2, "5"), (100, "2")])
def test_many_validation_losses_do_not_hide_the_curve(evaluations: int, radius: str, tmp_path: Path) -> None:
    val = rows(dict.fromkeys(range(evaluations), 3.0), "val_loss")
    page = render(tmp_path, final_report(), training_data(batches=rows({1: 4.0, 100: 2.0}), epochs=val))
    assert [e["r"] for e in page.elements if e.get("class") == "val"] == [radius] * evaluations


def test_the_interval_is_drawn_to_scale(tmp_path: Path) -> None:
    """Interval 2 to 4 around 3, claimed 1.5: no change at 1 is the left end, 4 the right, 8% kept free."""
    result = claim_result(measured=3.0, ci_low=2.0, ci_high=4.0, threshold=1.5)
    page = render(tmp_path, final_report(), results=[result])
    low, high = 1 - 0.08 * 3, 4 + 0.08 * 3

    def at(value: float) -> float:
        return pytest.approx(100 * (value - low) / (high - low), abs=0.02)

    for kind, value in (("faint", 1), ("threshold", 1.5), ("span", 2), ("measured", 3)):
        assert page.places_of(kind)[0][0] == at(value), kind
    (width,) = [float(a["width"][:-1]) for a in page.elements if a.get("class") == "span"]
    assert width == pytest.approx(100 * 2 / (high - low), abs=0.02)
    assert "at least 1.5x" in page.text


def test_a_difference_has_a_line_on_either_side(tmp_path: Path) -> None:
    """Within 1% of no change, and 0.5% above it: four figures, equally far apart, with 8% kept free."""
    result = claim_result(metric="difference", measured=0.005, threshold=0.01)
    page = render(tmp_path, final_report(), results=[result])
    ends = [100 * 0.08 / 1.16, 100 * 1.08 / 1.16]
    assert [x for x, _ in page.places_of("threshold")] == pytest.approx(ends, abs=0.02)
    assert page.places_of("faint")[0][0] == 50
    assert "within ±1.00%" in page.text


def test_bars_are_as_long_as_their_figures(tmp_path: Path) -> None:
    """Those against both baselines share a scale: the slowest of the four is the longest."""

    def quantities(baseline: float, ours: float, unit: str) -> dict[str, Quantity]:
        names = {"baseline": baseline, "optimized": ours}
        return {k: Quantity(name=f"{k} arm", value=v, unit=unit) for k, v in names.items()}

    results = [
        claim_result(name="kernels", measured=2.0, **quantities(4.0, 2.0, "s")),
        claim_result(name="kernels_vs_strong", measured=0.5, **quantities(1.0, 2.2, "s")),
        claim_result(name="cache", metric="ratio", measured=4.0, **quantities(4e6, 1e6, "bytes")),
        claim_result(name="quality", metric="increase", measured=0.0, **quantities(3.0, 3.0, "nats")),
    ]
    page = render(tmp_path, final_report(), results=results)
    bars = [(a["class"], float(a["width"][:-1])) for a in page.elements if a.get("class") in ("base", "ours")]
    assert bars[:4] == [("base", 100), ("ours", 50), ("base", 25), ("ours", 55)]
    assert bars[4:6] == [("base", 100), ("ours", 25)]
    assert len(bars) == 6 + 1  # and the one phase
    for value in ("4 s", "2.2 s", "4 MB", "1 MB"):
        assert value in page.text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 600, [0, 200, 400, 600]),
        (2.59, 8.37, [3, 4, 5, 6, 7, 8]),
        (0, 12, [0, 2, 4, 6, 8, 10, 12]),
        (0.001, 0.004, [0.001, 0.002, 0.003, 0.004]),
        (2.0, 2.0, [2.0]),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("last", "labels"),
    [
        (2, ["0", "1", "2"]),
        (600, ["0", "200", "400", "600"]),
        (9000, ["0", "2,000", "4,000", "6,000", "8,000"]),
        (70_000, ["0", "20k", "40k", "60k"]),
        (1_600_000, ["0", "0.5M", "1M", "1.5M"]),
    ],
)
def test_steps_are_whole_and_short_enough_for_a_phone(last: int, labels: list[str]) -> None:
    curve = loss_curve(training_data(batches=rows({1: 12_000.0, last: 4.0})))
    assert curve is not None
    assert [label for _, label in curve.x_ticks] == labels
    assert curve.y_ticks[-1][1] == "12,000"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.06, "0.1 s"),
        (50.88, "50.9 s"),
        (68.2, "1 min 8 s"),
        (3599.7, "1 h 0 min"),
        (123456.7, "34 h 17 min"),
    ],
)
def test_durations_fit_beside_their_bar(seconds: float, shown: str) -> None:
    assert show_duration(seconds) == shown


def test_every_op_has_its_choice_in_the_table(tmp_path: Path) -> None:
    """Measured, the only one for this device, and left to the rules of thumb as none could be measured."""
    late = [{"name": name, "excluded": "no time was left"} for name in ("fused", "all logits")]
    fast = [{"name": name, "milliseconds": 2.5, "relative_error": 0.002} for name in ("C++", "written out")]
    choices = [
        OpChoice.model_validate({"op": op, "choice": choice, "trials": trials, "reason": reason})
        for op, choice, trials, reason in (
            ("norm", "C++", fast, None),
            ("linear", "PyTorch", [], "no other form"),
            ("loss", "automatic", late, "no time was left"),
        )
    ]
    write_html_report(
        tmp_path / "report.html", run_of(final_report(kernels=Kernels(device="cpu", choices=choices)))
    )
    table = (tmp_path / "report.html").read_text("utf-8").partition("<table>")[2].partition("</table>")[0]
    bodies = table.split("<tbody>")[1:]
    for body, choice in zip(bodies, choices, strict=True):
        (chosen,) = re.findall(r'<tr class="PASS">(.*?)</tr>', body, re.DOTALL)
        assert f"<td>{choice.op}</td><td>{choice.choice}</td>" in chosen
        assert "chosen" in chosen
        assert body.count("<td>" + choice.op) == 1
    assert bodies[2].count("no time was left") == 3


def test_a_figure_without_its_arms_is_in_both_pages(tmp_path: Path) -> None:
    """As `validate_kernel_performance(actual, expected)` gives it; nothing is said on how it was measured."""
    run = run_of(final_report(), results=[claim_result(measured=2.0)])
    for write, name in ((write_html_report, "report.html"), (write_markdown_report, "report.md")):
        page = write(tmp_path / name, run).read_text("utf-8")
        assert "2x" in page
        assert "How it was measured" not in page


def test_the_machine_has_no_more_digits_than_say_anything(tmp_path: Path) -> None:
    metadata = {"model": "tiny", "started_at": "2026-01-01", "environment": {"load_average": 0.99072265625}}
    assert "0.991\n" in render(tmp_path, final_report(), training_data(metadata=metadata)).text


def test_a_failed_self_test_is_there_with_its_traceback(tmp_path: Path) -> None:
    test = TestResult(
        name="test_x", category="unit", status="failed", duration_s=0, error="E", traceback="line 1\nline 2"
    )
    assert "line 1\nline 2" in render(tmp_path, final_report(), tests=[test]).text


def test_a_claim_without_a_figure_has_no_drawing(tmp_path: Path) -> None:
    page = render(
        tmp_path, final_report(), results=[claim_result(status="NOT_MEASURED", message="not built")]
    )
    assert "not built" in page.text
    assert not page.places_of("measured")


@pytest.mark.parametrize("losses", [{}, {1: 3.0}, {1: 3.0, 2: None}, {1: None, 2: None}])
def test_no_curve_of_less_than_two_losses(losses: dict[int, float | None], tmp_path: Path) -> None:
    page = render(tmp_path, final_report(), training_data(batches=rows(losses)))
    assert "polyline" not in page.tags


def test_equal_losses_are_a_flat_curve(tmp_path: Path) -> None:
    page = render(tmp_path, final_report(), training_data(batches=rows({1: 2.0, 2: 2.0})))
    assert points_of(page) == [(50, 0), (100, 0)]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    """Not even a training report, and no figure in the final one."""
    page = render(tmp_path, final_report(phases=[Phase(name="testing", status="skipped", duration_s=None)]))
    assert "No claim was measured" in page.text
    assert "No validation loss: training did not finish." in page.text
    assert "None" not in page.text
