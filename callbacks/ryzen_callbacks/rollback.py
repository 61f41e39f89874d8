"""The last good checkpoint of a run, and going back to it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from ryzen_callbacks.trainer_values import is_fsdp

_SCHEDULED = ("lr", "momentum", "betas", "weight_decay")
"""What schedules change in a parameter group. Other entries may be an optimizer's state (Prodigy's `d`), but
for those that are new: a schedule may have begun since then.
"""

_Shapes = Mapping[str, torch.Size | None]
"""Of a module's state, by name; None where a lazy layer has none yet."""


class NoWayBackError(Exception):
    """Why there is no going back, in a clause; nothing has been changed."""


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
        self._new = path.with_name(f"{path.stem}.new{path.suffix}")
        self._every_n_steps = every_n_steps
        self._step: int | None = None
        self._tried: int | None = None
        self._warned = False
        self._shapes: _Shapes = {}

    def keep(self, trainer: Trainer, step: int) -> bool:
        """Save the present state as good if the one kept is `every_n_steps` old, or if there is none; returns
        whether it did. That it cannot be written is a warning, and tried again after as many steps.
        """
        if self._tried is not None and step - self._tried < self._every_n_steps:
            return False
        self._tried = step
        fault = self._save(trainer)
        written = trainer.strategy.reduce_boolean_decision(fault is None)
        fault = self._put_in_place(trainer, written) or fault
        written = trainer.strategy.reduce_boolean_decision(fault is None)
        if written:
            self._step, self._shapes = step, _shapes(trainer)
        elif not self._warned:
            left = "there is nothing to go back to"
            if self._step is not None:
                left = f"the one before it stays, so that a rollback goes back to step {self._step}"
            why = (str(fault).splitlines() or [repr(fault)])[-1] if fault else "on another rank"
            rank_zero_warn(
                f"the last good checkpoint {self._path} was not written ({why}): "
                f"{left}; make room there, it is tried again after {self._every_n_steps} steps"
            )
        self._warned = not written
        return written

    def restore(self, trainer: Trainer) -> int:
        """Go back to the state kept; returns its step.

        Raises:
            NoWayBackError: no state is kept, or module or optimizers do not have the parameters that they had
                then. All is left as it is.
        """
        if self._step is None:
            raise NoWayBackError("no last good checkpoint could be written")
        if change := _change(self._shapes, _shapes(trainer)):
            raise NoWayBackError(f"the module is another than in the last good checkpoint ({change})")
        module = trainer.lightning_module
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        before = [dict(group) for group in groups]
        # This run wrote the file, so there is no stranger's pickle in it; a module's hyper-parameters may be.
        checkpoint = trainer.strategy.load_checkpoint(self._path, weights_only=False)
        if not _take_added_groups(checkpoint.get("optimizer_states", []), trainer.optimizers):
            raise NoWayBackError("the optimizers have other parameters than in the last good checkpoint")
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
        if trainer.is_global_zero and self._tried is not None:
            for path in (self._path, self._new):
                _delete(path)
        self._step = self._tried = None

    def _save(self, trainer: Trainer) -> BaseException | None:
        """Write beside the checkpoint kept; returns what went wrong on this rank."""
        try:
            with _written_at_once(trainer.strategy):
                trainer.save_checkpoint(self._new, weights_only=False)
        except (OSError, CheckpointException) as error:
            trainer.strategy.barrier("LastGood")  # the other ranks wait at the end of `save_checkpoint`
            return error
        return None

    def _put_in_place(self, trainer: Trainer, written: bool) -> OSError | None:
        """Replace the checkpoint kept by the one just written, or delete what there is of it."""
        if not trainer.is_global_zero:
            return None
        try:
            if written:
                if self._path.is_dir() or self._new.is_dir():
                    _delete(self._path)
                self._new.replace(self._path)
            else:
                _delete(self._new)
        except OSError as error:
            return error
        return None


@contextmanager
def _written_at_once(strategy: Strategy) -> Iterator[None]:
    """Without a thread that writes checkpoints later, and that says later what went wrong."""
    plugin: Any = strategy.checkpoint_io
    # By name: the distributions lightning and pytorch-lightning each have their own class.
    if not any(kind.__name__ == "AsyncCheckpointIO" for kind in type(plugin).__mro__):
        yield
        return
    strategy.checkpoint_io = plugin.checkpoint_io
    try:
        yield
    finally:
        strategy.checkpoint_io = plugin


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _shapes(trainer: Trainer) -> _Shapes:
    """Of all that the module's checkpoints hold; none under FSDP, which gathers its weights for that."""
    if is_fsdp(trainer):
        return {}
    state = trainer.lightning_module.state_dict()
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: None if is_lazy(tensor) else tensor.shape for name, tensor in tensors.items()}


def _change(then: _Shapes, now: _Shapes) -> str | None:
    """The first difference, in a clause."""
    for name in {**then, **now}:
        if name not in then:
            return f"{name!r} is new"
        if name not in now:
            return f"{name!r} is gone"
        if then[name] != now[name]:
            was, is_ = ("without a shape" if s is None else tuple(s) for s in (then[name], now[name]))
            return f"{name!r} was {was} and is {is_}"
    return None


def _take_added_groups(states: Sequence[dict[str, Any]], optimizers: Sequence[Optimizer]) -> bool:
    """Add to the optimizers' `states` the parameter groups that they have got since; whether all fit then."""
    for state, optimizer in zip(states, optimizers, strict=False):
        groups, present = state["param_groups"], optimizer.state_dict()["param_groups"]
        groups += present[len(groups) :]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in present]:
            return False
    return True
