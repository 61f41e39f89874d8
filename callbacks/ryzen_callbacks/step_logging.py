"""Every step's values into the Trainer's loggers, each step once."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter, SummaryWriter

from ryzen_callbacks.step_recorder import Step


def log_steps(loggers: Sequence[Logger], steps: Sequence[Step]) -> None:
    """Log each step's values with every logger, as `train/<name>`.

    TensorBoard gets one event a step with all values: an event for each, as `log_metrics` writes them, costs
    it several times as much, in this thread and in its writer's.
    """
    for logger in loggers:
        writer = _tensorboard_writer(logger) if not getattr(logger, "_prefix", "") else None
        for step in steps:
            if writer is not None:
                values = [Summary.Value(tag=f"train/{n}", simple_value=v) for n, v in step.values.items()]
                writer.add_summary(Summary(value=values), step.step)
            else:
                logger.log_metrics({f"train/{n}": v for n, v in step.values.items()}, step=step.step)


def log_restart(trainer: Trainer, step: int) -> None:
    """Tell TensorBoard that the run goes on after `step`.

    Where an interrupted run got further than the checkpoint that it is resumed from, and logs into the same
    folder, TensorBoard then takes no notice of what it had logged beyond: there is one point for each step.
    """
    # The x of what the module logs; where it is ahead of ours, none of the module's own points may be lost.
    step = max(step, trainer.fit_loop.epoch_loop._batches_that_stepped)
    for logger in trainer.loggers:
        writer = _tensorboard_writer(logger)
        if writer is not None:
            writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)


def _tensorboard_writer(logger: Logger) -> FileWriter | None:
    writer = getattr(logger, "experiment", None)
    return writer.file_writer if isinstance(writer, SummaryWriter) else None
