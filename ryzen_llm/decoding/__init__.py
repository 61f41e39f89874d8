"""Generating text with a model."""

from ryzen_llm.decoding.generator import WEIGHTS, Generation, Generator
from ryzen_llm.decoding.kv_cache_optimizer import CacheChoice, KVCacheOptimizer
from ryzen_llm.decoding.sampling import Sampling

__all__ = ["WEIGHTS", "CacheChoice", "Generation", "Generator", "KVCacheOptimizer", "Sampling"]
