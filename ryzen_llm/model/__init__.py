"""The decoder-only transformer and its configuration."""

from ryzen_llm.model.config import PRESETS, ModelConfig
from ryzen_llm.model.transformer import Transformer

__all__ = ["PRESETS", "ModelConfig", "Transformer"]
