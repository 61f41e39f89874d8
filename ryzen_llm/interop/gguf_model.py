"""A model from a GGUF file: its metadata as `ModelConfig`, its tensors under transformers' names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop.fields import Fields
from ryzen_llm.interop.gguf_reader import GGUFFile
from ryzen_llm.interop.gguf_tokenizer import read_tokenizer
from ryzen_llm.interop.hf_config import checked_layers
from ryzen_llm.interop.weights import load_weights
from ryzen_llm.kernels import RopeScaling
from ryzen_llm.model import ModelConfig, Transformer

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_FFN_NORM = "pre_feedforward_layernorm"
_ROPE_FACTORS = "rope_freqs.weight"
# llama.cpp has these in its code, not in the file.
_GEMMA_LOCAL_THETA, _GEMMA_PATTERN, _GEMMA_27B_LAYERS = 10000.0, 6, 62


class GGUFTensors:
    """The tensors of a GGUF file; see `TensorSource`."""

    norm_offset = 0.0  # llama.cpp's converter has added Gemma's one already

    def __init__(self, file: GGUFFile, architecture: str, config: ModelConfig) -> None:
        self.where = str(file.path)
        self._file = file
        self._names: dict[str, str] = {}
        for name in file.tensors:
            if name != _ROPE_FACTORS:
                self._names[_transformers_name(name, architecture)] = name
        self.shapes = {name: file.tensors[theirs].shape for name, theirs in self._names.items()}
        self._heads = (
            {"q_proj": config.num_heads, "k_proj": config.num_kv_heads} if architecture == "llama" else {}
        )

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        weights = self._file.read(self._names[name])
        num_heads = self._heads.get(name.split(".")[-2])
        if num_heads:
            # llama.cpp rotates neighbours: its converter put the two halves of each head side by side.
            shape = weights.shape
            weights = weights.reshape(num_heads, -1, 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
        # A copy, because the file is mapped read-only, is made where PyTorch would warn of it.
        return torch.from_numpy(weights if weights.flags.writeable else weights.copy())


def load_gguf(path: Path, dtype: torch.dtype) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer of a GGUF file; see `load_pretrained`."""
    file = GGUFFile(path)
    where = str(path)
    architecture = Fields(file.metadata, where).text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"{where}: architecture {architecture[:60]!r} is not supported, expected one of "
            f"{', '.join(ARCHITECTURES)}"
        )
    config = _read_config(file, architecture, where)
    source = GGUFTensors(file, architecture, config)
    return load_weights(config, source, dtype), read_tokenizer(file.metadata, where)


def _transformers_name(name: str, architecture: str) -> str:
    """The name that transformers gives a tensor; an unknown one is left as it is, to be listed."""
    if name in _TOP:
        return _TOP[name]
    if matched := re.fullmatch(r"blk\.(\d{1,4})\.(\w+)\.(weight|bias)", name):
        index, part, kind = matched.groups()
        if part in _IN_BLOCK:
            theirs = _GEMMA_FFN_NORM if (architecture, part) == ("gemma3", "ffn_norm") else _IN_BLOCK[part]
            return f"model.layers.{index}.{theirs}.{kind}"
    return name


def _read_config(file: GGUFFile, architecture: str, where: str) -> ModelConfig:
    """The shape. Raises InputError for what is missing, of a wrong type, or an option not known."""
    prefix = f"{architecture}."
    fields = Fields(
        {key.removeprefix(prefix): v for key, v in file.metadata.items() if key.startswith(prefix)},
        f"{where}: {architecture}",
    )
    num_layers = checked_layers(fields.whole("block_count"), where)
    hidden_size = fields.whole("embedding_length")
    num_heads = fields.whole("attention.head_count")
    head_dim = fields.whole("attention.key_length", 0) or hidden_size // max(num_heads, 1)
    for other in ("attention.value_length", "rope.dimension_count"):
        fields.only(other, head_dim)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise InputError(f"{where}: has no tensor token_embd.weight")
    fields.only("vocab_size", embedding.shape[0])
    theta = fields.number("rope.freq_base", 10000.0)
    shape: dict[str, Any] = {
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.whole("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "intermediate_size": fields.whole("feed_forward_length"),
        "max_position_embeddings": fields.whole("context_length"),
        "rms_norm_eps": fields.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": theta,
        "rope_scaling": _scaling(fields),
        "tie_embeddings": "output.weight" not in file.tensors,
        "qkv_bias": architecture == "qwen2",
        "qk_norm": architecture in ("qwen3", "gemma3"),
    }
    if architecture == "gemma3":
        pattern = fields.whole("attention.sliding_window_pattern", _GEMMA_PATTERN)
        if pattern < 1:
            raise InputError(
                f"{fields.where}: attention.sliding_window_pattern is {pattern}, expected 1 or more"
            )
        sliding = tuple(i for i in range(num_layers) if (i + 1) % pattern)
        local_theta = fields.number("rope.freq_base_swa", _GEMMA_LOCAL_THETA)
        window = fields.whole("attention.sliding_window", 0)
        large = num_layers == _GEMMA_27B_LAYERS
        shape |= {
            "post_norms": True,
            "activation": "gelu_tanh",
            "scale_embeddings": True,
            "query_pre_attn_scalar": hidden_size // max(num_heads, 1) if large else head_dim,
            "sliding_window": window,
            "sliding_layers": sliding if window else (),
            "local_rope_theta": local_theta if window else 0.0,
        }
    fields.only("attention.causal", True)
    fields.ignore("rope.scaling.finetuned")
    fields.finish()
    try:
        if _ROPE_FACTORS in file.tensors:
            shape["rope_scaling"] = _llama3_scaling(file, shape)
        return ModelConfig(**shape)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _scaling(fields: Fields) -> RopeScaling | None:
    kind = fields.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise InputError(
            f"{fields.where}: rope.scaling.type {kind[:60]!r} is not supported, expected none, linear or yarn"
        )
    factor = fields.number("rope.scaling.factor", 1.0)
    original = fields.whole("rope.scaling.original_context_length", 0)
    fields.only("rope.scaling.attn_factor", 1.0)
    fields.only("rope.scaling.yarn_ext_factor", 1.0)
    ramp = {
        name: fields.number(f"rope.scaling.yarn_{name}", default)
        for name, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    }
    if kind == "none" or factor in (0.0, 1.0):
        return None
    try:
        if kind == "linear":
            return RopeScaling(kind=kind, factor=factor)
        return RopeScaling(kind=kind, factor=factor, original_max_position_embeddings=original, **ramp)
    except InputError as error:
        raise InputError(f"{fields.where}: {error}") from error


def _llama3_scaling(file: GGUFFile, shape: Mapping[str, Any]) -> RopeScaling:
    """Llama 3.1's stretching, of which the file has the result: a divisor for each frequency.

    Raises InputError where no factor gives these divisors with the constants of Llama 3.1 and 3.2.
    """
    if file.tensors[_ROPE_FACTORS].shape != (shape["head_dim"] // 2,) or shape["rope_scaling"] is not None:
        raise InputError(f"{_ROPE_FACTORS} does not fit the model's head_dim or rope.scaling")
    divisors = torch.tensor(file.read(_ROPE_FACTORS))
    factor = float(divisors.max())
    if not 1 <= factor < math.inf:
        raise InputError(f"{_ROPE_FACTORS} reaches {factor}, expected 1 or more")
    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    exponents = torch.arange(0, shape["head_dim"], 2, dtype=torch.float32) / shape["head_dim"]
    frequencies = shape["rope_theta"] ** -exponents
    expected = frequencies / scaling.stretch(frequencies, shape["rope_theta"])
    if not torch.allclose(divisors, expected, rtol=1e-4, atol=0):
        raise InputError(f"{_ROPE_FACTORS} is not the llama3 scaling of any factor: not supported")
    return scaling
