"""Perplexity is what a plain loop over transformers' model computes, and says what it was measured with."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "interop"))
from random_models import save, small_tokenizer

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.evaluation import measure_perplexity
from ryzen_llm.evaluation.perplexity import _batches, _bytes_of_first
from ryzen_llm.interop import load_pretrained
from ryzen_llm.model import Transformer

TEXT = "the cat sat on the mat, and the dog ran naïvely.\n\ndef main(): return 12\n" * 9


@pytest.fixture(scope="module", params=["llama", "gemma3 with two ropes"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Transformer, Any, Tokenizer]:
    directory = tmp_path_factory.mktemp("model")
    theirs = save(request.param, directory)
    return load_pretrained(directory)[0], theirs, load_pretrained(directory)[1]


@torch.no_grad()
def by_transformers(theirs: Any, ids: list[int], context: int, stride: int) -> float:
    """The loop of transformers' guide "Perplexity of fixed-length models", a token longer."""
    input_ids = torch.tensor([ids])
    nll_sum, n_tokens, prev_end_loc, seq_len = 0.0, 0, 0, len(ids)
    for begin_loc in range(0, seq_len, stride):
        end_loc = min(begin_loc + context + 1, seq_len)
        window = input_ids[:, begin_loc:end_loc]
        target_ids = window.clone()
        target_ids[:, : -(end_loc - prev_end_loc)] = -100
        neg_log_likelihood = theirs(window, labels=target_ids).loss
        num_loss_tokens = int((target_ids[:, 1:] != -100).sum())
        nll_sum += float(neg_log_likelihood) * num_loss_tokens
        n_tokens += num_loss_tokens
        prev_end_loc = end_loc
        if end_loc == seq_len:
            break
    assert n_tokens == seq_len - 1
    return math.exp(nll_sum / n_tokens)


@pytest.mark.parametrize(("context", "stride"), [(64, None), (64, 10), (100, 99), (128, 128), (1, 1), (7, 7)])
def test_it_is_that_of_transformers(
    models: tuple[Transformer, Any, Tokenizer], context: int, stride: int | None
) -> None:
    model, theirs, tokenizer = models
    found = measure_perplexity(model, tokenizer, TEXT, context=context, stride=stride)
    expected = by_transformers(theirs, tokenizer.encode(TEXT), context, stride or context)
    assert found.perplexity == pytest.approx(expected, rel=1e-4)
    assert (found.context, found.stride, found.beginning) == (context, stride or context, None)


def test_what_the_tokenizer_puts_before_a_text_is_there_and_not_scored(
    models: tuple[Transformer, Any, Tokenizer],
) -> None:
    """As Gemma's <bos>: without it that model's figures are meaningless."""
    model, theirs, _ = models
    backend = small_tokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    found = measure_perplexity(model, Tokenizer(backend), TEXT, context=50)
    ids = [1, *small_tokenizer().encode(TEXT).ids]
    assert found.perplexity == pytest.approx(by_transformers(theirs, ids, 50, 50), rel=1e-4)
    assert (found.beginning, found.scored_tokens) == ("<|im_start|>", len(ids) - 1)
    assert found.bits_per_byte == pytest.approx(
        found.loss * found.scored_tokens / math.log(2) / len(TEXT.encode())
    )


def test_what_the_tokenizer_puts_after_a_text_is_not_put_before_it(
    models: tuple[Transformer, Any, Tokenizer],
) -> None:
    backend = small_tokenizer()
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", 2)]
    )
    found = measure_perplexity(models[0], Tokenizer(backend), TEXT, context=50)
    assert (found.beginning, found.scored_tokens) == (None, len(small_tokenizer().encode(TEXT).ids))
    unscored = len(small_tokenizer().decode(small_tokenizer().encode(TEXT).ids[:1]).encode())
    assert found.bits_per_byte == pytest.approx(
        found.loss * found.scored_tokens / math.log(2) / (len(TEXT.encode()) - unscored)
    )


@pytest.mark.parametrize("text", ["日本", "🙂x", "abc", "ïz", "日", "\ufffdab", "本\ufffdx"])
def test_the_first_token_counts_as_the_bytes_that_it_is_of(text: str) -> None:
    """Where it is part of a character, too. In byte-level BPE a token has a sign for each of its bytes."""
    tokenizer = Tokenizer.train(["日本語のテキスト naïve 🙂🙃 abc" * 3] * 50, 262)
    ids = tokenizer.encode(text)
    vocabulary = {token: sign for sign, token in json.loads(tokenizer.to_json())["model"]["vocab"].items()}
    assert _bytes_of_first(tokenizer, ids) == len(vocabulary[ids[0]])


@settings(max_examples=200, deadline=None)
@given(length=st.integers(2, 300), context=st.integers(1, 90), data=st.data())
def test_every_token_but_the_first_is_scored_once_with_enough_before_it(
    length: int, context: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for inputs, targets in _batches(torch.arange(length), context, stride):
        assert inputs.shape == targets.shape
        assert inputs.shape[1] <= context
        for row, wanted in zip(inputs, targets, strict=True):
            for position in (wanted != -100).nonzero().flatten().tolist():
                token = int(wanted[position])
                assert row[: position + 1].tolist() == list(range(int(row[0]), token))
                assert position + 1 >= min(token, context - stride + 1)
                scored.append(token)
    assert scored == list(range(1, length))


@pytest.mark.parametrize("factor", [1e4, 1e36, math.nan])
def test_a_loss_that_has_no_perplexity_is_refused(factor: float, tmp_path: Path) -> None:
    """Too large for an exponential, infinite, or none."""
    save("llama", tmp_path)
    model, tokenizer = load_pretrained(tmp_path)
    with torch.no_grad():
        model.head.weight *= factor  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"the model's loss is (\d+\.\d|inf|nan) nats a token"):
        measure_perplexity(model, tokenizer, TEXT)


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({"context": 129}, TEXT, "context is 129, expected 1 to the model's longest sequence, 128"),
        ({"context": 8, "stride": 9}, TEXT, "stride is 9, expected 1 to the context, 8"),
        ({"context": 8, "stride": 0}, TEXT, "stride is 0"),
        ({}, "", "too short"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    models: tuple[Transformer, Any, Tokenizer], settings: dict[str, int], text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        measure_perplexity(models[0], models[2], text, **settings)
