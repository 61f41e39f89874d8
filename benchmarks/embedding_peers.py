"""Baselines and named peers for benchmarks/embeddings.py: the matrix each stands for, and bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def round_to_nearest(weight: Tensor, bits: int, group: int) -> tuple[Tensor, int]:
    """Asymmetric rounding in groups, no calibration; codes of `bits`, fp16 scale and minimum a group."""
    groups = torch.unflatten(weight.float(), -1, (-1, group))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-8).half().float()
    low = low.half().float()
    codes = ((groups - low) / scale).round().clamp(0, 2**bits - 1)
    return (codes * scale + low).flatten(-2), weight.numel() * bits // 8 + 4 * low.numel()


def truncated_svd(weight: Tensor, ratio: float) -> tuple[Tensor, int]:
    """The best low-rank matrix in the plain squared error, its factors in bf16."""
    rank = int(weight.numel() / ratio / sum(weight.shape))
    basis = torch.linalg.eigh(weight.T.double() @ weight.double()).eigenvectors[:, -rank:].float()
    return (weight @ basis) @ basis.T, 2 * rank * sum(weight.shape)


def torchao_int4(weight: Tensor) -> tuple[Tensor, int]:
    """torchao's weight-only quantisation of nn.Embedding: 4 bits, groups of 32."""
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup

    module = nn.Sequential(nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight.clone()))
    config = IntxWeightOnlyConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]
        granularity=PerGroup(32),
    )
    quantize_(module, config, lambda m, _: isinstance(m, nn.Embedding))
    quantised: Any = module[0].weight
    names, _ = quantised.__tensor_flatten__()  # as resident: each int4 code takes a byte here
    size = sum(getattr(quantised, name).nbytes for name in names if getattr(quantised, name) is not None)
    return quantised.dequantize().float(), size


def bitsandbytes_nf4(weight: Tensor) -> tuple[Tensor, int]:
    """bitsandbytes' NF4 in blocks of 64, as in its Embedding4bit."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    codes, state = quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
    return dequantize_4bit(codes, state).float().view_as(weight), codes.nbytes + state.absmax.nbytes


PEERS: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
    "torchao, int4, groups of 32": torchao_int4,
    "bitsandbytes, nf4, blocks of 64": bitsandbytes_nf4,
}
