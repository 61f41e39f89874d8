"""y = x Wᵀ with weights of 4 or 8 bits, on a CPU: in C++ with AVX2 (bf16: AVX512-VNNI), or PyTorch's ops.

    4 bits: W[n, k] = codes[n, k] * scale[n, k // 32] + minimum[n, k // 32]
    8 bits: W[n, k] = codes[n, k] * scale[n]

with sums in fp32. In C++ inputs in bf16 are rounded first: to 8 bits, with a scale for 32 of a row, as
llama.cpp does, so that their products with codes are sums of integers. A row of the result does not depend on
how many rows there are, which PyTorch's ops do not promise. Decoding one token reads every weight once and is
bound by memory, so what matters is that the weights are one stream that is asked of memory ahead of time.

In the C++ layout tiles of 16 outputs follow each other. With 4 bits a tile has 320 bytes for each group of 32
inputs: 256 of codes, where 16-bit word 2n + j of 64-byte part p holds the codes of output n and inputs
8p + j, 8p + j + 2, 8p + j + 4 and 8p + j + 6 from its low to its high bits; then a bf16 scale and minimum for
each output. With 8 bits it has 512 bytes, where 32-bit word n of part p holds the codes of output n and
inputs 4p to 4p + 3, each 128 too high; and at its end an fp32 scale for each output.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels.cpp_extension import compile_beside
from ryzen_llm.kernels.hardware import cpu_features

GROUP = 32
TILE = 16
INT8_INPUTS = 16
"""With 8 bits, what the number of inputs is a multiple of."""


def is_in_cpp(dtype: torch.dtype) -> bool:
    """Whether there is a C++ form for inputs of `dtype`, fp32 or bf16."""
    features = cpu_features()
    vnni = features.avx512_bf16 and features.avx512_vnni
    return (vnni if dtype == torch.bfloat16 else features.avx2) and is_compiled()


@functools.cache
def is_compiled() -> bool:
    """Compile the C++ forms, half a minute in a machine's first call; False, and a warning, if that fails."""
    slower = (
        "quantised weights use PyTorch's ops, which without bf16 arithmetic are slower than --weights fp32"
    )
    return compile_beside(__file__, slower, quantised_linear=_shape)


class PackedWeight(NamedTuple):
    """Weights as `quantised_linear` takes them on this machine: codes and factors, in C++ in one tensor."""

    codes: Tensor
    factors: Tensor | None


def pack_int4(codes: Tensor, scale: Tensor, minimum: Tensor, dtype: torch.dtype) -> PackedWeight:
    """Lay weights of 4 bits out for `quantised_linear`.

    Args:
        codes: (out_features, groups, 32) uint8 from 0 to 15; out_features is a multiple of 16.
        scale: (out_features, groups) bf16.
        minimum: The same.
        dtype: Of the inputs, bf16 or fp32.

    Raises InputError for codes of another shape.
    """
    out_features, groups, group = codes.shape
    if out_features % TILE or group != GROUP:
        raise InputError(
            f"codes are {tuple(codes.shape)}, expected (out_features, groups, {GROUP}) with out_features a "
            f"multiple of {TILE}: pad the weight with zeros, or keep it as it is"
        )
    if not is_in_cpp(dtype):
        whole = codes.view(out_features, -1).to(torch.int32)
        zero = minimum.float() + 8 * scale.float()
        factors = torch.stack((scale.T, zero.T), -1).to(dtype).contiguous()
        return PackedWeight(torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole, 1), factors)
    parts = codes.view(-1, TILE, groups, 4, 4, 2).to(torch.int32)  # tile, output, group, part, nibble, j
    words = parts[..., 0, :] | parts[..., 1, :] << 4 | parts[..., 2, :] << 8 | parts[..., 3, :] << 12
    words = words.permute(0, 2, 3, 1, 4).to(torch.uint16).flatten(2)
    factors = torch.stack((scale, minimum), -1).view(-1, TILE, groups, 2).transpose(1, 2).flatten(2)
    blocks = torch.cat((words.view(torch.uint8), factors.contiguous().view(torch.uint8)), -1)
    return PackedWeight(blocks.flatten(1), None)


def pack_int8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> PackedWeight:
    """The same of 8 bits.

    Args:
        codes: (out_features, in_features) int8; in_features is a multiple of 16. In C++ it is one of 32, and
            out_features one of 16: PyTorch's op takes the others.
        scale: (out_features,) fp32.
        dtype: Of the inputs, bf16 or fp32.

    Raises InputError for another number of inputs, for which PyTorch's op reads beyond the codes in bf16.
    """
    out_features, in_features = codes.shape
    if in_features % INT8_INPUTS:
        raise InputError(
            f"codes are {tuple(codes.shape)}, expected (out_features, in_features) with in_features a "
            f"multiple of {INT8_INPUTS}: pad the weight with zeros, or keep it as it is"
        )
    if out_features % TILE or in_features % GROUP or not is_in_cpp(dtype):
        return PackedWeight(codes.contiguous(), scale.to(dtype))
    parts = (codes.view(-1, TILE, in_features // 4, 4).to(torch.int16) + 128).to(torch.uint8)
    ends = scale.float().view(-1, TILE).view(torch.uint8)
    return PackedWeight(torch.cat((parts.transpose(1, 2).flatten(1), ends), 1), None)


def quantised_linear(x: Tensor, weight: PackedWeight, bits: int) -> Tensor:
    """(..., in_features) -> (..., out_features), both in the dtype that `weight` is packed for."""
    if weight.factors is None:
        y: Tensor = torch.ops.ryzen_llm.quantised_linear(x, weight.codes, bits)
        return y
    rows = x.reshape(-1, x.shape[-1])
    if bits == 8:
        y = torch._weight_int8pack_mm(rows, weight.codes, weight.factors)
    else:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, weight.codes, GROUP, weight.factors)
    return y.view(*x.shape[:-1], y.shape[-1])


def _shape(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0] * TILE)
