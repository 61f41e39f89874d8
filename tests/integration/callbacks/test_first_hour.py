"""What somebody meets who gives the callbacks to a project of their own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ryzen_callbacks import AnomalyDetector, Claim, OptimizationValidator, TrainingMetricsCollector
from tiny_run import Tiny
from torch.optim import Optimizer


class HasANumber(Tiny):
    """A setting of its own is called as the collector's hook is."""

    tokens_in_batch = 32  # type: ignore[assignment]


def test_a_modules_setting_called_tokens_in_batch_is_no_count_of_tokens(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    collector = TrainingMetricsCollector()
    make_trainer(callbacks=[collector], max_epochs=1).fit(HasANumber(), make_loader())
    assert "tokens" not in collector.statistics()
    assert collector.statistics()["loss"].count == 16


class NoOptimizer(Tiny):
    def configure_optimizers(self) -> Any:
        return None

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Not Tiny's, which looks at the learning rate."""


def test_a_module_without_an_optimizer_runs_as_it_does_without_callbacks(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    collector = TrainingMetricsCollector()
    detector = AnomalyDetector({"non_finite": "rollback"})
    module = NoOptimizer()
    make_trainer(callbacks=[collector, detector], max_epochs=1).fit(module, make_loader())
    assert len(module.batch_losses) == 16
    assert collector.statistics()["loss"].count == 16
    assert "learning_rate" not in collector.statistics()


class LogsPercent(Tiny):
    """Its validation accuracy is in percent: half a point less in the second epoch, ten less in the last."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_accuracy", (80.0, 79.5, 80.2, 70.0)[self.current_epoch])


def test_an_accuracy_in_percent_falls_by_points(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector({"accuracy_drop": "record"})
    make_trainer(callbacks=[detector], max_epochs=4, num_sanity_val_steps=0).fit(
        LogsPercent(), make_loader(), make_loader(8)
    )
    (found,) = (a for a in detector.anomalies if a.kind == "accuracy_drop")
    assert (found.step, found.value) == (64, pytest.approx(70.0))
    assert found.expected[0] == pytest.approx(75.2)


def pairs(folder: Path) -> dict[str, list[Any]]:
    """Two callbacks that would write the same file."""
    shared = folder / "report.json"
    claim = Claim(name="half", baseline=lambda: 2, optimized=lambda: 1, measure="bytes", threshold=2.0)
    return {
        "validators": [OptimizationValidator([claim]), OptimizationValidator()],
        "detectors": [AnomalyDetector(path=shared), AnomalyDetector(path=shared, name="second")],
        "collector and detector": [TrainingMetricsCollector(shared), AnomalyDetector(path=shared)],
        "detector and validator": [AnomalyDetector(path=shared), OptimizationValidator(path=shared)],
    }


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", pairs(Path()))
def test_two_callbacks_that_write_one_file_are_refused_before_training(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    name: str,
    order: int,
) -> None:
    with pytest.raises(ValueError, match=r"both report to .*report\.json; give each a path of its own"):
        make_trainer(callbacks=pairs(tmp_path)[name][::order]).fit(tiny, make_loader())
    assert tiny.batch_losses == []


def test_actions_that_are_no_mapping_are_refused_with_an_example() -> None:
    with pytest.raises(TypeError, match=r"actions is 'stop', expected .* such as \{'non_finite': 'stop'\}"):
        AnomalyDetector("stop")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, "high", [1.0]])
def test_a_value_given_by_hand_that_is_no_number_is_named(value: Any) -> None:
    collector = TrainingMetricsCollector()
    for record in (collector.record_batch_metric, collector.record_epoch_metric):
        with pytest.raises(ValueError, match=r"'accuracy' is .*, expected a number; leave out what was not"):
            record({"epoch": 0, "loss": 0.5, "accuracy": value})
    assert collector.statistics() == {}


def test_a_run_that_was_given_no_name_gets_one() -> None:
    """As of an environment variable that is not set."""
    collector = TrainingMetricsCollector(metadata={"experiment_id": None, "model": None})
    assert collector.report().metadata.experiment_id not in ("None", "")
