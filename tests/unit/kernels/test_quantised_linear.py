"""Products with weights of 4 and 8 bits: C++ and PyTorch's ops against fp64; rows do not depend on others."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import quantised_linear as module
from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.quantised_linear import PackedWeight, pack_int4, pack_int8, quantised_linear

needs_avx2 = pytest.mark.skipif(not cpu_features().avx2, reason="this CPU has no AVX2")
needs_avx512_vnni = pytest.mark.skipif(
    not (cpu_features().avx512_bf16 and cpu_features().avx512_vnni),
    reason="this CPU has no AVX512-BF16 and VNNI, which that C++ form is written for",
)
IN_CPP = [
    pytest.param(torch.float32, marks=needs_avx2, id="fp32"),
    pytest.param(torch.bfloat16, marks=needs_avx512_vnni, id="bf16"),
]


class Weights(NamedTuple):
    """Codes, their factors, and the matrix that they stand for in fp64, (48, 96)."""

    codes: Tensor
    factors: tuple[Tensor, ...]
    dense: Tensor

    def packed(self, dtype: torch.dtype) -> PackedWeight:
        pack: Any = pack_int4 if len(self.factors) == 2 else pack_int8
        return pack(self.codes, *self.factors, dtype)


@pytest.fixture(params=[4, 8])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def weights(bits: int) -> Weights:
    torch.manual_seed(0)
    if bits == 8:
        codes, scale = torch.randint(-127, 128, (48, 96), dtype=torch.int8), torch.rand(48).bfloat16().float()
        return Weights(codes, (scale,), codes.double() * scale.double()[:, None])
    codes = torch.randint(0, 16, (48, 3, 32), dtype=torch.uint8)
    scale, minimum = torch.rand(48, 3).bfloat16() / 8, torch.randn(48, 3).bfloat16()
    dense = codes.double() * scale.double()[..., None] + minimum.double()[..., None]
    return Weights(codes, (scale, minimum), dense.view(48, 96))


def rounded(x: Tensor) -> Tensor:
    """Inputs as the C++ form for bf16 multiplies them: of 8 bits, with a scale for 32 of them."""
    groups = x.float().unflatten(-1, (-1, 32))
    largest = groups.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # a number by a tensor is rounded twice
    return ((groups * inverse).round() * (largest / 127)).flatten(-2)


def in_fp64(x: Tensor, weights: Weights) -> tuple[Tensor, Tensor]:
    """The product, and the sum of its terms' sizes, which bounds what rounding each of them can cost."""
    return x.double() @ weights.dense.T, x.double().abs() @ weights.dense.abs().T


SHAPES = [(1,), (2, 1), (3,), (8,), (17,), (2, 3, 5), (0,)]


@pytest.mark.parametrize("dtype", IN_CPP)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_in_cpp_are_those_of_fp64(
    weights: Weights, bits: int, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Sums are fp32, and a result in bf16 is rounded once."""
    x = torch.randn(*shape, 96).to(dtype)
    packed = weights.packed(dtype)
    assert packed.factors is None, "the C++ form is there"
    y = quantised_linear(x, packed, bits)
    expected, terms = in_fp64(rounded(x) if dtype == torch.bfloat16 else x, weights)
    assert y.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 0
    assert ((y.double() - expected).abs() <= expected.abs() * rounding + terms * 2**-18).all()


@needs_avx512_vnni
def test_rounding_inputs_costs_half_a_step_at_most(weights: Weights, bits: int) -> None:
    """Also where one input is far larger than the others: only its own 32 have its steps."""
    x = torch.randn(9, 96).bfloat16()
    x[:, 40] = 300
    y = quantised_linear(x, weights.packed(torch.bfloat16), bits)
    expected, _ = in_fp64(x, weights)
    half_steps = x.double().unflatten(-1, (-1, 32)).abs().amax(-1) / 254
    bound = half_steps @ weights.dense.abs().unflatten(-1, (-1, 32)).sum(-1).T
    assert ((y.double() - expected).abs() <= bound + expected.abs() * 2**-8).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_pytorchs_ops_are_those_of_fp64(
    weights: Weights, bits: int, dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bf16 they round each weight before they multiply."""
    monkeypatch.setattr(module, "is_in_cpp", lambda dtype: False)
    x = torch.randn(*shape, 96).to(dtype)
    y = quantised_linear(x, weights.packed(dtype), bits)
    expected, terms = in_fp64(x, weights)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
    assert ((y.double() - expected).abs() <= (expected.abs() + terms) * rounding + 1e-5).all()


@pytest.mark.parametrize("dtype", IN_CPP)
def test_a_row_does_not_depend_on_how_many_there_are(weights: Weights, bits: int, dtype: torch.dtype) -> None:
    packed = weights.packed(dtype)
    x = torch.randn(37, 96).to(dtype)
    together = quantised_linear(x, packed, bits)
    for count in range(1, 18):
        assert torch.equal(quantised_linear(x[:count], packed, bits), together[:count])


@pytest.mark.parametrize("damage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", IN_CPP)
def test_what_is_no_number_does_not_get_lost(
    weights: Weights, bits: int, dtype: torch.dtype, damage: float
) -> None:
    """So that whoever looks at the logits learns of it; other rows are as they were."""
    packed = weights.packed(dtype)
    x = torch.randn(3, 96).to(dtype)
    expected = quantised_linear(x, packed, bits)
    x[1, 70] = damage
    y = quantised_linear(x, packed, bits)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], expected[::2])


@pytest.mark.parametrize("dtype", IN_CPP)
def test_zeros_give_zeros(weights: Weights, bits: int, dtype: torch.dtype) -> None:
    """A group of them has no scale."""
    y = quantised_linear(torch.zeros(2, 96, dtype=dtype), weights.packed(dtype), bits)
    assert torch.equal(y, torch.zeros(2, 48, dtype=dtype))


@pytest.mark.parametrize("dtype", IN_CPP)
def test_inputs_of_another_size_or_dtype_are_refused(weights: Weights, bits: int, dtype: torch.dtype) -> None:
    packed = weights.packed(dtype)
    for x in (torch.zeros(2, 64, dtype=dtype), torch.zeros(2, 96, dtype=torch.float64)):
        with pytest.raises(RuntimeError, match=r"expected fp32, or bf16 on a CPU .* with 96 inputs"):
            quantised_linear(x, packed, bits)
    with pytest.raises(RuntimeError, match="expected contiguous tiles"):
        quantised_linear(torch.zeros(2, 96, dtype=dtype), PackedWeight(packed.codes[:, 1:], None), bits)


@pytest.mark.parametrize("in_cpp", [True, False], ids=["C++", "PyTorch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_of_sizes_that_are_not_laid_out_are_refused(
    dtype: torch.dtype, in_cpp: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's op of 8 bits would read beyond them, and end the process at times."""
    if not in_cpp:
        monkeypatch.setattr(module, "is_in_cpp", lambda dtype: False)
    for in_features in (1, 24, 40, 100):
        with pytest.raises(InputError, match=rf"codes are \(16, {in_features}\), expected .* multiple of 16"):
            pack_int8(torch.zeros(16, in_features, dtype=torch.int8), torch.ones(16), dtype)
    for shape in ((40, 2, 32), (1, 2, 32), (32, 2, 16)):
        factors = torch.ones(shape[:2], dtype=torch.bfloat16)
        with pytest.raises(InputError, match=r"codes are .*, expected \(out_features, groups, 32\)"):
            pack_int4(torch.zeros(shape, dtype=torch.uint8), factors, factors, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(5, 48), (40, 96), (48, 80)])
def test_with_8_bits_sizes_that_the_tiles_do_not_fit_are_multiplied_by_pytorchs_op(
    sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    codes, scale = torch.randint(-127, 128, sizes, dtype=torch.int8), torch.rand(sizes[0]).bfloat16().float()
    weights = Weights(codes, (scale,), codes.double() * scale.double()[:, None])
    x = torch.randn(3, sizes[1]).to(dtype)
    expected, terms = in_fp64(x, weights)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-20
    y = quantised_linear(x, weights.packed(dtype), 8)
    assert ((y.double() - expected).abs() <= (expected.abs() + terms) * rounding + 1e-5).all()


@needs_avx2
def test_without_a_compiler_pytorchs_op_is_used_and_that_is_said(
    weights: Weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    monkeypatch.setattr(module, "is_compiled", module.is_compiled.__wrapped__)
    with pytest.warns(UserWarning, match=r"needs a C\+\+ compiler and ninja \(Ninja is required"):
        assert weights.packed(torch.float32).factors is not None
