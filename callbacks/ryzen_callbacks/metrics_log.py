"""What a run's metrics add up to: statistics, epoch rows and sampled steps. Knows no Lightning."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ryzen_callbacks.reports import EpochRow, MetricStatistics
from ryzen_callbacks.running_statistics import RunningStatistics

_MAX_SAMPLED_STEPS = 10_000
_MAX_EPOCHS = 1_000
EPOCH_FIELDS = (
    "train_loss",
    "val_loss",
    "accuracy",
    "tokens_per_second",
    "compression_ratio",
    "speedup",
    "improvement",
)


@dataclass(slots=True)
class _Epoch:
    """An epoch while it runs."""

    epoch: int
    step: int = 0
    statistics: dict[str, RunningStatistics] = field(default_factory=dict)
    timed_tokens: float = 0.0
    timed_seconds: float = 0.0
    given: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def push(self, values: Mapping[str, float]) -> None:
        _push(self.statistics, values)


class MetricsLog:
    """Streaming aggregates in bounded memory.

    Every `sample_every_n_steps`-th step is kept as it is; when more than 10,000 are kept, every other one
    goes and the interval doubles. When more than 1,000 epochs are over, every other one goes.
    """

    def __init__(self, sample_every_n_steps: int) -> None:
        self.sample_every_n_steps = sample_every_n_steps
        self.batches: list[dict[str, float | None]] = []
        self._finished: list[_Epoch] = []
        self._past: dict[str, RunningStatistics] = {}
        """Of the finished epochs."""
        self._epoch: _Epoch | None = None

    def add_step(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Take in one optimizer step. Values that are missing were not measured at this step."""
        current = self._enter(epoch)
        current.step = step
        current.push(values)
        seconds = values.get("step_time_s")
        if seconds is not None and "tokens" in values:
            current.timed_tokens += values["tokens"]
            current.timed_seconds += seconds
        if step % self.sample_every_n_steps == 0:
            row: dict[str, float | None] = {"step": step, **values}
            row["step"] = step  # whatever else is called so
            self._sample(row)

    def add_to_epoch(self, epoch: int, given: Mapping[str, float], reasons: Mapping[str, str]) -> None:
        """Fields of an epoch's row that do not follow from its steps, and why others are missing."""
        current = self._find(epoch)
        current.given.update(given)
        current.reasons.update(reasons)

    def add_epoch_statistics(self, epoch: int, values: Mapping[str, float]) -> None:
        """Values that were measured once in an epoch, into the statistics of the run and of the epoch."""
        current = self._find(epoch)
        current.push(values)
        if current is not self._epoch:
            _push(self._past, values)

    def epochs(self) -> list[EpochRow]:
        """All rows, with the running epoch's as it stands."""
        rows: list[EpochRow] = []
        for epoch in (*self._finished, self._epoch):
            if epoch is not None:
                rows.append(_row(epoch, rows[-1] if rows else None))
        return rows

    def summary(self) -> dict[str, MetricStatistics]:
        """Statistics of every metric over the run."""
        return {name: _summary(running) for name, running in self._statistics().items()}

    def sampled_csv(self) -> str:
        """The sampled steps as CSV, a column for each value ever seen, empty where a step has it not."""
        columns = list(dict.fromkeys(name for batch in self.batches for name in batch))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns or ["step"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.batches)
        return text.getvalue()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python state, enough to go on exactly, in the middle of an epoch too."""
        return {
            "sample_every_n_steps": self.sample_every_n_steps,
            "past": {n: s.state_dict() for n, s in self._past.items()},
            "batches": [dict(b) for b in self.batches],
            "finished": [asdict(epoch) for epoch in self._finished],
            "epoch": asdict(self._epoch) if self._epoch is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.sample_every_n_steps = state["sample_every_n_steps"]
        self._past = _load_statistics(state["past"])
        self.batches = [dict(b) for b in state["batches"]]
        self._finished = [_load_epoch(epoch) for epoch in state["finished"]]
        self._epoch = _load_epoch(state["epoch"]) if state["epoch"] else None

    def _enter(self, epoch: int) -> _Epoch:
        """The running epoch, after finishing the one before it if this is another."""
        if self._epoch is None or self._epoch.epoch != epoch:
            if self._epoch is not None:
                self._past = self._statistics()
                self._finished.append(self._epoch)
                self._epoch = None
                if len(self._finished) > _MAX_EPOCHS:
                    self._thin_epochs()
            self._epoch = _Epoch(epoch)
        return self._epoch

    def _find(self, epoch: int) -> _Epoch:
        """The epoch of that number, be it the running one or one that is over; else a new one."""
        if self._epoch is not None and self._epoch.epoch != epoch:
            for over in reversed(self._finished):
                if over.epoch == epoch:
                    return over
        return self._enter(epoch)

    def _thin_epochs(self) -> None:
        for epoch, row in zip(self._finished, self.epochs(), strict=True):
            if row.improvement is not None:
                epoch.given["improvement"] = row.improvement  # against an epoch that may go now
        del self._finished[-2::-2]  # the last one stays: the next is compared with it

    def _statistics(self) -> dict[str, RunningStatistics]:
        """Of the whole run."""
        now = self._epoch.statistics if self._epoch is not None else {}
        names = dict.fromkeys([*self._past, *now])
        none = RunningStatistics()
        return {name: self._past.get(name, none).merge(now.get(name, none)) for name in names}

    def _sample(self, batch: dict[str, float | None]) -> None:
        self.batches.append(batch)
        if len(self.batches) > _MAX_SAMPLED_STEPS:
            self.sample_every_n_steps *= 2
            self.batches = [b for b in self.batches if (b["step"] or 0) % self.sample_every_n_steps == 0]


def _row(epoch: _Epoch, before: EpochRow | None) -> EpochRow:
    loss = epoch.statistics.get("loss")
    values: dict[str, float | None] = dict.fromkeys(EPOCH_FIELDS)
    values["train_loss"] = _known(loss.mean) if loss is not None else None
    if epoch.timed_seconds > 0:
        values["tokens_per_second"] = epoch.timed_tokens / epoch.timed_seconds
    values.update({n: v for n, v in epoch.given.items() if math.isfinite(v)})
    improvement, why_not = _improvement(values, before)
    values["improvement"] = improvement if values["improvement"] is None else values["improvement"]
    reasons = {**_DEFAULT_REASONS, "improvement": why_not, **epoch.reasons}
    reasons |= {n: f"the value was {v}" for n, v in epoch.given.items() if not math.isfinite(v)}
    return EpochRow(
        epoch=epoch.epoch,
        step=epoch.step or None,
        **values,
        metrics={name: _summary(running) for name, running in epoch.statistics.items()},
        not_measured={name: reasons[name] for name in EPOCH_FIELDS if values[name] is None},
    )


def _improvement(values: Mapping[str, float | None], before: EpochRow | None) -> tuple[float | None, str]:
    """Relative fall of the validation loss since the epoch before; without one, of the training loss."""
    if before is None:
        return None, "the first epoch has none before it"
    for now, then in ((values["val_loss"], before.val_loss), (values["train_loss"], before.train_loss)):
        if now is not None and then:
            return (then - now) / abs(then), ""
    return None, "no loss was measured in both this epoch and the one before"


_DEFAULT_REASONS = {
    "train_loss": "no finite loss was recorded",
    "val_loss": "no validation loss was recorded in this epoch",
    "accuracy": "no accuracy was recorded in this epoch",
    "tokens_per_second": "no step of this epoch had both a token count and a time",
    "compression_ratio": "no compression_ratio was logged",
    "speedup": "no speedup was logged",
}


def _summary(running: RunningStatistics) -> MetricStatistics:
    return MetricStatistics(
        count=running.count,
        mean=_known(running.mean),
        min=_known(running.min),
        max=_known(running.max),
        std=_known(running.std),
        first=_known(running.first),
        last=_known(running.last),
        non_finite=running.non_finite,
    )


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _push(statistics: dict[str, RunningStatistics], values: Mapping[str, float]) -> None:
    for name, value in values.items():
        running = statistics.get(name)
        if running is None:
            running = statistics[name] = RunningStatistics()
        running.push(value)


def _load_epoch(state: dict[str, Any]) -> _Epoch:
    return _Epoch(**{**state, "statistics": _load_statistics(state["statistics"])})


def _load_statistics(state: dict[str, dict[str, Any]]) -> dict[str, RunningStatistics]:
    return {name: RunningStatistics.from_state_dict(s) for name, s in state.items()}
