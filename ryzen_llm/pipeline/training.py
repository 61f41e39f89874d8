"""The training phase: Lightning's loop with this project's callbacks."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

import yaml
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, RichProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector
from ryzen_callbacks.atomic_file import write_text

from ryzen_llm.pipeline.bursts import SpeedBursts
from ryzen_llm.pipeline.config import RunConfig
from ryzen_llm.pipeline.dashboard import Dashboard
from ryzen_llm.training import ShardedStrategy

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
TRAINING_REPORT = "training_metrics_report.json"
CONFIG = "config.yaml"


class LastValidation(Callback):
    """Remembers after how many optimizer steps the weights were validated last."""

    step: int | None = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember it."""
        if not trainer.sanity_checking:
            self.step = trainer.global_step


def build_trainer(
    config: RunConfig, output_dir: Path, precision: str, flops_per_token: int | None
) -> Trainer:
    """The Trainer of a run; it writes below `output_dir` only."""
    # Lightning suggests worker processes; a window is a slice of a memory map, no work for them.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Lightning's own business with PyTorch.
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    # A short run is no mistake: the collector logs every step whatever the interval.
    warnings.filterwarnings("ignore", message=".*smaller than the logging interval.*")
    # A resumed run's folder is not empty.
    warnings.filterwarnings("ignore", message=".*exists and is not empty.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    callbacks: list[Callback] = [
        LastValidation(),
        SpeedBursts(),  # before the collector, which takes up what it logs
        TrainingMetricsCollector(
            output_dir / TRAINING_REPORT,
            sample_every_n_steps=config.options.sample_every_n_steps,
            flops_per_token=flops_per_token,
            metadata={"model": config.model_name},
        ),
        AnomalyDetector(),
        Dashboard(yaml.safe_load(config.text)),
        ModelCheckpoint(
            output_dir / CHECKPOINTS,
            filename="{step}",
            monitor="step",
            mode="max",
            enable_version_counter=False,  # a damaged one of the same step is replaced
            save_top_k=2,  # one to fall back on, should a crash cut off the newer one
            every_n_train_steps=config.options.checkpoint_every_n_steps,
        ),
        # Not before: a checkpoint to resume from that does not fit is refused with nothing changed.
        LambdaCallback(on_train_start=lambda *_: _write_config(output_dir / CONFIG, config.text)),
    ]
    show_progress = config.trainer.get("enable_progress_bar")
    if show_progress is None:
        show_progress = sys.stderr.isatty() or sys.stdout.isatty()
    if show_progress:
        callbacks.append(RichProgressBar(refresh_rate=10))
    settings = {
        **config.trainer,
        "precision": precision,
        "enable_progress_bar": show_progress,
        "enable_model_summary": False,
        "strategy": ShardedStrategy() if config.trainer["strategy"] == "fsdp" else config.trainer["strategy"],
        # Measuring is one process's work, also where several have trained.
        **({} if config.options.runs("training") else {"strategy": "auto", "devices": 1, "num_nodes": 1}),
        "inference_mode": False,  # its tensors could not be trained on after a validation before training
    }
    return Trainer(
        **settings,
        callbacks=callbacks,
        logger=TensorBoardLogger(output_dir, name=TENSORBOARD, version=""),
        default_root_dir=output_dir,
    )


def train(
    trainer: Trainer, module: LightningModule, data: LightningDataModule, resume_from: Path | None
) -> str:
    """Fit, from the start or from a checkpoint, and leave a checkpoint of the last step.

    Returns where it is within the output directory. The Trainer's metrics are of the same weights.
    """
    trainer.fit(module, datamodule=data, ckpt_path=resume_from, weights_only=True)
    assert isinstance(trainer.checkpoint_callback, ModelCheckpoint)
    name = f"{CHECKPOINTS}/step={trainer.global_step}.ckpt"
    last = Path(trainer.default_root_dir) / name
    # The newest it wrote, which every process knows; not whether the file is there, which depends on timing.
    if str(last) != trainer.checkpoint_callback.best_model_path:
        trainer.save_checkpoint(last)
    (validation,) = (each for each in trainer.callbacks if isinstance(each, LastValidation))  # type: ignore[attr-defined]
    # Not yet in a finished run that was resumed, and of earlier weights where a step was the last one.
    if validation.step != trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    return name


@rank_zero_only
def _write_config(path: Path, text: str) -> None:
    write_text(path, text)
