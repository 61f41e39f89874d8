"""A compiled pass looks at a model's layout, not at its modules, and must not take another model's graph."""

import functools
from collections.abc import Callable

import pytest
import torch

from ryzen_llm.cache import KVCache
from ryzen_llm.decoding import Generator
from ryzen_llm.decoding.cuda_graph import Step
from ryzen_llm.decoding.fixed_width import Outcome
from ryzen_llm.kernels.cached_attention_cpu import is_in_cpp as attention_is_in_cpp
from ryzen_llm.kernels.few_rows_linear import is_in_cpp as few_rows_are_in_cpp
from ryzen_llm.kernels.quantised_linear import is_in_cpp as product_is_in_cpp
from ryzen_llm.model import ModelConfig, Transformer


def build(
    seed: int = 0, rms_norm_eps: float = 1e-5, sliding_window: int = 0, num_layers: int = 1
) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(
        ModelConfig(
            vocab_size=64,
            hidden_size=32,
            num_layers=num_layers,
            num_heads=4,
            num_kv_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
            rms_norm_eps=rms_norm_eps,
            sliding_window=sliding_window,
            sliding_layers=(0,) if sliding_window else (),
        )
    )


def without_positions(model: Transformer) -> Transformer:
    for block in model.blocks:
        block.attention.rotary = False  # an attribute that no config names
    return model


OTHERS: dict[str, Callable[[], tuple[Transformer, str]]] = {
    "a constant": lambda: (build(rms_norm_eps=1.0), "fp32"),
    "an attribute": lambda: (without_positions(build()), "fp32"),
    "the weights' kind": lambda: (build(), "int4"),
}


def logits(generator: Generator) -> torch.Tensor:
    with torch.inference_mode():
        return generator.fixed_width(torch.tensor([[3, 1, 4, 1]]), generator.new_cache(1, 8)).logits


@pytest.mark.parametrize("other", OTHERS)
def test_only_models_that_differ_in_values_alone_share_graphs(
    other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each one's logits are those of its own uncompiled pass, whichever was compiled before it."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    compiled = []
    for model, weights in ((build(), "fp32"), (build(seed=1), "fp32"), OTHERS[other](), (build(), "fp32")):
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        found = logits(Generator(model, weights=weights, compile=True))
        exact = found.dtype == torch.float32
        expected = logits(Generator(model, weights=weights))
        torch.testing.assert_close(
            found, expected, atol=1e-5 if exact else 1e-3, rtol=1e-5 if exact else 0.02
        )
        compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"] - before)
    assert compiled == [1, 0, 1, 0]


def test_caches_of_any_length_find_room_among_the_compilations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a sliding window a long cache has a ring buffer and a short one has none, each with a graph of its
    own, which must not count against Dynamo's limit: beyond it a whole graph is an error.
    """
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model, tokens = build(sliding_window=16), torch.tensor([[3]])
    compiled, eager = (Generator(model, weights="fp32", compile=compile) for compile in (True, False))
    with torch._dynamo.config.patch(recompile_limit=1), torch.inference_mode():
        for length in (8, 400, 8):
            found, expected = (
                generator.fixed_width(tokens, generator.new_cache(1, length)).logits
                for generator in (compiled, eager)
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


class Played:
    """A `GraphedStep` without CUDA: compiles when it is made and computes when it is called."""

    def __init__(self, step: Step[Outcome], cache: KVCache, tokens: torch.Tensor) -> None:
        self.step, self.cache = step, cache
        lengths = cache.lengths
        self(tokens)
        cache.truncate(lengths)

    def __call__(self, tokens: torch.Tensor) -> Outcome:
        positions = self.cache.append(tokens.shape[1]).view(1, -1).expand(tokens.shape)
        for layer in self.cache.layers:
            layer.positions = positions
        return self.step(tokens, positions, self.cache.layers)


def test_graphs_of_any_width_and_cache_find_room_among_the_compilations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU's, too: each width, batch and size of a cache is compiled anew before it is recorded."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    monkeypatch.setattr("ryzen_llm.decoding.fixed_width.GraphedStep", Played)
    torch._dynamo.reset()
    compiled, eager = (Generator(build(), weights="fp32", compile=compile) for compile in (True, False))
    compiled.fixed_width.device = torch.device("cuda")
    with torch._dynamo.config.patch(recompile_limit=1), torch.inference_mode():
        for width, length in ((1, 20), (1, 30), (2, 30), (4, 30)):
            tokens = torch.full((2, width), 3)
            found, expected = (
                generator.fixed_width(tokens, generator.new_cache(2, length)).logits
                for generator in (compiled, eager)
            )
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_texts_that_come_to_differ_in_length_take_the_same_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond Dynamo's limit, which only a new shape is exempt from, it would be an error in mid-text."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    generator = Generator(build(), weights="fp32", compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with torch._dynamo.config.patch(recompile_limit=1), torch.inference_mode():
        for batch_size in (1, 2, 3):
            cache = generator.new_cache(batch_size, 40)
            tokens = torch.full((batch_size, 1), 3)
            for length in ([2] * batch_size, range(1, batch_size + 1)):
                for _ in range(3):
                    generator.fixed_width(tokens, cache)
                cache.truncate(list(length))
                generator.fixed_width(tokens, cache)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 3


@pytest.mark.parametrize("cache", ["dense", "int4-sinks"])
@pytest.mark.parametrize("weights", ["bf16", "int4"])
def test_a_pass_over_four_tokens_gives_what_four_over_one_give(cache: str, weights: str) -> None:
    """To the bit: so a text is the same with drafts and without, not only nearly."""
    dtype = Generator(build(), weights="int4").dtype
    in_cpp = few_rows_are_in_cpp() if weights == "bf16" else product_is_in_cpp(dtype)
    if not (attention_is_in_cpp() and in_cpp):
        pytest.skip("without the C++ forms rounding depends on how many tokens there are")
    torch._dynamo.reset()
    model = build(num_layers=6)  # with fewer, sums of residuals are rounded at the same places in any case
    generator = Generator(model, weights=weights, compile=True, cache=cache)
    tokens = torch.randint(0, 64, (1, 44), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wide, narrow = (generator.new_cache(1, 44) for _ in range(2))
        for begin in range(0, 44, 4):
            four = tokens[:, begin : begin + 4]
            together = generator.fixed_width(four, wide).logits
            alone = [generator.fixed_width(token, narrow).logits for token in four.split(1, 1)]
            assert torch.equal(together, torch.cat(alone, 1))
