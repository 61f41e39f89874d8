"""Linear layers with weights of 8 or 4 bits on a GPU: few rows, which each read every weight once.

The codes are read as they are and become numbers in registers, so that decoding moves a half or a quarter
of the bytes of bf16 (Frantar et al. 2022, arXiv:2210.17323, whose format of 4 bits in groups this is).
"""

import torch
from torch import Tensor

GROUP = 32
"""Inputs that share a scale and a zero point in 4 bits."""


@torch.library.custom_op("ryzen_llm::int8_linear_on_gpu", mutates_args=())
def int8_linear_on_gpu(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """x (codes * scale)ᵀ: `x` (rows, inputs), `codes` (outputs, inputs) int8, `scale` (outputs,).

    The result is (rows, outputs) in the dtype of `x`; sums are fp32. For inference: it has no gradient.
    """
    from ryzen_llm.kernels.linear_on_gpu_triton import int8_linear_on_gpu  # Triton is there on Linux only

    return int8_linear_on_gpu(x, codes, scale)


@int8_linear_on_gpu.register_fake
def _int8_linear_on_gpu_fake(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0])


@torch.library.custom_op("ryzen_llm::int4_linear_on_gpu", mutates_args=())
def int4_linear_on_gpu(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """x ((codes - 8) * scale + zero)ᵀ with a scale and a zero point for each group of 32 inputs.

    `x` is (rows, inputs), `packed` (outputs, inputs / 2) uint8 by `pack_nibbles`, `scales` and `zeros`
    (outputs, inputs / 32). The result is (rows, outputs) in the dtype of `x`; sums are fp32. It has no
    gradient.
    """
    from ryzen_llm.kernels.linear_on_gpu_triton import int4_linear_on_gpu

    return int4_linear_on_gpu(x, packed, scales, zeros)


@int4_linear_on_gpu.register_fake
def _int4_linear_on_gpu_fake(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], packed.shape[0])


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes of 0 to 15, (outputs, inputs) integers, two a byte: the even input in the low half."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def unpack_nibbles(packed: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    """The weight that `int4_linear_on_gpu` multiplies by, (outputs, inputs) in the dtype of `scales`."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
    groups = codes.view(len(codes), -1, GROUP).to(scales.dtype) - 8
    return (groups * scales[..., None] + zeros[..., None]).flatten(1)
