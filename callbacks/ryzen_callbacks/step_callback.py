"""The Lightning hooks that several callbacks share: one recorder a Trainer, however many look at it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from ryzen_callbacks.step_recorder import Step, StepRecorder

_DEFAULT_INTERVAL = 50  # steps between transfers where the Trainer logs never (log_every_n_steps=0)


class StepCallback(Callback):
    """Base of callbacks that want every optimizer step's values without waiting for the device at every step.

    The first of them in `trainer.callbacks` records for all; at every `trainer.log_every_n_steps`-th
    optimizer step, at the end of an epoch and before a checkpoint it moves what was recorded off the device
    in one transfer, and each of them gets `on_steps`. A step is a batch after which `trainer.global_step` has
    grown: several optimizers stepping in one batch make one step, and so do accumulated micro-batches.

    Values of a step (`Step.values`): `loss` (mean over the accumulated micro-batches), `learning_rate` (of
    the first parameter group; `learning_rate_1`, ... for further optimizers), `grad_norm` (before clipping;
    over all optimizers that stepped), `tokens`, `samples`, `step_time_s`, `data_wait_s`; and every
    `log_every_n_steps`-th step also `memory_bytes` and whatever the module logged with `on_step=True`.
    The first step, and those that follow validation, a checkpoint or the end of an epoch, have no times.
    """

    tokens_in_batch: Callable[[Any], int] | None = None

    def __init__(self) -> None:
        self.last_step = 0
        """Optimizer steps seen so far; part of the state."""
        self._trainer: Trainer | None = None
        self._followers: list[StepCallback] = []
        self._recorder: StepRecorder | None = None
        self._step = 0
        self._global_step = 0
        self._count_tokens: Callable[[Any], int] | None = None
        self._failed = False

    def on_steps(self, trainer: Trainer, pl_module: LightningModule, steps: list[Step]) -> None:
        """Take in steps that are over. Called on every rank with the same values."""
        raise NotImplementedError

    # Who records

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The first of the Trainer's step callbacks becomes the one that records."""
        if stage != "fit":
            return
        everyone = [c for c in trainer.callbacks if isinstance(c, StepCallback)]  # type: ignore[attr-defined]
        self._trainer, self._failed, self._recorder = trainer, False, None
        self._followers = everyone if everyone[0] is self else []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start recording where the run, or the checkpoint it resumes from, stands."""
        if not self._followers:
            return
        distributed = trainer.world_size > 1
        self._recorder = StepRecorder(
            device=pl_module.device,
            reduce=(lambda tensor, how: _all_reduce(trainer, tensor, how)) if distributed else None,
            sharded_gradients=_is_fsdp(trainer),
        )
        self._recorder.break_clock()
        self._step = max(c.last_step for c in self._followers) or trainer.global_step
        self._global_step = trainer.global_step
        counters = [c.tokens_in_batch for c in self._followers if c.tokens_in_batch is not None]
        self._count_tokens = counters[0] if counters else getattr(pl_module, "tokens_in_batch", None)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The wait for data is over."""
        if self._recorder is not None:
            self._recorder.batch_started()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Gradient norm and learning rate, before clipping and before the scheduler."""
        if self._recorder is None:
            return
        index = next((i for i, other in enumerate(trainer.optimizers) if other is optimizer), 0)
        groups = optimizer.param_groups
        self._recorder.before_optimizer_step(
            f"learning_rate_{index}" if index else "learning_rate",
            groups[0]["lr"],
            [p for group in groups for p in group["params"]],
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the batch; at the log interval, hand out what was recorded."""
        if self._recorder is None:
            return
        tokens = self._count_tokens(batch) if self._count_tokens is not None else None
        self._recorder.batch_ended(_loss(trainer, pl_module, outputs), tokens, _leading_dimension(batch))
        global_step = trainer.global_step  # a long way through Lightning's loops, so asked for once
        if global_step != self._global_step:
            self._global_step = global_step
            self._step += 1
            self._recorder.step_ended(self._step, trainer.current_epoch)
            interval = trainer.log_every_n_steps or _DEFAULT_INTERVAL  # type: ignore[attr-defined]
            if self._step % interval == 0:
                self._recorder.add_extras({**logged_now(trainer, on_step=True), **_memory(pl_module.device)})
                self._drain(trainer, pl_module)
        self._recorder.idle()

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
        except RuntimeError as error:  # the device may be what failed; its error is the one to be seen
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
            self._break_clock()
        return {"last_step": self.last_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.last_step = state_dict["last_step"]

    def _release(self) -> None:
        self._trainer, self._recorder, self._followers = None, None, []

    def _break_clock(self) -> None:
        if self._recorder is not None:
            self._recorder.break_clock()

    def _drain(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._recorder is None or not len(self._recorder):
            return
        steps = self._recorder.drain(across_ranks=not self._failed)
        for callback in self._followers:
            callback.last_step = steps[-1].step
            callback.on_steps(trainer, pl_module, steps)


def _loss(trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | None:
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    if pl_module.automatic_optimization:
        # Lightning hands out the loss divided by the number of accumulated batches.
        batches = trainer.accumulate_grad_batches
        return loss * batches if batches > 1 else loss
    return loss.detach().clone()  # the module's own tensor, which a CUDA graph may write over


def _is_fsdp(trainer: Trainer) -> bool:
    # By name: the distributions lightning and pytorch-lightning each have their own class.
    return any(kind.__name__ == "FSDPStrategy" for kind in type(trainer.strategy).__mro__)


def logged_now(trainer: Trainer, on_step: bool) -> dict[str, float | Tensor]:
    """What the module logged in training during this very batch (`on_step`), or over this very epoch.

    `trainer.callback_metrics` will not do: it also has what validation or an earlier epoch left behind.
    """
    results = trainer._results
    if results is None:
        return {}
    logged = results.metrics(on_step=on_step)["callback"]
    # A metric logged both by step and by epoch comes twice, as `name` and as `name_step`.
    return {
        n: v for n, v in logged.items() if not (n.endswith("_step") and n.removesuffix("_step") in logged)
    }


def validated(trainer: Trainer, names: Iterable[str], device: torch.device) -> dict[str, float]:
    """What the module logged under `names` in the validation just over, by name.

    Over ranks it is the mean over those that logged it, whether or not the module logs with `sync_dist`, so
    that all of them see the same. A collective.
    """
    names, logged = list(names), trainer.callback_metrics
    rows = [[float(name in logged), float(logged.get(name, 0.0))] for name in names]
    if trainer.world_size > 1:
        table = torch.tensor(rows, dtype=torch.float64, device=device)
        rows = _all_reduce(trainer, table, "sum").tolist()
    return {name: total / ranks for name, (ranks, total) in zip(names, rows, strict=True) if ranks}


def _memory(device: torch.device) -> dict[str, float | Tensor]:
    """Bytes in use by tensors on CUDA, by the process elsewhere; nothing where that cannot be read."""
    if device.type == "cuda":
        return {"memory_bytes": float(torch.cuda.memory_allocated(device))}
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return {}
    resident, shared = map(int, statm.read_text().split()[1:3])
    # Pages of memory-mapped files count as shared: the system takes them back when it needs them.
    return {"memory_bytes": float((resident - shared) * _page_size())}


def _page_size() -> int:
    import resource  # absent on Windows, where there is no /proc either

    return resource.getpagesize()


def _leading_dimension(batch: Any) -> int | None:
    """Number of samples: the first tensor's first dimension; None if there is no such tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        for item in batch:
            if (size := _leading_dimension(item)) is not None:
                return size
    return None


def _all_reduce(trainer: Trainer, tensor: Tensor, how: str) -> Tensor:
    reduced = trainer.strategy.reduce(tensor, reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced
