"""Weights of 8 and 4 bits, what the packed ops give and refuse, and that a model still says the same; and
bf16 weights that few rows are multiplied by.
"""

from typing import Any

import pytest
import torch
from torch import nn

from ryzen_llm.decoding import Generator
from ryzen_llm.decoding.weights import KINDS, MOST_PACKED_ROWS, FewRowsLinear, Int4Linear, Int8Linear
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import few_rows_linear
from ryzen_llm.model import ModelConfig, Transformer

DTYPES = [torch.float32, torch.bfloat16]


def dequantised(layer: nn.Module, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight that a layer stands for, by giving it one input at a time."""
    return layer(torch.eye(in_features, dtype=dtype)).float().T


@pytest.mark.parametrize(("kind", "levels"), [("int8", 254), ("int4", 15)])
@pytest.mark.parametrize("rows", [1, 7, MOST_PACKED_ROWS + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_weight_is_off_by_half_a_step_at_most(
    kind: str, levels: int, rows: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64, bias=False).to(dtype)
    layer = KINDS[kind](linear, "layer")
    groups = linear.weight.detach().float().view(64, 1 if kind == "int8" else 3, -1)
    spread = 2 * groups.abs().amax(-1) if kind == "int8" else groups.amax(-1) - groups.amin(-1)
    step = (spread / levels)[..., None].expand_as(groups).reshape(64, 96)
    weight = dequantised(layer, 96, dtype)
    # bf16 scales, zeros and results: 8 bits of precision on top of half a step.
    assert ((weight - linear.weight).abs() <= 0.5 * step + 0.012 * linear.weight.abs().max()).all()
    x = torch.randn(rows, 96).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), x.float() @ weight.T, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_biases_are_added(dtype: torch.dtype) -> None:
    linear = nn.Linear(32, 16).to(dtype)
    for kind in KINDS.values():
        zeros = torch.zeros(2, 3, 32, dtype=dtype)
        assert torch.equal(kind(linear, "layer")(zeros), linear.bias.expand(2, 3, 16))


@pytest.mark.parametrize(
    ("kind", "sizes", "message"),
    [
        (
            Int8Linear,
            (40, 16),
            "weights int8: it has in_features = 40, expected a multiple of 16",
        ),
        (Int4Linear, (48, 16), "in_features = 48, expected a multiple of 32: choose int8 or bf16"),
        (Int4Linear, (32, 40), "out_features = 40, expected a multiple of 16"),
    ],
)
def test_sizes_that_the_ops_get_wrong_are_refused(kind: Any, sizes: tuple[int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kind(nn.Linear(*sizes), "it")


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_a_model_with_a_layer_of_such_a_size_is_refused_by_the_layers_name(weights: str) -> None:
    config = ModelConfig(
        vocab_size=112,
        hidden_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=72,
        max_position_embeddings=64,
    )
    message = rf"weights {weights}: blocks\.0\.mlp\.down_proj has in_features = 72, .*: choose bf16"
    with pytest.raises(InputError, match=message):
        Generator(Transformer(config), weights=weights)


@pytest.mark.parametrize(("weights", "largest"), [("int8", 0.03), ("int4", 0.3)])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_model_says_nearly_the_same(
    weights: str, largest: float, tied: bool, has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On hardware that has bf16 arithmetic, and on hardware that has not."""
    monkeypatch.setattr("ryzen_llm.decoding.generator.supports_bf16", lambda device: has_bf16)
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=112,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
        tie_embeddings=tied,
    )
    model = Transformer(config)
    quantised = Generator(model, weights=weights).model
    ids = torch.randint(0, 112, (2, 50))
    with torch.no_grad():
        exact, got = model(ids), quantised(ids)
    assert got.dtype == (torch.bfloat16 if has_bf16 else torch.float32)
    error = (got.float() - exact).square().mean().sqrt() / exact.std()
    assert 0.001 < error < largest
    assert not any(isinstance(module, nn.Linear) for module in quantised.modules())
    assert isinstance(quantised.head, Int8Linear), "4 bits in the head would cost most of the quality"
    assert any(isinstance(module, nn.Linear) for module in model.modules()), "the model itself is left alone"


@pytest.mark.skipif(not few_rows_linear.is_in_cpp(), reason="needs AVX512-BF16 and a C++ compiler")
@pytest.mark.parametrize("rows", [1, few_rows_linear.MOST_ROWS, few_rows_linear.MOST_ROWS + 1])
def test_few_rows_and_many_are_multiplied_by_the_layers_own_weight(rows: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(96, 64).bfloat16()
    layer, x = FewRowsLinear(linear), torch.randn(1, rows, 96).bfloat16()
    assert layer.weight is linear.weight
    expected = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    torch.testing.assert_close(layer(x).double(), expected, atol=0.01, rtol=2**-7)
