"""All forms of each op that a model can use: a new one is registered here, and measured from then on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ryzen_llm.kernels import causal_attention_cpu, linear_cpu, rotary_qkv_cpu
from ryzen_llm.kernels.causal_attention import (
    SMALLEST_BLOCK,
    attention_by_pytorch,
    attention_in_cpp,
    attention_in_query_blocks,
)
from ryzen_llm.kernels.cross_entropy import cross_entropy
from ryzen_llm.kernels.gated import geglu, geglu_by_triton, swiglu, swiglu_by_triton
from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.linear import linear, linear_in_cpp
from ryzen_llm.kernels.linear_cross_entropy import linear_cross_entropy
from ryzen_llm.kernels.rms_norm import (
    LARGEST_TRITON_ROW,
    add_rms_norm,
    add_rms_norm_by_pytorch,
    add_rms_norm_by_triton,
)
from ryzen_llm.kernels.rotary_qkv import rotary_qkv, rotary_qkv_by_triton, rotary_qkv_in_cpp
from ryzen_llm.kernels.workload import Workload

Unsuited = Callable[[Workload], str | None]
"""Why a form cannot or should not run a workload, or None."""


@dataclass(frozen=True)
class Candidate:
    """One form of an op. All forms of an op take and give the same."""

    function: Callable[..., Any]
    unsuited: Unsuited = lambda _: None


def _any_of(*reasons: Unsuited) -> Unsuited:
    return lambda work: next((why for reason in reasons if (why := reason(work))), None)


def _no_triton(work: Workload) -> str | None:
    if work.device.type != "cuda":
        return "needs a GPU"
    return None if find_spec("triton") else "is not installed"


def _in_cpp(module: ModuleType) -> Unsuited:
    def unsuited(work: Workload) -> str | None:
        on_cpu = work.device.type == "cpu" and cpu_features().avx512_bf16
        if not on_cpu or work.dtype != torch.bfloat16:
            return "for bf16 on CPUs with AVX512-BF16"
        return None if module.is_in_cpp() else "its C++ could not be compiled"

    return unsuited


def _heads_in_cpp(module: ModuleType) -> Unsuited:
    def unsuited(work: Workload) -> str | None:
        odd = work.head_dim % module.HEAD_MULTIPLE
        return f"head_dim is no multiple of {module.HEAD_MULTIPLE}" if odd else None

    return _any_of(unsuited, _in_cpp(module))


def _unsuited_to_linear(work: Workload) -> str | None:
    if work.device.type == "cpu" and cpu_features().amx_bf16:
        return "PyTorch's product uses AMX"
    if work.batch * work.time < linear_cpu.FEWEST_ROWS:
        return f"fewer than {linear_cpu.FEWEST_ROWS} tokens"
    multiple = linear_cpu.MULTIPLE
    odd = work.hidden_size % multiple or work.intermediate_size % multiple
    return f"hidden_size and intermediate_size are no multiples of {multiple}" if odd else None


def _qk_norm(work: Workload) -> str | None:
    return "it has no QK-norm" if work.qk_norm else None


def _row_too_long(work: Workload) -> str | None:
    return f"rows longer than {LARGEST_TRITON_ROW}" if work.hidden_size > LARGEST_TRITON_ROW else None


def _not_compiled(work: Workload) -> str | None:
    return None if work.compiled else "compilation is off"


def _logits_too_large(work: Workload) -> str | None:
    # In fp32 and as a gradient, beside the activations of a whole step, which are not there while measuring.
    needed, memory = 8 * work.batch * work.time * work.vocab_size, work.memory_bytes
    too_large = memory is not None and needed > memory // 8
    return f"all logits would take {needed >> 20} MiB" if too_large else None


def all_logits(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss as it is commonly written; see `linear_cross_entropy` for what it takes and gives."""
    return cross_entropy(F.linear(hidden_states, weight), targets)


def _all_logits_compiled(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    return _compiled_once(all_logits)(hidden_states, weight, targets)  # type: ignore[no-any-return]


_compiled_once = functools.cache(torch.compile)


def _query_blocks(blocks: int) -> Candidate:
    def unsuited(work: Workload) -> str | None:
        if work.device.type != "cpu":
            return "for CPUs"
        short = work.time < blocks * SMALLEST_BLOCK
        return f"a block would be shorter than {SMALLEST_BLOCK} queries" if short else None

    return Candidate(functools.partial(attention_in_query_blocks, blocks=blocks), unsuited)


def _fused_loss(slab_scale: float) -> Candidate:
    return Candidate(
        functools.partial(linear_cross_entropy, compiled=True, slab_scale=slab_scale), _not_compiled
    )


CANDIDATES: Mapping[str, Mapping[str, Candidate]] = {
    "attention": {
        "PyTorch's SDPA": Candidate(attention_by_pytorch),
        "C++": Candidate(attention_in_cpp, _heads_in_cpp(causal_attention_cpu)),
        "2 query blocks": _query_blocks(2),
        "4 query blocks": _query_blocks(4),
        "8 query blocks": _query_blocks(8),
    },
    "norm": {
        "written out": Candidate(add_rms_norm),
        "F.rms_norm": Candidate(add_rms_norm_by_pytorch),
        "Triton": Candidate(add_rms_norm_by_triton, _any_of(_no_triton, _row_too_long)),
    },
    "swiglu": {
        "written out": Candidate(swiglu),
        "Triton": Candidate(swiglu_by_triton, _no_triton),
    },
    "geglu": {
        "written out": Candidate(geglu),
        "Triton": Candidate(geglu_by_triton, _no_triton),
    },
    "rotary_qkv": {
        "written out": Candidate(rotary_qkv),
        "Triton": Candidate(rotary_qkv_by_triton, _no_triton),
        "C++": Candidate(rotary_qkv_in_cpp, _any_of(_qk_norm, _heads_in_cpp(rotary_qkv_cpu))),
    },
    "linear": {
        "PyTorch": Candidate(linear),
        "C++": Candidate(linear_in_cpp, _any_of(_unsuited_to_linear, _in_cpp(linear_cpu))),
    },
    "loss": {
        "all logits": Candidate(all_logits, _logits_too_large),
        "fused": Candidate(linear_cross_entropy),
        "fused, compiled": _fused_loss(1.0),
        "fused, compiled, half the slab": _fused_loss(0.5),
        "fused, compiled, twice the slab": _fused_loss(2.0),
        # Last, to be taken where it is clearly faster only: its memory costs a step more than it shows alone.
        "all logits, compiled": Candidate(_all_logits_compiled, _any_of(_not_compiled, _logits_too_large)),
    },
}
"""By op and name; the first form of each op is its plainest, which the others are checked against."""
