"""Weights under the names that transformers gives them, into a `Transformer` and out of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LISTED = 5  # names in a message; the others are counted


class TensorSource(Protocol):
    """Tensors of a file or several, not read yet."""

    where: str
    """What they are read from, for messages."""
    shapes: dict[str, tuple[int, ...]]
    """By transformers' name."""
    norm_offset: float
    """What is to be added to the weight of every RMSNorm: Gemma's transformers form stores it less one."""

    def read(self, name: str) -> Tensor:
        """The tensor, of any floating dtype. Raises InputError where the file is damaged."""


def dtype_named(name: str) -> torch.dtype:
    """The dtype of weights. Raises InputError for a name that is not in `DTYPES`."""
    if name not in DTYPES:
        raise InputError(f"dtype is {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_weights(config: ModelConfig, source: TensorSource, dtype: torch.dtype) -> Transformer:
    """A model (on the CPU, in eval mode) of the shape `config` with the weights of `source` in `dtype`.

    Everything is compared before anything is allocated; then one tensor at a time is read into its place.
    Raises InputError that lists the tensors that are missing, not expected or of another shape.
    """
    model = model_without_memory(config, source.where).to(dtype)
    compare_shapes({name: tuple(place.shape) for name, place, _ in _places(model)}, source)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, place, is_norm in _places(model):
            tensor = source.read(name)
            # In fp32: bf16 holds the weight less one, and not always the weight.
            place.copy_(tensor.float() + source.norm_offset if is_norm and source.norm_offset else tensor)
    return model.eval()


def model_without_memory(config: ModelConfig, where: str) -> Transformer:
    """A model on the meta device. Raises InputError where sizes are beyond what tensors can have."""
    try:
        with torch.device("meta"):
            return Transformer(config)
    except (RuntimeError, OverflowError, ValueError, TypeError) as error:  # TypeError: beyond 64 bits
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{where}: its sizes make no model ({reason})") from error


def weights_of(model: Transformer, norm_offset: float) -> Iterator[tuple[str, Tensor]]:
    """The weights under transformers' names, the embedding densified; the inverse of `load_weights`."""
    for name, place, is_norm in _places(model):
        yield name, place.float() - norm_offset if is_norm and norm_offset else place


def _places(model: Transformer) -> Iterator[tuple[str, Tensor, bool]]:
    """Transformers' name for each weight, its place (a view of ours), and whether it is that of a norm."""
    config = model.config
    yield "model.embed_tokens.weight", model.embedding.dense_weight(), False
    for i in range(config.num_layers):
        block, theirs = model.get_submodule(f"blocks.{i}"), f"model.layers.{i}"
        norms = {
            "input_layernorm": "attention_norm",
            "post_attention_layernorm": "attention_post_norm" if config.post_norms else "mlp_norm",
        }
        if config.post_norms:
            norms |= {"pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_post_norm"}
        if config.qk_norm:
            norms |= {"self_attn.q_norm": "attention.q_norm", "self_attn.k_norm": "attention.k_norm"}
        for name, ours in norms.items():
            yield f"{theirs}.{name}.weight", block.get_parameter(f"{ours}.weight").detach(), True
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            fused = block.get_parameter(f"attention.qkv_proj.{kind}").detach()
            for x, rows in zip("qkv", torch.split(fused, [q_size, kv_size, kv_size]), strict=True):
                yield f"{theirs}.self_attn.{x}_proj.{kind}", rows, False
        fused = block.get_parameter("mlp.gate_up_proj.weight").detach()
        for x, rows in zip(("gate", "up"), fused.chunk(2), strict=True):
            yield f"{theirs}.mlp.{x}_proj.weight", rows, False
        yield f"{theirs}.mlp.down_proj.weight", block.get_parameter("mlp.down_proj.weight").detach(), False
        o_proj = block.get_parameter("attention.o_proj.weight").detach()
        yield f"{theirs}.self_attn.o_proj.weight", o_proj, False
    yield "model.norm.weight", model.norm.weight.detach(), True
    if model.head is not None:
        yield "lm_head.weight", model.head.weight.detach(), False


def compare_shapes(expected: dict[str, tuple[int, ...]], source: TensorSource) -> None:
    """Raise InputError that lists the tensors that are missing, not expected or of another shape."""
    found = source.shapes
    faults = {
        "missing": sorted(expected.keys() - found.keys()),
        "not expected": sorted(found.keys() - expected.keys()),
        "of another shape": sorted(
            f"{name} is {list(found[name])}, expected {list(expected[name])}"
            for name in expected.keys() & found.keys()
            if found[name] != expected[name]
        ),
    }
    described = [f"{len(names)} {fault}: {_list(names)}" for fault, names in faults.items() if names]
    if described:
        raise InputError(f"{source.where}: the tensors do not fit the model: {'; '.join(described)}")


def _list(names: list[str]) -> str:
    shown = ", ".join(name[:100] for name in names[:_LISTED])
    return shown if len(names) <= _LISTED else f"{shown} and {len(names) - _LISTED} more"
