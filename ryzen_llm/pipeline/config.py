"""The configuration of a run: from files and the command line to objects, with every key checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace
from lightning.pytorch import Trainer

from ryzen_llm.claims import Optimizations, Thresholds
from ryzen_llm.data import TextDataModule
from ryzen_llm.errors import InputError
from ryzen_llm.model import PRESETS, ModelConfig
from ryzen_llm.pipeline.config_errors import explain
from ryzen_llm.training import OptimizerConfig

ALIASES = {
    "num_epochs": "trainer.max_epochs",
    "batch_size": "data.batch_size",
    "learning_rate": "optimizer.learning_rate",
    "target_speedup": "e2e_speedup_target",
    "accuracy_loss_threshold": "accuracy_loss_max",
}
"""Short names for keys, accepted in files and on the command line."""

PHASES = ("training", "validation", "testing")
"""Those that can be chosen."""

_DEFAULT_MODEL = "tiny"
_DESCRIPTION = """Train a language model, measure what the optimisations gain, and write the reports.

Five phases: setup, training, validation, testing, reporting. Every key below can stand in a YAML or JSON file
(--config FILE, several times if wanted; the later one wins) or on the command line. Short names: """

_LEAST_OF_DRAFTER = {"texts": 1, "length": 64, "vocab_size": 1, "intermediate_size": 1, "depth": 1}

# What the pipeline decides itself, and what makes no sense for it.
_TRAINER_SKIP = {
    "callbacks",
    "logger",
    "plugins",
    "profiler",
    "default_root_dir",
    "barebones",
    "fast_dev_run",
    "enable_checkpointing",
    "enable_model_summary",
    "inference_mode",
    "model_registry",
    "precision",  # added by hand, with the values that the recipes have
}


@dataclass(frozen=True)
class RunOptions:
    """The keys that belong to no part.

    Args:
        output_dir: Folder for checkpoints, logs and reports. An earlier run there is moved aside; anything
            else is left alone and refused.
        resume: Go on from the newest checkpoint in output_dir.
        phases: Which of training, validation and testing to run, with commas between; setup and reporting
            always run. Without training, the reports in output_dir of the phases left out are kept.
        checkpoint: Without training, the model to measure: a checkpoint, run, Hugging Face directory or .gguf
            file. If not given, the newest checkpoint in output_dir.
        strict: Exit with status 3 if a verdict is FAIL.
        seed: Seed of the weights and of everything else that is drawn.
        compile: Compile the model's blocks with torch.compile.
        checkpoint_activations: Compute activations again in backward: less memory, about a third more time.
        mask_documents: Let no token see another document than its own; those of a row follow each other.
        kernel_seconds: For measuring kernels in setup; after these no other form is tried, and the next run
            goes on.
        checkpoint_every_n_steps: Optimizer steps between checkpoints.
        sample_every_n_steps: Every n-th step is kept in training_metrics_report.json.
        validation_rounds: Paired rounds for each timed claim; 6 or more give an interval.
        twin_steps: Optimizer steps that two twins are trained for from scratch, one by the run's recipe and
            one plainly, to compare their validation losses; 0 for none.
        prompt: Beginning of the sample text at the end.
    """

    output_dir: str = "runs/default"
    resume: bool = False
    phases: str = ",".join(PHASES)
    checkpoint: str | None = None
    strict: bool = False
    seed: int = 0
    compile: bool = True
    checkpoint_activations: bool = False
    mask_documents: bool = False
    kernel_seconds: float = 15.0
    checkpoint_every_n_steps: int = 100
    sample_every_n_steps: int = 100
    validation_rounds: int = 12
    twin_steps: int = 30
    prompt: str = "import os\n\n\ndef "

    def __post_init__(self) -> None:
        for name in ("checkpoint_every_n_steps", "sample_every_n_steps", "validation_rounds"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if not self.kernel_seconds >= 0:
            raise InputError(f"kernel_seconds is {self.kernel_seconds}, expected zero or more")
        if self.twin_steps < 0:
            raise InputError(f"twin_steps is {self.twin_steps}, expected zero or more")
        if not 0 <= self.seed < 1 << 32:
            raise InputError(f"seed is {self.seed}, expected zero or more, and less than 2**32")
        if not self.prompt:
            raise InputError("prompt is empty, expected the beginning of a text")
        try:
            self.prompt.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
            raise InputError(f"prompt is {self.prompt!r}, expected text in UTF-8") from error
        for name in self.phases.split(","):
            if name not in ("setup", *PHASES, "reporting"):
                raise InputError(f"phases has {name!r}, expected some of {', '.join(PHASES)}")
        if self.checkpoint is not None and self.runs("training"):
            raise InputError(
                "checkpoint is given, but it is for --phases without training: to train on from it use "
                "--model.init_from, to go on with a run --resume"
            )

    def runs(self, phase: str) -> bool:
        """Whether `phase` is one of those to run."""
        return phase in self.phases.split(",")


@dataclass(frozen=True)
class DrafterOptions:
    """Training draft heads for a model, in the place of a language model.

    Args:
        target: The model to train heads for, as for load_pretrained: a checkpoint, run, directory or GGUF
            file. Null trains a language model.
        texts: How many texts it writes itself to train on, at least.
        length: Tokens of each.
        weights: What it writes them with, best what it is to be decoded with: bf16, fp32, int8 or int4.
        vocab_size: How many tokens can be drafted, those that it writes most.
        intermediate_size: Width of the heads' hidden layer.
        depth: Tokens of a draft.
    """

    target: str | None = None
    texts: int = 768
    length: int = 384
    weights: str = "bf16"
    vocab_size: int = 8192
    intermediate_size: int = 1024
    depth: int = 3

    def __post_init__(self) -> None:
        for name, least in _LEAST_OF_DRAFTER.items():
            if getattr(self, name) < least:
                raise InputError(f"drafter.{name} is {getattr(self, name)}, expected {least} or more")


@dataclass(frozen=True)
class RunConfig:
    """A whole configuration, checked.

    `trainer` holds the arguments of Lightning's Trainer, `model` what training starts from (`init_from`, or
    the name of a preset) and fields of the model, `text` all of the configuration as YAML.
    """

    options: RunOptions
    thresholds: Thresholds
    optimizations: Optimizations
    optimizer: OptimizerConfig
    drafter: DrafterOptions
    data: TextDataModule
    model: dict[str, Any]
    trainer: dict[str, Any]
    text: str

    def __post_init__(self) -> None:
        _check_trainer(self.trainer)
        if self.init_from is None:
            return
        if self.model["name"] is not None:
            raise InputError(
                f"model.name is {self.model['name']}, but model.init_from brings its own model: leave one "
                "of them out"
            )
        if self.data.given_tokenizer is not None:
            raise InputError(
                "data.tokenizer is given, but model.init_from brings the model's own tokenizer: leave it out"
            )

    @property
    def init_from(self) -> str | None:
        """The path of the model that training starts from; None to start from random weights."""
        path: str | None = self.model["init_from"]
        return path

    @property
    def model_name(self) -> str:
        """The model's name for people: the preset's, or that of the file or directory it comes from."""
        return Path(self.init_from).name if self.init_from else self.model["name"] or _DEFAULT_MODEL

    def check_initial(self, path: str, found: ModelConfig) -> None:
        """Raise InputError where a key contradicts the model at `path`, or the data do not fit it."""
        for name, value in self._model_fields().items():
            if value != getattr(found, name):
                raise InputError(
                    f"model.{name} is {value}, but the model at {path} has {getattr(found, name)}: leave "
                    f"model.{name} out"
                )
        self._check_context(found)

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model's shape for a tokenizer of `vocab_size`; InputError where it does not fit the data."""
        overrides = self._model_fields()
        if overrides.setdefault("vocab_size", vocab_size) < vocab_size:
            raise InputError(
                f"model.vocab_size is {overrides['vocab_size']}, but the tokenizer has {vocab_size} tokens; "
                "leave it out or raise it"
            )
        config = ModelConfig.from_name(self.model_name, **overrides)
        self._check_context(config)
        return config

    def _model_fields(self) -> dict[str, Any]:
        """The fields of the model that are given."""
        return {
            name: value
            for name, value in self.model.items()
            if value is not None and name not in ("name", "init_from")
        }

    def _check_context(self, config: ModelConfig) -> None:
        if self.data.context > config.max_position_embeddings:
            raise InputError(
                f"data.context is {self.data.context}, more than the model's max_position_embeddings of "
                f"{config.max_position_embeddings}; lower the one or raise the other"
            )


def _check_trainer(trainer: dict[str, Any]) -> None:
    """What Lightning takes, but does not work here."""
    clip = trainer["gradient_clip_val"]
    if clip is not None and not clip >= 0:
        raise InputError(f"trainer.gradient_clip_val is {clip}, expected zero, which is no clipping, or more")
    if trainer["limit_val_batches"] == 0:
        raise InputError("trainer.limit_val_batches is 0, expected more: the validation loss is reported")
    endless = trainer["max_epochs"] == -1 or (
        trainer["max_epochs"] is None and trainer["max_time"] is not None
    )
    if endless and trainer["max_steps"] == -1:
        raise InputError(
            "trainer.max_epochs and trainer.max_steps set no end, expected one of them to: the learning rate "
            "follows it, also where trainer.max_time comes first"
        )


def build_parser() -> ArgumentParser:
    """The parser of scripts/train.py; its defaults and help come from the docstrings of the parts."""
    short = ", ".join(f"{alias} = {key}" for alias, key in ALIASES.items())
    parser = ArgumentParser(prog="train.py", description=_DESCRIPTION + short + ".", exit_on_error=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML or JSON file with any of these keys.")
    for part in (RunOptions, Optimizations, Thresholds):
        parser.add_class_arguments(part, None)
    parser.add_class_arguments(TextDataModule, "data", skip={"tokenizer"})
    parser.add_argument(
        "--data.tokenizer",
        type=str | None,
        default=None,
        help="Path of a tokenizer.json; if not given, byte-level BPE is trained on the train split.",
    )
    model = parser.add_argument_group(
        "The model: a pretrained one, or a preset and fields that replace its own"
    )
    model.add_argument(
        "--model.init_from",
        type=str | None,
        default=None,
        help="Start from a Hugging Face directory, a .gguf file, a checkpoint, or the folder of a run. "
        "Its own tokenizer is used.",
    )
    model.add_argument(
        "--model.name",
        type=str | None,
        default=None,
        help=f"One of {', '.join(PRESETS)} (default: {_DEFAULT_MODEL}, without init_from).",
    )
    for field in fields(ModelConfig):
        default = "the preset's" if field.default is MISSING else "the preset's, or the model's usual one"
        model.add_argument(
            f"--model.{field.name}",
            type=field.type | None,  # type: ignore[operator]
            default=None,
            help=f"Default: {default}.",
        )
    parser.add_class_arguments(OptimizerConfig, "optimizer")
    parser.add_class_arguments(DrafterOptions, "drafter")
    parser.add_class_arguments(Trainer, "trainer", skip=_TRAINER_SKIP)
    parser.add_argument(
        "--trainer.precision",
        type=Literal["bf16-mixed", "32-true"] | None,
        default=None,
        help="Default: bf16-mixed where the hardware has bf16, else 32-true.",
    )
    parser.set_defaults({"trainer.max_epochs": 1, "trainer.gradient_clip_val": 1.0})
    return parser


def parse(arguments: Sequence[str]) -> RunConfig:
    """The configuration that the command line (and the files it names) gives.

    Raises InputError, naming the key, for anything wrong. `--help` and `--print_config` print and exit.
    """
    parser = build_parser()
    try:
        namespace = parser.parse_args(_expand(arguments))
        parser.validate(namespace, False)  # also values that are null, which parsing lets through
    except (ArgumentError, TypeError) as error:
        keys = [*ALIASES, *build_parser().get_defaults().keys()]
        raise InputError(explain(str(error), keys)) from error
    return from_namespace(parser, namespace)


def from_namespace(parser: ArgumentParser, namespace: Namespace) -> RunConfig:
    """The checked configuration of parsed arguments."""
    values = namespace.clone()
    values.pop("config", None)
    for name in ("optimizer", "drafter", "data", "model", "trainer"):
        if not isinstance(values[name], Namespace):
            raise InputError(
                f"{name} is {values[name]!r}, expected keys and values; leave it out for its defaults"
            )
    text = parser.dump(values)

    def part(cls: Any) -> Any:
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    return RunConfig(
        options=part(RunOptions),
        thresholds=part(Thresholds),
        optimizations=part(Optimizations),
        optimizer=OptimizerConfig(**values["optimizer"].as_dict()),
        drafter=DrafterOptions(**values["drafter"].as_dict()),
        data=TextDataModule(**values["data"].as_dict()),
        model=values["model"].as_dict(),
        trainer=values["trainer"].as_dict(),
        text=text,
    )


_SWITCHES = {
    f"--{field.name}"
    for part in (RunOptions, Optimizations)
    for field in fields(part)
    if field.type == "bool"
}


def _expand(arguments: Sequence[str]) -> list[str]:
    """The command line with short names written out, in its options and in the files that --config names.

    A switch without a value, such as `--resume`, is on.
    """
    expanded: list[str] = []
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if argument in _SWITCHES and (*arguments, "--")[position + 1].startswith("--"):
            argument = f"{argument}=true"
        elif name.startswith("--") and name[2:] in ALIASES:
            argument = f"--{ALIASES[name[2:]]}{equals}{value}"
        elif name == "--config" and equals:
            argument = f"--config={_read_config(value)}"
        elif position and arguments[position - 1] == "--config":
            argument = _read_config(argument)
        expanded.append(argument)
    return expanded


def _read_config(path: str) -> str:
    """A configuration file as one JSON text with the short names written out."""
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InputError(f"--config {path}: cannot be read ({reason})") from error
    except yaml.YAMLError as error:
        raise InputError(f"--config {path}: not YAML or JSON: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected keys and values, found {type(content).__name__}")
    for alias in ALIASES.keys() & content.keys():
        part, _, key = ALIASES[alias].rpartition(".")
        target = content.setdefault(part, {}) if part else content
        if not isinstance(target, dict):
            raise InputError(f"--config {path}: {part} is {target!r}, expected keys and values")
        target[key] = content.pop(alias)
    return json.dumps(content, default=str)


def exit_with(error: InputError) -> int:
    """Print the error as one line on stderr; returns the exit status for bad input."""
    print(f"error: {error}", file=sys.stderr)
    return 2
