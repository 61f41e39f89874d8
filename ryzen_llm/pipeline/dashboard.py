"""What makes a run's TensorBoard readable on opening: a dashboard, the settings, and histograms."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams


def _by_epoch(tag: str) -> tuple[str, list[str]]:
    """A curve with a point an epoch, as a margin of no width: a "Multiline" is scaled without its lowest and
    its highest point, which of two epochs leaves none.
    """
    return "Margin", [tag] * 3


LAYOUT = {
    "1 quality": {
        "loss (nats per token)": ["Multiline", ["^train/loss$", "^val_loss$"]],
        "accuracy of the next token": _by_epoch("val_accuracy"),
    },
    "2 speed": {
        "tokens per second": ["Multiline", ["^train/tokens_per_second$"]],
        "speed-up over eager fp32": _by_epoch("speedup"),
        "seconds per step, and of it waiting for data": [
            "Multiline",
            ["^train/step_time_s$", "^train/data_wait_s$"],
        ],
    },
    "3 optimiser": {
        "gradient norm": ["Multiline", ["^train/grad_norm$"]],
        "learning rate": ["Multiline", ["^train/learning_rate$"]],
    },
    "4 memory": {
        "bytes": ["Multiline", ["^train/memory_bytes$"]],
        "embedding, dense over trained": _by_epoch("compression_ratio"),
    },
}
"""The charts of the tab "Custom scalars", with the tags that each draws, in a "Multiline" as regular
expressions."""

_OUTCOMES = ("val_loss", "val_accuracy", "speedup")
_SAMPLE = 8192


class Dashboard(Callback):
    """Writes the layout and the settings when training starts, and histograms at the end of each epoch.

    Weights and gradients are sampled, at most 8,192 evenly spaced values of a tensor, which takes a
    millisecond whatever its size. Anomalies are texts of `AnomalyDetector`, curves those of the collector.

    Args:
        settings: The configuration, nested by part.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = flatten(settings)

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write layout and settings."""
        for writer in _writers(trainer):
            writer.add_custom_scalars(LAYOUT)
            outcomes = dict.fromkeys(_OUTCOMES, 0.0)  # only their names are written
            for summary in hparams(self._settings, outcomes):  # type: ignore[no-untyped-call]
                writer.file_writer.add_summary(summary)  # type: ignore[attr-defined]

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write histograms after an epoch's last batch; validation, which follows, drops the gradients."""
        if not trainer.is_last_batch:
            return
        for writer in _writers(trainer):
            for name, parameter in pl_module.named_parameters():
                for kind, tensor in (("weights", parameter.detach()), ("gradients", parameter.grad)):
                    if tensor is not None and len(values := _sample(tensor)):
                        writer.add_histogram(f"{kind}/{name}", values, trainer.global_step)


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Nested settings as `part.key`, in the types that TensorBoard takes."""
    flat: dict[str, str | float | bool] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str | float | bool | int) else str(value)
    return flat


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _sample(tensor: Tensor) -> Tensor:
    """Evenly spaced finite values, on the CPU; of a sharded tensor, from this process's part."""
    flat = getattr(tensor, "to_local", lambda: tensor)().flatten()
    values: Tensor = flat[:: max(1, -(-len(flat) // _SAMPLE))].float().cpu()
    return values[torch.isfinite(values)]
