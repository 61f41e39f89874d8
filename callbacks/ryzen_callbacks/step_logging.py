"""Every step's values into the Trainer's loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lightning.pytorch.loggers import Logger
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter


def log_step(loggers: Sequence[Logger], values: Mapping[str, float], step: int) -> None:
    """Log `values` at `step` with every logger.

    TensorBoard gets one event with all values: an event for each, as `log_metrics` writes them, costs it
    several times as much, in this thread and in its writer's.
    """
    for logger in loggers:
        writer = getattr(logger, "experiment", None)
        if isinstance(writer, SummaryWriter) and writer.file_writer is not None and not logger._prefix:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=v) for tag, v in values.items()])
            writer.file_writer.add_summary(summary, step)
        else:
            logger.log_metrics(dict(values), step=step)
