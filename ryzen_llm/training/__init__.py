"""Training: the LightningModule, its optimiser and schedules, and its checkpoints."""

from ryzen_llm.training.checkpoint import check_resumable, load_checkpoint, newest_checkpoint
from ryzen_llm.training.language_module import LanguageModule
from ryzen_llm.training.optimizer import OptimizerConfig, build_adamw
from ryzen_llm.training.precision import choose_precision
from ryzen_llm.training.sharded import ShardedStrategy, is_sharded, whole_state_dict

__all__ = [
    "LanguageModule",
    "OptimizerConfig",
    "ShardedStrategy",
    "build_adamw",
    "check_resumable",
    "choose_precision",
    "is_sharded",
    "load_checkpoint",
    "newest_checkpoint",
    "whole_state_dict",
]
