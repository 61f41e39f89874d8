"""Keys of 8 bits are rotated for the sake of those whose channels differ much in size."""

import torch

from ryzen_llm.cache import CACHES, LayerFormat, build_cache
from ryzen_llm.cache.int8 import Int8
from ryzen_llm.model import ModelConfig

TIME = 50
CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    intermediate_size=8,
    max_position_embeddings=TIME,
)


def error(format: LayerFormat, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """Root mean square of what attention is away from the formula in fp64."""
    cache = build_cache(
        [format], CONFIG, batch_size=1, max_length=TIME, dtype=torch.float32, device=torch.device("cpu")
    )
    cache.append(TIME)
    found = cache.layers[0].attend(queries, keys, values)
    scores = queries.double() @ keys.double().mT / 8
    scores = scores.masked_fill(torch.ones(TIME, TIME).triu(1).bool(), -torch.inf)
    return float((found - scores.softmax(-1) @ values.double()).square().mean().sqrt())


def test_a_large_channel_of_the_keys_costs_little() -> None:
    """One of 64 is 40 times as large as the others, as in Gemma 3: without rotation its scale is theirs."""
    torch.manual_seed(0)
    queries, (keys, values) = torch.randn(1, 2, TIME, 64), torch.randn(2, 1, 1, TIME, 64)
    keys[..., 7] *= 40
    queries[..., 7] /= 40
    rotated = error(CACHES["int8"], queries, keys, values)
    assert rotated < 0.3 * error(LayerFormat(Int8(), Int8()), queries, keys, values)
    assert rotated < 0.01
