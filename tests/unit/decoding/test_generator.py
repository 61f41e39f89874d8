"""The decoding loop gives what stepwise scoring without a cache gives, and what transformers generates."""

import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from ryzen_llm.decoding import Generator, Sampling
from ryzen_llm.decoding.generator import room_for
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import CpuFeatures
from ryzen_llm.model import ModelConfig, Transformer

sys.path.append(str(Path(__file__).parents[1] / "model"))
from hf_weights import reference_pair

SHAPE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
}


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig(max_position_embeddings=128, **SHAPE))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that the next token depends on the context
    return model


@pytest.fixture(scope="module")
def generator(model: Transformer) -> Generator:
    return Generator(model, weights="fp32")


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(0, 101, (3, 7), generator=torch.Generator().manual_seed(0))


def without_cache(
    model: Transformer, ids: torch.Tensor, steps: int, sampling: Sampling, seed: int
) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat((ids, sampling.sample(model(ids)[:, -1], rng)[:, None]), 1)
    return ids


@pytest.mark.parametrize("architecture", ["Llama", "Qwen3"])
def test_greedy_ids_are_those_transformers_generates(architecture: str, prompts: torch.Tensor) -> None:
    model, reference = reference_pair(architecture, **SHAPE)
    expected = reference.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False
    )
    assert len(set(expected.flatten().tolist())) > 20, "a reference that repeats itself tests nothing"
    assert torch.equal(Generator(model, weights="fp32").generate(prompts, max_new_tokens=40).ids, expected)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(0.8, top_k=20, top_p=0.9)])
def test_ids_are_those_of_scoring_without_a_cache(
    model: Transformer, generator: Generator, prompts: torch.Tensor, sampling: Sampling
) -> None:
    result = generator.generate(
        prompts,
        max_new_tokens=30,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        seed=11,
    )
    assert torch.equal(result.ids, without_cache(model, prompts, 30, sampling, seed=11))
    assert torch.equal(result.ids, torch.cat((prompts, result.new_ids), 1))
    assert result.stop_reason == "length"


def test_seeds_repeat_and_no_seed_differs(generator: Generator, prompts: torch.Tensor) -> None:
    def draw(seed: int | None) -> torch.Tensor:
        return generator.generate(prompts, max_new_tokens=20, temperature=2.0, seed=seed).new_ids

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not torch.equal(draw(None), draw(None))


def test_texts_of_any_length_share_a_few_graphs_on_a_gpu() -> None:
    """Each size of a cache is compiled there; on a CPU one graph is for all of them."""
    lengths = range(1, 2049)
    rooms = [room_for(length, torch.device("cuda")) for length in lengths]
    assert all(0 <= room - length < 256 for room, length in zip(rooms, lengths, strict=True))
    assert len(set(rooms)) == 8
    assert [room_for(length, torch.device("cpu")) for length in lengths] == list(lengths)


def test_one_dimension_is_a_batch_of_one(generator: Generator, prompts: torch.Tensor) -> None:
    result = generator.generate(prompts[1], max_new_tokens=5)
    assert torch.equal(result.ids, generator.generate(prompts[1:2], max_new_tokens=5).ids)


def test_a_row_ends_at_its_stop_token_while_others_go_on(generator: Generator, prompts: torch.Tensor) -> None:
    free = generator.generate(prompts, max_new_tokens=30).new_ids
    stop = int(free[0, 6])
    result = generator.generate(prompts, max_new_tokens=30, stop_tokens=[stop])
    for row, unstopped in zip(result.new_ids.tolist(), free.tolist(), strict=True):
        end = unstopped.index(stop) + 1 if stop in unstopped else 30
        expected = unstopped[:end] + [stop] * (30 - end)
        assert row == expected[: len(row)]
    assert any(stop not in row for row in free.tolist()), "every row stopped: the test shows nothing"
    assert result.stop_reason == "length"


def test_generation_ends_when_every_row_has_stopped(generator: Generator, prompts: torch.Tensor) -> None:
    free = generator.generate(prompts, max_new_tokens=30).new_ids
    stops = free[:, 4].tolist()
    last = max(next(i for i, token in enumerate(row) if token in stops) for row in free.tolist())
    result = generator.generate(prompts, max_new_tokens=30, stop_tokens=stops)
    assert result.stop_reason == "stop"
    assert result.new_ids.shape[1] == last + 1 <= 5


def test_a_stop_on_the_last_permitted_token_is_a_stop(generator: Generator, prompts: torch.Tensor) -> None:
    first = generator.generate(prompts[0], max_new_tokens=1).new_ids.item()
    result = generator.generate(prompts[0], max_new_tokens=1, stop_tokens=[int(first)])
    assert (result.stop_reason, result.new_ids.tolist()) == ("stop", [[first]])


def test_streaming_gives_the_same_ids_one_by_one(generator: Generator, prompts: torch.Tensor) -> None:
    streamed: list[list[int]] = []
    result = generator.generate(prompts, max_new_tokens=12, temperature=1.0, seed=3, on_token=streamed.append)
    assert torch.tensor(streamed).T.equal(result.new_ids)


def test_speed_counts_the_tokens_after_the_first(
    generator: Generator, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that moves by 2 s a reading: one at the start, at the first token and at the end."""
    readings = iter(range(0, 100, 2))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(readings)))
    result = generator.generate(prompts, max_new_tokens=5)
    assert result.time_to_first_token_s == 2.0
    assert result.tokens_per_second == 3 * 4 / 2.0
    assert result.accepted_per_step is None


def test_a_single_token_has_no_speed(generator: Generator, prompts: torch.Tensor) -> None:
    assert generator.generate(prompts, max_new_tokens=1).tokens_per_second is None


@pytest.mark.parametrize("weights", ["bf16", "fp32"])
@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_is_left_as_it_was(
    model: Transformer, prompts: torch.Tensor, weights: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryzen_llm.decoding.generator.supports_bf16", lambda device: True)
    model.train(training)
    before = {name: (p.data_ptr(), p.dtype, p.clone()) for name, p in model.named_parameters()}
    Generator(model, weights=weights).generate(prompts, max_new_tokens=3)
    assert model.training is training
    for name, parameter in model.named_parameters():
        address, dtype, value = before[name]
        assert (parameter.data_ptr(), parameter.dtype, parameter.requires_grad) == (address, dtype, True)
        assert torch.equal(parameter, value)


def test_fp32_weights_are_shared_and_bf16_weights_are_rounded_copies(
    model: Transformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ryzen_llm.decoding.generator.supports_bf16", lambda device: True)
    shared, rounded = Generator(model, weights="fp32").model, Generator(model, weights="bf16").model
    for ours, same, copy in zip(model.parameters(), shared.parameters(), rounded.parameters(), strict=True):
        assert same.data_ptr() == ours.data_ptr()
        assert torch.equal(copy, ours.bfloat16())


def test_hardware_without_bf16_decodes_in_fp32_and_says_so(
    model: Transformer, generator: Generator, prompts: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CpuFeatures(
        name=None,
        avx2=True,
        avx512=False,
        avx512_bf16=False,
        avx512_vnni=False,
        amx_bf16=False,
        arm_bf16=False,
    )
    monkeypatch.setattr("ryzen_llm.kernels.hardware.cpu_features", lambda: plain)
    with pytest.warns(UserWarning, match="cpu has no bf16 arithmetic: decoding with fp32 weights"):
        fallback = Generator(model, weights="bf16")
    assert fallback.weights == "fp32"
    assert torch.equal(fallback.generate(prompts).ids, generator.generate(prompts).ids)


@pytest.mark.parametrize("cache", ["dense", "int8", "int4-sinks"])
def test_a_compiled_step_gives_the_same_ids(model: Transformer, prompts: torch.Tensor, cache: str) -> None:
    """Beyond 128 tokens, so that the buffers grow in between."""
    longer = prompts[:, :1].expand(-1, 110)
    compiled, plain = (Generator(model, weights="fp32", cache=cache, compile=c) for c in (True, False))
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected = plain.generate(longer, max_new_tokens=18)
    assert torch.equal(compiled.generate(longer, max_new_tokens=18).ids, expected.ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_logits_that_are_not_finite_are_refused(model: Transformer, prompts: torch.Tensor) -> None:
    broken = deepcopy(model)
    broken.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        Generator(broken, weights="fp32").generate(prompts, max_new_tokens=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cache": "int2"}, "unknown cache 'int2': choose one of dense"),
        ({"cache": ["int8", "int2"]}, "unknown cache 'int2': choose one of dense"),
        ({"drafter": "eagle"}, "unknown drafter 'eagle': choose of suffix"),
        ({"weights": "int2"}, "unknown weights 'int2': choose one of bf16, fp32, int8, int4"),
        (
            {"weights": "int4"},
            "qkv_proj has in_features = 48, expected a multiple of 32: choose int8",
        ),
    ],
)
def test_unknown_choices_are_named(model: Transformer, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Generator(model, **arguments)


@pytest.mark.parametrize(
    ("input_ids", "settings", "message"),
    [
        (torch.zeros(0, dtype=torch.int64), {}, r"\(0,\) torch.int64, expected one or more tokens"),
        (torch.zeros(1, 1, 3, dtype=torch.int64), {}, r"\(1, 1, 3\)"),
        (torch.zeros(3), {}, "float32"),
        (torch.tensor([5, 101]), {}, "reach from 5 to 101, expected 0 to 100"),
        (torch.tensor([-1]), {}, "reach from -1"),
        (
            torch.zeros(100, dtype=torch.int64),
            {"max_new_tokens": 29},
            "make 129.*max_position_embeddings = 128",
        ),
        ([], {}, "input_ids are empty, expected one prompt or more"),
        (
            [torch.tensor([1]), torch.tensor([[1, 2]])],
            {},
            r"\(1, 2\) torch.int64, .* or a sequence of \(time,\)",
        ),
        ([torch.tensor([1]), torch.tensor([101])], {}, "reach from 1 to 101"),
        (torch.tensor([1]), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (torch.tensor([1]), {"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_prompts_and_settings_that_cannot_work_are_named(
    generator: Generator, input_ids: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        generator.generate(input_ids, **settings)


@pytest.mark.parametrize("drafter", [None, "suffix"])
@pytest.mark.parametrize(
    ("cache", "compile"), [("dense", False), ("int8", False), ("int4-sinks", False), ("dense", True)]
)
def test_prompts_of_different_lengths_have_the_texts_that_they_have_alone(
    model: Transformer, cache: str, drafter: str | None, compile: bool
) -> None:
    ids = torch.randint(0, 101, (60,), generator=torch.Generator().manual_seed(3))
    prompts = [ids[:3], ids[3:50], ids[50:]]
    generator = Generator(model, weights="fp32", cache=cache, drafter=drafter, compile=compile)
    together = generator.generate(prompts, max_new_tokens=12)
    for row, prompt in enumerate(prompts):
        alone = generator.generate(prompt, max_new_tokens=12)
        assert torch.equal(together.new_ids[row], alone.new_ids[0])
        length = len(prompt) + 12
        assert torch.equal(together.ids[row, :length], alone.ids[0])
        assert (together.ids[row, length:] == together.ids[row, length - 1]).all(), "filled up"


def test_the_whole_context_can_be_used(model: Transformer, generator: Generator) -> None:
    ids = torch.arange(100)[None]
    result = generator.generate(ids, max_new_tokens=28)
    assert torch.equal(result.ids, without_cache(model, ids, 28, Sampling(), seed=0))
