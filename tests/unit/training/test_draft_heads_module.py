"""Heads learn what a model writes, from text that it has written by itself."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from ryzen_llm.decoding import Generator, HeadsConfig, HeadsDrafter, SpeculativeDecoder
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.training import DraftHeadsModule, OptimizerConfig, TargetTextModule, Turns
from ryzen_llm.training.target_text import Places, write_texts

TURNS = Turns([1, 2], [3, 4], [5, 2], frozenset({3}))


@pytest.fixture(scope="module")
def target() -> Transformer:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_embeddings=False,  # or random weights would repeat one token
    )
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.eval()


def test_answers_are_what_the_model_finds_likeliest(target: Transformer) -> None:
    """Every token that counts as its own, scored again without a cache."""
    written = write_texts(
        Generator(target, weights="fp32"), TURNS, texts=6, length=90, longest_question=7, seed=1
    )
    ids, own = written["ids"], written["own"]
    with torch.no_grad():
        likeliest = target(ids).argmax(-1)
        torch.testing.assert_close(
            written["hidden_states"], target.hidden_states(ids)[:, :-1], atol=1e-4, rtol=1e-4
        )
    assert torch.equal(ids[:, 1:][own[:, 1:]], likeliest[:, :-1][own[:, 1:]])
    assert 0.3 < own.float().mean() < 1


def test_turns_follow_each_other_as_laid_out(target: Transformer) -> None:
    written = write_texts(
        Generator(target, weights="fp32"), TURNS, texts=6, length=120, longest_question=7, seed=2
    )
    for row, chosen in zip(written["ids"].tolist(), written["own"].tolist(), strict=True):
        assert row[:2] == [1, 2]
        begins = [i for i in range(1, 120) if chosen[i] and not chosen[i - 1]]
        ends = [i for i in range(119) if chosen[i] and not chosen[i + 1]]
        assert begins
        for begin in begins:
            assert row[begin - 2 : begin] == [3, 4]
        for end in ends:
            assert row[end] == 3
            assert row[end + 1 : end + 3] == [5, 2][: 119 - end]


def test_texts_are_written_once(target: Transformer, tmp_path: Path) -> None:
    generator = Generator(target, weights="fp32")
    data = TargetTextModule(generator, TURNS, tmp_path / "texts", texts=50, length=40, batch_size=1 << 20)
    data.prepare_data()
    with pytest.raises(InputError, match="places, expected at least batch_size = 1048576"):
        data.setup("fit")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()}
    assert len(before) == 2
    data.prepare_data()
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "texts").iterdir()} == before
    first, second = (load_file(path)["ids"] for path in sorted(before))
    assert not torch.equal(first, second), "every batch has a seed of its own"
    next(iter(before)).write_bytes(b"damaged")
    with pytest.raises(InputError, match="damaged"):
        data.setup("fit")


def test_a_place_is_where_the_model_goes_on_with_its_own_token() -> None:
    """Against the texts, place by place."""
    torch.manual_seed(0)
    texts = {"ids": torch.arange(40).view(2, 20), "own": torch.rand(2, 20) < 0.7}
    texts["hidden_states"] = torch.randn(2, 19, 4)
    places = Places(texts, depth=3)
    expected = [
        (text, t)
        for text in range(2)
        for t in range(20 - 4)
        if texts["own"][text, t + 1] and texts["own"][text, t + 2]
    ]
    assert len(places) == len(expected) > 5
    states, tokens, own = places.__getitems__(list(range(len(places))))
    for i, (text, t) in enumerate(expected):
        chosen = texts["own"][text, t + 2 : t + 5].tolist()
        assert torch.equal(states[i], texts["hidden_states"][text, t])
        assert torch.equal(tokens[i], texts["ids"][text, t + 1 : t + 5])
        assert own[i].tolist() == [all(chosen[: d + 1]) for d in range(3)]


def test_a_batch_whose_loss_is_nan_shows_in_the_mean(target: Transformer) -> None:
    """It would be left out, and heads that are damaged would look sound."""
    module = DraftHeadsModule(target, HeadsConfig(32, 64, 3), torch.arange(48)).eval()
    states, tokens = torch.randn(5, 32), torch.randint(0, 48, (5, 4))
    for damaged in (states * math.nan, states):
        module.validation_step((damaged, tokens, torch.ones(5, 3, dtype=torch.bool)), 0)
    assert math.isnan(module.mean_loss.compute())


def test_trained_heads_draft_better_and_the_target_stays(target: Transformer, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    data = TargetTextModule(
        Generator(target, weights="fp32"), TURNS, tmp_path, texts=96, length=64, batch_size=256
    )
    data.prepare_data()
    data.setup("fit")
    module = DraftHeadsModule(
        target, HeadsConfig(32, 64, 3), data.vocabulary(48), OptimizerConfig(learning_rate=1e-2)
    )
    trainer = pl.Trainer(
        max_epochs=12,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        accelerator="cpu",
        inference_mode=False,  # which the metrics of a validation before fitting would not survive
    )
    untrained = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    trained = trainer.validate(module, data, verbose=False)[0]
    assert trained["val_loss"] < untrained["val_loss"] / 2
    assert 3 - trained["val_accepted"] < 0.7 * (3 - untrained["val_accepted"]), "of three tokens, fewer fail"
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    assert all(name.startswith("heads.") for name in module.state_dict())

    generator = Generator(target, weights="fp32")
    decoder = SpeculativeDecoder(generator, HeadsDrafter(module.heads, generator.model), widths=(4,))
    prompt = data.val.ids[0, : int(data.val.own[0, :, 0].nonzero()[0])]
    out = decoder.generate(prompt, max_new_tokens=30)
    assert out.accepted_per_step is not None
    assert out.accepted_per_step > 1.3
