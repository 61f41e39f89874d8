"""Each op among its neighbours, as it stands in a block between two matrix products, or those of an MLP.

Inductor cannot fuse through a matrix product, so what lies between two of them compiles to the same code
here as in the block, in seconds instead of the block's half minute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.kernels.gated import swiglu
from ryzen_llm.kernels.rotary import rotary_table
from ryzen_llm.kernels.rotary_qkv import rotary_qkv
from ryzen_llm.kernels.workload import Workload

_EPS = 1e-5


@dataclass(frozen=True)
class Region:
    """An op's surroundings.

    Attributes:
        inputs: Draws (dtype of each tensor and shape) from a workload; fp32 ones are weights and residual.
        run: (function of the op, its inputs) -> outputs, all to be differentiated.
        in_block: Whether it is compiled as part of a block; the loss is not.
        autocast: Whether its products have weights in fp32.
    """

    inputs: Callable[[Workload, torch.Generator], list[Tensor]]
    run: Callable[[Callable[..., Any], Workload, list[Tensor]], tuple[Tensor, ...]]
    in_block: bool = True
    autocast: bool = False


def _normal(work: Workload, draw: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=draw).to(work.device, dtype)


def _projected(work: Workload, draw: torch.Generator) -> list[Tensor]:
    width = (work.num_heads + 2 * work.num_kv_heads) * work.head_dim
    projected = _normal(work, draw, work.batch, work.time, width, dtype=work.dtype)
    weights = [_normal(work, draw, work.head_dim) for _ in range(2)] if work.qk_norm else []
    return [projected, *weights]


def _run_qkv(function: Callable[..., Any], work: Workload, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    projected, *weights = inputs
    cos, sin = rotary_table(torch.arange(work.time, device=projected.device), work.head_dim, 10000.0)
    q_weight, k_weight = weights or (None, None)
    heads = {"num_heads": work.num_heads, "num_kv_heads": work.num_kv_heads}
    q, k, v = function(projected, cos, sin, q_weight, k_weight, eps=_EPS, **heads)
    return q, k, v


def _run_attention(function: Callable[..., Any], work: Workload, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    q, k, v = _run_qkv(rotary_qkv, work, inputs)
    return (function(q, k, v, work.window).transpose(1, 2).flatten(2),)


def _norm_inputs(work: Workload, draw: torch.Generator) -> list[Tensor]:
    shape = (work.batch, work.time, work.hidden_size)
    residual, added = _normal(work, draw, *shape), _normal(work, draw, *shape, dtype=work.dtype)
    return [residual, added, _normal(work, draw, work.hidden_size)]


def _run_norm(function: Callable[..., Any], work: Workload, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    total, normed = function(*inputs, _EPS)
    return total, normed.to(inputs[1].dtype)  # the matrix product's


def _gate_inputs(work: Workload, draw: torch.Generator) -> list[Tensor]:
    shape = (work.batch, work.time, 2 * work.intermediate_size)
    return [_normal(work, draw, *shape, dtype=work.dtype)]


def _run_gate(function: Callable[..., Any], work: Workload, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return (function(*inputs),)


def _linear_inputs(work: Workload, draw: torch.Generator) -> list[Tensor]:
    x = _normal(work, draw, work.batch, work.time, work.hidden_size, dtype=work.dtype)
    sizes = (2 * work.intermediate_size, work.hidden_size), (work.hidden_size, work.intermediate_size)
    return [x, *(_normal(work, draw, *size) / size[1] ** 0.5 for size in sizes)]


def _run_linear(function: Callable[..., Any], work: Workload, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    x, gate_up, down = inputs
    return (function(swiglu(function(x, gate_up)), down),)


def _loss_inputs(work: Workload, draw: torch.Generator) -> list[Tensor]:
    hidden = _normal(work, draw, work.batch, work.time, work.hidden_size)
    weight = _normal(work, draw, work.vocab_size, work.hidden_size) / work.hidden_size**0.5
    targets = torch.randint(work.vocab_size, (work.batch, work.time), generator=draw)
    return [hidden, weight, targets.to(work.device)]


def _run_loss(function: Callable[..., Any], work: Workload, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return (function(*inputs)[0],)


REGIONS: dict[str, Region] = {
    "norm": Region(_norm_inputs, _run_norm),
    "swiglu": Region(_gate_inputs, _run_gate),
    "geglu": Region(_gate_inputs, _run_gate),
    "rotary_qkv": Region(_projected, _run_qkv),
    "linear": Region(_linear_inputs, _run_linear, autocast=True),
    "loss": Region(_loss_inputs, _run_loss, in_block=False, autocast=True),
    "attention": Region(_projected, _run_attention),
}
"""The last takes the longest to compile."""


def ops_of(work: Workload) -> list[str]:
    """The ops that a model with this workload has."""
    other = "geglu" if work.activation == "silu" else "swiglu"
    return [op for op in REGIONS if op != other]
