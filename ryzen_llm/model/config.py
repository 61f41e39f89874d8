"""The shape of a model, by field or by name."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Self

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import RopeScaling

ACTIVATIONS = ("silu", "gelu_tanh")
_ZERO_STANDS_FOR_SOMETHING = ("head_dim", "sliding_window", "query_pre_attn_scalar", "local_rope_theta")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer of the Llama family.

    Raises InputError, naming the field, for a value that cannot work.

    Attributes:
        vocab_size: Number of token ids.
        hidden_size: Width of the residual stream.
        num_layers: Number of blocks.
        num_heads: Query heads of each block.
        num_kv_heads: Key and value heads; `num_heads` is a multiple of it (grouped-query attention).
        head_dim: Width of one head, even; 0 stands for hidden_size / num_heads.
        intermediate_size: Width inside the MLP.
        max_position_embeddings: Longest sequence in tokens.
        rope_theta: Base of the rotary position embedding.
        rms_norm_eps: Added to the mean square in every RMSNorm.
        tie_embeddings: Use the embedding as the output head too.
        qkv_bias: Biases on the query, key and value projections (Qwen2).
        qk_norm: RMSNorm on each query and key head (Qwen3, Gemma 3).
        post_norms: RMSNorm on what attention and MLP add to the residual stream too (Gemma 3).
        activation: Of the MLP's gate, "silu" or "gelu_tanh" (Gemma 3).
        scale_embeddings: Multiply the embeddings by sqrt(hidden_size), in their dtype (Gemma 3).
        query_pre_attn_scalar: Attention divides by its square root; 0 stands for head_dim.
        rope_scaling: How the rotary frequencies are stretched for a longer context; None leaves them alone.
        nope_layers: Indices of the layers without rotary embedding (SmolLM3; Kazemnejad et al. 2023,
            arXiv:2305.19466).
        sliding_window: How many tokens the sliding layers see; 0 if there are none.
        sliding_layers: Indices of the layers that attend within the sliding window (Mistral, Gemma 3).
        local_rope_theta: Base of the rotary embedding in the sliding layers, which then is not stretched; 0
            gives them that of all layers.
        embedding: Kind of embedding, a name in `ryzen_llm.model.embedding`.
        embedding_settings: The kind's own settings by name; None or those left out have its defaults.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_position_embeddings: int
    head_dim: int = 0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    activation: str = "silu"
    scale_embeddings: bool = False
    query_pre_attn_scalar: int = 0
    rope_scaling: RopeScaling | None = None
    nope_layers: tuple[int, ...] = ()
    sliding_window: int = 0
    sliding_layers: tuple[int, ...] = ()
    local_rope_theta: float = 0.0
    embedding: str = "dense"
    embedding_settings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.head_dim:
            self._require_positive_int("hidden_size")
            self._require_positive_int("num_heads")
            if self.hidden_size % self.num_heads:
                raise InputError(
                    f"model.hidden_size is {self.hidden_size}, expected a multiple of "
                    f"num_heads = {self.num_heads}: change one of them, or give head_dim"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_heads)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _ZERO_STANDS_FOR_SOMETHING and not isinstance(value, bool) and value == 0:
                continue
            if field.type is int:
                self._require_positive_int(field.name)
            elif field.type is float:
                if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                    raise InputError(f"model.{field.name} is {value!r}, expected a positive number")
            elif field.name in ("nope_layers", "sliding_layers"):
                self._require_layers(field.name)
            elif field.name == "embedding_settings":
                if value is not None and not isinstance(value, dict):
                    raise InputError(f"model.embedding_settings is {value!r}, expected names and values")
            elif not isinstance(value, field.type):  # type: ignore[arg-type]
                expected = getattr(field.type, "__name__", str(field.type))
                raise InputError(f"model.{field.name} is {value!r}, expected a {expected}")
        if not self.query_pre_attn_scalar:
            object.__setattr__(self, "query_pre_attn_scalar", self.head_dim)
        if self.activation not in ACTIVATIONS:
            raise InputError(
                f"model.activation is {self.activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        if bool(self.sliding_window) != bool(self.sliding_layers):
            raise InputError(
                f"model.sliding_window is {self.sliding_window} and sliding_layers are "
                f"{list(self.sliding_layers)}, expected both or neither"
            )
        if self.rope_scaling is not None and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise InputError(f"model.rope_theta is {self.rope_theta}, expected more than 1 for yarn")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"model.num_kv_heads is {self.num_kv_heads}, expected a divisor of "
                f"num_heads = {self.num_heads}"
            )
        if self.head_dim % 2:
            raise InputError(
                f"model.head_dim is {self.head_dim}, expected an even number for rotary embedding"
            )

    def _require_positive_int(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"model.{name} is {value!r}, expected a positive whole number")

    def _require_layers(self, name: str) -> None:
        """A sorted tuple of layer indices; a list, as in JSON, becomes one."""
        value = getattr(self, name)
        known = range(self.num_layers)
        if (
            not isinstance(value, tuple | list)
            or any(isinstance(layer, bool) or not isinstance(layer, int) for layer in value)
            or not set(value) <= set(known)
            or len(set(value)) != len(value)
        ):
            raise InputError(
                f"model.{name} is {value!r}, expected different layer indices from 0 to {len(known) - 1}"
            )
        object.__setattr__(self, name, tuple(sorted(value)))

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """How many tokens each layer sees, itself the last; 0 where it sees all."""
        sliding = set(self.sliding_layers)
        return tuple(self.sliding_window if i in sliding else 0 for i in range(self.num_layers))

    @classmethod
    def from_name(cls, name: str, **overrides: Any) -> Self:
        """The preset `name`, with the fields in `overrides` replaced.

        Raises InputError for an unknown name or field.
        """
        if name not in PRESETS:
            nearest = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise InputError(f"unknown model {name!r}: {hint}known names are {', '.join(PRESETS)}")
        return cls.from_dict(PRESETS[name] | overrides)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`. Raises InputError for unknown or missing fields."""
        known = {field.name for field in fields(cls)}
        required = {field.name for field in fields(cls) if field.default is MISSING}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"unknown model field {unknown[0]!r}: expected some of {', '.join(sorted(known))}"
            )
        if missing := sorted(required - set(values)):
            raise InputError(f"model fields are missing: {', '.join(missing)}")
        values = dict(values)
        if isinstance(values.get("rope_scaling"), dict):
            values["rope_scaling"] = RopeScaling.from_dict(values["rope_scaling"])
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain types, fit for JSON and for checkpoints loaded with weights_only."""
        values = asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


# The named ones below `small` are the published shapes of those models.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 512,
        "max_position_embeddings": 2048,
    },
    "small": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_layers": 8,
        "num_heads": 8,
        "num_kv_heads": 4,
        "intermediate_size": 1408,
        "max_position_embeddings": 2048,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "num_layers": 30,
        "num_heads": 9,
        "num_kv_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "smollm2-360m": {
        "vocab_size": 49152,
        "hidden_size": 960,
        "num_layers": 32,
        "num_heads": 15,
        "num_kv_heads": 5,
        "intermediate_size": 2560,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
    },
    "qwen2.5-0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "intermediate_size": 4864,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "qkv_bias": True,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "num_layers": 28,
        "num_heads": 16,
        "num_kv_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
        "max_position_embeddings": 40960,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "qk_norm": True,
    },
    "tinyllama-1.1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "num_layers": 22,
        "num_heads": 32,
        "num_kv_heads": 4,
        "intermediate_size": 5632,
        "max_position_embeddings": 2048,
        "tie_embeddings": False,
    },
}
