"""Two parts together."""

import copy

import pytest
import torch
import torch.nn.functional as F

from ryzen_llm.cache import build_cache
from ryzen_llm.decoding import Generator, SpeculativeDecoder
from ryzen_llm.kernels import PLAIN
from ryzen_llm.model.embedding import FactorizedEmbedding
from ryzen_llm.selftest.trained import Trained, with_quantised_embedding


def test_kernels_with_compression(trained: Trained) -> None:
    """With a factorised embedding, the run's kernels give the loss and gradients of plain PyTorch."""
    if not trained.model.config.tie_embeddings:
        pytest.skip("the model's output head is not its embedding")
    model = copy.deepcopy(trained.model).train()
    vocab_size, hidden_size = model.config.vocab_size, model.config.hidden_size
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        embedding = FactorizedEmbedding(vocab_size, hidden_size, rank=max(1, hidden_size // 4))
    model.replace_embedding(embedding.to(trained.device))
    batch = trained.val_batches[0][:2].to(trained.device)
    model.use_kernels(PLAIN)
    expected = F.cross_entropy(model(batch[:, :-1]).float().flatten(0, 1), batch[:, 1:].flatten())
    expected.backward()  # type: ignore[no-untyped-call]
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model.use_kernels(trained.model.kernels)
    loss, _ = model.loss(batch[:, :-1], batch[:, 1:])
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss, expected, atol=1e-3, rtol=1e-3)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        error = (parameter.grad - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert error < 0.01, f"a gradient is off by {error:.2%}"


@torch.inference_mode()
def test_kv_cache_with_kernels(trained: Trained) -> None:
    """Attention straight on 8-bit codes gives nearly the logits of no cache, through every layer."""
    prompt = trained.prompt
    cache = build_cache(
        "int8",
        trained.model.config,
        batch_size=1,
        max_length=prompt.shape[1],
        dtype=torch.float32,
        device=trained.device,
    )
    logits = torch.cat([trained.model(token, cache) for token in torch.split(prompt, 1, 1)], 1)
    expected = trained.model(prompt)
    error = (logits - expected).square().mean().sqrt() / expected.std()
    assert error < 0.05, f"the logits are off by {error:.2%} of their spread"


def test_compression_with_speculation(trained: Trained) -> None:
    """Drafts or none on a model with a quantised embedding: the same ids."""
    generator = Generator(with_quantised_embedding(trained), weights="fp32")
    plain, speculative = (
        SpeculativeDecoder(generator, drafter, widths=[4]).generate(
            trained.prompt, max_new_tokens=trained.new_tokens
        )
        for drafter in ([], ["suffix"])
    )
    assert plain.new_ids.tolist() == speculative.new_ids.tolist()
