"""The Lightning hooks that several callbacks share: one recorder a Trainer, however many look at it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from ryzen_callbacks.batch_hooks import BATCH_HOOKS, follow, leave_out, put_back
from ryzen_callbacks.step_recorder import Step, StepRecorder
from ryzen_callbacks.trainer_values import (
    all_reduce,
    is_fsdp,
    leading_dimension,
    logged_since,
    loss_of,
    memory_in_use,
)

_DEFAULT_INTERVAL = 50  # steps between transfers where the Trainer logs never (log_every_n_steps=0)
_MAX_PENDING = 500  # steps on the device, however large log_every_n_steps
_RESERVED = frozenset(
    {
        "step",
        "loss",
        "learning_rate",
        "grad_norm",
        "tokens",
        "samples",
        "step_time_s",
        "data_wait_s",
        "tokens_per_second",
        "samples_per_second",
        "memory_bytes",
        "mfu",
    }
)


class StepCallback(Callback):
    """Base of callbacks that want every optimizer step's values without waiting for the device at every step.

    The first of them in `trainer.callbacks` records for all; at every `trainer.log_every_n_steps`-th
    optimizer step, at every 500th, at the end of an epoch and before a checkpoint it moves what was recorded
    off the device in one transfer, and each of them gets `on_steps`. A step is a batch in which an optimizer
    steps, with those accumulated before it: several optimizers stepping in one batch make one step.

    Values of a step (`Step.values`): `loss` (mean over the accumulated micro-batches), `learning_rate` (of
    the first parameter group; `learning_rate_1`, ... for further optimizers), `grad_norm` (before clipping;
    over all optimizers that stepped, the last time each did), `tokens`, `samples`, `step_time_s`,
    `data_wait_s`; and every `log_every_n_steps`-th step also `memory_bytes` and whatever the module logged
    with `on_step=True` since the one before it, the last value of each, under names other than these. The
    first step, and those that follow validation, a checkpoint, a rollback, a written report or the end of an
    epoch, have no times.

    `data_wait_s` is what the host waited for the data loader's next batches: not for their way to the device,
    nor for other callbacks. There is no public hook around that. The recorder gets in where the training loop
    tells its profiler of `train_dataloader_next`, for the time of the fit, and there is none of it where
    another version of Lightning does not. It also follows `trainer.save_checkpoint`: callbacks are not told
    of checkpoints of weights only.
    """

    tokens_in_batch: Callable[[Any], int] | None = None

    def __init__(self, name: str | None = None) -> None:
        kind = type(self).__qualname__
        self._state_key = kind if name is None else f"{kind}({name})"
        self.last_step = 0
        """Optimizer steps seen so far; part of the state."""
        self._trainer: Trainer | None = None
        self._followers: list[StepCallback] = []
        self._recorder: StepRecorder | None = None
        self._leader: StepCallback | None = None
        self._undo_follow: list[Callable[[], None]] = []
        self._seen: dict[str, Any] = {}
        self._step = 0
        self._epoch = 0
        self._rate_names: dict[int, str] = {}
        self._count_tokens: Callable[[Any], int] | None = None
        self._failed = False
        leave_out(self, BATCH_HOOKS, Callback)

    @property
    def state_key(self) -> str:
        """Whose state it is in a checkpoint."""
        return self._state_key

    def on_steps(self, trainer: Trainer, pl_module: LightningModule, steps: list[Step]) -> None:
        """Take in steps that are over. Called on every rank with the same values."""
        raise NotImplementedError

    def between_batches(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Do what may not be done within a batch, such as changing weights; `step` steps are done so far.

        Called on every rank after every batch, and after `on_steps` if its values are handed out.
        """

    # Who records

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The first of the Trainer's step callbacks becomes the one that records."""
        if stage != "fit":
            return
        everyone = [c for c in trainer.callbacks if isinstance(c, StepCallback)]  # type: ignore[attr-defined]
        self._trainer, self._failed, self._recorder = trainer, False, None
        self._leader = everyone[0]
        if self._leader is self:
            self._followers = everyone
            put_back(self, BATCH_HOOKS)
            leave_out(self, BATCH_HOOKS, Callback)
        else:
            self._followers = []
            leave_out(self, BATCH_HOOKS, StepCallback)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording where the run, or the checkpoint it resumes from, stands."""
        if not self._followers:
            return
        distributed = trainer.world_size > 1
        self._recorder = StepRecorder(
            device=pl_module.device,
            reduce=(lambda tensor, how: all_reduce(trainer, tensor, how)) if distributed else None,
            sharded_gradients=is_fsdp(trainer),
            half_gradients=any(p.dtype is torch.float16 for p in pl_module.parameters()),
        )
        loop = trainer.fit_loop.epoch_loop
        self._undo_follow = [
            follow(owner, method, then)
            for owner, method, then in (
                (loop, "_on_before_fetch", self._recorder.wait_started),
                (loop, "_on_after_fetch", self._recorder.wait_ended),
                (trainer, "save_checkpoint", self._recorder.break_clock),
            )
            if hasattr(owner, method)
        ]
        # Where the state has no steps of ours, Lightning's count of them; `global_step` is one of optimizers.
        steps_before = trainer.fit_loop.epoch_loop._batches_that_stepped
        self._step = max(c.last_step for c in self._followers) or steps_before
        self._epoch = trainer.current_epoch  # an epoch that is gone on with is not started again
        self._rate_names = {
            id(optimizer): f"learning_rate_{index}" if index else "learning_rate"
            for index, optimizer in enumerate(trainer.optimizers)
        }
        counters = [c.tokens_in_batch for c in self._followers if c.tokens_in_batch is not None]
        of_module = getattr(pl_module, "tokens_in_batch", None)  # may be a setting of the same name
        self._count_tokens = counters[0] if counters else of_module if callable(of_module) else None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Which epoch it is."""
        self._epoch = trainer.current_epoch

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradient norm and learning rate, before clipping and before the scheduler."""
        if self._recorder is None:
            return
        groups = optimizer.param_groups  # none, where the module has no optimizer and Lightning's stands in
        self._recorder.before_optimizer_step(
            self._rate_names.get(id(optimizer), "learning_rate"),
            groups[0].get("lr") if groups else None,
            [grad for group in groups for p in group["params"] if (grad := p.grad) is not None],
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the batch; at the log interval, hand out what was recorded."""
        if self._recorder is None:
            return
        tokens = self._count_tokens(batch) if self._count_tokens is not None else None
        if type(tokens) is not int and tokens is not None:
            tokens = _whole_number(tokens)
        self._recorder.batch_ended(loss_of(trainer, pl_module, outputs), tokens, leading_dimension(batch))
        if self._recorder.stepped:
            self._step += 1
            self._recorder.step_ended(self._step, self._epoch)
            interval = trainer.log_every_n_steps or _DEFAULT_INTERVAL  # type: ignore[attr-defined]
            if self._step % interval == 0:
                logged = logged_since(trainer, self._seen)
                own = {name: value for name, value in logged.items() if name not in _RESERVED}
                self._recorder.add_extras({**own, **memory_in_use(pl_module.device)})
                self._drain(trainer, pl_module)
            elif self._step % _MAX_PENDING == 0:
                self._drain(trainer, pl_module)
        for callback in self._followers:
            callback.between_batches(trainer, pl_module, self._step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand out the steps before it; validation itself is not training time."""
        self._drain(trainer, pl_module)
        self._break_clock()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hand out the epoch's last steps."""
        self._drain(trainer, pl_module)
        self._break_clock()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand out what this rank has; the others may never come to a collective."""
        self._failed = True
        try:
            self._drain(trainer, pl_module)
        except (OSError, RuntimeError) as error:  # the device or the disk may be what failed
            rank_zero_warn(f"the values of the last steps are lost: {error}")
        self._release()  # Lightning does not call `teardown` after an exception

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the Trainer and of what is on the device."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs. Steps recorded but not yet handed out are handed out first.

        Micro-batches of a step not completed yet are left out: their gradients are not in a checkpoint
        either.
        """
        if self._trainer is not None:
            self._drain(self._trainer, self._trainer.lightning_module)
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.last_step = state_dict["last_step"]

    def _release(self) -> None:
        for undo in self._undo_follow:
            undo()
        self._trainer, self._recorder, self._followers, self._leader = None, None, [], None
        self._undo_follow, self._seen = [], {}

    def _break_clock(self) -> None:
        """What was just done is no part of training: the running step has no times."""
        if self._leader is not None and self._leader._recorder is not None:
            self._leader._recorder.break_clock()

    def _drain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None or not len(self._recorder):
            return
        steps = self._recorder.drain(across_ranks=not self._failed)
        for callback in self._followers:
            callback.last_step = steps[-1].step
            callback.on_steps(trainer, pl_module, steps)


def _whole_number(tokens: Any) -> int:
    try:
        return int(tokens)
    except (RuntimeError, TypeError, ValueError) as error:
        kind = type(tokens).__name__
        raise TypeError(f"tokens_in_batch returned no number but a {kind}: {error}") from error
