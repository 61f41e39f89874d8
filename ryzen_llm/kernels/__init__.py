"""Numeric operations on tensors, one file each. Nothing here knows a model."""

from ryzen_llm.kernels.cached_attention import Stored, cached_attention
from ryzen_llm.kernels.cached_attention_cpu import (
    MEMORY_ALIGNMENT,
    append_and_attend,
    append_suits,
    is_in_cpp,
)
from ryzen_llm.kernels.candidates import CANDIDATES
from ryzen_llm.kernels.causal_attention import causal_attention, document_starts, visible
from ryzen_llm.kernels.choices import AUTOMATIC, PLAIN, KernelChoices
from ryzen_llm.kernels.chunked_cross_entropy import chunked_cross_entropy
from ryzen_llm.kernels.compilation import shared_compilations
from ryzen_llm.kernels.cross_entropy import cross_entropy
from ryzen_llm.kernels.gated import geglu, swiglu
from ryzen_llm.kernels.hadamard import hadamard, rotate
from ryzen_llm.kernels.hardware import (
    CpuCaches,
    CpuFeatures,
    cpu_caches,
    cpu_features,
    describe_device,
    supports_bf16,
)
from ryzen_llm.kernels.linear_cross_entropy import linear_cross_entropy
from ryzen_llm.kernels.packed_rows import PackedRows, pack, packed_linear, packed_lookup, unpack
from ryzen_llm.kernels.rms_norm import rms_norm
from ryzen_llm.kernels.rope_scaling import RopeScaling
from ryzen_llm.kernels.rotary import Rope, apply_rotary, rotary_table
from ryzen_llm.kernels.rotary_qkv import rotary_qkv
from ryzen_llm.kernels.trellis_rows import (
    MOST_TRELLIS_BITS,
    TrellisRows,
    can_encode,
    trellis_bytes,
    trellis_encode,
)
from ryzen_llm.kernels.workload import Workload

__all__ = [
    "AUTOMATIC",
    "CANDIDATES",
    "MEMORY_ALIGNMENT",
    "MOST_TRELLIS_BITS",
    "PLAIN",
    "CpuCaches",
    "CpuFeatures",
    "KernelChoices",
    "PackedRows",
    "Rope",
    "RopeScaling",
    "Stored",
    "TrellisRows",
    "Workload",
    "append_and_attend",
    "append_suits",
    "apply_rotary",
    "cached_attention",
    "can_encode",
    "causal_attention",
    "chunked_cross_entropy",
    "cpu_caches",
    "cpu_features",
    "cross_entropy",
    "describe_device",
    "document_starts",
    "geglu",
    "hadamard",
    "is_in_cpp",
    "linear_cross_entropy",
    "pack",
    "packed_linear",
    "packed_lookup",
    "rms_norm",
    "rotary_qkv",
    "rotary_table",
    "rotate",
    "shared_compilations",
    "supports_bf16",
    "swiglu",
    "trellis_bytes",
    "trellis_encode",
    "unpack",
    "visible",
]
