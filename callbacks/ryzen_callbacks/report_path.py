"""Where a callback's report goes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning.pytorch import Trainer


def prepare_report_path(trainer: Trainer, path: Path | None, name: str) -> Path | None:
    """`path`, or `name` in the Trainer's log directory; its folder made and found writable. None under
    fast_dev_run.

    To be called on every rank: `trainer.log_dir` and the check's outcome are broadcast, so that all ranks
    raise or none does.

    Raises:
        ValueError: the folder cannot be made or written to; raised before training starts.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return path
    log_dir = trainer.log_dir  # a collective: every rank asks for it, whether it needs it or not
    path = path if path is not None else Path(log_dir or trainer.default_root_dir) / name
    fault = why_not_writable(path) if trainer.is_global_zero else None
    if fault := trainer.strategy.broadcast(fault):
        raise ValueError(fault)
    return path


def why_not_writable(path: Path) -> str | None:
    """What is in the way of a file at `path`, in a sentence; makes its folder. None if nothing is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        return (
            f"cannot write {path.name} in {path.parent}: {error.strerror}; give a path in a writable folder"
        )
    return None
