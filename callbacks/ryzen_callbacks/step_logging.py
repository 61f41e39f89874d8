"""Every step's values into the Trainer's loggers, each step once."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from dataclasses import replace

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.tensorflow_stub.io.gfile import GFile
from torch.utils.tensorboard import FileWriter, SummaryWriter

from ryzen_callbacks.step_recorder import Step
from ryzen_callbacks.tensorboard_records import encode


def log_steps(loggers: Sequence[Logger], steps: Sequence[Step], without: Set[str] = frozenset()) -> None:
    """Log each step's values with every logger, as `train/<name>`, but for the names in `without`.

    To a TensorBoard file on a disk the steps are written past its logger, which would take longer over them
    than a short training step lasts.
    """
    if any(name.startswith("train/") for name in without):
        steps = [
            replace(step, values={n: v for n, v in step.values.items() if f"train/{n}" not in without})
            for step in steps
        ]
    for logger in loggers:
        file = _tensorboard_file(logger)
        if file is not None:
            prefix = getattr(logger, "_prefix", "")
            file.write(encode(steps, f"{prefix}-train/" if prefix else "train/", time.time()))
            continue
        for step in steps:
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
            writer.flush()  # what follows it must come after it in the file, too


def _tensorboard_writer(logger: Logger) -> FileWriter | None:
    writer = getattr(logger, "experiment", None)
    return writer.file_writer if isinstance(writer, SummaryWriter) else None


def _tensorboard_file(logger: Logger) -> GFile | None:
    """The logger's event file, if a block of bytes can simply be appended to it.

    Each write to such a file opens it to append, so that the blocks of the logger's thread stay whole too.
    """
    writer = _tensorboard_writer(logger)
    file = getattr(getattr(writer, "event_writer", None), "_general_file_writer", None)
    return file if isinstance(file, GFile) and file.fs_supports_append else None
