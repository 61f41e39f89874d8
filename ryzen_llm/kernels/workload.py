"""What one training step gives the ops of a model: for what their forms are compared."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Sizes as in ModelConfig, and how the step runs.

    Attributes:
        device: Where.
        dtype: Of the matrix products, bf16 under autocast; weights and residual stream are fp32.
        compiled: Whether blocks and loss are compiled.
        batch: Sequences.
        time: Tokens of each.
        hidden_size: Width of the residual stream.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Width of one head.
        intermediate_size: Width inside the MLP.
        vocab_size: Number of token ids.
        window: Tokens that each token sees; 0 for all up to it.
        activation: Of the MLP's gate, "silu" or "gelu_tanh".
        qk_norm: Whether queries and keys are normalised.
    """

    device: torch.device
    dtype: torch.dtype
    compiled: bool
    batch: int
    time: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    window: int = 0
    activation: str = "silu"
    qk_norm: bool = False

    @property
    def memory_bytes(self) -> int | None:
        """Memory of the device, in all; None where unknown."""
        if self.device.type == "cuda":
            return int(torch.cuda.get_device_properties(self.device).total_memory)
        if self.device.type == "cpu" and hasattr(os, "sysconf"):
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return None
