"""The callback that collects a run's metrics and writes the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from ryzen_callbacks.atomic_file import write_text
from ryzen_callbacks.detector import AnomalyDetector, detectors_of
from ryzen_callbacks.device_peaks import peak_flops
from ryzen_callbacks.environment import describe_environment
from ryzen_callbacks.metrics_log import EPOCH_FIELDS, MetricsLog
from ryzen_callbacks.report_path import prepare_report_path, refuse_shared_path
from ryzen_callbacks.reports import MetricStatistics, RunMetadata, TrainingMetricsReport
from ryzen_callbacks.step_callback import StepCallback
from ryzen_callbacks.step_logging import log_restart, log_steps
from ryzen_callbacks.step_recorder import Step
from ryzen_callbacks.trainer_values import logged_in_epoch, sent_to_loggers, validated

REPORT_NAME = "training_metrics_report.json"
_COMPONENT_FIGURES = ("compression_ratio", "speedup")


class TrainingMetricsCollector(StepCallback):
    """Collects loss, learning rates, gradient norm, rates and times per optimizer step, and reports them.

    Every step's values go to the Trainer's loggers as `train/<name>` with the number of optimizer steps done
    as x, unless the module itself has logged something there under that name, and into the report's
    statistics as `<name>`; see `StepCallback` for the names and `TrainingMetricsReport` for the report. It
    also works by hand, outside a Trainer:

        collector = TrainingMetricsCollector()
        collector.record_batch_metric({"loss": 0.6, "learning_rate": 1e-3})
        collector.record_epoch_metric({"epoch": 0, "loss": 0.5, "accuracy": 0.7})
        collector.export_metrics("results.json")

    An epoch's `train_loss` is the mean over its optimizer steps, `tokens_per_second` its tokens over its
    time, timed steps only, and `improvement` the relative fall of the validation loss against the epoch
    before (of the training loss where there is no validation). A resumed run goes on with the report of the
    interrupted one. A report that cannot be written while training goes on, or after an error, is a warning.

    Args:
        path: the JSON report; None: `training_metrics_report.json` in the Trainer's log directory.
        csv: also write the sampled steps beside it as CSV, at the end of the run.
        sample_every_n_steps: keep every n-th step's values in the report.
        write_every_n_steps: write the report at least this often (at log intervals), and at the end.
        tokens_in_batch: counts the tokens of a batch; None: the module's `tokens_in_batch(batch)` if it has
            one, else tokens are not measured. Say there whether padding counts. A count that is on the device
            is waited for at every batch.
        flops_per_token: training FLOPs per token (forward and backward; see `count_flops`), for `mfu`: that
            times tokens per second over the device's dense peak. No `mfu` where the peak is not known (see
            `device_peaks`).
        val_loss: name under which the module logs its validation loss.
        accuracy: name under which the module logs its validation accuracy.
        metadata: `experiment_id` and `model` name the run (defaults: a random id, the module's class);
            whatever else is given goes to the report's `metadata.extra` as JSON.
        name: tells several collectors in one Trainer apart, and their states in a checkpoint. Each needs a
            `path` of its own; the first of them has the loggers.

    Raises:
        ValueError: an interval below 1, metadata that are no JSON, a `path` that ends in .csv;
            at set-up: a report path that cannot be written, or that another callback writes to.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        csv: bool = False,
        sample_every_n_steps: int = 100,
        write_every_n_steps: int = 1000,
        tokens_in_batch: Callable[[Any], int] | None = None,
        flops_per_token: float | None = None,
        val_loss: str = "val_loss",
        accuracy: str = "val_accuracy",
        metadata: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        for argument, value in (
            ("sample_every_n_steps", sample_every_n_steps),
            ("write_every_n_steps", write_every_n_steps),
        ):
            if value < 1:
                raise ValueError(f"{argument} is {value}, expected 1 or more")
        self.path = Path(path) if path is not None else None
        if self.path is not None and self.path.suffix == ".csv":
            raise ValueError(
                f"path is {path}, expected one for the JSON report; csv=True puts a CSV file beside it"
            )
        self.csv = csv
        self.write_every_n_steps = write_every_n_steps
        self.tokens_in_batch = tokens_in_batch
        self.flops_per_token = flops_per_token
        self._names = {"val_loss": val_loss, "accuracy": accuracy}
        extra = dict(metadata or {})
        experiment_id, model = extra.pop("experiment_id", None), extra.pop("model", None)
        for key, value in extra.items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"metadata {key!r} is no JSON: {error}") from error
        self._metadata = RunMetadata(
            experiment_id=uuid4().hex[:12] if experiment_id is None else str(experiment_id),
            model=model,
            started_at=_now(),
            environment=describe_environment(),
            extra=extra,
        )
        self._log = MetricsLog(sample_every_n_steps)
        self._detectors: list[AnomalyDetector] = []
        self._destination = self.path
        self._has_the_loggers = False
        self._in_training = False
        self._next_epoch = 0
        self._ended: tuple[int, dict[str, Any]] | None = None
        self._written_at = 0
        self._peak: float | None = None

    # By hand

    def record_batch_metric(self, metrics: Mapping[str, float]) -> None:
        """Record one optimizer step's values; without `step` and `epoch` among them, of the next step and of
        the running epoch: that of the step before, or the next one if its metrics have been recorded.

        Raises:
            ValueError: a value that is no number.
        """
        values = _numbers(metrics)
        self.last_step = int(values.pop("step", self.last_step + 1))
        self._next_epoch = int(values.pop("epoch", self._next_epoch))
        self._log.add_step(self.last_step, self._next_epoch, values)

    def record_epoch_metric(self, metrics: Mapping[str, float]) -> None:
        """Record an epoch's values: `epoch` (required), then any; `loss` means `train_loss`.

        Raises:
            ValueError: no `epoch`, or a value that is no number.
        """
        if "epoch" not in metrics:
            raise ValueError(f"an epoch's metrics need 'epoch', got {', '.join(metrics) or 'nothing'}")
        values = _numbers(metrics)
        epoch = int(values.pop("epoch"))
        if "loss" in values:
            values["train_loss"] = values.pop("loss")
        self._next_epoch = epoch + 1
        self._log.add_epoch_statistics(epoch, values)
        self._log.add_to_epoch(epoch, {n: v for n, v in values.items() if n in EPOCH_FIELDS}, {})

    def statistics(self) -> dict[str, MetricStatistics]:
        """Statistics of every metric so far."""
        return self._log.summary()

    def report(self) -> TrainingMetricsReport:
        """The report as it stands."""
        return TrainingMetricsReport(
            metadata=self._metadata.model_copy(),
            statistics=self._log.summary(),
            epochs=self._log.epochs(),
            batches=list(self._log.batches),
            batches_every_n_steps=self._log.sample_every_n_steps,
            anomalies=[row for detector in self._detectors for row in detector.rows()],
        )

    def export_metrics(self, path: str | Path) -> Path:
        """Write the report, atomically, as JSON; to a path ending in .csv, the sampled steps as CSV.

        Returns the path.
        """
        if Path(path).suffix == ".csv":
            return write_text(path, self._log.sampled_csv())
        return self.report().write(path)

    # In a Trainer

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Settle where the report goes, and fail now rather than after training if it cannot go there."""
        super().setup(trainer, pl_module, stage)
        self._in_training = False
        if stage != "fit":
            return
        self._destination = None  # nothing is written if the next line raises
        self._destination = prepare_report_path(trainer, self.path, REPORT_NAME)
        refuse_shared_path(trainer, self, self._destination)
        collectors = [c for c in trainer.callbacks if isinstance(c, TrainingMetricsCollector)]  # type: ignore[attr-defined]
        self._has_the_loggers = collectors[0] is self
        self._detectors = detectors_of(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what runs, and on what."""
        super().on_train_start(trainer, pl_module)
        self._metadata.model = self._metadata.model or type(pl_module).__name__
        self._metadata.status = "running"
        self._metadata.finished_at = None
        self._ended = None
        self._in_training = True
        self._written_at = self.last_step
        if self.last_step and self._has_the_loggers:
            log_restart(trainer, self.last_step)
        peak = peak_flops(pl_module.device, str(trainer.precision))
        self._peak = peak * trainer.world_size if peak is not None else None

    def on_steps(self, trainer: Trainer, pl_module: LightningModule, steps: list[Step]) -> None:
        """Log and add up; write the report if it is time to."""
        for step in steps:
            values = step.values
            if self.flops_per_token and self._peak and "tokens_per_second" in values:
                values["mfu"] = self.flops_per_token * values["tokens_per_second"] / self._peak
            self._log.add_step(step.step, step.epoch, values)
            if figures := _component_figures(values):
                self._log.add_to_epoch(step.epoch, figures, {})
        if self._has_the_loggers:
            log_steps(trainer.loggers, steps, without=sent_to_loggers(trainer))
        if self.last_step - self._written_at >= self.write_every_n_steps:
            self._write(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the validation's figures into the running epoch's row."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        logged = validated(trainer, self._names.values(), pl_module.device)
        given = {field: logged[name] for field, name in self._names.items() if name in logged}
        missing = {
            field: f"the module logged no {name!r} in validation"
            for field, name in self._names.items()
            if name not in logged
        }
        self._log.add_to_epoch(trainer.current_epoch, given, missing)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take what the module logged for the whole epoch into its row."""
        super().on_train_epoch_end(trainer, pl_module)
        figures = _component_figures(logged_in_epoch(trainer))
        self._log.add_to_epoch(trainer.current_epoch, figures, {})
        self._ended = trainer.current_epoch, dict(trainer.callback_metrics)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in what is late of the epoch before."""
        super().on_train_epoch_start(trainer, pl_module)
        self._take_late_figures(trainer)
        self._ended = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of a finished run."""
        self._take_late_figures(trainer)
        self._finish(trainer, "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write the report of a run that ends here; not of one that was over or has not begun."""
        super().on_exception(trainer, pl_module, exception)
        if self._in_training:
            self._finish(trainer, "failed")
            self._in_training = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The report is done: what goes wrong from now on is not of this run."""
        super().teardown(trainer, pl_module, stage)
        self._in_training = False

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to end with the report of an uninterrupted one."""
        if self._trainer is not None:
            self._take_late_figures(self._trainer)
        return {
            **super().state_dict(),
            "log": self._log.state_dict(),
            "experiment_id": self._metadata.experiment_id,
            "started_at": self._metadata.started_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        super().load_state_dict(state_dict)
        self._log.load_state_dict(state_dict["log"])
        self._metadata.experiment_id = state_dict["experiment_id"]
        self._metadata.started_at = state_dict["started_at"]

    def _take_late_figures(self, trainer: Trainer) -> None:
        """What the module logged in its own `on_train_epoch_end`, which is called after the callbacks'."""
        if self._ended is not None:
            epoch, before = self._ended
            logged = trainer.callback_metrics
            late = {n: logged[n] for n in _COMPONENT_FIGURES if logged.get(n) is not before.get(n)}
            self._log.add_to_epoch(epoch, _component_figures(late), {})

    def _finish(self, trainer: Trainer, status: Literal["finished", "failed"]) -> None:
        self._metadata.status = status
        self._metadata.finished_at = _now()
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self._written_at = self.last_step
        self._break_clock()  # on every rank: the others wait for the first one
        if self._destination is None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        try:
            self.report().write(self._destination)
            if self.csv and self._metadata.status != "running":
                self.export_metrics(self._destination.with_suffix(".csv"))
        except OSError as error:
            if self._metadata.status == "finished":
                raise
            rank_zero_warn(f"the report was not written: {error}")


def _component_figures(values: Mapping[str, Any]) -> dict[str, float]:
    """Figures about the model that an epoch's row has room for, if the module logs them."""
    return {name: float(values[name]) for name in _COMPONENT_FIGURES if name in values}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{name!r} is {value!r}, expected a number; leave out what was not measured"
            ) from error
    return numbers


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
