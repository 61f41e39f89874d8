"""Drafts do not change the distribution of what is drawn: every text of a toy model is counted."""

import functools
import itertools
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ryzen_llm.decoding import (
    Draft,
    DraftHeads,
    DraftModelDrafter,
    Generator,
    HeadsConfig,
    HeadsDrafter,
    Sampling,
    SpeculativeDecoder,
)
from ryzen_llm.decoding.verification import verify
from ryzen_llm.model import ModelConfig, Transformer

sys.path.append(str(Path(__file__).parent))
from adversaries import Adversary, always, draft, oracle, repeating

LENGTH = 3
SAMPLES = 100_000
NEXT = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.34, 0.65, 0.01]]
"""Of a Markov chain over three tokens, of which 2 ends the text."""


def chain_texts() -> dict[tuple[int, ...], float]:
    """Every text of at most LENGTH tokens after token 0, with its probability."""
    texts: dict[tuple[int, ...], float] = {}

    def extend(text: tuple[int, ...], probability: float) -> None:
        if len(text) == LENGTH or text[-1:] == (2,):
            texts[text] = probability
            return
        for token, p in enumerate(NEXT[text[-1] if text else 0]):
            extend((*text, token), probability * p)

    extend((), 1.0)
    return texts


def draw_after(rng: random.Random, tokens: list[int], i: int) -> int:
    return rng.choices(range(3), NEXT[tokens[i]])[0]


def chi_square(counts: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    total = counts.total()
    assert counts.keys() <= expected.keys()
    return sum((counts[text] - total * p) ** 2 / (total * p) for text, p in expected.items())


def limit(degrees: int) -> float:
    """What chi-square exceeds about once in 30 000 times: Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3


def toy_model() -> Transformer:
    model = Transformer(
        ModelConfig(
            vocab_size=5,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=1,
            intermediate_size=16,
            max_position_embeddings=64,
        )
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


def random_tree(rng: random.Random, vocab_size: int = 3) -> Draft:
    """Siblings may be alike."""
    size = rng.randrange(7)
    tokens = rng.choices(range(vocab_size), k=size)
    return Draft(tokens, [0] * size, [rng.randrange(-1, index) for index in range(size)])


DRAFTS: dict[str, Callable[[list[int], random.Random], Draft]] = {
    "none": lambda text, rng: draft([]),
    "likeliest": lambda text, rng: draft([0, 0]),
    "unlikely": lambda text, rng: draft([1, 2]),
    "end of text": lambda text, rng: draft([2, 2, 2]),
    "repeating": lambda text, rng: draft(text[-1:] * 3),
    "random": lambda text, rng: draft(rng.choices(range(3), k=rng.randrange(4))),
    "by what was drawn": lambda text, rng: draft([(text[-1] + len(text)) % 3, 0]),
    "every token": lambda text, rng: Draft([0, 1, 2] * 2, [0] * 6, [-1, -1, -1, 1, 1, 1]),
    "trees": lambda text, rng: random_tree(rng),
}


@pytest.mark.parametrize("name", DRAFTS)
def test_verified_drafts_leave_the_joint_distribution(name: str) -> None:
    """Chi-square over all texts of up to three tokens, 100 000 of them."""
    rng = random.Random(0)
    expected = chain_texts()
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(SAMPLES):
        text = [0]
        while len(text) <= LENGTH and (len(text) == 1 or text[-1] != 2):
            drafted = DRAFTS[name](text, rng)
            draw = functools.partial(draw_after, rng, [text[-1], *drafted.tokens])
            text += verify(drafted, draw, {2}, LENGTH + 1 - len(text))[0]
        counts[tuple(text[1:])] += 1
    assert chi_square(counts, expected) < limit(len(expected) - 1)


def test_the_chi_square_test_can_fail() -> None:
    """Greedy drafts accepted whenever they are likelier than not: a bug found elsewhere."""
    rng = random.Random(0)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(SAMPLES):
        text = [0]
        while len(text) <= LENGTH and (len(text) == 1 or text[-1] != 2):
            token = rng.choices(range(3), NEXT[text[-1]])[0]
            text.append(0 if NEXT[text[-1]][0] > rng.random() * 1.05 else token)
        counts[tuple(text[1:])] += 1
    assert chi_square(counts, chain_texts()) > limit(len(chain_texts()) - 1)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [(1.0, None, None), (0.8, 4, 0.95)])
@pytest.mark.parametrize(
    "name", ["suffix", "recycling", "heads", "draft_model", "right", "repeating", "end of text", "trees"]
)
def test_generated_texts_follow_the_joint_distribution(
    name: str, settings: tuple[float, int | None, float | None]
) -> None:
    """The whole decoder on a toy model, 100 000 texts of three tokens, against enumerating the model."""
    torch.manual_seed(0)
    model, other = toy_model(), toy_model()
    temperature, top_k, top_p = settings
    sampling = Sampling(temperature, top_k, top_p)
    prompt = torch.tensor([1, 2, 1, 3, 1, 2])
    expected: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        for text in itertools.product(range(5), repeat=LENGTH):
            logits = model(torch.cat((prompt, torch.tensor(text)))[None])[0, len(prompt) - 1 : -1]
            p = sampling.probabilities(logits).gather(1, torch.tensor(text)[:, None]).double().prod()
            if p > 0:
                expected[text] = float(p)
    generator = Generator(model, weights="fp32", compile=name == "trees")
    rng = random.Random(1)
    likeliest = max(expected, key=lambda text: expected[text])
    heads = DraftHeads(HeadsConfig(model.config.hidden_size, 16, 3), torch.arange(5)).eval()
    drafter = {
        "heads": HeadsDrafter(heads, generator.model),
        "draft_model": DraftModelDrafter(Generator(other, weights="fp32"), 5),
        "right": Adversary("right", oracle([*prompt.tolist(), *likeliest])),
        "repeating": Adversary("repeating", repeating),
        "end of text": Adversary("end of text", always(0)),
        "trees": Adversary("trees", lambda text, most: random_tree(rng, 5)),
    }.get(name, name)
    decoder = SpeculativeDecoder(generator, drafter, widths=(4,))
    counts: Counter[tuple[int, ...]] = Counter()
    batch = 2000
    for seed in range(SAMPLES // batch):
        out = decoder.generate(
            prompt.expand(batch, -1),
            max_new_tokens=LENGTH,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed * batch,
        )
        counts.update(map(tuple, out.new_ids.tolist()))
        assert not decoder.statistics.failures
    likely = {text: p for text, p in expected.items() if p * SAMPLES >= 5}
    rest = Counter({text: n for text, n in counts.items() if text in likely})
    assert counts.keys() <= expected.keys()
    total = sum(likely.values())
    assert abs(rest.total() - SAMPLES * total) < 5 * math.sqrt(SAMPLES * (1 - total) + 1)
    assert chi_square(rest, {text: p / total for text, p in likely.items()}) < limit(len(likely) - 1)
