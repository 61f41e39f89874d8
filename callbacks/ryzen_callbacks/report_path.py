"""Where a callback's report goes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from lightning.pytorch import Callback, Trainer


def prepare_report_path(
    trainer: Trainer, path: Path | None, name: str, may_be_folder: bool = False
) -> Path | None:
    """`path`, or `name` in the Trainer's log directory; its folder made and found writable. None under
    fast_dev_run. `may_be_folder`: a folder of that name is no obstacle.

    To be called on every rank: `trainer.log_dir` and the check's outcome are broadcast, so that all ranks
    raise or none does.

    Raises:
        ValueError: there can be no file at the path; raised before training starts.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return path
    log_dir = trainer.log_dir  # a collective: every rank asks for it, whether it needs it or not
    path = path if path is not None else Path(log_dir or trainer.default_root_dir) / name
    fault = why_not_writable(path, may_be_folder) if trainer.is_global_zero else None
    if fault := trainer.strategy.broadcast(fault):
        raise ValueError(fault)
    return path


def refuse_shared_path(trainer: Trainer, owner: Callback, path: Path | None) -> None:
    """Raise ValueError if another of our callbacks in the Trainer writes to `owner`'s `path` as well."""
    for other in trainer.callbacks:  # type: ignore[attr-defined]
        if other is not owner and path is not None and getattr(other, "_destination", None) == path:
            kinds = f"a {type(owner).__name__} and a {type(other).__name__}"
            raise ValueError(f"{kinds} both report to {path}; give each a path of its own")


def why_not_writable(path: Path, may_be_folder: bool = False) -> str | None:
    """What is in the way of a file at `path`, in a sentence; makes its folder. None if nothing is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):  # as `atomic_file` does
            pass
        if path.is_dir() and not may_be_folder:
            return f"{path} is a folder, expected the path of a file; give one in it, or beside it"
        if path.exists() and not (path.is_file() or path.is_dir()):
            return f"{path} is no regular file, and a report would take its place; give another path"
    except OSError as error:
        return (
            f"cannot write {path.name} in {path.parent}: {error.strerror}; give a path in a writable folder"
        )
    return None
