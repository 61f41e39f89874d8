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


def logged_since(trainer: Trainer, seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The last value of what the module logged in training with `on_step=True` since the last call.

    `seen` is kept for the next call, empty at first: Lightning keeps a value until it is logged anew, and
    `trainer.callback_metrics` also what validation left behind.
    """
    logged: dict[str, Tensor] = {}
    for key, metric in trainer.fit_loop._results.valid_items():
        value = metric._forward_cache if metric.meta.on_step else None
        if isinstance(value, Tensor) and value.numel() == 1 and value is not seen.get(key):
            seen[key] = value  # another tensor each time that it is logged
            logged[metric.meta.name] = value.detach()
    return logged


def logged_in_epoch(trainer: Trainer) -> dict[str, Tensor]:
    """What the module logged in training over this very epoch."""
    results = trainer._results
    return {} if results is None else results.metrics(on_step=False)["callback"]


def sent_to_loggers(trainer: Trainer) -> set[str]:
    """The names under which the module itself has logged something to the loggers in training."""
    results = trainer.fit_loop.epoch_loop._results
    sent = [metric for metric in results.values() if metric.meta.logger]
    return {results._forked_name(metric, on_step)[1] for metric in sent for on_step in (True, False)}


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
        return batch.size(0) if batch.ndim else None  # a nested tensor has no `shape`
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
