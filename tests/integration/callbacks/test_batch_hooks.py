"""Lightning is kept from calling hooks that do nothing, and from nothing else."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from ryzen_callbacks import AnomalyDetector, OptimizationValidator, TrainingMetricsCollector
from ryzen_callbacks.batch_hooks import BATCH_HOOKS
from tiny_run import Tiny


class Watching(AnomalyDetector):
    """A user's own subclass, with a hook of its own where ours has none and one where ours has one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"on_after_backward": 0, "on_train_batch_end": 0}

    def on_after_backward(self, *_: Any) -> None:
        self.seen["on_after_backward"] += 1

    def on_train_batch_end(self, *arguments: Any) -> None:
        super().on_train_batch_end(*arguments)
        self.seen["on_train_batch_end"] += 1


def called(callback: Any) -> set[str]:
    """The hooks that Lightning calls at every batch."""
    return {name for name in BATCH_HOOKS if callable(getattr(callback, name))}


def test_only_the_callback_that_records_is_called_at_every_batch_and_subclasses_keep_their_hooks(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    collector, detector, validator = TrainingMetricsCollector(), Watching(), OptimizationValidator()
    make_trainer(callbacks=[validator, collector, detector], max_epochs=1).fit(Tiny(), make_loader())
    recording = {"on_before_optimizer_step", "on_train_batch_end"}
    assert called(validator) == set()
    assert called(collector) == recording
    assert called(detector) == set(detector.seen)
    assert detector.seen == {"on_after_backward": 16, "on_train_batch_end": 16}
    assert detector.last_step == 16


def test_a_callback_that_followed_records_when_it_is_first_in_another_trainer(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    detector = AnomalyDetector()
    make_trainer(callbacks=[TrainingMetricsCollector(), detector], max_epochs=1).fit(Tiny(), make_loader())
    make_trainer(callbacks=[detector], max_epochs=1).fit(Tiny(), make_loader())
    assert detector.last_step == 32


@pytest.mark.parametrize("after_a_fit", [False, True])
def test_callbacks_can_still_be_copied_and_pickled(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], after_a_fit: bool
) -> None:
    callbacks = TrainingMetricsCollector(), AnomalyDetector(), OptimizationValidator()
    if after_a_fit:
        make_trainer(callbacks=list(callbacks), max_epochs=1).fit(Tiny(), make_loader())
    for callback in callbacks:
        for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
            assert called(twin) == called(callback)
