"""With a drafter, whatever it does, the text is the one without."""

import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from ryzen_llm.decoding import (
    Draft,
    Drafter,
    DraftModelDrafter,
    Generator,
    SpeculativeDecoder,
    SuffixDrafter,
)
from ryzen_llm.decoding.pauses import Pauses
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer

sys.path.append(str(Path(__file__).parent))
from adversaries import FAILING, Adversary, always, draft, oracle, repeating

NEW = 40
SAMPLED: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 4},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "seed": 5},
]


def build(seed: int, **changes: Any) -> Transformer:
    """Random, but with texts that soon repeat themselves here and there, so that drafts hold sometimes."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": 101,
        "hidden_size": 48,
        "num_layers": 2,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 256,
    }
    model = Transformer(ModelConfig(**{**shape, **changes}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(0)


@pytest.fixture(scope="module")
def prompts() -> torch.Tensor:
    return torch.randint(0, 101, (3, 7), generator=torch.Generator().manual_seed(0)).repeat(1, 2)


def drafters(model: Transformer, truth: list[int]) -> dict[str, Any]:
    corpus = torch.randint(0, 101, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    return {
        "suffix": "suffix",
        "recycling": "recycling",
        "all": [
            "suffix",
            "recycling",
            DraftModelDrafter(Generator(build(1, num_layers=1), weights="fp32"), 101),
        ],
        "with a corpus": SuffixDrafter([*corpus, *truth]),
        "itself": DraftModelDrafter(Generator(model, weights="fp32"), 101),
        "right": Adversary("right", oracle(truth)),
        "wrong": Adversary("wrong", oracle(truth, shift=1, vocab_size=101)),
        "repeating": Adversary("repeating", repeating),
        "end of text": Adversary("end of text", always(0)),
    }


@pytest.mark.parametrize("name", drafters(build(0), []))
@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("widths", [(1, 2, 4, 8), (4,)])
def test_ids_are_those_without_a_drafter(
    model: Transformer, prompts: torch.Tensor, name: str, sampled: dict[str, Any], widths: tuple[int, ...]
) -> None:
    generator = Generator(model, weights="fp32")
    plain = generator.generate(prompts[:1], max_new_tokens=NEW, **sampled)
    drafter = drafters(model, plain.ids[0].tolist())[name]
    decoder = SpeculativeDecoder(generator, drafter, widths=widths)
    for _ in range(2):  # tables and rates are kept from text to text
        out = decoder.generate(prompts[:1], max_new_tokens=NEW, **sampled)
        assert torch.equal(out.ids, plain.ids)
    assert not decoder.statistics.failures
    if name == "right" and widths == (4,):
        assert out.accepted_per_step == pytest.approx(39 / 10)
    if name == "wrong":
        assert out.accepted_per_step == 1.0


@pytest.mark.parametrize("cache", ["dense", "int8", "k8v4", "int4-sinks", ["int8", "dense"]])
@pytest.mark.parametrize("drafter", ["suffix", "recycling", "wrong"])
def test_every_cache_rolls_back(model: Transformer, prompts: torch.Tensor, cache: Any, drafter: str) -> None:
    """Against the same widths without a draft: between widths the last bits differ, and so may a code."""
    generator = Generator(model, weights="fp32", cache=cache)
    plain = SpeculativeDecoder(generator, [], widths=(4,)).generate(prompts, max_new_tokens=NEW)
    chosen = Adversary("wrong", always(7)) if drafter == "wrong" else drafter
    out = SpeculativeDecoder(generator, chosen, widths=(4,)).generate(prompts, max_new_tokens=NEW)
    assert torch.equal(out.ids, plain.ids)


def test_sliding_windows_roll_back(prompts: torch.Tensor) -> None:
    """Beyond the ring buffers' length."""
    model = build(2, sliding_window=16, sliding_layers=(0,), max_position_embeddings=512)
    generator = Generator(model, weights="fp32")
    plain = generator.generate(prompts, max_new_tokens=200)
    for drafter in ("suffix", Adversary("wrong", always(7))):
        assert torch.equal(
            SpeculativeDecoder(generator, drafter, widths=(1, 8)).generate(prompts, max_new_tokens=200).ids,
            plain.ids,
        )


@pytest.mark.parametrize("name", ["suffix", "recycling", "all", "right", "wrong"])
def test_texts_of_a_batch_go_on_at_their_own_pace(
    model: Transformer, prompts: torch.Tensor, name: str
) -> None:
    generator = Generator(model, weights="fp32")
    plain = generator.generate(prompts, max_new_tokens=NEW)
    drafter = drafters(model, plain.ids[1].tolist())[name]
    out = SpeculativeDecoder(generator, drafter, widths=(1, 4)).generate(prompts, max_new_tokens=NEW)
    assert torch.equal(out.ids, plain.ids)


def test_a_stop_token_inside_an_accepted_run_ends_the_text(model: Transformer, prompts: torch.Tensor) -> None:
    generator = Generator(model, weights="fp32")
    free = generator.generate(prompts, max_new_tokens=NEW)
    for position in range(1, 12):
        stop = int(free.new_ids[0, position])
        expected = generator.generate(prompts, max_new_tokens=NEW, stop_tokens=[stop])
        for row in range(3):
            decoder = SpeculativeDecoder(
                generator, Adversary("right", oracle(free.ids[row].tolist())), widths=(8,)
            )
            out = decoder.generate(prompts, max_new_tokens=NEW, stop_tokens=[stop])
            assert torch.equal(out.ids, expected.ids)
            assert out.stop_reason == expected.stop_reason


def test_streaming_gives_every_token_once_and_in_order(model: Transformer, prompts: torch.Tensor) -> None:
    generator = Generator(model, weights="fp32")
    truth = generator.generate(prompts, max_new_tokens=NEW)
    stop = int(truth.new_ids[2, 9])
    decoder = SpeculativeDecoder(generator, Adversary("right", oracle(truth.ids[0].tolist())))
    for stops in ([], [stop]):
        streamed: list[list[int]] = []
        out = decoder.generate(prompts, max_new_tokens=NEW, stop_tokens=stops, on_token=streamed.append)
        assert torch.tensor(streamed).T.equal(out.new_ids)


@pytest.mark.parametrize("name", FAILING)
def test_a_drafter_that_fails_costs_no_output(model: Transformer, prompts: torch.Tensor, name: str) -> None:
    generator = Generator(model, weights="fp32", drafter=[FAILING[name], "suffix"])
    plain = Generator(model, weights="fp32").generate(prompts, max_new_tokens=NEW)
    with pytest.warns(UserWarning, match=f"drafter {name} is dropped from this text"):
        assert torch.equal(generator.generate(prompts, max_new_tokens=NEW).ids, plain.ids)
    assert generator.speculation is not None
    assert list(generator.speculation.statistics.failures) == [name]


@pytest.mark.parametrize("sampled", SAMPLED)
@pytest.mark.parametrize("texts", [1, 3])
def test_drafters_learn_of_the_steps_that_had_no_drafts(
    model: Transformer,
    prompts: torch.Tensor,
    texts: int,
    sampled: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of a pause, all together: what they are asked afterwards is about the whole text."""
    without = SpeculativeDecoder(Generator(model, weights="fp32"), [])
    streamed: list[list[int]] = []
    plain = without.generate(prompts[:texts], max_new_tokens=NEW, **sampled)
    truth = plain.ids.tolist()
    stops = truth[0][-2:-1] if texts == 1 and sampled else []
    if stops:
        plain = without.generate(prompts[:texts], max_new_tokens=NEW, stop_tokens=stops, **sampled)
        truth = plain.ids.tolist()
    chance = random.Random(0)
    monkeypatch.setattr(
        Pauses, "passed", lambda self, *step: setattr(self, "left", chance.choice((0, 0, 1, 3)))
    )
    asked: list[int] = []
    sessions: list[Any] = []

    def propose(text: list[int], most: int) -> Draft:
        row = next(row for row in truth if row[: len(text)] == text)
        asked.append(len(text))
        return draft(row[len(text) : len(text) + most])

    class Watched(Adversary):
        def begin(self, tokens: Sequence[int], hidden_state: torch.Tensor) -> Any:
            sessions.append(super().begin(tokens, hidden_state))
            return sessions[-1]

    decoder = SpeculativeDecoder(Generator(model, weights="fp32"), Watched("watched", propose))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a drafter that fails is dropped with one
        out = decoder.generate(
            prompts[:texts],
            max_new_tokens=NEW,
            stop_tokens=stops,
            on_token=streamed.append,
            **sampled,
        )
    assert torch.equal(out.ids, plain.ids)
    assert torch.tensor(streamed).T.equal(out.new_ids)
    assert [session.text for session in sessions] == truth
    assert out.stop_reason == plain.stop_reason
    assert 0 < len(set(asked)) < decoder.statistics.steps


def test_a_draft_that_is_too_long_is_cut(model: Transformer, prompts: torch.Tensor) -> None:
    generator = Generator(model, weights="fp32")
    endless = Adversary("endless", lambda text, most: oracle(plain.ids[0].tolist())(text, 10**6))
    plain = generator.generate(prompts[:1], max_new_tokens=NEW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = SpeculativeDecoder(generator, endless, widths=(4,)).generate(prompts[:1], max_new_tokens=NEW)
    assert torch.equal(out.ids, plain.ids)


def bushy(truth: list[int], text: list[int]) -> Draft:
    """Five true tokens, each with a wrong sibling before it that has a wrong child."""
    tokens: list[int] = []
    parents: list[int] = []
    last = -1
    for token in truth[len(text) : len(text) + 5]:
        wrong = (token + 1) % 101
        parents += [last, len(tokens), last]
        tokens += [wrong, wrong, token]
        last = len(tokens) - 1
    return Draft(tokens, [0] * len(tokens), parents)


@pytest.mark.parametrize("cache", ["dense", "int8", "k8v4", "int4-sinks"])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_trees_are_read_where_passes_are_compiled(prompts: torch.Tensor, cache: str, weights: str) -> None:
    """Each pass keeps the true tokens from among the wrong ones, of texts that come apart, and beyond 128
    tokens; what is read back afterwards is as if no others had been there.
    """
    model = build(3, num_layers=1, head_dim=16)
    torch._dynamo.reset()
    generator = Generator(model, weights=weights, cache=cache, compile=True)
    plain = generator.generate(prompts.repeat(1, 7), max_new_tokens=NEW)
    truths = plain.ids.tolist()

    def propose(text: list[int], most: int) -> Draft:
        (truth,) = (truth for truth in truths if truth[: len(text)] == text)
        return bushy(truth, text) if len(text) % 3 else draft([])

    decoder = SpeculativeDecoder(generator, Adversary("bushy", propose), widths=(16,))
    out = decoder.generate(prompts.repeat(1, 7), max_new_tokens=NEW)
    assert torch.equal(out.ids, plain.ids)
    assert not decoder.statistics.failures
    assert decoder.statistics.accepted["bushy"] > 3 * decoder.statistics.steps / 2


def test_a_tree_is_read_as_one_text_where_passes_cannot_read_it(
    model: Transformer, prompts: torch.Tensor
) -> None:
    """The likeliest one, once its siblings have been wrong: eager, and in ring buffers."""
    windowed = build(2, sliding_window=16, sliding_layers=(0,), max_position_embeddings=512)
    for generator in (Generator(model, weights="fp32"), Generator(windowed, weights="fp32", compile=True)):
        plain = generator.generate(prompts[:1], max_new_tokens=NEW + 110)
        truth = plain.ids[0].tolist()

        def propose(text: list[int], most: int, truth: list[int] = truth) -> Draft:
            found = bushy(truth, text)
            return Draft(found.tokens, [int(i % 3 == 2) for i in range(len(found.tokens))], found.parents)

        decoder = SpeculativeDecoder(generator, Adversary("bushy", propose), widths=(8,))
        out = decoder.generate(prompts[:1], max_new_tokens=NEW + 110)
        assert torch.equal(out.ids, plain.ids)
        assert out.accepted_per_step is not None
        assert out.accepted_per_step > 4


def test_a_tree_that_is_too_deep_is_cut(model: Transformer, prompts: torch.Tensor) -> None:
    """Near the end of a text."""
    generator = Generator(model, weights="fp32")
    plain = generator.generate(prompts[:1], max_new_tokens=NEW)
    truth = plain.ids[0].tolist()
    drafter = Adversary("deep", lambda text, most: bushy([*truth, *range(100)], text))
    decoder = SpeculativeDecoder(generator, drafter, widths=(8,))
    assert torch.equal(decoder.generate(prompts[:1], max_new_tokens=NEW).ids, plain.ids)
    assert not decoder.statistics.failures


def test_a_compiled_pass_gives_the_same_ids() -> None:
    """Beyond 128 tokens, so that the buffers grow in between."""
    model = build(0, num_layers=1)
    prompt = torch.arange(100)[None]
    compiled = Generator(model, weights="fp32", cache="int8", compile=True)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    out = SpeculativeDecoder(compiled, "suffix", widths=(4,)).generate(prompt, max_new_tokens=NEW)
    expected = Generator(model, weights="fp32", cache="int8").generate(prompt, max_new_tokens=NEW)
    assert torch.equal(out.ids, expected.ids)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1


def test_the_whole_context_can_be_used(model: Transformer, prompts: torch.Tensor) -> None:
    new = 256 - prompts.shape[1]
    expected = Generator(model, weights="fp32").generate(prompts, max_new_tokens=new)
    out = Generator(model, weights="fp32", drafter="suffix").generate(prompts, max_new_tokens=new)
    assert torch.equal(out.ids, expected.ids)


def test_logits_that_are_not_finite_are_refused(prompts: torch.Tensor) -> None:
    broken = build(0)
    broken.norm.weight.data[3] = float("nan")
    with pytest.raises(InputError, match="logits are not finite"):
        Generator(broken, weights="fp32", drafter="suffix").generate(prompts)


@pytest.mark.parametrize(
    ("drafter", "widths", "message"),
    [
        ("eagle", (1,), "unknown drafter 'eagle': choose of suffix, recycling"),
        (["suffix", "suffix"], (1,), "drafter suffix is there 2 times"),
        ("suffix", (), "widths are"),
        ("suffix", (0, 4), "expected one or more numbers from 1 to 32"),
        ("suffix", (33,), "expected one or more numbers from 1 to 32"),
    ],
)
def test_settings_that_cannot_work_are_named(
    model: Transformer, drafter: str | Drafter, widths: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        SpeculativeDecoder(Generator(model, weights="fp32"), drafter, widths=widths)


def test_a_draft_model_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(InputError, match="has 50 tokens, the model's 101"):
        DraftModelDrafter(Generator(build(0, vocab_size=50), weights="fp32"), 101)
