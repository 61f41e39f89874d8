"""Generating text with a model."""

from ryzen_llm.decoding.drafters import (
    DRAFT_MODEL,
    DRAFTER_NAMES,
    Draft,
    Drafter,
    DraftHeads,
    DraftModelDrafter,
    DraftSession,
    HeadsConfig,
    HeadsDrafter,
    RecyclingDrafter,
    Step,
    SuffixDrafter,
    check_drafters,
    output_rows,
)
from ryzen_llm.decoding.generation import Generation
from ryzen_llm.decoding.generator import WEIGHTS, Generator
from ryzen_llm.decoding.kv_cache_optimizer import CacheChoice, KVCacheOptimizer
from ryzen_llm.decoding.sampling import Sampling
from ryzen_llm.decoding.speculative import SpeculativeDecoder

__all__ = [
    "DRAFTER_NAMES",
    "DRAFT_MODEL",
    "WEIGHTS",
    "CacheChoice",
    "Draft",
    "DraftHeads",
    "DraftModelDrafter",
    "DraftSession",
    "Drafter",
    "Generation",
    "Generator",
    "HeadsConfig",
    "HeadsDrafter",
    "KVCacheOptimizer",
    "RecyclingDrafter",
    "Sampling",
    "SpeculativeDecoder",
    "Step",
    "SuffixDrafter",
    "check_drafters",
    "output_rows",
]
