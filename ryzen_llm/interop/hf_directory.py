"""Reading a Hugging Face model directory: config.json, safetensors in one file or several, tokenizer.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ryzen_llm.data import OTHER_TOKENS, SpecialTokens, Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop.fields import Fields
from ryzen_llm.interop.hf_config import parse_config
from ryzen_llm.interop.native_directory import MODEL_TYPE, load_native, parse_native
from ryzen_llm.interop.weights import load_weights
from ryzen_llm.model import Transformer

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CHAT_TEMPLATE = "chat_template.jinja"
_DTYPES = ("F32", "F16", "BF16", "F64")
_ROPE_FREQUENCIES = ".rotary_emb.inv_freq"
"""What old files hold besides the weights, in every layer: transformers computes it, and so do we."""
_EMBEDDING, _TIED_HEAD = "model.embed_tokens.weight", "lm_head.weight"


class SafetensorsFiles:
    """The tensors of a directory's safetensors files (see `TensorSource`).

    A file is mapped anew for each tensor: the pages that were read are then no longer the process's memory.
    """

    def __init__(
        self, directory: Path, *, tied: bool, norm_offset: float, dtypes: tuple[str, ...] | None = _DTYPES
    ) -> None:
        self.where = str(directory)
        self.norm_offset = norm_offset
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in _weight_files(directory):
            try:
                self._list_tensors(path, dtypes)
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: truncated or no safetensors file ({error})") from error
        if tied and self.shapes.pop(_TIED_HEAD, None) is not None and _EMBEDDING in self.shapes:
            # Some files hold the embedding a second time.
            head, embedding = self.read(_TIED_HEAD), self.read(_EMBEDDING)
            if not torch.equal(head.to(embedding.dtype), embedding):
                raise InputError(
                    f"{directory}: {_TIED_HEAD} is not the embedding that {CONFIG} ties it to: take it out, "
                    "or set tie_word_embeddings to false if the model has a head of its own"
                )

    def _list_tensors(self, path: Path, dtypes: tuple[str, ...] | None) -> None:
        file: Any
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name.endswith(_ROPE_FREQUENCIES):
                    continue
                piece = file.get_slice(name)
                if dtypes is not None and piece.get_dtype() not in dtypes:
                    raise InputError(
                        f"{path}: {name[:100]} is of dtype {piece.get_dtype()}, expected "
                        f"{', '.join(dtypes)}: quantised checkpoints are not supported"
                    )
                if name in self.shapes:
                    raise InputError(f"{path}: {name[:100]} is in another file of the model too")
                self.shapes[name] = tuple(piece.get_shape())
                self._files[name] = path

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        try:
            file: Any
            with safe_open(self._files[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise InputError(f"{self.where}: {name} cannot be read ({error})") from error
        return tensor


def load_directory(directory: Path, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a Hugging Face directory; see `load_pretrained`."""
    values = read_json(directory / CONFIG)
    if values.get("model_type") == MODEL_TYPE:
        native = parse_native(values, str(directory / CONFIG))
        tensors = SafetensorsFiles(directory, tied=False, norm_offset=0.0, dtypes=None)
        return load_native(native, tensors, dtype), _read_tokenizer(directory, values)
    config = parse_config(values, str(directory / CONFIG))
    tokenizer = _read_tokenizer(directory, values)
    source = SafetensorsFiles(
        directory, tied=config.tie_embeddings, norm_offset=1.0 if config.post_norms else 0.0
    )
    return load_weights(config, source, dtype), tokenizer


def read_json(path: Path) -> dict[str, Any]:
    """The keys and values of a JSON file. Raises InputError where it cannot be read or is no such file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON ({str(error)[:100]})") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def _weight_files(directory: Path) -> list[Path]:
    """The one file, which goes before an index as in transformers, or those that the index names, which have
    to lie in the directory itself.
    """
    index = directory / INDEX
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if not index.is_file():
        pickled = sorted(path.name for path in directory.glob("*.bin"))
        hint = f": {pickled[0]} is a pickle, which is never read" if pickled else ""
        raise InputError(f"{directory}: has no {WEIGHTS} and no {INDEX}{hint}; expected one of them")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: weight_map is not a mapping of tensors to file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors") or "\0" in name:
            raise InputError(
                f"{index}: names the file {name[:100]!r}, expected a .safetensors file of the same directory"
            )
        if not (directory / name).is_file():
            raise InputError(f"{index}: names {name[:100]!r}, which is not there")
    return [directory / name for name in names]


def _read_tokenizer(directory: Path, config: dict[str, Any]) -> Tokenizer:
    if not (directory / TOKENIZER).is_file():
        raise InputError(
            f"{directory}: has no {TOKENIZER}; save it with the tokenizer's fast form "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))"
        )
    settings = read_json(directory / TOKENIZER_CONFIG) if (directory / TOKENIZER_CONFIG).is_file() else {}
    if "added_tokens_decoder" not in settings and (directory / SPECIAL_TOKENS).is_file():  # an old one
        settings |= read_json(directory / SPECIAL_TOKENS)
    generation = read_json(directory / GENERATION_CONFIG) if (directory / GENERATION_CONFIG).is_file() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next(
            (
                one.get("template")
                for one in template
                if isinstance(one, dict) and one.get("name") == "default"
            ),
            None,
        )
    if (directory / CHAT_TEMPLATE).is_file():
        try:
            template = (directory / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{directory / CHAT_TEMPLATE}: cannot be read ({error})") from error
    if template is not None and not isinstance(template, str):
        raise InputError(f"{directory / TOKENIZER_CONFIG}: chat_template is not a text")
    others = {name: _token(settings, name, directory) for name in OTHER_TOKENS}
    stop_ids = _token_ids(config, directory / CONFIG) + _token_ids(generation, directory / GENERATION_CONFIG)
    return Tokenizer.from_file(
        directory / TOKENIZER,
        SpecialTokens(
            bos=_token(settings, "bos_token", directory),
            eos=_token(settings, "eos_token", directory),
            stop_ids=tuple(sorted(set(stop_ids))),
            chat_template=template,
            others={name: token for name, token in others.items() if token is not None},
        ),
    )


def _token(settings: dict[str, Any], name: str, directory: Path) -> str | None:
    """A special token's text, which may be given as an object with `content`."""
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    if value is not None and not isinstance(value, str):
        raise InputError(f"{directory / TOKENIZER_CONFIG}: {name} is not a text")
    return value


def _token_ids(values: dict[str, Any], path: Path) -> list[int]:
    """`eos_token_id`, which may be null, one or several."""
    if isinstance(values.get("eos_token_id"), list):
        ids: list[int] = Fields(values, str(path)).items("eos_token_id", int)
        return ids
    one = Fields(values, str(path)).whole("eos_token_id", None)
    return [] if one is None else [one]
