"""However a text is split into calls, a model with a cache gives the logits it gives without one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzen_llm.cache import KVCache, build_cache
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer

CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    max_position_embeddings=600,
    qk_norm=True,
)
CPU = torch.device("cpu")


def new_cache(max_length: int = 600, batch_size: int = 2, dtype: torch.dtype = torch.float32) -> KVCache:
    return build_cache("dense", CONFIG, batch_size=batch_size, max_length=max_length, dtype=dtype, device=CPU)


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # so that attention is far from uniform
    return model.eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 600), generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 90), min_size=1, max_size=6))
def test_any_chunking_gives_the_uncached_logits(
    model: Transformer, ids: torch.Tensor, chunks: list[int]
) -> None:
    cache = new_cache()
    with torch.no_grad():
        parts = [model(part, cache) for part in ids[:, : sum(chunks)].split(chunks, dim=1)]
        expected = model(ids[:, : sum(chunks)])
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
    assert cache.length == sum(chunks)


def test_single_steps_across_the_growing_prefix_give_the_uncached_logits(
    model: Transformer, ids: torch.Tensor
) -> None:
    """Positions 250 to 262 and 508 to 516 cross the sizes at which attention reads a longer prefix."""
    cache = new_cache()
    with torch.no_grad():
        expected = model(ids)
        for first, last in ((250, 262), (508, 516)):
            model(ids[:, cache.length : first], cache)
            for position in range(first, last):
                logits = model(ids[:, position : position + 1], cache)[:, 0]
                torch.testing.assert_close(logits, expected[:, position], atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_was_rolled_back_leaves_no_trace(
    model: Transformer, ids: torch.Tensor, data: st.DataObject
) -> None:
    """Append wrong tokens, truncate, append the right ones: the same keys, values and logits, bit for bit."""
    kept, wrong, right = (data.draw(st.integers(1, 40), label=label) for label in ("kept", "wrong", "right"))
    straight, rolled_back = new_cache(), new_cache()
    with torch.no_grad():
        for cache in (straight, rolled_back):
            model(ids[:, :kept], cache)
        model(60 - ids[:, kept : kept + wrong], rolled_back)
        rolled_back.truncate(kept)
        assert rolled_back.length == kept
        after = [model(ids[:, kept : kept + right], cache) for cache in (straight, rolled_back)]
    assert torch.equal(after[0], after[1])
    for a, b in zip(straight.layers, rolled_back.layers, strict=True):
        assert torch.equal(a.keys[:, :, : kept + right], b.keys[:, :, : kept + right])
        assert torch.equal(a.values[:, :, : kept + right], b.values[:, :, : kept + right])


def test_each_row_of_a_batch_reads_its_own_keys(model: Transformer, ids: torch.Tensor) -> None:
    with torch.no_grad():
        together = new_cache()
        model(ids[:, :20], together)
        both = model(ids[:, 20:21], together)
        for row in range(2):
            alone = new_cache(batch_size=1)
            model(ids[row : row + 1, :20], alone)
            single = model(ids[row : row + 1, 20:21], alone)
            torch.testing.assert_close(both[row : row + 1], single, atol=1e-5, rtol=1e-5)


def test_reset_starts_a_new_text(model: Transformer, ids: torch.Tensor) -> None:
    cache = new_cache()
    with torch.no_grad():
        first = model(ids[:, :9], cache)
        cache.reset()
        assert cache.length == 0
        assert torch.equal(model(ids[:, :9], cache), first)


def test_a_bf16_cache_under_an_fp32_model_rounds_only_keys_and_values(
    model: Transformer, ids: torch.Tensor
) -> None:
    cache = new_cache(dtype=torch.bfloat16)
    with torch.no_grad():
        logits, expected = model(ids[:, :50], cache), model(ids[:, :50])
    assert logits.dtype == torch.float32
    assert 1e-6 < (logits - expected).abs().max() < 0.2 * expected.std()


def test_bytes_are_those_of_the_buffers_and_addresses_never_move(
    model: Transformer, ids: torch.Tensor
) -> None:
    cache = new_cache(max_length=300, dtype=torch.bfloat16)
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert (
        cache.bytes_allocated == 2 * (2 * 2 * 2 * 300 * 8) * 2 + 300 * 8
    )  # keys, values; positions in int64
    with torch.no_grad():
        model(ids[:, :290], cache)
        model(ids[:, 290:300], cache)
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == addresses


def test_overflow_is_refused_and_changes_nothing(model: Transformer, ids: torch.Tensor) -> None:
    cache = new_cache(max_length=10)
    with torch.no_grad():
        model(ids[:, :8], cache)
        with pytest.raises(InputError, match="3 more tokens after 8 exceed its max_length of 10"):
            model(ids[:, 8:11], cache)
        assert cache.length == 8
        model(ids[:, 8:10], cache)


@pytest.mark.parametrize("length", [-1, 6])
def test_truncating_outside_the_text_is_refused(length: int) -> None:
    cache = new_cache()
    cache.append(5)
    with pytest.raises(InputError, match=f"cannot truncate to {length}, expected 0 to its length of 5"):
        cache.truncate(length)


def test_bad_caches_are_named() -> None:
    with pytest.raises(InputError, match="unknown cache 'int2': choose one of dense"):
        build_cache("int2", CONFIG, batch_size=1, max_length=8, dtype=torch.float32, device=CPU)
    with pytest.raises(InputError, match="max_length is 0"):
        new_cache(max_length=0)
