"""Two parts together."""

import pytest


def test_kernels_with_compression() -> None:
    pytest.skip("KernelOptimizer and EmbeddingCompressor are not built yet")


def test_kv_cache_with_kernels() -> None:
    pytest.skip("KVCacheOptimizer and KernelOptimizer are not built yet")


def test_compression_with_speculation() -> None:
    pytest.skip("EmbeddingCompressor and SpeculativeDecoder are not built yet")
