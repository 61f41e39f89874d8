"""What a run uses and why, for the table that setup prints."""

from __future__ import annotations

from typing import NamedTuple

from ryzen_llm.claims import Optimizations
from ryzen_llm.kernels import AUTOMATIC
from ryzen_llm.model import ModelConfig
from ryzen_llm.pipeline.report import Kernels
from ryzen_llm.training import OpChoice


class Part(NamedTuple):
    """One line of the table."""

    name: str
    used: str
    why: str


def chosen_parts(model: ModelConfig, enabled: Optimizations, kernels: Kernels) -> list[Part]:
    """The optimised parts of a run: its kernels, embedding, cache and drafters."""
    parts = [Part(f"kernel {choice.op}", choice.choice, _reason(choice)) for choice in kernels.choices]
    if not parts:
        parts.append(Part("kernels", "plain PyTorch", kernels.reason or ""))
    if model.embedding != "dense":
        parts.append(Part("embedding", model.embedding, f"model.embedding: {model.embedding}"))
    elif enabled.enable_embedding_compression:
        ratio = f"embedding_ratio: {enabled.embedding_ratio}"
        parts.append(Part("embedding", "dense; a copy is compressed once it is trained", ratio))
    else:
        parts.append(Part("embedding", "dense", "enable_embedding_compression: false"))
    if enabled.enable_kv_cache_optimization:
        parts.append(Part("key-value cache", enabled.kv_cache, f"kv_cache: {enabled.kv_cache}"))
    else:
        parts.append(Part("key-value cache", "dense", "enable_kv_cache_optimization: false"))
    if enabled.enable_speculative_decoding:
        drafters = ", ".join(enabled.drafters)
        parts.append(Part("drafters", f"{drafters}: the best at each step", f"drafters: {drafters}"))
    else:
        parts.append(Part("drafters", "none", "enable_speculative_decoding: false"))
    return parts


def _reason(choice: OpChoice) -> str:
    if choice.reason:
        return choice.reason + (": left to the rules of thumb" if choice.choice == AUTOMATIC else "")
    measured = sum(trial.excluded is None for trial in choice.trials)
    return f"the fastest of {measured} measured {'now' if choice.measured_now else 'in an earlier run'}"
