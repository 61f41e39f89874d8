"""The folder of a run: found writable, held by one run at a time, an earlier run moved aside."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ryzen_llm.errors import InputError

_LOCK = ".lock"
_RUN = (
    *("config.yaml", "checkpoints", "tensorboard", "report.html", "report.md", "phase2_final_report.json"),
    *("training_metrics_report.json", "validation_report.json", "integration_test_report.json"),
)
"""What a run writes: a folder with none of these is not one of a run."""


@contextmanager
def claim_output_dir(path: Path, keep: bool) -> Iterator[None]:
    """Make `path` ready for a run, and keep other runs out of it until the context is left.

    Without `keep`, what an earlier run left there moves to the first free of `path-1`, `path-2`, ...:
    nothing is overwritten. Raises InputError where the folder cannot be written, is no folder, has what no
    run has left, is the working directory or above it, or another run has it.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"output_dir {path}: is a file, expected a folder or a name that is free")
    lock = _locked(path)
    try:
        if not keep and any(each.name != _LOCK for each in path.iterdir()):
            lock = _moved_aside(path, lock)
        yield
    finally:
        if lock.is_locked:  # or else the file there is another run's
            Path(lock.lock_file).unlink(missing_ok=True)  # it is gone where the folder is
            lock.release()


def _locked(path: Path) -> FileLock:
    """Make the folder, and take its lock, which is the operating system's: a killed run holds none."""
    lock = FileLock(path / _LOCK)
    try:
        path.mkdir(parents=True, exist_ok=True)
        _write_nothing(path)  # where nothing can be written, the lock seems to be taken
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"output_dir {path}: another run is writing to it; choose another folder") from None
    except OSError as error:
        raise _unwritable(path, error) from error
    return lock


def _moved_aside(path: Path, lock: FileLock) -> FileLock:
    """Rename the folder, and lock a new one; the old one is locked until it has its new name."""
    here = Path.cwd()
    if path.resolve() in (here, *here.parents):
        raise InputError(f"output_dir {path}: is the working directory or above it; choose another folder")
    if not any((path / name).exists() for name in _RUN):
        raise InputError(f"output_dir {path}: is not empty and holds no earlier run; choose another folder")
    number = 1
    while (aside := path.with_name(f"{path.name}-{number}")).exists():
        number += 1
    try:
        path.rename(aside)
    except OSError as error:
        raise _unwritable(path, error) from error
    print(f"{path} holds an earlier run: moved to {aside}")
    (aside / _LOCK).unlink()
    lock.release()
    return _locked(path)


def _write_nothing(folder: Path) -> None:
    """Raise OSError where no file can be made."""
    with tempfile.TemporaryFile(dir=folder):
        pass


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(f"output_dir {path}: cannot be written ({error.strerror}); choose another folder")
