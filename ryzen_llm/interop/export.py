"""`export_pretrained`: a directory that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop.hf_config import write_config
from ryzen_llm.interop.hf_directory import (
    CONFIG,
    GENERATION_CONFIG,
    INDEX,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
)
from ryzen_llm.interop.native_directory import native_config, native_weights
from ryzen_llm.interop.weights import dtype_named, weights_of
from ryzen_llm.model import Transformer


@torch.no_grad()
def export_pretrained(
    model: Transformer,
    tokenizer: Tokenizer,
    directory: str | Path,
    *,
    dtype: str = "fp32",
    max_shard_bytes: int = 5_000_000_000,
    densify: bool = True,
) -> Path:
    """Write a Hugging Face directory: safetensors, config.json and the tokenizer's files; returns its path.

    `transformers.AutoModelForCausalLM.from_pretrained` loads it with the same logits, and `load_pretrained`
    with the same bits where `dtype` holds them. The directory appears complete or not at all.

    Args:
        model: The model, on any device.
        tokenizer: Its tokenizer.
        directory: Where to; it must not be there yet, or be empty.
        dtype: "fp32", "bf16" or "fp16".
        max_shard_bytes: Size in bytes above which the weights are split into several files.
        densify: Write a compressed embedding as the dense one that it stands for. Without, it is written in
            its packed form, which only `load_pretrained` reads, and which is not trained.

    Raises InputError for a directory that is in use or cannot be written, an unknown dtype, and a model whose
    combination of options no architecture of transformers has.
    """
    try:
        directory = Path(directory).expanduser().absolute()
    except RuntimeError as error:  # ~ of nobody
        raise InputError(f"{directory}: {error}") from error
    target = dtype_named(dtype)
    if max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes is {max_shard_bytes}, expected 1 or more")
    weights: Iterable[tuple[str, Tensor]]
    if densify or model.config.embedding == "dense":
        config = write_config(model.config) | {"torch_dtype": str(target).removeprefix("torch.")}
        norm_offset = 1.0 if model.config.post_norms else 0.0
        weights = ((name, t.to("cpu", target).contiguous()) for name, t in weights_of(model, norm_offset))
    else:
        embedding = model.embedding.compressed()
        config = native_config(replace(model.config, embedding_settings=embedding.settings or None))
        weights = native_weights(model, embedding, target)
    try:
        if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise InputError(f"{directory}: is there already; name another directory, or remove it")
        directory.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
        try:
            _write_weights(building, weights, max_shard_bytes)
            stops = {"eos_token_id": list(tokenizer.stop_ids)}
            # Said outright, because the defaults of some architectures are beyond a small vocabulary.
            _write_json(building / CONFIG, config | stops | {"bos_token_id": None, "pad_token_id": None})
            _write_json(building / GENERATION_CONFIG, stops)
            (building / TOKENIZER).write_text(tokenizer.to_plain_json(), encoding="utf-8")
            _write_json(building / TOKENIZER_CONFIG, _tokenizer_config(model, tokenizer))
            building.chmod(0o755)  # mkdtemp makes private ones, and so does safetensors
            for file in building.iterdir():
                file.chmod(0o644)
            os.replace(building, directory)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{directory}: cannot be written ({error})") from error
    return directory


def _write_weights(directory: Path, weights: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    """One file, or several with an index; a file at a time is held in memory."""
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        save_file(shard, directory / f"shard-{len(shards)}", {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in weights:
        if shard and size + tensor.nbytes > max_shard_bytes:
            flush()
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (directory / f"shard-{index}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _tokenizer_config(model: Transformer, tokenizer: Tokenizer) -> dict[str, Any]:
    special = tokenizer.special
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": special.bos,
        "eos_token": special.eos or tokenizer.decode([tokenizer.end_of_text_id]),
        "chat_template": special.chat_template,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        **special.others,
    }
    return {name: value for name, value in values.items() if value is not None}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
