"""A tiny model to be trained, and a Trainer that says nothing."""

from typing import Any

from lightning.pytorch import seed_everything

from ryzen_llm.data import TextDataModule
from ryzen_llm.model import ModelConfig
from ryzen_llm.training import LanguageModule, OptimizerConfig

SHAPE: dict[str, Any] = {
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
}
QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def build_module(data: TextDataModule, **settings: Any) -> LanguageModule:
    """The tiny model for the data's tokenizer, always with the same weights."""
    seed_everything(0, verbose=False)
    config = ModelConfig(vocab_size=data.tokenizer.vocab_size, **SHAPE)
    return LanguageModule(config, OptimizerConfig(learning_rate=0.01), **settings)
