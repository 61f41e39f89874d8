"""The last good checkpoint of a run, and going back to it."""

from __future__ import annotations

import shutil
from pathlib import Path

from lightning.pytorch import Trainer


class LastGood:
    """Keeps one checkpoint of a time when nothing was wrong, and restores it.

    `keep` and `restore` are collectives. Restored are weights and optimizer states. The loops, the data and
    the learning-rate schedules go on where they are, so that the batches since that checkpoint, the faulty
    one among them, are skipped.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self._path = path
        self._every_n_steps = every_n_steps
        self._step: int | None = None

    def keep(self, trainer: Trainer, step: int) -> None:
        """Save the present state as good if the one kept is `every_n_steps` old, or if there is none."""
        if self._step is None or step - self._step >= self._every_n_steps:
            trainer.save_checkpoint(self._path)
            self._step = step

    def restore(self, trainer: Trainer) -> int:
        """Go back to the state kept; returns its step."""
        assert self._step is not None  # one is kept when training starts
        # This run wrote the file, so there is no stranger's pickle in it; a module's hyper-parameters may be.
        checkpoint = trainer.strategy.load_checkpoint(self._path, weights_only=False)
        trainer.strategy.load_model_state_dict(checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        return self._step

    def remove(self, trainer: Trainer) -> None:
        """Delete the file (a folder, for a sharded checkpoint)."""
        if trainer.is_global_zero and self._step is not None:
            if self._path.is_dir():
                shutil.rmtree(self._path)
            else:
                self._path.unlink(missing_ok=True)
        self._step = None
