"""Which steps have times, and what is a wait for data."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from ryzen_callbacks import TrainingMetricsCollector
from tiny_run import Tiny
from torch.utils.data import DataLoader


def test_the_first_step_of_each_epoch_is_not_timed_and_the_others_are(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    make_trainer(callbacks=[collector], val_check_interval=8).fit(tiny, make_loader(), make_loader(16))
    report = collector.report()
    assert untimed(collector) == [1, 9, 17, 25]
    for row, steps in zip(report.epochs, (report.batches[:16], report.batches[16:]), strict=True):
        timed = [b for b in steps if "step_time_s" in b]
        seconds = sum(b["step_time_s"] or 0 for b in timed)
        assert row.tokens_per_second == pytest.approx(sum(b["tokens"] or 0 for b in timed) / seconds)
        for b in timed:
            assert 0 < (b["data_wait_s"] or 0) < (b["step_time_s"] or 0)


def untimed(collector: TrainingMetricsCollector) -> list[float | None]:
    return [b["step"] for b in collector.report().batches if "step_time_s" not in b]


@pytest.mark.parametrize("weights_only", [False, True])
def test_the_step_after_a_checkpoint_is_not_timed(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any], weights_only: bool
) -> None:
    """Written between batches, at 5, 10 and 15; for one of weights only no callback is asked for a state."""
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    saver = ModelCheckpoint(every_n_train_steps=5, save_weights_only=weights_only)
    trainer = make_trainer(callbacks=[collector, saver], max_epochs=1, enable_checkpointing=True)
    trainer.fit(tiny, make_loader())
    assert untimed(collector) == [1, 6, 11, 16]
    assert "save_checkpoint" not in vars(trainer)  # it is followed while training goes on only


def test_the_step_after_a_report_is_not_timed(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """Writing a report of 10,000 steps takes a second."""
    collector = TrainingMetricsCollector(sample_every_n_steps=1, write_every_n_steps=6)
    make_trainer(callbacks=[collector], max_epochs=1).fit(tiny, make_loader())
    assert untimed(collector) == [1, 7, 13]


def slowed(data: DataLoader[Any], monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of the recorder's own, on which each batch of `data` takes a second."""
    clock = [0.0]
    monkeypatch.setattr("ryzen_callbacks.step_recorder.time.perf_counter", lambda: clock[0])
    collate = data.collate_fn

    def slowly(samples: Any) -> Any:
        clock[0] += 1.0
        return collate(samples)

    data.collate_fn = slowly
    return clock


class Takes(Callback):
    """Makes the clock go on by as many seconds as it is told, in its hooks of a batch."""

    def __init__(self, clock: list[float], seconds: float) -> None:
        self.clock, self.seconds = clock, seconds

    def on_train_batch_start(self, *_: Any) -> None:
        self.clock[0] += self.seconds

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock[0] += self.seconds


@pytest.mark.parametrize("order", [1, -1], ids=["collector first", "collector last"])
@pytest.mark.parametrize("stream", [False, True])
def test_data_wait_is_the_wait_for_the_loader_and_no_other(
    tiny: Tiny,
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    order: int,
    stream: bool,
) -> None:
    """Two batches a step, each 1 s of the loader; 2 s of another callback before it and 2 s after it. Of a
    stream, whose length is not known, Lightning asks for a batch in advance, and for none at the end.
    """
    data = make_loader(32, stream=stream)
    clock = slowed(data, monkeypatch)
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    callbacks = [collector, Takes(clock, 2.0)][::order]
    make_trainer(callbacks=callbacks, max_epochs=1, accumulate_grad_batches=2).fit(tiny, data)
    times = [(b["step_time_s"], b["data_wait_s"]) for b in collector.report().batches[1:]]
    assert times == [(10.0, 2.0), (10.0, 2.0), (9.0, 1.0) if stream else (10.0, 2.0)]


class FetchesItself(Tiny):
    """Takes its batches from the loader's iterator itself, as Lightning allows."""

    def training_step(self, dataloader_iter: Any) -> torch.Tensor:  # type: ignore[override]
        batch, *_ = next(dataloader_iter)
        return self.loss(batch)


def test_data_wait_of_a_module_that_fetches_its_batches_itself(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_loader()
    slowed(data, monkeypatch)
    collector = TrainingMetricsCollector(sample_every_n_steps=1)
    make_trainer(callbacks=[collector], max_epochs=1).fit(FetchesItself(), data)
    waits = [b["data_wait_s"] for b in collector.report().batches[1:]]
    assert len(waits) >= 14
    assert set(waits) == {1.0}
