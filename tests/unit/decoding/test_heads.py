"""Draft heads compute what their formula says, and files of them are checked."""

import functools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ryzen_llm.decoding import (
    Draft,
    DraftHeads,
    Generator,
    HeadsConfig,
    HeadsDrafter,
    SpeculativeDecoder,
)
from ryzen_llm.decoding.drafters.heads import SURENESS
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer


def build(tied: bool = True) -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=101,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_embeddings=tied,
    )
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def heads() -> DraftHeads:
    torch.manual_seed(5)
    heads = DraftHeads(HeadsConfig(32, 48, 4), torch.arange(3, 99, 2))
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return heads.eval()


@pytest.mark.parametrize("tied", [True, False])
def test_drafts_follow_the_formula(heads: DraftHeads, tied: bool) -> None:
    """In fp64, text by text, from the docstrings: after each that is followed, its four likeliest tokens."""
    model = build(tied)
    drafter = HeadsDrafter(heads, model)
    matrix = (model.embedding.lookup(torch.arange(101)) if tied else model.head.weight).double()  # type: ignore[union-attr]

    def after(state: Tensor, token: int) -> tuple[Tensor, Tensor]:
        e = model.embedding.lookup(torch.tensor(token)).double()
        normed = [
            x / (x.square().mean() + 1e-5).sqrt() * w.double()
            for x, w in ((state, heads.state_norm), (e, heads.token_norm))
        ]
        gate, up = (heads.w_in.weight.double() @ torch.cat(normed)).chunk(2)
        state = state + heads.w_out.weight.double() @ (gate * gate.sigmoid() * up)
        return state, (matrix[heads.vocabulary] @ state).softmax(0)

    first = torch.randn(32).double()
    expected: dict[tuple[int, ...], float] = {}
    followed: list[tuple[float, tuple[int, ...], Tensor]] = [(1.0, (), first)]
    for _ in range(4):
        found: list[tuple[float, tuple[int, ...], Tensor]] = []
        for chance, text, state in followed:
            state, chances = (part.detach() for part in after(state, text[-1] if text else 7))
            for index in chances.argsort(descending=True)[:4].tolist():
                token = int(heads.vocabulary[index])
                found.append((chance * float(chances[index]), (*text, token), state))
        expected |= {text: chance for chance, text, _ in found if chance >= 0.02}
        followed = sorted(found, key=lambda each: -each[0])[:2]
    assert max(map(len, expected)) > 2
    assert len(expected) > 6

    def texts(draft: Draft) -> dict[tuple[int, ...], int]:
        made: list[tuple[int, ...]] = []
        for token, parent in zip(draft.tokens, draft.follows, strict=True):
            made.append((*(made[parent] if parent >= 0 else ()), token))
        return dict(zip(made, draft.signals, strict=True))

    with torch.inference_mode():
        draft, shorter = (texts(drafter.draft(first.float(), 7, most)) for most in (9, 2))
    assert draft.keys() == expected.keys()
    assert shorter == {text: signal for text, signal in draft.items() if len(text) <= 2}
    for text, signal in draft.items():
        likely = expected[text] / expected.get(text[:-1], 1.0)
        assert signal == 12 * (len(text) - 1) + min(int(-2 * math.log2(likely)), 11)
        # Until one has been tried: within the rounding of a signal, half a bit.
        assert likely >= 2**-5.5
        assert abs(math.log2(drafter.likelihood(signal) / (SURENESS * likely))) <= 0.25 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_another_shape_have_a_graph_of_their_own(
    heads: DraftHeads, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiled draft does not look at its modules, some of which are quantised in bf16 and some not."""
    monkeypatch.setattr("torch.compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    model = build().to(dtype)
    others = [
        DraftHeads(HeadsConfig(32, size, 4), torch.arange(0, 96, step))
        for size, step in ((64, 6), (64, 3), (96, 3), (48, 5))
    ]
    for parameter in (parameter for each in others for parameter in each.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.inference_mode():
        state = torch.randn(32, dtype=dtype)
        for each in (heads, *others, heads):
            compiled, eager = (HeadsDrafter(each.eval(), model, compile=compile) for compile in (True, False))
            assert compiled.draft(state, 7, 4) == eager.draft(state, 7, 4)


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int4"])
def test_untrained_heads_change_nothing(heads: DraftHeads, weights: str) -> None:
    """With int4 the heads are quantised, too, and the model's own embedding is not."""
    model = build()
    prompt = torch.arange(10)[None]
    if weights == "int4":  # whose sizes do not suit
        model = Transformer(ModelConfig(**{**model.config.to_dict(), "vocab_size": 112})).eval()
    generator = Generator(model, weights=weights)
    plain = SpeculativeDecoder(generator, [], widths=(4,)).generate(prompt, max_new_tokens=40)
    decoder = SpeculativeDecoder(generator, HeadsDrafter(heads, generator.model), widths=(4,))
    assert torch.equal(decoder.generate(prompt, max_new_tokens=40).ids, plain.ids)
    assert decoder.statistics.drafted["heads"] > 0
    assert not decoder.statistics.failures


def test_heads_are_saved_and_loaded(heads: DraftHeads, tmp_path: Path) -> None:
    heads.save(tmp_path / "heads.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["heads.safetensors"]
    loaded = DraftHeads.load(tmp_path / "heads.safetensors")
    assert loaded.config == heads.config
    for name, tensor in heads.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)
    path = f"heads:{tmp_path}/heads.safetensors"
    out = Generator(build(), weights="fp32", drafter=["suffix", path]).generate(
        torch.arange(9), max_new_tokens=9
    )
    assert out.accepted_per_step is not None


def test_files_that_are_not_heads_are_refused(heads: DraftHeads, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.safetensors: no such file"):
        DraftHeads.load(tmp_path / "a.safetensors")
    (tmp_path / "a.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match="damaged"):
        DraftHeads.load(tmp_path / "a.safetensors")
    heads.vocabulary[0] = -1
    heads.save(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"damaged \(the vocabulary is no list of ids"):
        DraftHeads.load(tmp_path / "a.safetensors")
    heads.vocabulary[0] = 3
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match="something else"):
        DraftHeads.load(tmp_path / "b.safetensors")
    config = ModelConfig.from_name("tiny", vocab_size=300, hidden_size=16, num_heads=2, num_kv_heads=1)
    other = Transformer(config)
    with pytest.raises(InputError, match="are for a hidden_size of 32 and ids up to 97, the model has 16"):
        HeadsDrafter(heads, other)


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "depth"])
def test_a_shape_that_cannot_work_is_named(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} is 0"):
        HeadsConfig(**{"hidden_size": 8, name: 0})
