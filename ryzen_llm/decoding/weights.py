"""Linear layers for decoding, which reads every weight once a token: of 8 or 4 bits, or as they are."""

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import few_rows_linear
from ryzen_llm.kernels.linear_on_gpu import (
    int4_linear_on_gpu,
    int8_linear_on_gpu,
    pack_nibbles,
    unpack_nibbles,
)
from ryzen_llm.kernels.quantised_linear import (
    GROUP,
    INT8_INPUTS,
    TILE,
    PackedWeight,
    pack_int4,
    pack_int8,
    quantised_linear,
)
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import DenseEmbedding

MOST_PACKED_ROWS = 64
"""With more rows than that, weights are cheaper to convert than to multiply as they are."""
_HAS_TRITON = find_spec("triton") is not None


class Int8Linear(nn.Module):
    """weight ≈ codes * scale, codes of 8 bits and one scale for each output, by `quantised_linear`.

    Raises InputError for a number of inputs that is no multiple of 16: PyTorch's op would give wrong results.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        _require_multiple(name, linear, "in_features", INT8_INPUTS, "int8")
        weight = linear.weight.detach().float()
        scale = (weight.abs().amax(1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
        codes = (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
        on_cpu = weight.device.type == "cpu"
        dtype = linear.weight.dtype
        packed = pack_int8(codes, scale, dtype) if on_cpu else PackedWeight(codes, scale.to(dtype))
        self.codes = nn.Buffer(packed.codes)
        self.scale = None if packed.factors is None else nn.Buffer(packed.factors)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the layer that this was made of."""
        rows = x.reshape(-1, x.shape[-1])
        few = rows.shape[0] <= MOST_PACKED_ROWS
        if self.scale is None or (x.device.type == "cpu" and few):
            y = quantised_linear(rows, PackedWeight(self.codes, self.scale), bits=8)
        elif _suits_triton(rows):
            y = int8_linear_on_gpu(rows, self.codes, self.scale)
        else:
            y = F.linear(rows, self.codes.to(x.dtype)) * self.scale
        return _finish(y, self.bias, x)


class Int4Linear(nn.Module):
    """weight ≈ codes * scale + minimum for groups of 32 inputs, codes of 4 bits, by `quantised_linear`.

    Raises InputError where there is no CPU, and for sizes that the kernel does not take.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        if linear.weight.device.type != "cpu":
            raise InputError(
                f"weights int4 need a CPU or CUDA, not {linear.weight.device.type}: choose int8 or bf16"
            )
        _require_multiple(name, linear, "in_features", GROUP, "int4")
        _require_multiple(name, linear, "out_features", TILE, "int4")
        groups = linear.weight.detach().float().view(linear.out_features, -1, GROUP)
        minimum = groups.amin(-1).bfloat16()
        scale = ((groups.amax(-1) - minimum.float()) / 15).clamp(min=1e-6).bfloat16()
        codes = ((groups - minimum.float()[..., None]) / scale.float()[..., None]).round()
        packed = pack_int4(codes.clamp(0, 15).to(torch.uint8), scale, minimum, linear.weight.dtype)
        self.codes = nn.Buffer(packed.codes)
        self.factors = None if packed.factors is None else nn.Buffer(packed.factors)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), in the dtype of the layer that this was made of."""
        y = quantised_linear(x, PackedWeight(self.codes, self.factors), bits=4)
        return y if self.bias is None else y + self.bias


class Int4LinearOnGpu(nn.Module):
    """weight ≈ (codes - 8) * scale + zero for groups of 32 inputs, two codes a byte, by a Triton kernel.

    Raises InputError for a number of inputs that is no multiple of 32.
    """

    def __init__(self, linear: nn.Linear, name: str) -> None:
        super().__init__()
        _require_multiple(name, linear, "in_features", GROUP, "int4")
        groups = linear.weight.detach().float().view(linear.out_features, -1, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scale = ((high - low) / 15).clamp(min=1e-6).bfloat16()
        zero = (low + 8 * scale.float()).bfloat16()
        codes = ((groups - zero.float()[..., None]) / scale.float()[..., None]).round() + 8
        self.codes = nn.Buffer(pack_nibbles(codes.clamp(0, 15).to(torch.uint8).flatten(1)))
        self.scale, self.zero = nn.Buffer(scale), nn.Buffer(zero)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) bf16 -> (..., out_features) bf16."""
        rows = x.reshape(-1, x.shape[-1])
        if _suits_triton(rows):
            y = int4_linear_on_gpu(rows, self.codes, self.scale, self.zero)
        else:
            y = F.linear(rows, unpack_nibbles(self.codes, self.scale, self.zero).to(x.dtype))
        return _finish(y, self.bias, x)


class FewRowsLinear(nn.Module):
    """A linear layer with its own weight, bf16 on a CPU, of which few rows are multiplied in C++."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        rows = x.reshape(-1, x.shape[-1])
        if rows.shape[0] > few_rows_linear.MOST_ROWS:
            return F.linear(x, self.weight, self.bias)
        return _finish(few_rows_linear.few_rows_linear(rows, self.weight), self.bias, x)


def _suits_triton(rows: Tensor) -> bool:
    return _HAS_TRITON and rows.is_cuda and rows.shape[0] <= MOST_PACKED_ROWS


KINDS: dict[str, type[Int8Linear] | type[Int4Linear]] = {"int8": Int8Linear, "int4": Int4Linear}


def quantise_weights(model: Transformer, kind: str) -> None:
    """Replace every linear layer of `model`, and its output head, by one with weights of `kind`.

    A tied dense embedding stays as it is for looking up tokens; its quantised form is the head's, which has 8
    bits whatever the kind: with 4 it alone would cost most of the quality. Raises InputError where a layer's
    size does not suit the kind, naming the layer.
    """
    _untie(model)
    for path, module in _linear_layers(model):
        if module is model.head:
            quantised: nn.Module = Int8Linear(module, path)
        else:
            on_gpu = kind == "int4" and module.weight.is_cuda
            quantised = (Int4LinearOnGpu if on_gpu else KINDS[kind])(module, path)
        _replace(model, path, quantised)


def multiply_few_rows(model: Transformer) -> None:
    """Where the CPU has AVX512-BF16, have linear layers in bf16 and the output head take `few_rows_linear`.

    Weights stay where they are, that of a tied dense embedding, too.
    """
    weight = next(model.parameters())
    if weight.is_cpu and weight.dtype == torch.bfloat16 and few_rows_linear.is_in_cpp():
        _untie(model)
        for path, module in _linear_layers(model):
            if module.out_features >= few_rows_linear.FEWEST_OUTPUTS:
                _replace(model, path, FewRowsLinear(module))


def _untie(model: Transformer) -> None:
    """Give a tied dense embedding a head of its own, with the same weight."""
    if model.head is None and isinstance(model.embedding, DenseEmbedding):
        weight = model.embedding.weight
        model.head = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        model.head.weight = weight


def _linear_layers(model: Transformer) -> list[tuple[str, nn.Linear]]:
    return [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]


def _replace(model: Transformer, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _require_multiple(name: str, linear: nn.Linear, side: str, multiple: int, kind: str) -> None:
    size = getattr(linear, side)
    if size % multiple:
        suited = "int8 or bf16" if kind == "int4" and not linear.in_features % INT8_INPUTS else "bf16"
        raise InputError(
            f"weights {kind}: {name} has {side} = {size}, expected a multiple of {multiple}: choose {suited} "
            "for this model"
        )


def _finish(y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    if bias is not None:
        y = y + bias
    return y.view(*x.shape[:-1], y.shape[-1])
