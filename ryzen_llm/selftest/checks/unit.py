"""Each part on its own."""

import copy
import statistics
from pathlib import Path

import pytest
import torch
from ryzen_callbacks import Claim, OptimizationValidator, TrainingMetricsCollector, TrainingMetricsReport
from torch import Tensor

from ryzen_llm.cache import build_cache
from ryzen_llm.decoding import Generator, SpeculativeDecoder
from ryzen_llm.kernels import CANDIDATES, PLAIN, shared_compilations
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import QuantizedEmbedding
from ryzen_llm.selftest.trained import Trained
from ryzen_llm.training import EmbeddingCompressor, KernelOptimizer


def test_kernel_optimizer_initialization(trained: Trained, tmp_path: Path) -> None:
    """It chooses for every op of the model, changes no weight, and finds its choices again."""
    model = copy.deepcopy(trained.model)
    batch, time = trained.prompt.shape
    choices = KernelOptimizer(model, batch, time, compile=False, cache_dir=tmp_path).optimize()
    assert {choice.op for choice in choices} >= {"attention", "norm", "rotary_qkv", "loss"}
    for choice in choices:
        assert getattr(model.kernels, choice.op) == choice.choice
        assert choice.choice in CANDIDATES[choice.op], choice.reason
    assert model.content_hash() == trained.model.content_hash()
    again = KernelOptimizer(model, batch, time, compile=False, cache_dir=tmp_path).optimize()
    assert [c.choice for c in again] == [c.choice for c in choices]
    assert not any(choice.measured_now for choice in again)


def test_kernel_optimizer_compilation(trained: Trained) -> None:
    """The model as it trained, compiled block by block, has the loss and gradients of plain fp32 PyTorch."""
    batch = trained.val_batches[0].to(trained.device)  # of training's shape, which is compiled already

    def gradient(model: Transformer) -> tuple[Tensor, Tensor]:
        loss, _ = model.train().loss(batch[:, :-1], batch[:, 1:])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    model = copy.deepcopy(trained.model)
    model.use_kernels(PLAIN)
    plain_loss, plain = gradient(model)
    model = copy.deepcopy(trained.model)
    model.compile_blocks()
    with shared_compilations(), trained.autocast():
        loss, compiled = gradient(model)
    bf16 = trained.precision == "bf16-mixed"  # with 8 bits of mantissa
    torch.testing.assert_close(loss, plain_loss, atol=0, rtol=5e-3 if bf16 else 1e-4)
    error = (compiled - plain).norm() / plain.norm()
    assert error < (0.05 if bf16 else 1e-3), f"the gradient is off by {error:.2%}"


def test_embedding_compression_pipeline(trained: Trained) -> None:
    """Calibrated on some text and rounded to 6 bits, the model predicts nearly the same on the rest."""
    if trained.model.config.embedding != "dense" or not trained.model.config.tie_embeddings:
        pytest.skip("the model's embedding is not a tied dense one")
    ids = trained.val_batches[0].flatten().to(trained.device)
    compressor = EmbeddingCompressor(trained.model, ids[: len(ids) // 16 * 16].view(-1, 16))
    compressed = compressor.compress(QuantizedEmbedding, bits=6)
    assert compressed.compression_ratio > 2
    assert compressor.quality(compressor.apply(compressed)).perplexity_increase < 0.05


@torch.inference_mode()
def test_kv_cache_initialization(trained: Trained) -> None:
    config, prompt = trained.model.config, trained.prompt
    length = prompt.shape[1]
    cache = build_cache(
        "dense", config, batch_size=1, max_length=length, dtype=torch.float32, device=trained.device
    )
    elements = 2 * config.num_layers * config.num_kv_heads * length * config.head_dim
    assert (cache.length, cache.bytes_allocated) == (0, 0)

    first = trained.model(prompt, cache)
    assert cache.bytes_allocated == 4 * elements, "keys and values in fp32"
    torch.testing.assert_close(first, trained.model(prompt), atol=1e-3, rtol=1e-3)
    cache.truncate(length // 2)
    trained.model(prompt[:, length // 2 :].flip(1), cache)  # other tokens, to be rolled back
    cache.truncate(length // 2)
    again = trained.model(prompt[:, length // 2 :], cache)
    assert cache.length == length
    torch.testing.assert_close(again, first[:, length // 2 :], atol=1e-3, rtol=1e-3)


def test_speculative_decoding_setup(trained: Trained) -> None:
    """Drafts or none, over the same graph: the same ids."""
    generator = Generator(trained.model, weights="fp32")
    plain, speculative = (
        SpeculativeDecoder(generator, drafter, widths=[4]).generate(
            trained.prompt, max_new_tokens=trained.new_tokens
        )
        for drafter in ([], ["suffix", "recycling"])
    )
    assert plain.new_ids.tolist() == speculative.new_ids.tolist()
    assert plain.accepted_per_step in (1.0, None)


def test_metrics_collection(trained: Trained) -> None:
    losses = [4.0, 3.5, 3.75, 2.0]
    collector = TrainingMetricsCollector()
    for loss in losses:
        collector.record_batch_metric({"loss": loss})
    found = collector.statistics()["loss"]
    assert found.count == len(losses)
    assert found.mean == pytest.approx(statistics.fmean(losses))
    assert found.std == pytest.approx(statistics.stdev(losses))
    assert (found.min, found.max, found.first, found.last) == (2.0, 4.0, 4.0, 2.0)

    if trained.training_report is not None:
        report = TrainingMetricsReport.model_validate_json(trained.training_report.read_text("utf-8"))
        whole = report.statistics["loss"]
        assert whole.min is not None
        assert whole.max is not None
        sampled = [row["loss"] for row in report.batches if row.get("loss") is not None]
        assert all(whole.min <= loss <= whole.max for loss in sampled if loss is not None)


def test_validation_framework() -> None:
    validator = OptimizationValidator()
    assert validator.validate_end_to_end(3.2, 3.0).status == "PASS"
    assert validator.validate_end_to_end(2.9, 3.0).status == "WARNING"
    assert validator.validate_end_to_end(2.0, 3.0).status == "FAIL"

    def losses(increase: float) -> list[float]:
        return [2.0 + 0.001 * (i % 3) + increase for i in range(8)]

    def status(increase: float) -> str:
        claim = Claim(
            name="loss",
            measure="loss",
            threshold=0.01,
            baseline=lambda: [2.0] * 8,
            optimized=lambda: losses(increase),
        )
        result = validator.validate([claim]).results[0]
        expected = statistics.fmean(losses(increase)) / 2.0 - 1
        assert result.measured == pytest.approx(expected)
        assert result.ci_low is not None
        assert result.ci_high is not None
        assert result.ci_low < expected < result.ci_high
        return result.status

    assert status(0.0) == "PASS"
    assert status(0.019) == "WARNING", "the threshold lies within the interval"
    assert status(0.1) == "FAIL"
