"""Train a small language model, make it faster and smaller, and prove each gain on your own machine."""

from ryzen_llm.data import TextDataModule
from ryzen_llm.decoding import Generator, KVCacheOptimizer
from ryzen_llm.interop import export_pretrained, load_pretrained
from ryzen_llm.model import ModelConfig, Transformer
from ryzen_llm.pipeline import Orchestrator
from ryzen_llm.selftest import IntegrationTestRunner
from ryzen_llm.training import LanguageModule

__all__ = [
    "Generator",
    "IntegrationTestRunner",
    "KVCacheOptimizer",
    "LanguageModule",
    "ModelConfig",
    "Orchestrator",
    "TextDataModule",
    "Transformer",
    "export_pretrained",
    "load_pretrained",
]
