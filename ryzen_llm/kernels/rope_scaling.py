"""Rotary frequencies stretched for contexts longer than a model was first trained on."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from ryzen_llm.errors import InputError

KINDS = ("linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How the rotary frequencies of a model are stretched.

    Raises InputError, naming the field, for a value that cannot work.

    Attributes:
        kind: "linear" (position interpolation, Chen et al. 2023, arXiv:2306.15595), "llama3" (Llama 3.1) or
            "yarn" (Peng et al. 2023, arXiv:2309.00071).
        factor: How many times longer the context becomes.
        original_max_position_embeddings: The context before stretching; llama3 and yarn need it.
        low_freq_factor: llama3: wavelengths above the original context over this are stretched in full.
        high_freq_factor: llama3: wavelengths below the original context over this are left alone.
        beta_fast: yarn: frequencies of more rotations than this in the original context are left alone.
        beta_slow: yarn: frequencies of fewer rotations than this are stretched in full.
        attention_factor: yarn: cosines and sines are multiplied by it; 0 stands for 0.1 * ln(factor) + 1.
    """

    kind: str
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"rope_scaling.kind is {self.kind!r}, expected one of {', '.join(KINDS)}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "kind":
                continue
            number = int if field.type is int else int | float
            may_be_zero = field.default == 0 and not (
                field.name == "original_max_position_embeddings" and self.kind != "linear"
            )
            if (
                isinstance(value, bool)
                or not isinstance(value, number)
                or not (0 < value < math.inf or (may_be_zero and value == 0))
            ):
                raise InputError(f"rope_scaling.{field.name} is {value!r}, expected a positive number")
        if self.high_freq_factor <= self.low_freq_factor:
            raise InputError(
                f"rope_scaling.high_freq_factor is {self.high_freq_factor}, expected more than "
                f"low_freq_factor = {self.low_freq_factor}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`. Raises InputError for unknown or missing fields."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise InputError(
                f"unknown field rope_scaling.{unknown[0]}: expected some of {', '.join(sorted(known))}"
            )
        if missing := sorted({"kind", "factor"} - set(values)):
            raise InputError(f"rope_scaling fields are missing: {', '.join(missing)}")
        return cls(**values)

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        if self.kind != "yarn":
            return 1.0
        return self.attention_factor or 0.1 * math.log(max(self.factor, 1.0)) + 1.0

    def stretch(self, frequencies: Tensor, theta: float) -> Tensor:
        """The stretched form of `frequencies` (head_dim / 2,) in radians per token, whose base is `theta`."""
        if self.kind == "linear":
            return frequencies / self.factor
        context = self.original_max_position_embeddings
        if self.kind == "llama3":
            rotations = context * frequencies / (2 * math.pi)
            kept = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = kept.clamp(0, 1)
        else:
            half = frequencies.shape[0]

            def index_of(rotations: float) -> float:
                """The index, not whole, of the frequency that turns so often in the original context."""
                return half * math.log(context / (rotations * 2 * math.pi)) / math.log(theta)

            first = max(math.floor(index_of(self.beta_fast)), 0)
            last = min(math.ceil(index_of(self.beta_slow)), 2 * half - 1)
            indices = torch.arange(half, dtype=torch.float32, device=frequencies.device)
            kept = 1 - ((indices - first) / max(last - first, 0.001)).clamp(0, 1)
        return frequencies / self.factor * (1 - kept) + frequencies * kept
