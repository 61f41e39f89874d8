"""What the Trainer, the module and the batch say of a training step and of a validation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor


def loss_of(trainer: Trainer, pl_module: LightningModule, outputs: Any) -> Tensor | None:
    """The loss that `training_step` returned, of the batch as such, on its device; None without one."""
    loss = outputs.get("loss") if isinstance(outputs, dict | Mapping) else outputs
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        return None
    if pl_module.automatic_optimization:
        # Lightning hands out the loss divided by the number of accumulated batches.
        batches = trainer.accumulate_grad_batches
        return loss * batches if batches > 1 else loss
    return loss.detach().clone()  # the module's own tensor, which a CUDA graph may write over


def is_fsdp(trainer: Trainer) -> bool:
    """Whether each rank holds a part of every gradient."""
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

    `trainer.callback_metrics` has them, but also what an earlier validation left behind. Over ranks it is the
    mean over those that logged it, whether or not the module logs with `sync_dist`, so that all of them see
    the same. A collective.
    """
    names, results = list(names), trainer._results
    assert results is not None  # a loop is running
    fresh = [metric for metric in results.values() if not metric.has_reset]
    now = {name for metric in fresh for name in results._forked_name(metric, on_step=False)}
    logged = {name: value for name, value in trainer.callback_metrics.items() if name in now}
    rows = [[float(name in logged), float(logged.get(name, 0.0))] for name in names]
    if trainer.world_size > 1:
        table = torch.tensor(rows, dtype=torch.float64, device=device)
        rows = all_reduce(trainer, table, "sum").tolist()
    return {name: total / ranks for name, (ranks, total) in zip(names, rows, strict=True) if ranks}


def memory_in_use(device: torch.device) -> dict[str, float | Tensor]:
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


def leading_dimension(batch: Any) -> int | None:
    """Number of samples: the first tensor's first dimension; None if there is no such tensor."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else None
    if isinstance(batch, list | tuple | Mapping):
        for item in batch.values() if isinstance(batch, Mapping) else batch:
            if (size := leading_dimension(item)) is not None:
                return size
    return None


def all_reduce(trainer: Trainer, tensor: Tensor, how: str) -> Tensor:
    """`tensor` reduced over the ranks with "sum" or "max". A collective."""
    reduced = trainer.strategy.reduce(tensor, reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced
