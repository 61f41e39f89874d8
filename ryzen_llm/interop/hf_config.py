"""`config.json` of transformers, to and from `ModelConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ryzen_llm.errors import InputError
from ryzen_llm.interop.fields import Fields
from ryzen_llm.kernels import RopeScaling
from ryzen_llm.model import ModelConfig

# The class that transformers builds for each model_type.
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",  # SmolLM2 too
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}
# What transformers takes where config.json is silent and it matters.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rope_theta": 10000.0, "tie": False},
    "mistral": {"rope_theta": 10000.0, "tie": False, "num_kv_heads": 8, "sliding_window": 4096},
    "qwen2": {"rope_theta": 10000.0, "tie": False, "num_kv_heads": 32},
    "qwen3": {"rope_theta": 10000.0, "tie": False, "num_kv_heads": 32, "head_dim": 128},
    "smollm3": {"rope_theta": 2000000.0, "tie": True, "num_kv_heads": 4},
    "gemma3_text": {"rope_theta": 1000000.0, "tie": True, "num_kv_heads": 4, "head_dim": 256},
}
_MOST_LAYERS = 1000
_GEMMA_LOCAL_THETA, _GEMMA_WINDOW = 10000.0, 4096
_FULL, _SLIDING = "full_attention", "sliding_attention"
# These change nothing that the model computes from token ids at inference.
_WITHOUT_EFFECT = (
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "attn_implementation",
    "bos_token_id",
    "cache_implementation",
    "dtype",
    "eos_token_id",
    "initializer_range",
    "is_llama_config",
    "model_type",
    "pad_token_id",
    "pretraining_tp",
    "return_dict",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "unk_token_id",
    "use_cache",
)


def model_type_of(values: Mapping[str, Any], where: str) -> str:
    """The `model_type` of a config.json. Raises InputError where it is not one of `ARCHITECTURES`."""
    fields = Fields(values, where)
    model_type: str = fields.text("model_type")
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"{where}: architecture {model_type[:60]!r} is not supported, "
            f"expected one of {', '.join(ARCHITECTURES)}"
        )
    built = fields.items("architectures", str, [ARCHITECTURES[model_type]])
    if built != [ARCHITECTURES[model_type]]:
        raise InputError(
            f"{where}: architectures are {str(built)[:80]}, expected {ARCHITECTURES[model_type]}: only "
            "language models with their output head are supported"
        )
    return model_type


def parse_config(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The shape that a config.json describes.

    Raises InputError, naming the key, for an architecture or option that is not supported, a value of the
    wrong type, and a key that is not known.
    """
    model_type = model_type_of(values, where)
    defaults = _DEFAULTS[model_type]
    fields = Fields(values, where)
    fields.ignore(*_WITHOUT_EFFECT)
    gemma = model_type == "gemma3_text"
    fields.only("hidden_activation" if gemma else "hidden_act", "gelu_pytorch_tanh" if gemma else "silu")
    num_layers = checked_layers(fields.whole("num_hidden_layers"), fields.where)
    num_heads = fields.whole("num_attention_heads")
    max_position_embeddings = fields.whole("max_position_embeddings")
    shape: dict[str, Any] = {
        "vocab_size": fields.whole("vocab_size"),
        "hidden_size": fields.whole("hidden_size"),
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": fields.whole("num_key_value_heads", defaults.get("num_kv_heads", num_heads)),
        "head_dim": fields.whole("head_dim", defaults.get("head_dim", 0)),
        "intermediate_size": fields.whole("intermediate_size"),
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": fields.number("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.flag("tie_word_embeddings", defaults["tie"]),
        "qkv_bias": model_type == "qwen2",
        "qk_norm": model_type in ("qwen3", "gemma3_text"),
    }
    if model_type != "qwen2":
        fields.only("attention_bias", False)
    if model_type in ("llama", "smollm3"):
        fields.only("mlp_bias", False)
    fields.only("rope_interleaved", False)
    fields.only("is_causal", True)
    if gemma:
        shape |= {
            "post_norms": True,
            "activation": "gelu_tanh",
            "scale_embeddings": True,
            "query_pre_attn_scalar": fields.whole("query_pre_attn_scalar", 256),
        }
    shape |= _rope(fields, model_type, max_position_embeddings)
    if model_type == "smollm3":
        shape["nope_layers"] = _nope_layers(fields, num_layers)
    shape |= _sliding(fields, model_type, num_layers, shape.get("nope_layers", ()))
    if not shape.get("sliding_layers"):
        shape.pop("local_rope_theta", None)  # of no layer
    fields.finish()
    try:
        return ModelConfig(**shape)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def checked_layers(num_layers: int, where: str) -> int:
    """`num_layers`, unless so many would have to be made up before their tensors are found missing."""
    if not 0 < num_layers <= _MOST_LAYERS:
        raise InputError(f"{where}: {num_layers} layers, expected 1 to {_MOST_LAYERS}")
    return num_layers


def _rope(fields: Fields, model_type: str, max_position_embeddings: int) -> dict[str, Any]:
    """`rope_parameters` as transformers 5 writes it, or `rope_theta` and `rope_scaling` as before."""
    found: dict[str, Any] = {}
    theta = fields.number("rope_theta", _DEFAULTS[model_type]["rope_theta"])
    local_theta = fields.number("rope_local_base_freq", _GEMMA_LOCAL_THETA)
    scaling = fields.group("rope_scaling")
    parameters = fields.group("rope_parameters")
    if parameters is not None and scaling is not None:
        raise InputError(f"{fields.where}: has both rope_scaling and rope_parameters, expected one of them")
    if model_type == "gemma3_text":
        if parameters is not None:
            local = parameters.group("sliding_attention")
            if local is not None:
                local_theta = local.number("rope_theta", local_theta)
                local.only("rope_type", "default")
                local.finish()
            scaling = parameters.group("full_attention")
            parameters.finish()
        found["local_rope_theta"] = local_theta
    elif parameters is not None:
        scaling = parameters
    if scaling is not None:
        theta = scaling.number("rope_theta", theta)
        found["rope_scaling"] = _scaling(scaling, max_position_embeddings)
    return found | {"rope_theta": theta}


def _scaling(fields: Fields, max_position_embeddings: int) -> RopeScaling | None:
    kind = fields.text("rope_type", None) or fields.text("type", "default")
    fields.ignore("type")
    if kind == "default":
        fields.finish()
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise InputError(
            f"{fields.where}: rope_type {kind[:60]!r} is not supported, expected default, linear, llama3 or "
            "yarn"
        )
    values: dict[str, Any] = {"kind": kind, "factor": fields.number("factor")}
    original = fields.whole("original_max_position_embeddings", max_position_embeddings)
    if kind != "linear":
        values["original_max_position_embeddings"] = original
    if kind == "llama3":
        values["low_freq_factor"] = fields.number("low_freq_factor")
        values["high_freq_factor"] = fields.number("high_freq_factor")
    if kind == "yarn":
        values["beta_fast"] = fields.number("beta_fast", 32.0)
        values["beta_slow"] = fields.number("beta_slow", 1.0)
        values["attention_factor"] = fields.number("attention_factor", 0.0)
        fields.only("truncate", True)
    fields.finish()
    try:
        return RopeScaling(**values)
    except InputError as error:
        raise InputError(f"{fields.where}: {error}") from error


def _nope_layers(fields: Fields, num_layers: int) -> tuple[int, ...]:
    interval = fields.whole("no_rope_layer_interval", 4)
    rotary = fields.items("no_rope_layers", int, None)  # 1 where the layer *has* rotary embedding
    if rotary is None:
        if interval < 1:
            raise InputError(f"{fields.where}: no_rope_layer_interval is {interval}, expected 1 or more")
        return tuple(range(interval - 1, num_layers, interval))
    if len(rotary) < num_layers or not set(rotary) <= {0, 1}:
        raise InputError(f"{fields.where}: no_rope_layers is not a 0 or 1 for each of {num_layers} layers")
    return tuple(index for index in range(num_layers) if not rotary[index])


def _sliding(fields: Fields, model_type: str, num_layers: int, nope: tuple[int, ...]) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers`, or nothing where every layer sees all tokens."""
    layer_types = fields.items("layer_types", str, None)
    if layer_types is not None and (
        len(layer_types) != num_layers or not set(layer_types) <= {_SLIDING, _FULL}
    ):
        raise InputError(
            f"{fields.where}: layer_types is not {_FULL} or {_SLIDING} for each of {num_layers} layers"
        )
    if model_type == "llama":
        if _SLIDING in (layer_types or ()):  # which transformers passes over
            raise InputError(
                f"{fields.where}: layer_types has {_SLIDING}, expected {_FULL}: llama has no windows"
            )
        return {}  # whatever else it says about windows there is an unknown option
    none_given = fields.is_null("sliding_window")
    window = fields.whole("sliding_window", None if none_given or model_type == "smollm3" else 4096)
    if model_type == "mistral":
        sliding = list(range(num_layers))
    elif model_type == "gemma3_text":
        fields.ignore("_sliding_window_pattern")  # transformers writes it, and never reads it
        pattern = fields.whole("sliding_window_pattern", 6)
        if pattern < 1:
            raise InputError(f"{fields.where}: sliding_window_pattern is {pattern}, expected 1 or more")
        sliding = [i for i in range(num_layers) if (i + 1) % pattern]
    else:
        used = fields.flag("use_sliding_window", False)
        first = fields.whole("max_window_layers", 28)
        window = window if used else None
        sliding = list(nope) if model_type == "smollm3" else list(range(first, num_layers))
    if layer_types is not None:
        sliding = [i for i, kind in enumerate(layer_types) if kind == _SLIDING]
        if sliding and not window:
            raise InputError(
                f"{fields.where}: layer_types has sliding layers, but no sliding_window is in use"
            )
    return {"sliding_window": window, "sliding_layers": tuple(sliding)} if window and sliding else {}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The content of the config.json of this shape, in the form that transformers 4 and 5 both read.

    Raises InputError where no architecture of transformers has this combination of options.
    """
    config = replace(config, embedding="dense", embedding_settings=None)
    for model_type in ARCHITECTURES:
        values = _as(model_type, config)
        try:
            if parse_config(values) == config:
                return values
        except InputError:
            continue
    raise InputError(
        "export: no architecture of transformers has this model's combination of options; expected that of "
        f"one of {', '.join(ARCHITECTURES)}"
    )


def _as(model_type: str, config: ModelConfig) -> dict[str, Any]:
    """What can be said of `config` in the words of `model_type`, which may not be all."""
    gemma = model_type == "gemma3_text"
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[model_type]],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_values(config.rope_scaling),
        "hidden_activation" if gemma else "hidden_act": "gelu_pytorch_tanh" if gemma else "silu",
    }
    if model_type != "qwen2":
        values["attention_bias"] = False
    if model_type == "smollm3":
        values["no_rope_layers"] = [int(i not in config.nope_layers) for i in range(config.num_layers)]
    if model_type != "llama":
        values["sliding_window"] = config.sliding_window or None
    if model_type not in ("llama", "mistral"):
        sliding = set(config.sliding_layers)
        values["layer_types"] = [_SLIDING if i in sliding else _FULL for i in range(config.num_layers)]
    if model_type in ("qwen2", "qwen3", "smollm3"):
        values["use_sliding_window"] = bool(config.sliding_window)
    if gemma:
        values["query_pre_attn_scalar"] = config.query_pre_attn_scalar
        values["rope_local_base_freq"] = config.local_rope_theta or config.rope_theta
        values["sliding_window"] = config.sliding_window or _GEMMA_WINDOW  # asked for also where none slides
    return values


def _scaling_values(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        values |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor:
            values["attention_factor"] = scaling.attention_factor
    return values
