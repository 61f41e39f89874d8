"""The two JSON reports: their fields, as pydantic models. A field that was not measured is None."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ryzen_callbacks.atomic_file import write_json

Status = Literal["PASS", "WARNING", "FAIL", "NOT_MEASURED"]
Severity = Literal["warning", "critical"]


class _Report(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)

    schema_version: int = 1

    def write(self, path: str | Path) -> Path:
        """Write the report as strict JSON, atomically; returns the path."""
        return write_json(path, self.model_dump(mode="python"))


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class RunMetadata(_Part):
    """Which run this is and where it ran. Times are ISO 8601 in UTC. `extra` is what the caller added."""

    experiment_id: str
    model: str | None = None
    started_at: str | None = None
    finished_at: str | None = None
    status: Literal["running", "finished", "failed"] = "running"
    environment: dict[str, Any]
    extra: dict[str, Any] = {}


class MetricStatistics(_Part):
    """Statistics of one metric over the run; `std` is the sample standard deviation."""

    count: int
    mean: float | None = None
    min: float | None = None
    max: float | None = None
    std: float | None = None
    first: float | None = None
    last: float | None = None
    non_finite: int = 0


class EpochRow(_Part):
    """One epoch. Every None has its reason in `not_measured`."""

    epoch: int
    step: int | None = None
    """Optimizer steps done when the row was made."""
    train_loss: float | None = None
    val_loss: float | None = None
    accuracy: float | None = None
    tokens_per_second: float | None = None
    compression_ratio: float | None = None
    speedup: float | None = None
    improvement: float | None = None
    metrics: dict[str, MetricStatistics] = {}
    """Statistics of every metric over this epoch's optimizer steps."""
    not_measured: dict[str, str] = {}


class AnomalyRow(_Part):
    """One anomaly; `expected` is the [low, high] that the value should have kept to, None where open."""

    step: int
    kind: str
    severity: Severity
    value: float | None
    expected: tuple[float | None, float | None]
    message: str


class TrainingMetricsReport(_Report):
    """training_metrics_report.json."""

    metadata: RunMetadata
    statistics: dict[str, MetricStatistics] = {}
    epochs: list[EpochRow] = []
    batches: list[dict[str, float | None]] = []
    """Sampled steps: step, loss, learning_rate, grad_norm, tokens_per_second, and what else there was."""
    batches_every_n_steps: int
    anomalies: list[AnomalyRow] = []


class Quantity(_Part):
    """One arm's figure: its name, the value and the unit."""

    name: str
    value: float | None
    unit: str


class Samples(_Part):
    """What was measured. For time: per round, each arm's mean of its two timings in seconds, and in `control`
    the baseline's two timings themselves, in the order taken. For loss: per batch. For memory: one figure.
    """

    baseline: list[float] = []
    optimized: list[float] = []
    control: list[tuple[float, float]] = []


class Control(_Part):
    """The A/A measurement: the baseline against itself; a sound set-up gives an interval around 1."""

    ratio: float
    ci_low: float | None
    ci_high: float | None


class ValidationResult(_Part):
    """The verdict on one claim, with everything needed to compute it again."""

    name: str
    description: str = ""
    metric: str
    measured: float | None = None
    ci_low: float | None = None
    ci_high: float | None = None
    threshold: float
    tolerance: float = 0.0
    status: Status
    message: str
    baseline: Quantity | None = None
    optimized: Quantity | None = None
    rounds: int | None = None
    samples: Samples | None = None
    control: Control | None = None


class ValidationSummary(_Part):
    """How many claims came out how. `pass_rate` is passed / measured, None if none was measured."""

    total: int
    passed: int
    failed: int
    warnings: int
    not_measured: int
    pass_rate: float | None


class ValidationReport(_Report):
    """validation_report.json."""

    environment: dict[str, Any]
    summary: ValidationSummary
    results: list[ValidationResult]

    @classmethod
    def of(cls, results: list[ValidationResult], environment: dict[str, Any]) -> ValidationReport:
        """The report of `results`, with its summary counted from them."""
        count = {status: sum(r.status == status for r in results) for status in ("PASS", "FAIL", "WARNING")}
        measured = sum(count.values())
        summary = ValidationSummary(
            total=len(results),
            passed=count["PASS"],
            failed=count["FAIL"],
            warnings=count["WARNING"],
            not_measured=len(results) - measured,
            pass_rate=count["PASS"] / measured if measured else None,
        )
        return cls(environment=environment, summary=summary, results=results)
