"""However a text is split into calls, rolled back, saved or batched, a cache holds and gives the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from ryzen_llm.cache import CACHES, KVCache, LayerFormat, build_cache, load_cache, save_cache
from ryzen_llm.cache.int8 import Int8
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 600,
    "qk_norm": True,
}
CONFIG = ModelConfig(**SHAPE)
SLIDING = ModelConfig(**SHAPE, sliding_window=40, sliding_layers=(0,))
CPU = torch.device("cpu")
ON_CPU = [name for name in CACHES if name != "fp8"]


def new_cache(
    name: str | list[LayerFormat] = "dense",
    max_length: int = 600,
    batch_size: int = 2,
    dtype: torch.dtype = torch.float32,
    config: ModelConfig = CONFIG,
) -> KVCache:
    return build_cache(name, config, batch_size=batch_size, max_length=max_length, dtype=dtype, device=CPU)


def contents(cache: KVCache) -> list[torch.Tensor]:
    """Every stored tensor as far as it is in use."""
    found = []
    for layer in cache.layers:
        used = min(cache.length, layer.most_slots)
        found += [part[:, :, :used] for part in (*layer.keys, *layer.values) if part is not None]
        if layer.sinks is not None:
            found.append(layer.sinks[:, :, :, : min(used, layer.format.sinks)])
    return found


def same_bytes(a: KVCache, b: KVCache) -> bool:
    return all(torch.equal(x, y) for x, y in zip(contents(a), contents(b), strict=True))


def build_model(config: ModelConfig) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # so that attention is far from uniform
    return model.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build_model(CONFIG)


@pytest.fixture(scope="module")
def sliding() -> Transformer:
    return build_model(SLIDING)


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 61, (2, 600), generator=torch.Generator().manual_seed(0))


def feed(cache: KVCache, tokens: torch.Tensor, chunks: list[int]) -> list[torch.Tensor]:
    """Put given queries, keys and values, `tokens` (3, batch, 4 heads, time, 8), through every layer."""
    contexts = []
    for chunk in tokens.split(chunks, 3):
        cache.append(chunk.shape[3])
        q, k, v = chunk
        contexts.append([layer.attend(q, k[:, :2], v[:, :2]) for layer in cache.layers])
    return [torch.cat(parts, 2) for parts in zip(*contexts, strict=True)]


@settings(max_examples=20, deadline=None)
@given(chunks=st.lists(st.integers(1, 90), min_size=1, max_size=6))
@pytest.mark.parametrize("name", ON_CPU)
def test_any_chunking_stores_the_same_bytes(name: str, chunks: list[int]) -> None:
    """Of the same keys and values, with a ring buffer too; the contexts differ by rounding alone."""
    tokens = torch.randn(3, 2, 4, sum(chunks), 8, generator=torch.Generator().manual_seed(0))
    whole, parts = new_cache(name, config=SLIDING), new_cache(name, config=SLIDING)
    expected, got = feed(whole, tokens, [sum(chunks)]), feed(parts, tokens, chunks)
    assert same_bytes(whole, parts)
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@settings(max_examples=25, deadline=None)
@given(chunks=st.lists(st.integers(1, 90), min_size=1, max_size=6))
@pytest.mark.parametrize("kind", ["model", "sliding"])
def test_any_chunking_of_a_dense_cache_gives_the_uncached_logits(
    kind: str, request: pytest.FixtureRequest, ids: torch.Tensor, chunks: list[int]
) -> None:
    model: Transformer = request.getfixturevalue(kind)
    cache = new_cache(config=model.config)
    with torch.no_grad():
        parts = [model(part, cache) for part in ids[:, : sum(chunks)].split(chunks, dim=1)]
        expected = model(ids[:, : sum(chunks)])
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-5, rtol=2e-5)
    assert cache.length == sum(chunks)


@pytest.mark.parametrize(("name", "largest"), [("int8", 0.02), ("k8v4", 0.2), ("int4", 0.3)])
def test_a_quantised_cache_stays_near_the_uncached_logits(
    model: Transformer, ids: torch.Tensor, name: str, largest: float
) -> None:
    """Relative to the logits' spread; and not exact, or nothing would have been quantised."""
    with torch.no_grad():
        expected = model(ids[:, :200])
        error = (model(ids[:, :200], new_cache(name)) - expected).square().mean().sqrt() / expected.std()
    assert 1e-4 < error < largest


@settings(max_examples=20, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", ON_CPU)
def test_what_was_rolled_back_leaves_no_trace(
    sliding: Transformer, ids: torch.Tensor, name: str, data: st.DataObject
) -> None:
    """Append wrong tokens, truncate, append the right ones: the same bytes and logits."""
    some = st.integers(1, 5) | st.integers(1, 100)  # less than the first tokens that are kept in full, too
    kept, wrong, right = (data.draw(some, label=label) for label in ("kept", "wrong", "right"))
    straight, rolled_back = (new_cache(name, config=SLIDING) for _ in range(2))
    with torch.no_grad():
        for cache in (straight, rolled_back):
            sliding(ids[:, :kept], cache)
        sliding(60 - ids[:, kept : kept + wrong], rolled_back)
        rolled_back.truncate(kept)
        assert rolled_back.length == kept
        after = [sliding(ids[:, kept : kept + right], cache) for cache in (straight, rolled_back)]
    if kept + wrong <= 40 + 128:  # otherwise the ring has lost what no token sees any more
        assert same_bytes(straight, rolled_back)
    assert torch.equal(after[0], after[1]) or name == "dense"  # wider masks round dense attention otherwise
    torch.testing.assert_close(after[0], after[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_texts_of_different_lengths_are_as_if_alone(
    sliding: Transformer, ids: torch.Tensor, name: str
) -> None:
    lengths = [150, 23]
    together = new_cache(name, config=SLIDING)
    alone = [new_cache(name, batch_size=1, config=SLIDING) for _ in lengths]
    with torch.no_grad():
        for row, length in enumerate(lengths):
            prompt = ids[row : row + 1, :length]
            a = sliding(prompt, together.row(row, length))
            assert torch.equal(a, sliding(prompt, alone[row]))
        assert together.lengths == (150, 23)
        for step in range(30):
            token = torch.stack([ids[row, length + step] for row, length in enumerate(lengths)])[:, None]
            both = sliding(token, together)
            for row, cache in enumerate(alone):
                single = sliding(token[row : row + 1], cache)
                torch.testing.assert_close(both[row : row + 1], single, atol=1e-4, rtol=1e-4)
    assert together.lengths == (180, 53)
    together.truncate([170, 50])
    assert together.lengths == (170, 50)


@pytest.mark.parametrize("name", ["dense", "int4-sinks"])
def test_a_fork_goes_its_own_way(model: Transformer, ids: torch.Tensor, name: str) -> None:
    cache = new_cache(name)
    with torch.no_grad():
        model(ids[:, :20], cache)
        kept = cache.fork()
        swapped = cache.fork([1, 0, 1])
        model(ids[:, 20:30], cache)
        assert (kept.length, cache.length) == (20, 30)
        expected = model(ids[:, 20:22], kept)
        got = model(ids[[1, 0, 1], 20:22], swapped)
    torch.testing.assert_close(got, expected[[1, 0, 1]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_saved_prompt_goes_on_as_if_never_saved(
    sliding: Transformer, ids: torch.Tensor, name: str, tmp_path: Path
) -> None:
    cache, restored = new_cache(name, config=SLIDING), new_cache(name, config=SLIDING)
    with torch.no_grad():
        sliding(ids[:, :190], cache)
        save_cache(cache, tmp_path / "prompt.safetensors", model_hash=sliding.content_hash())
        sliding(ids[:, 300:310], restored)
        load_cache(restored, tmp_path / "prompt.safetensors", model_hash=sliding.content_hash())
        assert restored.lengths == (190, 190)
        assert same_bytes(cache, restored)
        assert torch.equal(sliding(ids[:, 190:193], cache), sliding(ids[:, 190:193], restored))


def test_a_saved_cache_knows_what_its_ring_buffers_have_overwritten(
    sliding: Transformer, ids: torch.Tensor, tmp_path: Path
) -> None:
    """One text is rolled back: as before it was saved, it cannot be any further."""
    cache, restored = new_cache(config=SLIDING), new_cache(config=SLIDING)
    with torch.no_grad():
        for row, length in enumerate((400, 100)):
            part = cache.row(row, length)
            sliding.run_blocks(ids[row : row + 1, :length], part.append(length), part.layers)
        cache.truncate((300, 100))
        save_cache(cache, tmp_path / "texts.safetensors", model_hash="m")
        load_cache(restored, tmp_path / "texts.safetensors", model_hash="m")
        assert restored.lengths == (300, 100)
        for each in (cache, restored):
            with pytest.raises(InputError, match="cannot truncate from 400 to 271"):
                each.truncate((271, 100))
        # Not to the bit: they have room for other lengths, and a matrix library may add in another order.
        after_cache, after_restored = sliding(ids[:, :3], cache), sliding(ids[:, :3], restored)
        torch.testing.assert_close(after_restored, after_cache, rtol=0, atol=1e-6)


def test_a_saved_cache_that_does_not_fit_is_refused(
    model: Transformer, ids: torch.Tensor, tmp_path: Path
) -> None:
    path, cache = tmp_path / "prompt.safetensors", new_cache("int8")
    with pytest.raises(InputError, match="it is empty"):
        save_cache(cache, path, model_hash="m")
    with torch.no_grad():
        model(ids[:, :9], cache)
    save_cache(cache, path, model_hash="m")
    fresh = new_cache("int8")
    with pytest.raises(InputError, match="computed by other weights"):
        load_cache(fresh, path, model_hash="other")
    with pytest.raises(InputError, match="another kind or size"):
        load_cache(new_cache("k8v4"), path, model_hash="m")
    with pytest.raises(InputError, match="another kind or size"):
        load_cache(new_cache("int8", batch_size=1), path, model_hash="m")
    with pytest.raises(InputError, match="another kind or size"):
        load_cache(new_cache([LayerFormat(Int8(), Int8(), sinks=1)] * 2), path, model_hash="m")
    with pytest.raises(InputError, match="holds 9 tokens, more than max_length = 8"):
        load_cache(new_cache("int8", max_length=8), path, model_hash="m")
    with pytest.raises(InputError, match="no such file"):
        load_cache(fresh, tmp_path / "absent", model_hash="m")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="does not have its hash"):
        load_cache(fresh, path, model_hash="m")
    path.write_bytes(whole[:100])
    with pytest.raises(InputError, match="damaged, or not a saved cache"):
        load_cache(fresh, path, model_hash="m")
    path.write_bytes(whole)
    save_file(load_file(path), path, metadata={"ryzen_llm_cache": json.dumps({"version": 0})})
    with pytest.raises(InputError, match="has version 0, this program reads version 4"):
        load_cache(fresh, path, model_hash="m")
    assert fresh.length == 0


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


# Bits of a key and value of 64 channels, scales and minima counted.
BITS = {"dense": 2048, "int8": 1056, "k8v4": 816, "int4": 576, "int4-sinks": 576}


@pytest.mark.parametrize("name", ON_CPU)
def test_memory_follows_the_text_in_blocks(name: str) -> None:
    shape = SHAPE | {"head_dim": 64, "max_position_embeddings": 8192}
    cache = new_cache(name, max_length=8192, dtype=torch.bfloat16, config=ModelConfig(**shape))
    vectors = 2 * 2 * 2  # layers, rows, heads
    sinks = vectors * 2 * CACHES[name].sinks * 64 * 2
    assert cache.bytes_allocated == sinks
    for length, slots in ((1, 128), (128, 128), (129, 256), (1000, 1024)):
        cache.append(length - cache.length)
        assert cache.bytes_allocated == vectors * slots * BITS[name] // 8 + sinks
    cache.truncate(5)
    assert cache.bytes_allocated == vectors * 1024 * BITS[name] // 8 + sinks, "truncating moves nothing"


def test_a_sliding_layer_keeps_its_window_only() -> None:
    cache = new_cache("int8", config=SLIDING)
    cache.append(600)
    assert [layer.num_slots for layer in cache.layers] == [40 + 128, 600]


def test_addresses_stay_between_growths_and_reserve_grows_at_once(
    model: Transformer, ids: torch.Tensor
) -> None:
    cache = new_cache("k8v4", max_length=300)
    cache.reserve(300)
    addresses = [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors]
    with torch.no_grad():
        model(ids[:, :290], cache)
        model(ids[:, 290:300], cache)
    assert [tensor.data_ptr() for layer in cache.layers for tensor in layer.tensors] == addresses


def test_layers_can_have_formats_of_their_own() -> None:
    cache = build_cache(
        ["int8", "k8v4"], CONFIG, batch_size=1, max_length=128, dtype=torch.float32, device=CPU
    )
    cache.append(128)
    assert [layer.values.packed for layer in cache.layers] == [False, True]


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


@pytest.mark.parametrize("name", ON_CPU)
def test_what_is_kept_of_a_tree_is_where_it_would_be_alone(
    model: Transformer, ids: torch.Tensor, name: str
) -> None:
    """Byte by byte: each text keeps other tokens, one of them none."""
    cache = new_cache(name)
    with torch.no_grad():
        model(ids[:, :20], cache)
        model(ids[:, 20:26], cache)
    before = [
        [part.clone() for part in (*layer.keys, *layer.values) if part is not None] for layer in cache.layers
    ]
    kept = [[0, 2, 5], []]
    cache.keep(kept)
    assert cache.lengths == (23, 20)
    for layer, parts in zip(cache.layers, before, strict=True):
        for now, part in zip((p for p in (*layer.keys, *layer.values) if p is not None), parts, strict=True):
            assert torch.equal(now[:, :, :20], part[:, :, :20])
            assert torch.equal(now[0, :, 20:23], part[0, :, [20, 22, 25]])
    assert not torch.equal(before[0][0][0, :, 21], before[0][0][0, :, 22]), "or nothing was moved"


def test_tokens_of_a_ring_buffer_are_not_moved() -> None:
    cache = new_cache(config=SLIDING)
    cache.append(5)
    with pytest.raises(InputError, match="tokens of a ring buffer cannot be moved"):
        cache.keep([[0, 2], [0]])
    cache.keep([[0, 1], [0]])
    assert cache.lengths == (2, 1)


def test_a_ring_buffer_refuses_to_roll_back_what_it_has_overwritten() -> None:
    cache = new_cache(config=SLIDING)
    cache.append(400)
    cache.truncate(272)
    with pytest.raises(InputError, match="cannot truncate from 400 to 271: layers with a sliding window"):
        cache.truncate(271)
    cache.truncate(0)
    cache.append(10)
    cache.truncate(1)


@pytest.mark.parametrize("name", ON_CPU)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("which", [0, 1])
def test_keys_and_values_that_are_not_finite_are_refused(name: str, value: float, which: int) -> None:
    if value == 1e30 and name == "dense":
        return  # which fits in fp32
    cache = new_cache(name, batch_size=1)
    cache.append(3)
    both = torch.randn(2, 1, 2, 3, 8)
    both[which, 0, 1, 2, 5] = value
    with pytest.raises(InputError, match="NaN, infinite or too large"):
        cache.layers[0].attend(torch.randn(1, 4, 3, 8), *both)
    cache.reset()
    cache.append(1)  # of what was refused nothing is left, not even where masked slots weigh it with 0
    assert cache.layers[0].attend(torch.randn(1, 4, 1, 8), *both[:, :, :, :1]).isfinite().all()


@pytest.mark.parametrize(
    ("queries", "keys", "message"),
    [
        (torch.zeros(1, 4, 3, 8), torch.zeros(1, 3, 3, 8), r"keys are \(1, 3, 3, 8\)"),
        (torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 2, 8), r"expected \(1, 2, 3, 8\)"),
        (torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8, dtype=torch.int64), "expected .* floating"),
        (
            torch.zeros(1, 4, 3, 8).half(),
            torch.zeros(1, 2, 3, 8),
            "queries are .*float16, expected",
        ),
        (torch.zeros(1, 3, 3, 8), torch.zeros(1, 2, 3, 8), "multiple of their 2 heads"),
    ],
)
def test_shapes_and_dtypes_of_another_model_are_named(
    queries: torch.Tensor, keys: torch.Tensor, message: str
) -> None:
    cache = new_cache(batch_size=1)
    cache.append(3)
    with pytest.raises(InputError, match=message):
        cache.layers[0].attend(queries, keys, keys)


def test_bad_caches_are_named(model: Transformer, ids: torch.Tensor) -> None:
    with pytest.raises(InputError, match="unknown cache 'int2': choose one of dense"):
        new_cache("int2")
    with pytest.raises(InputError, match="max_length is 0"):
        new_cache(max_length=0)
    with pytest.raises(InputError, match="fp8 needs a CUDA device, not cpu: choose int8"):
        new_cache("fp8")
    with pytest.raises(InputError, match="1 formats for 2 layers"):
        build_cache(["int8"], CONFIG, batch_size=1, max_length=8, dtype=torch.float32, device=CPU)
    foreign = new_cache(config=ModelConfig(**SHAPE | {"num_layers": 3}))
    with torch.no_grad(), pytest.raises(InputError, match="the cache has 3 layers, the model 2"):
        model(ids, foreign)
