"""The TensorBoard log opens as a dashboard whose every chart has data, with settings and histograms."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from google.protobuf.message import Message
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tiny import MODEL, report

from ryzen_llm.interop import load_pretrained


@pytest.fixture(scope="module")
def log(finished: Path) -> EventAccumulator:
    return EventAccumulator(
        str(finished / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0}
    ).Reload()


def charts(log: EventAccumulator) -> Iterator[tuple[str, list[str]]]:
    (event,) = log.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    for category in layout.category:
        for chart in category.chart:
            # A curve by epoch is a margin of no width, which TensorBoard draws whole.
            yield chart.title, list(chart.multiline.tag) or [series.value for series in chart.margin.series]


def test_every_chart_of_the_dashboard_has_its_curves(log: EventAccumulator) -> None:
    found = dict(charts(log))
    assert len(found) >= 8
    for title, tags in found.items():
        assert tags, title
        for tag in tags:
            assert [name for name in log.Tags()["scalars"] if re.fullmatch(tag, name)], (title, tag)


def test_the_settings_are_those_of_the_run(log: EventAccumulator) -> None:
    def content(name: str) -> Message:
        return HParamsPluginData.FromString(log.SummaryMetadata(name).plugin_data.content)

    settings = content("_hparams_/session_start_info").session_start_info.hparams
    assert settings["model.hidden_size"].number_value == MODEL["hidden_size"]
    assert settings["data.source"].string_value
    outcomes = [info.name.tag for info in content("_hparams_/experiment").experiment.metric_infos]
    assert set(outcomes) <= set(log.Tags()["scalars"])


def test_histograms_are_of_the_weights(log: EventAccumulator, finished: Path) -> None:
    model, _ = load_pretrained(finished)
    weights = dict(model.named_parameters())
    names = {tag.partition("/")[2].removeprefix("model.") for tag in log.Tags()["histograms"]}
    assert names == set(weights)
    for name in weights:
        last = log.Histograms(f"weights/model.{name}")[-1]
        assert last.step == 40
        values = weights[name].detach()
        assert last.histogram_value.num == values.numel()  # all of them, being few
        assert last.histogram_value.min == pytest.approx(values.min().item(), rel=1e-6)
        assert last.histogram_value.sum == pytest.approx(values.double().sum().item(), rel=1e-4, abs=1e-4)
        assert len(log.Histograms(f"gradients/model.{name}")) == 2


def test_speed_up_and_ratio_are_measured_in_training(finished: Path, log: EventAccumulator) -> None:
    """The embedding being dense, its ratio is 1; the speed-up is the one that was logged."""
    rows = report(finished, "training_metrics_report")["epochs"]
    assert [row["compression_ratio"] for row in rows] == [1.0, 1.0]
    measured = [row["speedup"] for row in rows if row["speedup"] is not None]
    assert measured == pytest.approx([event.value for event in log.Scalars("speedup")], rel=1e-6)
    assert rows[0]["speedup"] > 0
    for row in rows:
        assert (row["speedup"] is None) == ("speedup" in row["not_measured"])


def test_a_histogram_of_what_is_not_finite_leaves_that_out() -> None:
    from ryzen_llm.pipeline.dashboard import _sample

    values = torch.tensor([1.0, float("nan"), 2.0, float("inf")])
    assert _sample(values).tolist() == [1.0, 2.0]
    assert len(_sample(torch.arange(1_000_000.0))) in range(8000, 8193)
