"""A run that is interrupted and resumed reports what an uninterrupted one reports, timings aside."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import Tiny

TIMINGS = ("step_time_s", "data_wait_s", "tokens_per_second", "samples_per_second", "memory_bytes")


class Resumable:
    """A loader that goes on in the middle of an epoch, as Lightning asks of one: by its state."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches
        self.next = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.next = self.next, 0
        for index in range(start, len(self.batches)):
            self.given = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.given % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def without_timings(value: Any) -> Any:
    if isinstance(value, dict):
        timed = (*TIMINGS, "metadata", "not_measured")
        return {key: without_timings(item) for key, item in value.items() if key not in timed}
    if isinstance(value, list):
        return [without_timings(item) for item in value]
    return value


@pytest.mark.parametrize("stop_at", [1, 10, 21])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_resumed_report_equals_the_uninterrupted_one(
    make_trainer: Callable[..., Any],
    make_loader: Callable[..., Any],
    tmp_path: Path,
    stop_at: int,
    accumulate: int,
) -> None:
    """The log interval is 3, so that the checkpoints at 1 and 10 find steps that are not handed out yet.
    A checkpoint on an epoch's last batch is left out: resuming, Lightning skips that epoch's validation.
    """

    def run(
        name: str, checkpoint: Path | None = None, **settings: Any
    ) -> tuple[Any, TrainingMetricsCollector]:
        path = tmp_path / f"{name}.json"
        callbacks = [
            TrainingMetricsCollector(path, sample_every_n_steps=2),
            AnomalyDetector(actions={"stall": "record"}),
            *settings.pop("callbacks", []),
        ]
        trainer = make_trainer(callbacks=callbacks, accumulate_grad_batches=accumulate, **settings)
        data = Resumable(list(make_loader()))
        trainer.fit(Tiny(), data, make_loader(8), ckpt_path=checkpoint)
        return json.loads(path.read_text()), callbacks[0]

    whole, _ = run("whole", max_epochs=4)
    saver = ModelCheckpoint(tmp_path, filename="c", every_n_train_steps=stop_at, save_top_k=1)
    _, first = run("first", max_epochs=4, max_steps=stop_at, callbacks=[saver], enable_checkpointing=True)
    resumed, second = run("second", checkpoint=tmp_path / "c.ckpt", max_epochs=4)
    assert without_timings(resumed) == without_timings(whole)
    assert resumed["metadata"]["experiment_id"] == first.report().metadata.experiment_id
    assert second.last_step == 64 // accumulate


class Crashes(Callback):
    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 13:
            raise KeyError("planted")


def test_a_step_done_twice_has_one_point_in_tensorboard(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], tmp_path: Path
) -> None:
    """The run gets to step 13, beyond its checkpoint at 10, crashes, and goes on from there in its folder.

    TensorBoard reads the files in the order of their names: the second each was begun in, and, of two that
    one process began in the same second, a counter read as text ("10" before "9"). So the second run waits
    for a second of its own, as that of another process would have.
    """

    def run(callbacks: list[Any], checkpoint: Path | None = None) -> str:
        logger = TensorBoardLogger(tmp_path, version="same")
        trainer = make_trainer(
            callbacks=[TrainingMetricsCollector(), *callbacks], logger=logger, enable_checkpointing=True
        )
        trainer.fit(Tiny(), Resumable(list(make_loader())), ckpt_path=checkpoint)
        return str(logger.log_dir)

    saver = ModelCheckpoint(tmp_path, filename="c", every_n_train_steps=10, save_top_k=1)
    with pytest.raises(KeyError, match="planted"):
        run([saver, Crashes()])
    time.sleep(1)
    folder = run([], tmp_path / "c.ckpt")
    assert len(list(Path(folder).glob("events*"))) == 2
    for tag in ("train/loss", "train/grad_norm", "train/learning_rate"):
        points = EventAccumulator(folder).Reload().Scalars(tag)
        assert [point.step for point in points] == list(range(1, 33))


def test_the_state_is_plain_python(
    tiny: Tiny, make_trainer: Callable[..., Any], make_loader: Callable[..., Any]
) -> None:
    """Nothing that a weights-only load would refuse, and nothing that needs this package to be unpickled."""
    callbacks = [TrainingMetricsCollector(), AnomalyDetector()]
    make_trainer(callbacks=callbacks, max_steps=10).fit(tiny, make_loader())
    for callback in callbacks:
        state = callback.state_dict()
        assert json.loads(json.dumps(state)) == state
