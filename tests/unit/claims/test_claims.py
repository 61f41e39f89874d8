"""Claims are measured on copies of the model, and what is not built says so."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from ryzen_callbacks import OptimizationValidator

from ryzen_llm.claims import (
    ClaimContext,
    Optimizations,
    Thresholds,
    accuracy_preservation,
    build_claims,
    embedding_compression,
)
from ryzen_llm.decoding import RecyclingDrafter
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.model.embedding import Calibration
from ryzen_llm.training import OptimizerConfig, calibrate


@pytest.fixture
def context() -> ClaimContext:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    batches = [torch.randint(300, (2, 41)) for _ in range(6)]
    return ClaimContext(
        model=Transformer(config),
        train_batches=batches[:2],
        val_batches=batches,
        precision="32-true",
        compile=False,
        device=torch.device("cpu"),
        thresholds=Thresholds(),
        enabled=Optimizations(enable_speculative_decoding=False),
    )


def test_what_is_not_built_or_switched_off_says_so(context: ClaimContext) -> None:
    claims = {claim.name: claim for claim in build_claims(context)}
    assert list(claims) == [
        "kernel_performance",
        "kernel_performance_vs_strong",
        "embedding_compression",
        "embedding_compression_quality",
        "kv_cache",
        "kv_cache_quality",
        "speculative_decoding",
        "end_to_end",
        "end_to_end_vs_strong",
        "numerical_correctness",
        "accuracy_preservation",
    ]
    assert "enable_speculative_decoding" in claims["speculative_decoding"].not_measured_because
    assert claims["kv_cache"].threshold == 0.25
    off = dataclasses.replace(context, enabled=Optimizations(enable_kernel_optimization=False))
    assert "enable_kernel_optimization" in build_claims(off)[0].not_measured_because


def test_measuring_leaves_the_model_as_it_was(context: ClaimContext) -> None:
    before = copy.deepcopy(context.model.state_dict())
    claims = [
        c
        for c in build_claims(context)
        if c.name in ("kernel_performance", "end_to_end", "numerical_correctness")
    ]
    kernels, speed, loss = OptimizationValidator(claims, rounds=1).validate().results
    assert speed.status == "WARNING", "one round gives no interval"
    assert speed.measured is not None
    assert speed.measured > 0
    assert kernels.measured is not None
    assert kernels.measured > 0
    assert "forward and backward of 2 x 40 tokens" in kernels.description
    assert "train on 160 tokens (2 optimizer steps of 2 x 40), then generate 32 tokens" in speed.description
    assert loss.status == "PASS"
    assert loss.measured == pytest.approx(0, abs=1e-6), "the same precision, summed in another order"
    for name, tensor in context.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None for p in context.model.parameters())


def test_the_embedding_is_compressed_after_training_and_its_cost_is_measured(context: ClaimContext) -> None:
    config = context.model.config
    claims = [claim for claim in build_claims(context) if claim.name.startswith("embedding")]
    size, quality = OptimizationValidator(claims).validate().results
    assert size.baseline is not None
    assert size.baseline.value == 2 * config.vocab_size * config.hidden_size
    assert size.measured is not None
    assert 3.5 <= size.measured < 5
    assert size.status == "PASS"
    assert quality.measured
    assert abs(quality.measured) < 0.01
    assert context.model.config.embedding == "dense", "the trained model is left as it is"


def test_both_claims_on_an_embedding_are_about_the_same_one(
    context: ClaimContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a pass over text to make it: it is made once, and again for other text."""
    seen: list[torch.Tensor] = []

    def noted(model: Transformer, ids: torch.Tensor) -> Calibration:
        seen.append(ids)
        return calibrate(model, ids)

    monkeypatch.setattr(embedding_compression, "calibrate", noted)
    for changed in (context, dataclasses.replace(context, train_batches=context.train_batches[1:])):
        claims = [claim for claim in build_claims(changed) if claim.name.startswith("embedding")]
        OptimizationValidator(claims).validate()
    first, second = (batch[:, :-1] for batch in context.train_batches)
    assert [ids.tolist() for ids in seen] == [first.tolist(), second.tolist()]


def test_an_embedding_that_was_trained_compressed_is_measured_as_it_is(context: ClaimContext) -> None:
    shape = context.model.config.to_dict() | {"embedding": "factorized", "embedding_settings": {"rank": 4}}
    context = dataclasses.replace(context, model=Transformer(ModelConfig.from_dict(shape)))
    claims = [claim for claim in build_claims(context) if claim.name.startswith("embedding")]
    size, quality = OptimizationValidator(claims).validate().results
    vocab_size, hidden_size = context.model.config.vocab_size, context.model.config.hidden_size
    assert size.measured == pytest.approx(vocab_size * hidden_size / (4 * (vocab_size + hidden_size)))
    assert quality.status == "NOT_MEASURED"


@pytest.mark.parametrize("kind", ["int8", "k8v4"])
def test_the_cache_is_measured_on_validation_text(context: ClaimContext, kind: str) -> None:
    """With a head_dim of 16, a key or value is 32 bytes in bf16, 18 in int8 and 12 in int4; at 40 tokens.

    int8 keeps a token in full, too, k8v4 four.
    """
    context = dataclasses.replace(context, enabled=Optimizations(kv_cache=kind))
    claims = [claim for claim in build_claims(context) if claim.name.startswith("kv_cache")]
    memory, quality = OptimizationValidator(claims).validate().results
    assert memory.status == "PASS"
    assert memory.baseline is not None
    assert memory.baseline.value == 2 * 2 * 32 * 40
    assert memory.measured == pytest.approx(1 - {"int8": 18 / 32 + 1 / 40, "k8v4": 15 / 32 + 4 / 40}[kind])
    assert quality.status == "PASS"
    assert quality.measured
    assert abs(quality.measured) < 0.01


def test_an_unknown_cache_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="unknown cache 'int2'"):
        Optimizations(kv_cache="int2")


def test_a_cache_that_is_switched_off_is_not_measured(context: ClaimContext) -> None:
    context = dataclasses.replace(context, enabled=Optimizations(enable_kv_cache_optimization=False))
    claims = [claim for claim in build_claims(context) if claim.name.startswith("kv_cache")]
    assert all("enable_kv_cache_optimization" in claim.not_measured_because for claim in claims)


def test_speculation_is_measured_on_the_same_texts_both_ways(
    context: ClaimContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each round starts with empty tables: its texts are those of the round before."""
    sizes: list[list[int]] = []
    forget = RecyclingDrafter.forget

    def spy(drafter: RecyclingDrafter) -> None:
        forget(drafter)
        sizes.append([len(table) for table in drafter.tables])

    monkeypatch.setattr(RecyclingDrafter, "forget", spy)
    context = dataclasses.replace(context, enabled=Optimizations(drafters=("recycling",)))
    claim = next(claim for claim in build_claims(context) if claim.name == "speculative_decoding")
    assert claim.baseline is not None
    assert claim.optimized is not None
    plain, first, _ = claim.baseline(), claim.optimized(), claim.optimized()
    assert [out.ids.tolist() for out in plain] == [out.ids.tolist() for out in first]
    assert sizes == [[0, 0, 0]] * 3, "when it is made, and before each round"
    assert "64 tokens generated greedily after each of 4 prompts of 32 tokens" in claim.description
    result = OptimizationValidator([claim], rounds=1).validate().results[0]
    assert result.measured
    assert result.optimized is not None
    assert "recycling" in result.optimized.name


@pytest.mark.parametrize(
    ("drafters", "message"),
    [
        ((), "drafters is empty"),
        (("eagle",), "unknown drafter 'eagle'"),
        (("suffix",) * 2, "there 2 times"),
        (("suffix:a",), "suffix takes no path"),
        (("heads",), "drafter heads: no such file; expected heads:PATH"),
        (("draft_model:/nowhere",), "drafter draft_model:/nowhere: no such file; expected draft_model:PATH"),
    ],
)
def test_drafters_that_cannot_work_are_named(drafters: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Optimizations(drafters=drafters)


def test_bf16_moves_the_loss_a_little(context: ClaimContext) -> None:
    context = dataclasses.replace(context, precision="bf16-mixed")
    (claim,) = [claim for claim in build_claims(context) if claim.name == "numerical_correctness"]
    result = OptimizationValidator([claim]).validate().results[0]
    assert result.status == "PASS"
    assert result.measured
    assert abs(result.measured) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kernel_performance_vs_strong", "end_to_end_vs_strong"])
def test_the_strong_baseline_is_measured(name: str, context: ClaimContext) -> None:
    context = dataclasses.replace(context, precision="bf16-mixed", compile=True)
    claim = next(c for c in build_claims(context) if c.name == name)
    result = OptimizationValidator([claim], rounds=1).validate().results[0]
    assert result.status == "WARNING"
    assert result.threshold == 1.0
    assert result.tolerance == 0.05


@pytest.mark.parametrize(
    "wrong",
    [
        {"kernel_speedup_min": 0.0},
        {"e2e_speedup_target": float("nan")},
        {"compression_ratio_min": float("inf")},
        {"accuracy_loss_max": 1.5},
        {"test_pass_rate_min": -0.1},
    ],
)
def test_thresholds_that_make_no_sense_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Thresholds(**wrong)


def test_no_batches_are_refused(context: ClaimContext) -> None:
    with pytest.raises(InputError, match="val_batches is empty"):
        dataclasses.replace(context, val_batches=[])


def test_twins_are_trained_alike_and_what_the_recipe_costs_shows(context: ClaimContext) -> None:
    """In fp32 on plain kernels there is nothing to lose; an embedding of rank 1 costs more than 1%."""
    # Text with something to learn: each token follows the one before it.
    text = [(torch.arange(41)[None] + torch.randint(300, (8, 1))) % 300 for _ in range(60)]
    context = dataclasses.replace(
        context, optimizer=OptimizerConfig(learning_rate=0.01), twin_batches=text, val_batches=text[:6]
    )
    (same,) = OptimizationValidator([accuracy_preservation.claim(context)]).validate().results
    assert same.measured == pytest.approx(0, abs=1e-4)
    assert same.status == "PASS"
    assert same.baseline is not None
    assert same.baseline.value < 4.0, "well under the log of 300 that they begin with"
    shape = context.model.config.to_dict() | {"embedding": "factorized", "embedding_settings": {"rank": 1}}
    context = dataclasses.replace(context, model=Transformer(ModelConfig.from_dict(shape)))
    (worse,) = OptimizationValidator([accuracy_preservation.claim(context)]).validate().results
    assert worse.measured is not None
    assert worse.measured > 0.01
    assert worse.status == "FAIL"
    none = accuracy_preservation.claim(dataclasses.replace(context, twin_batches=[]))
    assert "twin_steps" in none.not_measured_because
