"""Train a small language model, make it faster and smaller, and prove each gain on your own machine."""

from ryzen_llm.data import TextDataModule
from ryzen_llm.decoding import Generator, KVCacheOptimizer, SpeculativeDecoder
from ryzen_llm.interop import export_pretrained, load_pretrained
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.pipeline import Orchestrator
from ryzen_llm.selftest import IntegrationTestRunner
from ryzen_llm.training import EmbeddingCompressor, KernelOptimizer, LanguageModule

__all__ = [
    "EmbeddingCompressor",
    "Generator",
    "IntegrationTestRunner",
    "KVCacheOptimizer",
    "KernelOptimizer",
    "LanguageModule",
    "ModelConfig",
    "Orchestrator",
    "SpeculativeDecoder",
    "TextDataModule",
    "Transformer",
    "export_pretrained",
    "load_pretrained",
]
