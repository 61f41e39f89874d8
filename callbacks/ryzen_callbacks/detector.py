"""The callback that watches training for what should not happen."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from ryzen_callbacks.anomaly import Anomaly
from ryzen_callbacks.atomic_file import write_json
from ryzen_callbacks.report_path import prepare_report_path, refuse_shared_path
from ryzen_callbacks.reports import AnomalyRow
from ryzen_callbacks.rollback import LastGood, NoWayBackError
from ryzen_callbacks.rule import Rule
from ryzen_callbacks.rules import KINDS, OF_THE_WEIGHTS, SIGNALS, default_rules
from ryzen_callbacks.step_callback import StepCallback
from ryzen_callbacks.step_recorder import Step
from ryzen_callbacks.trainer_values import validated

Action = Literal["record", "warn", "stop", "rollback"]
CHECKPOINT_NAME = "last_good.ckpt"

_MAX_KEPT = 1000


class AnomalyDetector(StepCallback):
    """Finds what goes wrong in training: see `ryzen_callbacks.rules` for each kind's rule.

    Kinds: loss_spike, grad_norm_spike, non_finite, divergence, plateau (only with `plateau_steps`), stall,
    throughput_drop, data_wait_growth, memory_growth, accuracy_drop.

    The values are looked at when they leave the device, at every `trainer.log_every_n_steps`-th step, so an
    anomaly is reported up to that many steps late, with the step at which it happened. Every rank sees the
    same values and decides alike. By hand, on any sequence:

        detector = AnomalyDetector()
        for step, loss in enumerate(losses):
            for anomaly in detector.update(step=step, loss=loss):
                print(anomaly.message)

    Args:
        actions: what to do about each kind: "record" (only note it), "warn" (the default: also a warning on
            the console), "stop" (also end training after the running batch), or "rollback" (also restore
            weights and optimizer states of the last good checkpoint and go on with the next batch; see
            `LastGood`). A fault that is still there after a rollback is a new one.
        path: a JSON file for the anomalies; None: none (`TrainingMetricsCollector` has them in its report).
            That it cannot be written is a warning while training goes on, and an error at the end.
        plateau_steps: report a loss that has not got better for this many steps; None: never.
        accuracy: name under which the module logs its validation accuracy.
        checkpoint_every_n_steps: how old the last good checkpoint may get; it is written at log intervals at
            which nothing is found and no fault goes on, and only if some kind's action is "rollback".
        max_rollbacks: after this many, the next one stops training instead.
        name: tells several detectors in one Trainer apart, and their states in a checkpoint; only one of them
            may roll back, which the others take into account.

    Raises:
        ValueError: an unknown kind or action, an action for plateau without `plateau_steps`, a count below 1;
            at set-up: a path that cannot be written or that another callback writes to, a second detector
            that may roll back.
        TypeError: actions that are no mapping.
    """

    def __init__(
        self,
        actions: Mapping[str, Action] | None = None,
        path: str | Path | None = None,
        *,
        plateau_steps: int | None = None,
        accuracy: str = "val_accuracy",
        checkpoint_every_n_steps: int = 500,
        max_rollbacks: int = 3,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        if not isinstance(actions, Mapping | None):
            example = "actions by kind, such as {'non_finite': 'stop'}"
            raise TypeError(f"actions is {actions!r}, expected {example}")
        self.actions = dict(actions or {})
        for kind, action in self.actions.items():
            if kind not in KINDS:
                raise ValueError(f"unknown kind of anomaly {kind!r}; there are {', '.join(KINDS)}")
            if action not in get_args(Action):
                raise ValueError(
                    f"action {action!r} for {kind}; expected one of {', '.join(get_args(Action))}"
                )
        if "plateau" in self.actions and plateau_steps is None:
            raise ValueError("an action for plateau needs plateau_steps: without it no plateau is looked for")
        for argument, count in (
            ("plateau_steps", plateau_steps),
            ("checkpoint_every_n_steps", checkpoint_every_n_steps),
            ("max_rollbacks", max_rollbacks),
        ):
            if count is not None and count < 1:
                raise ValueError(f"{argument} is {count}, expected 1 or more")
        self.path = Path(path) if path is not None else None
        self._destination = self.path
        self.accuracy = accuracy
        self.checkpoint_every_n_steps = checkpoint_every_n_steps
        self.max_rollbacks = max_rollbacks
        self.anomalies: list[Anomaly] = []
        """What was found, oldest first; after 1,000 only counted, in `not_kept`."""
        self.not_kept = 0
        self.rollbacks: list[dict[str, int]] = []
        """What was undone: `at_step`, back `to_step`, because of the anomaly at `anomaly_step`."""
        self.refused_rollbacks: list[dict[str, Any]] = []
        """What could not be undone, so that training stopped: `at_step`, `anomaly_step`, and the `reason`."""
        self._rules = default_rules(plateau_steps)
        self._rules_of_weights = [rule for rule in self._rules if rule.kind in OF_THE_WEIGHTS]
        self._last_good: LastGood | None = None
        self._to_undo: Anomaly | None = None
        self._well_at: int | None = None
        self._good_rules: dict[str, dict[str, Any]] = {}
        self._steps_done = 0
        self._in_step = False
        self._undone_up_to = 0

    def update(self, *, step: int, **signals: float | None) -> list[Anomaly]:
        """Judge the values of one optimizer step; return what is found.

        Args:
            step: its number.
            signals: any of loss, grad_norm, step_time (seconds), throughput (per second), data_wait_share (of
                the step's time), memory (bytes), accuracy (0 to 1, or in percent). None: not measured.

        Raises:
            ValueError: a signal of another name.
        """
        if unknown := set(signals) - set(SIGNALS):
            raise ValueError(f"unknown signal {min(unknown)!r}; there are {', '.join(SIGNALS)}")
        return self._judge({name: ([step], [value]) for name, value in signals.items() if value is not None})

    def _judge(self, columns: Mapping[str, tuple[list[int], list[float]]]) -> list[Anomaly]:
        """Judge each signal's steps and values, rule by rule, and keep what is found."""
        found = []
        for rule in self._rules:
            if rule.signal in columns:
                found += rule.update_all(*columns[rule.signal])
        found.sort(key=lambda anomaly: anomaly.step)
        room = _MAX_KEPT - len(self.anomalies)
        self.anomalies.extend(found[:room])
        self.not_kept += len(found[room:])
        return found

    def rows(self) -> list[AnomalyRow]:
        """The anomalies as they stand in a report."""
        return [anomaly.row() for anomaly in self.anomalies]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fail now rather than during training if a file cannot be written."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        self._to_undo, self._undone_up_to = None, 0  # a run that failed may have left something
        if self.path is not None:
            self._destination = prepare_report_path(trainer, self.path, self.path.name)
            refuse_shared_path(trainer, self, self._destination)
        if sum("rollback" in detector.actions.values() for detector in detectors_of(trainer)) > 1:
            raise ValueError("two AnomalyDetectors of one Trainer roll back; give the actions of both to one")
        if "rollback" in self.actions.values() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            checkpoint = prepare_report_path(trainer, None, CHECKPOINT_NAME, may_be_folder=True)
            assert checkpoint is not None
            self._last_good = LastGood(checkpoint, self.checkpoint_every_n_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the state before the first step, so that there is always something to go back to; put this
        run's file in the place of another's.
        """
        super().on_train_start(trainer, pl_module)
        if self._last_good is not None:
            self._keep(trainer, self._last_good, self.last_step)
        self._write(trainer, in_training=False)

    def on_steps(self, trainer: Trainer, pl_module: LightningModule, steps: list[Step]) -> None:
        """Judge the steps and act on what is found."""
        columns: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
        for step in steps:
            if step.step <= self._undone_up_to:
                continue  # its weights are no more
            for name, value in signals_of(step.values).items():
                numbers, values = columns[name]
                numbers.append(step.step)
                values.append(value)
        found = self._judge(columns)
        sound = not found and not any(rule.in_doubt() for rule in self._rules_of_weights)
        self._well_at = self.last_step if sound else None
        self._act(trainer, found)

    def between_batches(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Undo what is to be undone, or keep the present as good if it is what was judged last."""
        self._in_step = step == self._steps_done
        self._steps_done = step
        self._undo(trainer)
        if self._last_good is not None and self._well_at == step:
            self._keep(trainer, self._last_good, step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the steps before it, and validate no weights that are to be undone."""
        super().on_validation_start(trainer, pl_module)
        self._undo(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the epoch's last steps: there may be no batch after them to undo them."""
        super().on_train_epoch_end(trainer, pl_module)
        self._undo(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Judge the validation accuracy."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        accuracy = validated(trainer, [self.accuracy], pl_module.device).get(self.accuracy)
        self._act(trainer, self.update(step=self.last_step, accuracy=accuracy))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make up for what could not be written."""
        self._write(trainer, in_training=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Judge the last steps, and delete the last good checkpoint."""
        super().on_exception(trainer, pl_module, exception)
        self._forget_last_good(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Delete the last good checkpoint: it is of no use to another run."""
        super().teardown(trainer, pl_module, stage)
        self._forget_last_good(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs, the rules' windows included."""
        return {
            **super().state_dict(),
            "anomalies": [{**vars(found), "expected": list(found.expected)} for found in self.anomalies],
            "not_kept": self.not_kept,
            "rollbacks": list(self.rollbacks),
            "refused_rollbacks": list(self.refused_rollbacks),
            "rules": _states(self._rules),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        super().load_state_dict(state_dict)
        self.anomalies = [
            Anomaly(**{**anomaly, "expected": tuple(anomaly["expected"])})
            for anomaly in state_dict["anomalies"]
        ]
        self.not_kept = state_dict["not_kept"]
        self.rollbacks = list(state_dict["rollbacks"])
        self.refused_rollbacks = list(state_dict.get("refused_rollbacks", []))
        _load_states(self._rules, state_dict["rules"])

    def _act(self, trainer: Trainer, found: list[Anomaly]) -> None:
        for anomaly in found:
            action = self.actions.get(anomaly.kind, "warn")
            for logger in trainer.loggers:
                add_text = getattr(getattr(logger, "experiment", None), "add_text", None)
                if trainer.is_global_zero and add_text is not None:
                    add_text(f"anomaly/{anomaly.kind}", anomaly.message, anomaly.step)
            if action != "record":
                rank_zero_warn(anomaly.message)
            if action == "stop":
                trainer.should_stop = True
            elif action == "rollback":
                self._to_undo = self._to_undo or anomaly
        if found:
            self._write(trainer)

    def _keep(self, trainer: Trainer, last_good: LastGood, step: int) -> None:
        if last_good.keep(trainer, step):
            for detector in detectors_of(trainer):
                detector._good_rules = _states(detector._rules_of_weights)

    def _undo(self, trainer: Trainer) -> None:
        if self._last_good is not None and self._to_undo is not None:
            self._roll_back(trainer, self._last_good, self._to_undo)
            self._to_undo = self._well_at = None

    def _roll_back(self, trainer: Trainer, last_good: LastGood, anomaly: Anomaly) -> None:
        if len(self.rollbacks) >= self.max_rollbacks:
            self._refuse(trainer, anomaly, f"there were {self.max_rollbacks} rollbacks")
            return
        try:
            to_step = last_good.restore(trainer)
        except NoWayBackError as error:
            self._refuse(trainer, anomaly, f"there is no going back, as {error}")
            return
        finally:
            self._break_clock()
        for detector in detectors_of(trainer):
            _load_states(detector._rules, detector._good_rules)
            detector._undone_up_to = self._steps_done + self._in_step
        self.rollbacks.append({"at_step": self._steps_done, "to_step": to_step, "anomaly_step": anomaly.step})
        rank_zero_warn(f"weights and optimizer are back at step {to_step}; the batches since are skipped")
        self._write(trainer)

    def _refuse(self, trainer: Trainer, anomaly: Anomaly, reason: str) -> None:
        """Stop, and leave the weights as they are."""
        refused = {"at_step": self._steps_done, "anomaly_step": anomaly.step, "reason": reason}
        self.refused_rollbacks.append(refused)
        rank_zero_warn(f"stopping: {reason}, and {anomaly.message}")
        trainer.should_stop = True
        self._write(trainer)

    def _forget_last_good(self, trainer: Trainer) -> None:
        if self._last_good is not None:
            self._last_good.remove(trainer)
            self._last_good = None

    def _write(self, trainer: Trainer, in_training: bool = True) -> None:
        if self.path is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._break_clock()  # on every rank: the others wait for the first one
        if not trainer.is_global_zero:
            return
        rows = [row.model_dump() for row in self.rows()]
        try:
            found = {
                "anomalies": rows,
                "rollbacks": self.rollbacks,
                "refused_rollbacks": self.refused_rollbacks,
            }
            write_json(self.path, {"schema_version": 1, **found})
        except OSError as error:
            if not in_training:
                raise
            rank_zero_warn(f"the anomalies were not written: {error}")


def detectors_of(trainer: Trainer) -> list[AnomalyDetector]:
    """The Trainer's detectors."""
    return [c for c in trainer.callbacks if isinstance(c, AnomalyDetector)]  # type: ignore[attr-defined]


def _states(rules: list[Rule]) -> dict[str, dict[str, Any]]:
    """The rules' states by kind and signal."""
    return {f"{rule.kind} of {rule.signal}": rule.state_dict() for rule in rules}


def _load_states(rules: list[Rule], states: Mapping[str, dict[str, Any]]) -> None:
    """Load what there is: a rule that is not in `states` stays as it is."""
    for rule in rules:
        if (name := f"{rule.kind} of {rule.signal}") in states:
            rule.load_state_dict(states[name])


def signals_of(values: Mapping[str, float]) -> dict[str, float]:
    """A step's values under the names that the rules know."""
    signals = {signal: values[name] for name, signal in _SIGNAL_OF.items() if name in values}
    step_time = values.get("step_time_s")
    if step_time and "data_wait_s" in values:
        signals["data_wait_share"] = values["data_wait_s"] / step_time
    return signals


_SIGNAL_OF = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "step_time_s": "step_time",
    "samples_per_second": "throughput",
    "tokens_per_second": "throughput",  # the better measure of the two, so it comes last
    "memory_bytes": "memory",
}
