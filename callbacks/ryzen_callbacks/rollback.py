"""The last good checkpoint of a run, and going back to it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from torch.optim import Optimizer

_SCHEDULED = ("lr", "momentum", "betas", "weight_decay")
"""What schedules change in a parameter group. Other entries may be an optimizer's state (Prodigy's `d`), but
for those that are new: a schedule may have begun since then.
"""


class LastGood:
    """Keeps one checkpoint of a time when nothing was wrong, and restores it.

    `keep` and `restore` are collectives. Restored are the module's state, the optimizers' states, and what
    the hooks `on_load_checkpoint` of module and callbacks take from the checkpoint (the average of
    `WeightAveraging`); gradients become zero. All else stays as it is: the batches since that checkpoint, the
    faulty one among them, are skipped, and loops, learning rates and the other numbers that schedules change,
    the loss scale, metrics, and the state that callbacks have by `state_dict` go on. A parameter group that
    an optimizer has got since (`BackboneFinetuning`) stays: its weights go back, its state begins anew.
    """

    def __init__(self, path: Path, every_n_steps: int) -> None:
        self._path = path
        self._every_n_steps = every_n_steps
        self._step: int | None = None

    def keep(self, trainer: Trainer, step: int) -> bool:
        """Save the present state as good if the one kept is `every_n_steps` old, or if there is none; returns
        whether it did.
        """
        if self._step is not None and step - self._step < self._every_n_steps:
            return False
        trainer.save_checkpoint(self._path)
        self._step = step
        return True

    def restore(self, trainer: Trainer) -> int | None:
        """Go back to the state kept; returns its step, or None and leaves all as it is if the optimizers do
        not have the parameters that they had then.
        """
        assert self._step is not None  # one is kept when training starts
        module = trainer.lightning_module
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        before = [dict(group) for group in groups]
        # This run wrote the file, so there is no stranger's pickle in it; a module's hyper-parameters may be.
        checkpoint = trainer.strategy.load_checkpoint(self._path, weights_only=False)
        if not _take_added_groups(checkpoint.get("optimizer_states", []), trainer.optimizers):
            return None
        module.on_load_checkpoint(checkpoint)
        trainer.strategy.load_model_state_dict(checkpoint, strict=module.strict_loading)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            callback.on_load_checkpoint(trainer, module, checkpoint)
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        for group, present in zip(groups, before, strict=True):
            group.update({n: v for n, v in present.items() if n in _SCHEDULED or n not in group})
        module.zero_grad(set_to_none=False)  # in place: a CUDA graph writes to where they are
        return self._step

    def remove(self, trainer: Trainer) -> None:
        """Delete the file (a folder, for a sharded checkpoint)."""
        if trainer.is_global_zero and self._step is not None:
            if self._path.is_dir():
                shutil.rmtree(self._path)
            else:
                self._path.unlink(missing_ok=True)
        self._step = None


def _take_added_groups(states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer]) -> bool:
    """Add to the optimizers' `states` the parameter groups that they have got since; whether all fit then."""
    for state, optimizer in zip(states, optimizers, strict=False):
        groups, present = state["param_groups"], optimizer.state_dict()["param_groups"]
        groups += present[len(groups) :]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in present]:
            return False
    return True
