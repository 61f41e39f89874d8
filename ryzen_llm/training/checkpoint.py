"""Reading this project's Lightning checkpoints, without unpickling anything but tensors and plain types."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch

from ryzen_llm.data import TextDataModule, Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.training.language_module import CHECKPOINT_FORMAT, CHECKPOINT_KEY
from ryzen_llm.training.sharded import read_sharded

_MODEL_PREFIX = "model."


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of this project, on the CPU; a sharded one without optimizer states.

    Raises InputError for a file that is missing, truncated, holds anything but tensors and plain types, or
    was not written by this project.
    """
    if not path.exists():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about a foreign pickle's protocol; the error says enough
            if path.is_dir():
                content = read_sharded(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {path}: not a plain checkpoint, refused ({_first_line(error)}); expected a "
            "checkpoint written by scripts/train.py"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"checkpoint {path}: truncated or not a checkpoint ({_first_line(error)}); use another "
            "one of its folder"
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get(CHECKPOINT_KEY), dict):
        raise InputError(f"checkpoint {path}: not of this project; expected one written by scripts/train.py")
    ours = content[CHECKPOINT_KEY]
    if ours.get("format") != CHECKPOINT_FORMAT:
        raise InputError(
            f"checkpoint {path}: has format {ours.get('format')}, this version reads format "
            f"{CHECKPOINT_FORMAT}; use the version of ryzen-llm that wrote it"
        )
    if missing := {"model", "state_dict"} - {*ours, *content}:
        raise InputError(f"checkpoint {path}: is incomplete, it has no {' and no '.join(sorted(missing))}")
    return content


def load_checkpoint(path: Path) -> tuple[Transformer, Tokenizer]:
    """The model (fp32, on the CPU, in eval mode) and the tokenizer of a checkpoint.

    Raises InputError as `read_checkpoint` does, and where the checkpoint has no tokenizer or its tensors do
    not fit its model.
    """
    content = read_checkpoint(path)
    tokenizer = content.get(TextDataModule.__qualname__, {}).get("tokenizer")
    if tokenizer is None:
        raise InputError(f"checkpoint {path}: holds no tokenizer; it was not trained with TextDataModule")
    weights = {
        name.removeprefix(_MODEL_PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(_MODEL_PREFIX)
    }
    try:
        model = Transformer(ModelConfig.from_dict(content[CHECKPOINT_KEY]["model"]))
        model.load_state_dict(weights)
        return model.eval(), Tokenizer.from_json(tokenizer)
    except InputError as error:
        raise InputError(f"checkpoint {path}: {error}") from error
    except RuntimeError as error:
        raise InputError(
            f"checkpoint {path}: its tensors do not fit its model: {' '.join(str(error).split())}"
        ) from error


def check_resumable(path: Path, config: ModelConfig, data: TextDataModule) -> None:
    """Raise InputError, naming what differs, where the checkpoint is not of this model and data."""
    content = read_checkpoint(path)
    saved = ModelConfig.from_dict(content[CHECKPOINT_KEY]["model"]).to_dict()
    changes = [
        f"model.{name} is {value}, was {saved[name]}"
        for name, value in config.to_dict().items()
        if saved[name] != value
    ]
    if changes:
        raise InputError(
            f"resume: {path} has another model ({', '.join(changes)}); restore it, or start a new run"
        )
    if TextDataModule.__qualname__ not in content:
        raise InputError(f"resume: {path} was not trained with TextDataModule; start a new run")
    data.check_resumable(content[TextDataModule.__qualname__])


def newest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the most optimizer steps in `directory` that can be read; None where there is none.

    One that was cut off while it was written is passed over with a warning.
    """
    steps = {int(path.stem.partition("=")[2]): path for path in directory.glob("step=*.ckpt")}
    for step in sorted(steps, reverse=True):
        try:
            read_checkpoint(steps[step])
        except InputError as error:
            warnings.warn(f"{error}; taking the one before", stacklevel=2)
        else:
            return steps[step]
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
