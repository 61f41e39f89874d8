"""Numeric operations on tensors, one file each. Nothing here knows a model."""

from ryzen_llm.kernels.cached_attention import Stored, cached_attention
from ryzen_llm.kernels.causal_attention import causal_attention, visible
from ryzen_llm.kernels.cross_entropy import cross_entropy
from ryzen_llm.kernels.geglu import geglu
from ryzen_llm.kernels.hadamard import hadamard, rotate
from ryzen_llm.kernels.hardware import CpuCaches, CpuFeatures, cpu_caches, cpu_features, supports_bf16
from ryzen_llm.kernels.int4_linear import GROUP as INT4_GROUP
from ryzen_llm.kernels.int4_linear import PackedInt4, int4_linear, pack_int4
from ryzen_llm.kernels.linear_cross_entropy import linear_cross_entropy
from ryzen_llm.kernels.rms_norm import rms_norm
from ryzen_llm.kernels.rope_scaling import RopeScaling
from ryzen_llm.kernels.rotary import apply_rotary, rotary_table
from ryzen_llm.kernels.swiglu import swiglu

__all__ = [
    "INT4_GROUP",
    "CpuCaches",
    "CpuFeatures",
    "PackedInt4",
    "RopeScaling",
    "Stored",
    "apply_rotary",
    "cached_attention",
    "causal_attention",
    "cpu_caches",
    "cpu_features",
    "cross_entropy",
    "geglu",
    "hadamard",
    "int4_linear",
    "linear_cross_entropy",
    "pack_int4",
    "rms_norm",
    "rotary_table",
    "rotate",
    "supports_bf16",
    "swiglu",
    "visible",
]
