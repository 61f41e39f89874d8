"""The model that a call starts from, where it is not a new one."""

from __future__ import annotations

from pathlib import Path

from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.model import Transformer
from ryzen_llm.pipeline.config import RunConfig
from ryzen_llm.pipeline.training import CHECKPOINTS, CONFIG
from ryzen_llm.training import newest_checkpoint


def load_model(config: RunConfig, path: str) -> Transformer:
    """The model at `path`, whose tokenizer becomes that of the data.

    Raises InputError where it does not fit the configuration.
    """
    model, config.data.given_tokenizer = load_pretrained(path)
    config.check_initial(path, model.config)
    return model


def model_to_measure(config: RunConfig, output_dir: Path) -> tuple[Transformer, str]:
    """The model for the phases after training, where a call does not train, and where it is from.

    Raises InputError where there is none, and where the reports in `output_dir` are about another one.
    """
    inside = newest_checkpoint(output_dir / CHECKPOINTS)
    given = config.options.checkpoint or inside or config.init_from
    if given is None:
        raise InputError(
            f"phases has no training, and {output_dir} holds no checkpoint: give --checkpoint, or an "
            "output_dir with a run in it"
        )
    path = Path(given).expanduser().absolute()
    if inside and path not in (inside, output_dir):
        raise InputError(
            f"checkpoint {path}: output_dir {output_dir} holds a run whose newest checkpoint is "
            f"{inside.name}; its reports are about that one: choose another output_dir"
        )
    if not inside or config.init_from:
        model = load_model(config, str(inside or path))
    else:
        model, tokenizer = load_pretrained(inside)
        config.check_initial(str(inside), model.config)
        # The store that training made is opened again, not a second one with the same tokenizer given.
        if tokenizer.to_json() != config.data.tokenizer.to_json():
            raise InputError(
                f"{inside} was trained with another tokenizer than the data here give: use the run's {CONFIG}"
            )
    return model, str(inside.relative_to(output_dir) if inside else path)
