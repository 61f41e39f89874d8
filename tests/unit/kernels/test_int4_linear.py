"""The product with weights of 4 bits: C++ and PyTorch's op against fp64; rows do not depend on others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ryzen_llm.kernels import int4_linear as module
from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.int4_linear import int4_linear, pack_int4

needs_avx2 = pytest.mark.skipif(not cpu_features().avx2, reason="this CPU has no AVX2")
needs_avx512_bf16 = pytest.mark.skipif(
    not cpu_features().avx512_bf16, reason="this CPU has no AVX512-BF16, which that C++ form is written for"
)
IN_CPP = [
    pytest.param(torch.float32, marks=needs_avx2, id="fp32"),
    pytest.param(torch.bfloat16, marks=needs_avx512_bf16, id="bf16"),
]


@pytest.fixture
def weights() -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minima of 48 outputs and 96 inputs."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (48, 3, 32), dtype=torch.uint8)
    return codes, torch.rand(48, 3).bfloat16() / 8, torch.randn(48, 3).bfloat16()


def in_fp64(x: Tensor, weights: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The product, and the sum of its terms' sizes, which bounds what rounding each of them can cost."""
    codes, scale, minimum = weights
    dense = (codes.double() * scale.double()[..., None] + minimum.double()[..., None]).view(48, 96)
    return x.double() @ dense.T, x.double().abs() @ dense.abs().T


SHAPES = [(1,), (2, 1), (3,), (8,), (17,), (2, 3, 5), (0,)]


@pytest.mark.parametrize("dtype", IN_CPP)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_in_cpp_are_those_of_fp64(
    weights: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Sums are fp32, and a result in bf16 is rounded once."""
    x = torch.randn(*shape, 96).to(dtype)
    packed = pack_int4(*weights, dtype)
    assert packed.factors is None, "the C++ form is there"
    y = int4_linear(x, packed)
    expected, terms = in_fp64(x, weights)
    assert y.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    assert ((y.double() - expected).abs() <= expected.abs() * rounding + terms * 2**-20).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_pytorchs_op_are_those_of_fp64(
    weights: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In bf16 it rounds each weight before it multiplies."""
    monkeypatch.setattr(module, "is_in_cpp", lambda dtype: False)
    x = torch.randn(*shape, 96).to(dtype)
    y = int4_linear(x, pack_int4(*weights, dtype))
    expected, terms = in_fp64(x, weights)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
    assert ((y.double() - expected).abs() <= (expected.abs() + terms) * rounding + 1e-5).all()


@pytest.mark.parametrize("dtype", IN_CPP)
def test_a_row_does_not_depend_on_how_many_there_are(
    weights: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    packed = pack_int4(*weights, dtype)
    x = torch.randn(37, 96).to(dtype)
    together = int4_linear(x, packed)
    for count in range(1, 18):
        assert torch.equal(int4_linear(x[:count], packed), together[:count])


@pytest.mark.parametrize("dtype", IN_CPP)
def test_inputs_of_another_size_or_dtype_are_refused(
    weights: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype
) -> None:
    packed = pack_int4(*weights, dtype)
    for x in (torch.zeros(2, 64, dtype=dtype), torch.zeros(2, 96, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"expected fp32, or bf16 on a CPU .* with 96 inputs"):
            int4_linear(x, packed)


@needs_avx2
def test_without_a_compiler_pytorchs_op_is_used_and_that_is_said(
    weights: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    monkeypatch.setattr(module, "is_compiled", module.is_compiled.__wrapped__)
    with pytest.warns(UserWarning, match=r"needs a C\+\+ compiler and ninja \(Ninja is required"):
        assert pack_int4(*weights, torch.float32).factors is not None
