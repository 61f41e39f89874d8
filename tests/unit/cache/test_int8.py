"""What keys would spend codes on for nothing: channels that differ much in size, and what all keys share."""

import dataclasses

import pytest
import torch

from ryzen_llm.cache import CACHES, LayerCache, LayerFormat
from ryzen_llm.cache.int8 import Int8

TIME = 50


def error(format: LayerFormat, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """Root mean square of what attention is away from the formula in fp64."""
    layer = LayerCache(
        format,
        batch_size=1,
        kv_heads=1,
        head_dim=64,
        window=0,
        max_length=TIME,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    layer.grow(TIME)
    layer.positions = torch.arange(TIME)[None]
    found = layer.attend(queries, keys, values)
    expected = torch.nn.functional.scaled_dot_product_attention(
        queries.double(), keys.double(), values.double(), is_causal=True
    )
    return float((found - expected).square().mean().sqrt())


def test_a_large_channel_of_the_keys_costs_little() -> None:
    """One of 64 is 40 times as large as the others; in Gemma 3 it is up to 60 times the median one."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 1, 1, TIME, 64)
    keys[..., 7] *= 40
    queries[..., 7] /= 40
    rotated = error(CACHES["int8"], queries, keys, values)
    assert rotated < 0.3 * error(LayerFormat(Int8(), Int8(), sinks=1), queries, keys, values)
    assert rotated < 0.01


@pytest.mark.parametrize("name", ["int8", "k8v4", "int4-sinks"])
def test_what_all_keys_have_in_common_costs_nothing(name: str) -> None:
    """It is ten times what they differ in: where there are no first tokens, whose mean is taken, it costs."""
    torch.manual_seed(0)
    queries, keys, values = torch.randn(3, 1, 1, TIME, 64)
    shared = keys + 10 * torch.randn(64)
    found = error(CACHES[name], queries, shared, values)
    assert found < 1.01 * error(CACHES[name], queries, keys, values)
    assert found < 0.7 * error(dataclasses.replace(CACHES[name], sinks=0), queries, shared, values)
