"""Training: the LightningModule, its optimiser and schedules, and its checkpoints."""

from ryzen_llm.training.checkpoint import (
    check_heads_resumable,
    check_resumable,
    load_checkpoint,
    newest_checkpoint,
)
from ryzen_llm.training.draft_heads_module import DraftHeadsModule
from ryzen_llm.training.embedding_calibration import Quality, calibrate, measure, with_embedding
from ryzen_llm.training.embedding_compressor import Candidate, EmbeddingChoice, EmbeddingCompressor
from ryzen_llm.training.healing import HealingModule, heal
from ryzen_llm.training.kernel_optimizer import KernelOptimizer, OpChoice
from ryzen_llm.training.language_module import LanguageModule
from ryzen_llm.training.optimizer import OptimizerConfig, build_adamw
from ryzen_llm.training.precision import autocast, choose_precision
from ryzen_llm.training.sharded import ShardedStrategy, is_sharded, whole_state_dict
from ryzen_llm.training.target_text import TargetTextModule, Turns

__all__ = [
    "Candidate",
    "DraftHeadsModule",
    "EmbeddingChoice",
    "EmbeddingCompressor",
    "HealingModule",
    "KernelOptimizer",
    "LanguageModule",
    "OpChoice",
    "OptimizerConfig",
    "Quality",
    "ShardedStrategy",
    "TargetTextModule",
    "Turns",
    "autocast",
    "build_adamw",
    "calibrate",
    "check_heads_resumable",
    "check_resumable",
    "choose_precision",
    "heal",
    "is_sharded",
    "load_checkpoint",
    "measure",
    "newest_checkpoint",
    "whole_state_dict",
    "with_embedding",
]
