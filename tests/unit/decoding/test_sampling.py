"""What is drawn follows the distribution that temperature, top-k and top-p define, in that order."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzen_llm.decoding import Sampling
from ryzen_llm.decoding.sampling import seed_generator
from ryzen_llm.errors import InputError

TOY_LOGITS = [2.0, 1.5, 1.0, 0.0, -1.0, -3.0]


def brute_force(
    logits: list[float], temperature: float, top_k: int | None, top_p: float | None
) -> dict[int, float]:
    """The definition, token by token in Python floats: the kept tokens and their probabilities."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[:top_k]
    weights = [math.exp((logits[i] - max(logits)) / temperature) for i in order]
    kept: list[float] = []
    for weight in weights:
        if top_p is not None and sum(kept) >= top_p * sum(weights):
            break
        kept.append(weight)
    return {i: weight / sum(kept) for i, weight in zip(order, kept, strict=False)}


@settings(max_examples=300, deadline=None)
@given(
    ranks=st.permutations(range(12)),
    temperature=st.floats(0.1, 5.0),
    top_k=st.none() | st.integers(1, 15),
    top_p=st.none() | st.floats(0.01, 1.0),
)
def test_probabilities_equal_the_definition(
    ranks: list[int], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    """Over distinct logits; the kept set and every probability. Cut points within rounding are left out."""
    logits = [0.37 * rank + 0.01 * rank * rank for rank in ranks]
    expected = brute_force(logits, temperature, top_k, top_p)
    if top_p is not None and brute_force(logits, temperature, top_k, top_p - 1e-5).keys() != (
        brute_force(logits, temperature, top_k, top_p + 1e-5).keys()
    ):
        return
    probabilities = Sampling(temperature, top_k, top_p).probabilities(torch.tensor([logits]))[0]
    assert set(probabilities.nonzero().flatten().tolist()) == {i for i, p in expected.items() if p > 1e-30}
    for i, probability in expected.items():
        assert probabilities[i].item() == pytest.approx(probability, rel=1e-4, abs=1e-30)


@pytest.mark.parametrize(
    "sampling", [(1.0, None, None), (0.5, None, None), (1.3, 3, None), (1.0, None, 0.8), (0.9, 4, 0.7)]
)
def test_drawn_tokens_follow_the_probabilities(sampling: tuple[float, int | None, float | None]) -> None:
    """Chi-square over 40 000 draws; with 5 degrees of freedom it exceeds 27.9 once in 25 000 times."""
    draws = 40_000
    rng = torch.Generator().manual_seed(0)
    tokens = Sampling(*sampling).sample(torch.tensor(TOY_LOGITS).expand(draws, -1), rng)
    counts = tokens.bincount(minlength=len(TOY_LOGITS)).tolist()
    expected = brute_force(TOY_LOGITS, *sampling)
    assert sum(counts[i] for i in expected) == draws
    assert sum((counts[i] - draws * p) ** 2 / (draws * p) for i, p in expected.items()) < 27.9


@pytest.mark.parametrize("uniform", [0.0, 0.25, 1 - 2**-53])
def test_no_random_number_draws_a_token_that_cannot_be(
    uniform: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least and the greatest that `torch.rand` gives; tokens without a chance lie all around."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, uniform, dtype=torch.float64))
    logits = torch.tensor([[0.0, 5.0, 1.0, 5.0, 0.0]]).expand(3, -1)
    assert set(Sampling(1.0, top_k=2).sample(logits).tolist()) <= {1, 3}


def test_the_many_of_a_large_vocabulary_have_their_share() -> None:
    """Half the draws are of 49 999 tokens of the least probability, as many of their first half as of the
    last; five deviations of 4000 draws are 158 and 137.
    """
    logits = torch.zeros(1, 50_000)
    logits[0, 0] = math.log(49_999)
    rng = torch.Generator().manual_seed(0)
    tokens = torch.cat([Sampling(1.0).sample(logits.expand(500, -1), rng) for _ in range(8)])
    assert abs(int((tokens == 0).sum()) - 2000) < 158
    assert abs(int((tokens > 25_000).sum()) - 1000) < 137


def test_a_shared_seed_repeats_and_another_differs() -> None:
    logits = torch.zeros(64, 50)

    def draw(seed: int) -> torch.Tensor:
        return Sampling(1.0).sample(logits, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))


def test_temperature_zero_is_the_most_likely_token_whatever_the_filters() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.9], [5.0, -1.0, 4.0]])
    sampling = Sampling(0.0, top_k=3, top_p=0.5)
    assert sampling.sample(logits).tolist() == [1, 0]
    assert sampling.probabilities(logits).tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]


@pytest.mark.parametrize("sampling", [(1e-38, None, None), (1e-60, None, None), (1.0, None, 1e-60)])
def test_tiny_settings_take_the_likeliest(sampling: tuple[float, None, float | None]) -> None:
    """They must not overflow, nor become 0 in fp32: of the NaN that gives, the last token would be drawn."""
    logits = torch.tensor([[100.0, 99.0, -100.0]])
    assert Sampling(*sampling).probabilities(logits).tolist() == [[1.0, 0.0, 0.0]]
    assert Sampling(*sampling).sample(logits).tolist() == [0]


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed is {seed}, expected a number of 64 bits"):
        seed_generator(torch.Generator(), seed)


def test_top_p_of_one_keeps_every_token() -> None:
    """Where the running sum of 50 000 small probabilities is rounded to 1 early, the tail must stay."""
    logits = torch.randn(1, 50_000, generator=torch.Generator().manual_seed(0))
    assert (Sampling(1.0, top_p=1.0).probabilities(logits) > 0).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
    ],
)
def test_settings_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**fields)
