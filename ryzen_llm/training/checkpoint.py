"""Reading this project's Lightning checkpoints, without unpickling anything but tensors and plain types."""

from __future__ import annotations

import pickle
import re
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.data import TextDataModule, Tokenizer
from ryzen_llm.decoding import DraftHeads
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.training.language_module import CHECKPOINT_FORMAT, CHECKPOINT_KEY
from ryzen_llm.training.optimizer import OptimizerConfig
from ryzen_llm.training.sharded import read_sharded

_MODEL_PREFIX = "model."
_NAME = re.compile(r"step=(\d+)\.ckpt")
_KINDS = {"model": "a language model", "heads": "draft heads"}
"""What a checkpoint can be of, by the key of its shape."""
_KEPT = ("learning_rate", "weight_decay", "beta1", "beta2")
"""Settings that an optimizer takes from the checkpoint, whatever the configuration says."""


def read_checkpoint(path: Path, kind: str = "model") -> dict[str, Any]:
    """The content of a checkpoint of this project, on the CPU; a sharded one without optimizer states.

    Raises InputError for a file that is missing, truncated, holds anything but tensors and plain types, was
    not written by this project, or is not of `kind`: "model" or "heads".
    """
    content = _read(path)
    _check_kind(path, content, kind)
    return content


def _read(path: Path) -> dict[str, Any]:
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
    except Exception as error:  # whatever an unpickler meets in bytes that are no pickle
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
    if not isinstance(ours.get("heads", ours.get("model")), dict):
        raise InputError(f"checkpoint {path}: is incomplete, it has no shape of a model")
    weights = content.get("state_dict")
    if not isinstance(weights, dict) or not all(isinstance(each, Tensor) for each in weights.values()):
        raise InputError(f"checkpoint {path}: is incomplete, it has no weights")
    return content


def _check_kind(path: Path, content: dict[str, Any], kind: str) -> None:
    found = "heads" if "heads" in content[CHECKPOINT_KEY] else "model"
    if found != kind:
        raise InputError(f"checkpoint {path}: is of {_KINDS[found]}, expected one of {_KINDS[kind]}")


def load_checkpoint(path: Path) -> tuple[Transformer, Tokenizer]:
    """The model (fp32, on the CPU, in eval mode) and the tokenizer of a checkpoint.

    Raises InputError as `read_checkpoint` does, and where the checkpoint has no tokenizer or its tensors do
    not fit its model.
    """
    content = read_checkpoint(path)
    data = content.get(TextDataModule.__qualname__)
    tokenizer = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(tokenizer, str):
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


def check_resumable(
    path: Path, config: ModelConfig, data: TextDataModule, optimizer: OptimizerConfig
) -> None:
    """Raise InputError, naming what differs, where the checkpoint is not of this model, data and optimizer.

    The schedule may be another one, for a run that is to become longer: it is followed from there on.
    """
    content = read_checkpoint(path)
    ours = content[CHECKPOINT_KEY]
    saved = ModelConfig.from_dict(ours["model"]).to_dict()
    if changes := _changes("model", config.to_dict(), saved):
        raise InputError(f"resume: {path} has another model ({changes}); restore it, or start a new run")
    _check_optimizer(path, optimizer, ours)
    if not isinstance(content.get(TextDataModule.__qualname__), dict):
        raise InputError(f"resume: {path} was not trained with TextDataModule; start a new run")
    data.check_resumable(content[TextDataModule.__qualname__])


def check_heads_resumable(path: Path, heads: DraftHeads, optimizer: OptimizerConfig) -> None:
    """Raise InputError, naming what differs, where the checkpoint is not of these heads and optimizer."""
    content = read_checkpoint(path, "heads")
    ours = content[CHECKPOINT_KEY]
    if changes := _changes("drafter", asdict(heads.config), ours["heads"]):
        raise InputError(f"resume: {path} is of other heads ({changes}); restore drafter, or start a new run")
    vocabulary = content["state_dict"].get("heads.vocabulary")
    if vocabulary is None or not torch.equal(vocabulary, heads.vocabulary.cpu()):
        raise InputError(f"resume: {path} drafts other tokens; restore drafter and data, or start a new run")
    _check_optimizer(path, optimizer, ours)


def _check_optimizer(path: Path, optimizer: OptimizerConfig, ours: dict[str, Any]) -> None:
    here = {name: value for name, value in asdict(optimizer).items() if name in _KEPT}
    if changes := _changes("optimizer", here, ours.get("optimizer")):
        raise InputError(
            f"resume: {path} was trained with another optimizer ({changes}), which it goes on with; restore "
            "it, or start a new run"
        )


def _changes(part: str, here: dict[str, Any], saved: Any) -> str:
    """What differs, for people."""
    before = saved if isinstance(saved, dict) else {}
    return ", ".join(
        f"{part}.{name} is {value}, was {before.get(name)}"
        for name, value in here.items()
        if value != before.get(name)
    )


def newest_checkpoint(directory: Path, kind: str = "model") -> Path | None:
    """The checkpoint of the most optimizer steps in `directory` that can be read; None where there is none.

    One that was cut off while it was written is passed over with a warning. Raises InputError where the
    newest is not of `kind`, see `read_checkpoint`.
    """
    named = ((_NAME.fullmatch(path.name), path) for path in directory.glob("step=*.ckpt"))
    steps = {int(match[1]): path for match, path in named if match}
    for step in sorted(steps, reverse=True):
        try:
            content = _read(steps[step])
        except InputError as error:
            warnings.warn(f"{error}; taking the one before", stacklevel=2)
        else:
            _check_kind(steps[step], content, kind)
            return steps[step]
    return None


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
