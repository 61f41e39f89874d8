"""A configuration that cannot work is refused where it is written, by the name of its field."""

import json
import re
from typing import Any

import pytest
import torch

from ryzen_llm.errors import InputError
from ryzen_llm.model import PRESETS, ModelConfig

FIELDS: dict[str, Any] = PRESETS["tiny"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", -1),
        ("num_layers", 2.0),
        ("num_heads", True),
        ("num_kv_heads", "2"),
        ("num_kv_heads", 3),
        ("intermediate_size", None),
        ("max_position_embeddings", 0),
        ("head_dim", 33),
        ("head_dim", -2),
        ("rope_theta", 0.0),
        ("rope_theta", float("inf")),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", "1e-5"),
        ("tie_embeddings", 1),
        ("qkv_bias", "no"),
        ("qk_norm", None),
        ("embedding", 3),
    ],
)
def test_a_bad_value_is_refused_by_field_and_value(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"model\.{field} is {re.escape(repr(value))}, expected"):
        ModelConfig.from_dict(FIELDS | {field: value})


def test_heads_must_divide_the_width_unless_head_dim_is_given() -> None:
    with pytest.raises(InputError, match=r"hidden_size is 250.*num_heads = 4"):
        ModelConfig.from_dict(FIELDS | {"hidden_size": 250})
    assert ModelConfig.from_dict(FIELDS | {"hidden_size": 250, "head_dim": 64}).head_dim == 64


def test_head_dim_defaults_to_an_even_share_of_the_width() -> None:
    assert ModelConfig.from_name("tiny").head_dim == 64
    assert ModelConfig.from_name("tiny", hidden_size=128).head_dim == 32


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(
        InputError, match=r"unknown model 'smollm2-135M': did you mean 'smollm2-135m'\?.*tiny"
    ):
        ModelConfig.from_name("smollm2-135M")
    with pytest.raises(InputError, match=r"unknown model 'xyzzy': known names are tiny, small"):
        ModelConfig.from_name("xyzzy")


def test_unknown_and_missing_fields_are_named() -> None:
    with pytest.raises(InputError, match="unknown model field 'hiden_size'"):
        ModelConfig.from_name("tiny", hiden_size=3)
    with pytest.raises(InputError, match="missing: num_layers, vocab_size"):
        ModelConfig.from_dict({k: v for k, v in FIELDS.items() if k not in ("num_layers", "vocab_size")})


@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_survives_json_and_a_weights_only_checkpoint(name: str, tmp_path: Any) -> None:
    config = ModelConfig.from_name(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    torch.save(config.to_dict(), tmp_path / "config.pt")
    assert ModelConfig.from_dict(torch.load(tmp_path / "config.pt", weights_only=True)) == config
