"""Two parts together."""

import pytest
import torch

from ryzen_llm.cache import build_cache
from ryzen_llm.selftest.trained import Trained


def test_kernels_with_compression() -> None:
    pytest.skip("KernelOptimizer and EmbeddingCompressor are not built yet")


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


def test_compression_with_speculation() -> None:
    pytest.skip("EmbeddingCompressor is not built yet")
