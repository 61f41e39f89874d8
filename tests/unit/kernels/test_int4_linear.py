"""The product with weights of 4 bits: C++ and PyTorch's op against fp64; rows do not depend on others."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ryzen_llm.kernels import int4_linear as module
from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.int4_linear import int4_linear, pack_int4

needs_avx512_bf16 = pytest.mark.skipif(
    not cpu_features().avx512_bf16, reason="this CPU has no AVX512-BF16, which the C++ form is written for"
)
FORMS = [pytest.param(True, marks=needs_avx512_bf16, id="C++"), pytest.param(False, id="PyTorch")]


@pytest.fixture
def weights() -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and minima of 48 outputs and 96 inputs."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (48, 3, 32), dtype=torch.uint8)
    return codes, torch.rand(48, 3).bfloat16() / 8, torch.randn(48, 3).bfloat16()


@pytest.mark.parametrize("compiled", FORMS)
@pytest.mark.parametrize("shape", [(1,), (2, 1), (3,), (8,), (17,), (2, 3, 5)])
def test_products_are_those_of_fp64(
    weights: tuple[Tensor, Tensor, Tensor],
    compiled: bool,
    shape: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setattr(module, "is_compiled", lambda: False)
    codes, scale, minimum = weights
    x = torch.randn(*shape, 96).bfloat16()
    y = int4_linear(x, pack_int4(codes, scale, minimum))
    dense = codes.double() * scale.double()[..., None] + minimum.double()[..., None]
    expected = x.double() @ dense.view(48, 96).T
    # C++ rounds the result once, to 8 bits; PyTorch's op each product's weight as well.
    largest = (x.double().abs() @ dense.abs().view(48, 96).T) * (0 if compiled else 2**-8)
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + largest + 1e-4).all()


@needs_avx512_bf16
def test_a_row_does_not_depend_on_how_many_there_are(weights: tuple[Tensor, Tensor, Tensor]) -> None:
    packed = pack_int4(*weights)
    assert packed.factors is None, "the C++ form is there"
    x = torch.randn(37, 96).bfloat16()
    together = int4_linear(x, packed)
    for count in range(1, 18):
        assert torch.equal(int4_linear(x[:count], packed), together[:count])


@needs_avx512_bf16
def test_inputs_of_another_size_or_dtype_are_refused(weights: tuple[Tensor, Tensor, Tensor]) -> None:
    packed = pack_int4(*weights)
    for x in (torch.zeros(2, 64).bfloat16(), torch.zeros(2, 96)):
        with pytest.raises(RuntimeError, match="expected bf16 with 96 inputs"):
            int4_linear(x, packed)


@needs_avx512_bf16
def test_without_a_compiler_pytorchs_op_is_used_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    with pytest.warns(UserWarning, match=r"needs a C\+\+ compiler and ninja \(Ninja is required"):
        assert module.is_compiled.__wrapped__() is False
