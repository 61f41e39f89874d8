"""What the optimizer chooses keeps its budget, costs what it says, and is better than the same without it."""

import pytest
import torch
import torch.nn.functional as F

from ryzen_llm import KVCacheOptimizer
from ryzen_llm.cache import CACHES, build_cache
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer

LENGTH = 4096
"""Tokens of the cache that is optimised for."""


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Its keys have large constant channels, as trained ones have, and what it predicts depends on them."""
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=97,
        hidden_size=64,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        rope_theta=1e6,
        qkv_bias=True,
    )
    model = Transformer(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.25)
    for block in model.blocks:
        torch.nn.init.normal_(block.attention.qkv_proj.bias.data[128:192], std=3.0)
    return model


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def optimizer(model: Transformer, ids: torch.Tensor) -> KVCacheOptimizer:
    return KVCacheOptimizer(model, ids, LENGTH)


def divergence(model: Transformer, ids: torch.Tensor, kinds: list) -> float:
    cache = build_cache(
        kinds, model.config, batch_size=2, max_length=100, dtype=torch.float32, device=torch.device("cpu")
    )
    with torch.no_grad():
        p, q = model(ids).log_softmax(-1), model(ids, cache).log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("saving", [0.3, 0.5, 0.6, 0.66])
def test_a_memory_budget_is_kept_and_the_cost_is_measured(
    model: Transformer, ids: torch.Tensor, optimizer: KVCacheOptimizer, saving: float
) -> None:
    choice = optimizer.choose(saving=saving)
    # Of a key and value of 32 channels, four of which have 8 bits where the others have 4; keys and values of
    # first tokens in bf16; an offset in fp32 and two matrices in fp16. All for two heads.
    tokens = {"dense": 128, "int8": 68, "k8v4": 54, "int4-sinks": 42}
    fixed = {"dense": 0, "int8": 128, "k8v4": 4 * 128, "int4-sinks": 4 * 128 + 4 * 32 + 2 * 2 * 32 * 32}
    total = 2 * sum(LENGTH * tokens[name] + fixed[name] for name in choice.names)
    assert choice.bytes == total
    assert choice.saving == pytest.approx(1 - total / (2 * 3 * 128 * LENGTH))
    assert choice.saving >= saving
    assert choice.kl == pytest.approx(divergence(model, ids, list(choice.formats)), rel=1e-2, abs=1e-6)
    assert len(choice.costs) == 9
    assert choice.report()["names"] == choice.names


def test_what_a_transform_takes_is_counted(model: Transformer, ids: torch.Tensor) -> None:
    """In a cache of 200 tokens that is more than the bits that it saves: no layer gets one."""
    optimizer = KVCacheOptimizer(model, ids, 200)
    smallest = optimizer.choose(perplexity_increase=1e9)
    assert set(smallest.names) == {"int4-sinks"}
    assert set(smallest.formats) == {CACHES["int4-sinks"]}
    assert smallest.bytes == 3 * 2 * (200 * 40 + 4 * 128)


def test_a_quality_budget_is_kept_and_used(optimizer: KVCacheOptimizer, ids: torch.Tensor) -> None:
    strict, loose = (optimizer.choose(perplexity_increase=x) for x in (0.0005, 0.05))
    assert strict.perplexity_increase <= 0.0005
    assert loose.perplexity_increase <= 0.05
    assert loose.saving > strict.saving


def test_the_key_transform_makes_four_bits_better(
    model: Transformer, ids: torch.Tensor, optimizer: KVCacheOptimizer
) -> None:
    names = ["int4-sinks"] * 3
    with_transform = divergence(model, ids, list(optimizer.formats(names)))
    assert with_transform < 0.7 * divergence(model, ids, names)


def test_budgets_and_texts_that_cannot_work_are_named(
    model: Transformer, optimizer: KVCacheOptimizer
) -> None:
    with pytest.raises(InputError, match="one of them"):
        optimizer.choose()
    with pytest.raises(InputError, match=r"saving is 0\.9, the most that is possible is 0\.663"):
        optimizer.choose(saving=0.9)
    with pytest.raises(InputError, match="length is 4097, expected 1 to max_position_embeddings = 4096"):
        KVCacheOptimizer(model, torch.zeros(1, 16, dtype=torch.int64), 4097)
    with pytest.raises(InputError, match=r"calibration is \(1, 3\) torch.int64"):
        KVCacheOptimizer(model, torch.zeros(1, 3, dtype=torch.int64))


def test_entropy_of_the_reference_is_far_from_uniform(model: Transformer, ids: torch.Tensor) -> None:
    """Otherwise no cache could do harm, and the tests above would show nothing."""
    with torch.no_grad():
        logits = model(ids)
    assert float(F.softmax(logits, -1).amax(-1).mean()) > 0.1
