"""Epoch rows, sampled steps and statistics add up to what was recorded, in bounded memory."""

import json
import math
import statistics
from pathlib import Path

import pytest
from ryzen_callbacks import TrainingMetricsCollector, TrainingMetricsReport
from ryzen_callbacks.metrics_log import EPOCH_FIELDS, MetricsLog
from ryzen_callbacks.reports import EpochRow


def test_an_epochs_rate_is_its_tokens_over_its_time_and_untimed_steps_have_no_part() -> None:
    """The mean of the steps' own rates would give 550."""
    log = MetricsLog(1)
    log.add_step(1, 0, {"loss": 4.0, "tokens": 1e6})
    log.add_step(2, 0, {"loss": 2.0, "tokens": 100.0, "step_time_s": 1.0})
    log.add_step(3, 0, {"loss": 3.0, "tokens": 100.0, "step_time_s": 0.1})
    (row,) = log.epochs()
    assert row.tokens_per_second == pytest.approx(200 / 1.1)
    assert row.train_loss == pytest.approx(3.0)
    assert row.step == 3
    assert row.metrics["loss"].std == pytest.approx(statistics.stdev([4.0, 2.0, 3.0]))


def test_improvement_is_that_of_the_validation_loss_and_else_of_the_training_loss() -> None:
    log = MetricsLog(1)
    for epoch, (train, val) in enumerate([(4.0, 2.0), (3.0, 1.5), (1.5, None), (1.0, 3.0)]):
        log.add_step(epoch + 1, epoch, {"loss": train})
        if val is not None:
            log.add_to_epoch(epoch, {"val_loss": val}, {})
    improvements = [row.improvement for row in log.epochs()]
    assert improvements[0] is None
    assert improvements[1:] == pytest.approx([0.25, 0.5, 1 / 3])


def test_a_loss_that_falls_is_an_improvement_below_zero_too() -> None:
    """A log-likelihood, say: divided by the negative loss itself, getting better would look like worse."""
    log = MetricsLog(1)
    for epoch, loss in enumerate([-1.0, -2.0, -1.0]):
        log.add_to_epoch(epoch, {"val_loss": loss}, {})
    assert [row.improvement for row in log.epochs()] == [None, 1.0, -0.5]


def test_a_rows_step_is_its_own_whatever_else_is_called_so() -> None:
    log = MetricsLog(2)
    log.add_step(2, 0, {"step": 0.0, "loss": 1.0})
    assert log.batches == [{"step": 2, "loss": 1.0}]


def test_what_comes_late_goes_to_the_row_of_its_epoch() -> None:
    """All steps first, then each epoch's figures: one row for each epoch, and all counts are right."""
    log = MetricsLog(1)
    for step in range(1, 7):
        log.add_step(step, (step - 1) // 2, {"loss": 1 / step})
    for epoch in range(3):
        log.add_epoch_statistics(epoch, {"val_loss": 2.0**-epoch})
        log.add_to_epoch(epoch, {"val_loss": 2.0**-epoch}, {})
    rows = log.epochs()
    assert [(row.epoch, row.step, row.val_loss) for row in rows] == [(0, 2, 1.0), (1, 4, 0.5), (2, 6, 0.25)]
    assert [row.improvement for row in rows] == [None, 0.5, 0.5]
    assert [row.metrics["val_loss"].mean for row in rows] == [1.0, 0.5, 0.25]
    assert (log.summary()["val_loss"].count, log.summary()["loss"].count) == (3, 6)


def test_everything_missing_from_a_row_has_its_reason() -> None:
    log = MetricsLog(1)
    log.add_step(1, 0, {"loss": math.nan})
    log.add_to_epoch(0, {"accuracy": math.nan}, {"val_loss": "there is no val loader"})
    (row,) = log.epochs()
    missing = {name for name in EPOCH_FIELDS if getattr(row, name) is None}
    assert set(row.not_measured) == missing == set(EPOCH_FIELDS)
    assert row.not_measured["val_loss"] == "there is no val loader"
    assert row.not_measured["accuracy"] == "the value was nan"
    assert row.metrics["loss"].non_finite == 1


def test_a_measured_field_has_no_reason() -> None:
    log = MetricsLog(1)
    log.add_to_epoch(0, {}, {"val_loss": "none yet"})
    log.add_to_epoch(0, {"val_loss": 2.0}, {})
    assert "val_loss" not in log.epochs()[0].not_measured


def test_memory_stays_bounded_by_thinning_the_samples_evenly() -> None:
    log = MetricsLog(1)
    for step in range(1, 25_001):
        log.add_step(step, 0, {"loss": 1.0})
    assert len(log.batches) <= 10_000
    assert log.sample_every_n_steps == 4
    assert [b["step"] for b in log.batches] == list(range(4, 25_001, 4))


def test_of_very_many_epochs_the_old_ones_are_thinned_and_the_improvement_stays_right() -> None:
    log = MetricsLog(1)
    for epoch in range(1500):
        log.add_to_epoch(epoch, {"val_loss": 0.5**epoch if epoch < 1000 else 0.5**1000}, {})
    rows = log.epochs()
    assert len(rows) <= 1000
    assert [row.epoch for row in rows[-400:]] == list(range(1100, 1500))
    assert [row.improvement for row in rows if 0 < row.epoch < 1000] == pytest.approx(
        [0.5] * sum(0 < row.epoch < 1000 for row in rows)
    )


def test_goes_on_from_its_state_in_the_middle_of_an_epoch() -> None:
    def feed(log: MetricsLog, steps: range) -> None:
        for step in steps:
            values = {"loss": 1 / step, "tokens": 10.0, "step_time_s": 0.5}
            log.add_step(step, (step - 1) // 10, values)
            if step % 10 == 5:
                log.add_to_epoch((step - 1) // 10, {"val_loss": 2 / step}, {})

    whole, first, second = MetricsLog(7), MetricsLog(7), MetricsLog(3)
    feed(whole, range(1, 36))
    feed(first, range(1, 18))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    feed(second, range(18, 36))
    assert second.state_dict() == whole.state_dict()
    assert second.epochs() == whole.epochs()


def test_the_state_does_not_change_with_the_log_it_came_from() -> None:
    log = MetricsLog(1)
    log.add_step(1, 0, {"loss": 1.0})
    state = log.state_dict()
    before = json.dumps(state)
    log.add_step(2, 1, {"loss": 2.0})
    assert json.dumps(state) == before


def test_the_collector_works_by_hand(tmp_path: Path) -> None:
    collector = TrainingMetricsCollector(sample_every_n_steps=2, metadata={"experiment_id": "e1", "lab": "x"})
    for loss in (0.9, 0.7, 0.5):
        collector.record_batch_metric({"loss": loss, "my_metric": 2 * loss})
    collector.record_epoch_metric({"epoch": 0, "loss": 0.6, "accuracy": 0.7, "val_loss": 0.8})
    collector.record_epoch_metric({"epoch": 1, "val_loss": 0.4})
    path = collector.export_metrics(tmp_path / "results.json")
    report = TrainingMetricsReport.model_validate(json.loads(path.read_text()))
    assert report.metadata.experiment_id == "e1"
    assert report.metadata.extra == {"lab": "x"}
    assert report.statistics["loss"].mean == pytest.approx(0.7)
    assert report.statistics["my_metric"].last == 1.0
    assert report.batches == [{"step": 2, "loss": 0.7, "my_metric": 1.4}]
    rows: list[EpochRow] = report.epochs
    assert [(r.epoch, r.train_loss, r.val_loss, r.accuracy) for r in rows] == [
        (0, 0.6, 0.8, 0.7),
        (1, None, 0.4, None),
    ]
    assert rows[1].improvement == pytest.approx(0.5)


@pytest.mark.parametrize("numbered", [False, True])
def test_by_hand_an_epochs_steps_and_figures_are_in_one_row(numbered: bool) -> None:
    """As in the README, epoch after epoch, whether or not the steps say which epoch theirs is."""
    collector = TrainingMetricsCollector()
    for epoch in range(3):
        for loss in (3.0, 1.0):
            collector.record_batch_metric({"loss": loss - epoch, **({"epoch": epoch} if numbered else {})})
        collector.record_epoch_metric({"epoch": epoch, "accuracy": epoch / 4})
    rows = collector.report().epochs
    assert [(r.epoch, r.step, r.train_loss, r.accuracy) for r in rows] == [
        (0, 2, 2.0, 0.0),
        (1, 4, 1.0, 0.25),
        (2, 6, 0.0, 0.5),
    ]


def test_the_sampled_steps_as_csv_and_back(tmp_path: Path) -> None:
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    collector.record_batch_metric({"loss": 0.5})
    collector.record_batch_metric({"loss": 0.25, "extra": 3})
    path = collector.export_metrics(tmp_path / "steps.csv")
    assert path.read_text() == "step,loss,extra\n1,0.5,\n2,0.25,3.0\n"


def test_an_epoch_without_its_number_is_refused() -> None:
    with pytest.raises(ValueError, match="need 'epoch', got loss"):
        TrainingMetricsCollector().record_epoch_metric({"loss": 1.0})


@pytest.mark.parametrize("name", ["sample_every_n_steps", "write_every_n_steps"])
def test_an_interval_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0"):
        TrainingMetricsCollector(**{name: 0})


@pytest.mark.parametrize("value", [Path("/x"), {"a": {1, 2}}, object()], ids=lambda v: type(v).__name__)
def test_metadata_that_a_report_cannot_hold_are_refused_at_once(value: object) -> None:
    """Not when the report is written, which would end the run."""
    with pytest.raises(ValueError, match="metadata 'data' is no JSON"):
        TrainingMetricsCollector(metadata={"data": value})


@pytest.mark.parametrize("csv", [True, False])
def test_a_json_report_in_a_csv_file_is_refused(csv: bool) -> None:
    with pytest.raises(ValueError, match=r"path is steps\.csv, expected one for the JSON report; csv=True"):
        TrainingMetricsCollector("steps.csv", csv=csv)
