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

_MODEL_PREFIX = "model."


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of this project, on the CPU.

    Raises InputError for a file that is missing, truncated, holds anything but tensors and plain types, or
    was not written by this project.
    """
    if not path.is_file():
        raise InputError(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"checkpoint {path}: not a plain checkpoint, refused ({str(error).splitlines()[0]}); expected a "
            "checkpoint written by scripts/train.py"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise InputError(
            f"checkpoint {path}: truncated or not a checkpoint ({str(error).splitlines()[0]}); use another "
            "one of its folder"
        ) from error
    if not isinstance(content, dict) or CHECKPOINT_KEY not in content:
        raise InputError(f"checkpoint {path}: not of this project; expected one written by scripts/train.py")
    written = content[CHECKPOINT_KEY].get("format")
    if written != CHECKPOINT_FORMAT:
        raise InputError(
            f"checkpoint {path}: has format {written}, this version reads format {CHECKPOINT_FORMAT}; "
            "use the version of ryzen-llm that wrote it"
        )
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
    model = Transformer(ModelConfig.from_dict(content[CHECKPOINT_KEY]["model"]))
    weights = {
        name.removeprefix(_MODEL_PREFIX): tensor
        for name, tensor in content["state_dict"].items()
        if name.startswith(_MODEL_PREFIX)
    }
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(f"checkpoint {path}: its tensors do not fit its model: {error}") from error
    return model.eval(), Tokenizer.from_json(tokenizer)


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
