"""What the claims are measured on, against which thresholds, and which optimisations are switched on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
from torch import Tensor

from ryzen_llm.cache import check_names
from ryzen_llm.decoding import check_drafters
from ryzen_llm.errors import InputError
from ryzen_llm.model import Transformer
from ryzen_llm.training import OptimizerConfig, autocast

_FRACTIONS = ("kv_cache_memory_savings_min", "accuracy_loss_max", "test_pass_rate_min")
_PRECISIONS = ("bf16-mixed", "32-true")


@dataclass(frozen=True)
class Thresholds:
    """What the claims and the self-tests have to reach.

    Raises InputError, naming the key, for a value that is not positive and finite or a fraction above 1.

    Args:
        kernel_speedup_min: Least speed-up of the optimised kernels.
        compression_ratio_min: Least ratio of the dense embedding's bytes to the compressed one's.
        kv_cache_memory_savings_min: Least share of the key-value cache's memory saved.
        speculation_speedup_min: Least speed-up of speculative over plain decoding.
        e2e_speedup_target: Least speed-up of everything together over the naive baseline.
        accuracy_loss_max: Largest relative increase of the validation loss.
        test_pass_rate_min: Least share of the self-tests to pass, of those that ran.
    """

    kernel_speedup_min: float = 3.0
    compression_ratio_min: float = 2.0
    kv_cache_memory_savings_min: float = 0.25
    speculation_speedup_min: float = 1.2
    e2e_speedup_target: float = 3.0
    accuracy_loss_max: float = 0.01
    test_pass_rate_min: float = 0.95

    def __post_init__(self) -> None:
        for each in fields(self):
            key, value = each.name, getattr(self, each.name)
            if key in _FRACTIONS:
                fits, expected = 0 <= value <= 1, "a fraction from 0 to 1"
            else:
                fits, expected = 0 < value < math.inf, "a positive number"
            if not fits:
                raise InputError(f"{key} is {value}, expected {expected}")


@dataclass(frozen=True)
class Optimizations:
    """Which optimisations the run uses; one switched off is reported as not measured.

    Raises InputError for an unknown kind of cache, and for an unknown drafter or none.

    Args:
        enable_kernel_optimization: Use and measure the optimised kernels.
        enable_embedding_compression: Use and measure the compressed embedding.
        enable_kv_cache_optimization: Use and measure the compressed key-value cache.
        enable_speculative_decoding: Use and measure speculative decoding.
        embedding_ratio: What a dense embedding is compressed to after training, to measure that: bytes in
            bf16 over compressed bytes.
        kv_cache: Kind of compressed cache that is used and measured: int8, k8v4, int4, int4-sinks or fp8.
        drafters: Drafters that are used and measured, such as [suffix,recycling], the best at each step:
            suffix, recycling, heads:PATH, draft_model:PATH.
    """

    enable_kernel_optimization: bool = True
    enable_embedding_compression: bool = True
    enable_kv_cache_optimization: bool = True
    enable_speculative_decoding: bool = True
    embedding_ratio: float = 3.5
    kv_cache: str = "int8"
    drafters: tuple[str, ...] = ("suffix", "recycling")

    def __post_init__(self) -> None:
        check_names([self.kv_cache])
        if not 1 < self.embedding_ratio < math.inf:
            raise InputError(f"embedding_ratio is {self.embedding_ratio}, expected more than 1")
        if self.enable_speculative_decoding and not self.drafters:
            raise InputError("drafters is empty, expected one or more, or enable_speculative_decoding: false")
        check_drafters(self.drafters)


@dataclass(frozen=True)
class ClaimContext:
    """What the claims are measured on. No claim changes the model: each arm works on a copy of its own.

    Raises InputError for no batches or a precision that no recipe has.

    Attributes:
        model: The trained model, fp32, not compiled.
        train_batches: Token ids, (batch, context + 1) int64 each.
        val_batches: The same, of the validation split.
        precision: Of the run: "bf16-mixed" or "32-true".
        compile: Whether the run compiles.
        device: Where the arms run.
        thresholds: What has to be reached.
        enabled: What is switched on.
        optimizer: The run's, for the twins.
        twin_batches: What the twins are trained on, like train_batches; none for no twins.
    """

    model: Transformer
    train_batches: list[Tensor]
    val_batches: list[Tensor]
    precision: str
    compile: bool
    device: torch.device
    thresholds: Thresholds
    enabled: Optimizations
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    twin_batches: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.precision not in _PRECISIONS:
            raise InputError(
                f"precision is {self.precision!r}, expected {' or '.join(_PRECISIONS)} to measure claims"
            )
        for name in ("train_batches", "val_batches"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty, expected at least one batch to measure claims on")

    @property
    def recipe(self) -> str:
        """The run's precision and compilation in words."""
        precision = "bf16 autocast" if self.precision == "bf16-mixed" else "fp32"
        return f"{precision}, {'compiled blocks' if self.compile else 'not compiled'}"

    def autocast(self) -> torch.autocast:
        """The autocast of the run's precision."""
        return autocast(self.precision, self.device)
