"""Drafters find what they say they find; how often that helps is measured, not tested."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzen_llm.decoding import (
    Draft,
    Drafter,
    DraftModelDrafter,
    Generator,
    RecyclingDrafter,
    Step,
    SuffixDrafter,
)
from ryzen_llm.decoding.drafters.recycling import CONTEXTS
from ryzen_llm.decoding.drafters.suffix_automaton import SuffixAutomaton
from ryzen_llm.model import ModelConfig, Transformer

HIDDEN = torch.zeros(1)
TEXTS = st.lists(st.integers(0, 2), min_size=1, max_size=40)


def step(
    inputs: list[int], predictions: list[int], accepted: list[int], parents: Sequence[int] | None = None
) -> Step:
    follows = range(-1, len(inputs) - 1) if parents is None else parents
    return Step(inputs, follows, predictions, accepted, range(len(accepted)), HIDDEN)


def occurrences(text: list[int], part: list[int]) -> list[int]:
    """Where `part` ends in `text`."""
    return [i + len(part) - 1 for i in range(len(text) - len(part) + 1) if text[i : i + len(part)] == part]


def longest_suffix(text: list[int], within: list[int]) -> int:
    return max((n for n in range(1, len(text) + 1) if occurrences(within, text[-n:])), default=0)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_the_longest_suffix_that_occurred_before_is_found(text: list[int]) -> None:
    """Against trying all of them, after every token."""
    automaton = SuffixAutomaton()
    for i, token in enumerate(text):
        automaton.append(token)
        length, end = automaton.earlier()
        so_far = text[: i + 1]
        assert length == longest_suffix(so_far, so_far[:-1])
        if length:
            assert end in occurrences(so_far[:-1], so_far[-length:])


@settings(max_examples=200, deadline=None)
@given(TEXTS, TEXTS)
def test_the_longest_suffix_in_a_corpus_is_found(corpus: list[int], text: list[int]) -> None:
    automaton = SuffixAutomaton(corpus)
    state, length = 0, 0
    for i, token in enumerate(text):
        state, length = automaton.step(state, length, token)
        so_far = text[: i + 1]
        assert length == longest_suffix(so_far, corpus)
        if length:
            assert automaton.end[state] in occurrences(corpus, so_far[-length:])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=500))
def test_the_automaton_is_linear_in_the_text(text: list[int]) -> None:
    automaton = SuffixAutomaton(text)
    assert len(automaton.next) <= max(2 * len(text), 1) + 1
    assert sum(map(len, automaton.next)) <= 3 * len(text) + 1


def propose(drafter: Drafter, text: list[int], most: int) -> Draft:
    return drafter.begin(text, HIDDEN).propose(most)


def test_a_suffix_is_continued_as_it_was_before() -> None:
    assert propose(SuffixDrafter(), [5, 6, 7, 8, 9, 1, 6, 7], 3).tokens == [8, 9, 1]
    assert propose(SuffixDrafter(), [1, 2, 3], 3).tokens == ()


def test_a_repetition_goes_on_beyond_the_end_of_the_text() -> None:
    assert propose(SuffixDrafter(), [9, 1, 2, 3, 1, 2], 7).tokens == [3, 1, 2, 3, 1, 2, 3]


def test_of_several_places_the_later_one_is_copied() -> None:
    session = SuffixDrafter().begin([1, 2, 3, 1, 2, 4, 1, 2], HIDDEN)
    session.update(step([], [], [5, 1, 2]))
    assert session.propose(1).tokens == [5]


def test_a_longer_match_has_another_signal() -> None:
    one, two = propose(SuffixDrafter(), [1, 2, 9, 2], 2), propose(SuffixDrafter(), [1, 2, 9, 1, 2], 2)
    assert one.signals[0] != two.signals[0]
    assert one.signals[1] == two.signals[0], "a token that holds makes the match longer"


def test_a_corpus_is_copied_where_its_match_is_longer() -> None:
    drafter = SuffixDrafter([10, 11, 12, 13, 14])
    assert propose(drafter, [1, 11, 12], 5).tokens == [13, 14]
    assert propose(drafter, [7, 11, 12, 3, 7, 11, 12], 2).tokens == [3, 7]


def test_predictions_are_reused_also_after_rejected_tokens() -> None:
    drafter = RecyclingDrafter()
    session = drafter.begin([1, 2], HIDDEN)
    session.update(step([2, 8, 9], [3, 4, 5], [3]))  # 8 and 9 were rejected
    assert session.propose(4).tokens == []
    session.update(step([3], [8], [8]))
    assert session.propose(4).tokens == [4], "after 8 the model had predicted 4"
    assert propose(drafter, [2], 9).tokens == [3, 8, 4], "the table is kept from text to text"
    drafter.forget()
    assert propose(drafter, [2], 9).tokens == []


def test_predictions_in_a_tree_are_after_what_they_follow() -> None:
    drafter = RecyclingDrafter()
    session = drafter.begin([1, 2], HIDDEN)
    session.update(step([2, 8, 9, 7], [3, 4, 5, 6], [3], parents=[-1, 0, 0, 2]))  # 2 8, 2 9 and 2 9 7
    assert propose(drafter, [1, 2, 8], 1).tokens == [4]
    assert propose(drafter, [1, 2, 9], 1).tokens == [5]
    assert propose(drafter, [2, 9, 7], 1).tokens == propose(drafter, [6, 9, 7], 1).tokens == [6]
    assert propose(drafter, [8, 9], 1).tokens == propose(drafter, [9], 1).tokens
    assert (8, 9) not in drafter.tables[CONTEXTS.index(2)], "9 did not follow 8"


def test_the_longer_context_decides() -> None:
    drafter = RecyclingDrafter()
    drafter.begin([1], HIDDEN).update(step([1, 2], [2, 3], [2, 3]))
    drafter.begin([5], HIDDEN).update(step([5, 2], [2, 4], [2, 4]))
    assert propose(drafter, [1, 2], 1).tokens == [3]
    assert propose(drafter, [5, 2], 1).tokens == [4]
    assert propose(drafter, [9, 2], 1).tokens == [4], "the latest"


def test_a_confirmed_prediction_has_another_signal() -> None:
    drafter = RecyclingDrafter()
    signals = []
    for _ in range(5):
        drafter.begin([1], HIDDEN).update(step([1], [2], [2]))
        signals += propose(drafter, [1], 1).signals
    assert len(set(signals)) == 3


def test_the_table_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_llm.decoding.drafters.recycling.MOST_ENTRIES", 10)
    drafter = RecyclingDrafter()
    session = drafter.begin([0], HIDDEN)
    for token in range(50):
        session.update(step([token], [token + 1], [token + 1]))
    assert [len(table) for table in drafter.tables] == [10, 10, 10]
    assert propose(drafter, [49], 1).tokens == [50]
    assert propose(drafter, [3], 1).tokens == []


@pytest.mark.parametrize("drafter", [SuffixDrafter(), SuffixDrafter([1, 2, 3, 4] * 9), RecyclingDrafter()])
def test_a_guess_that_more_speaks_for_is_taken_for_likelier(drafter: Drafter) -> None:
    """Of a text that repeats itself; every kind of guess has a likelihood before it was tried."""
    text = [1, 2, 3, 4] * 8
    session = drafter.begin(text[:1], HIDDEN)
    first = []
    for now, then in pairwise(text[:-1]):
        session.update(step([now], [then], [then]))
        if signals := session.propose(7).signals:
            likely = [drafter.likelihood(signal) for signal in signals]
            assert all(0 < each < 1 for each in likely)
            first.append(likely[0])
    assert first == sorted(first)
    assert first[0] < 0.5 < 0.9 < first[-1]


def test_a_draft_model_goes_on_where_the_text_is_what_it_has_read() -> None:
    """A pass may read less of a draft than was drafted, and find that right."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
    config = ModelConfig(vocab_size=50, max_position_embeddings=64, **shape)
    generator = Generator(Transformer(config), weights="fp32")
    drafter = DraftModelDrafter(generator, 50)
    session = drafter.begin([1, 2, 3], HIDDEN)
    draft = session.propose(4)
    tokens = list(draft.tokens)
    with torch.no_grad():
        likeliest = generator.model(torch.tensor([[1, 2, 3]]))[0, -1].softmax(-1).max()
    assert drafter.likelihood(draft.signals[0]) == pytest.approx(float(likeliest), abs=1 / 16)
    session.update(step([], [], tokens[:1]))
    assert list(session.propose(3).tokens) == tokens[1:]
