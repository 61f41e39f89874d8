"""Products of few rows in bf16 are those of fp64, rounded once, and no row depends on the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzen_llm.kernels.few_rows_linear import FEWEST_OUTPUTS, few_rows_linear, is_in_cpp

pytestmark = pytest.mark.skipif(not is_in_cpp(), reason="needs a CPU with AVX512-BF16 and a C++ compiler")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 150), st.integers(FEWEST_OUTPUTS, 90), st.integers(0, 99))
def test_products_are_those_of_fp64(rows: int, inputs: int, outputs: int, seed: int) -> None:
    """Any sizes: inputs that fill no register, outputs that fill no block, no rows at all."""
    x, weight = draw(rows, inputs, seed=seed), draw(outputs, inputs, seed=seed + 1)
    y = few_rows_linear(x, weight)
    expected = x.double() @ weight.double().T
    terms = x.double().abs() @ weight.double().abs().T
    assert y.dtype == torch.bfloat16
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + terms * 2**-20).all()


def test_a_row_does_not_depend_on_how_many_there_are() -> None:
    x, weight = draw(37, 200), draw(70, 200, seed=1)
    together = few_rows_linear(x, weight)
    for count in range(1, 18):
        assert torch.equal(few_rows_linear(x[:count], weight), together[:count])
        assert torch.equal(few_rows_linear(x[count:], weight), together[count:])


def test_strides_do_not_matter() -> None:
    x, weight = draw(64, 9).T, draw(64, 24, seed=1).T
    assert torch.equal(few_rows_linear(x, weight), few_rows_linear(x.contiguous(), weight.contiguous()))


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_what_is_no_number_does_not_get_lost(damage: float) -> None:
    x, weight = draw(3, 70), draw(20, 70, seed=1)
    expected = few_rows_linear(x, weight)
    x[1, 65] = damage
    y = few_rows_linear(x, weight)
    assert not y[1].isfinite().any()
    assert torch.equal(y[::2], expected[::2])


def test_it_is_an_op_that_can_be_compiled() -> None:
    x, weight = draw(5, 64), draw(12, 64, seed=1)
    torch.library.opcheck(torch.ops.ryzen_llm.few_rows_linear.default, (x, weight))
    torch._dynamo.reset()
    compiled = torch.compile(few_rows_linear, fullgraph=True)
    assert torch.equal(compiled(x, weight), few_rows_linear(x, weight))


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (draw(2, 32), draw(3, 32)),
        (draw(2, 32), draw(8, 31)),
        (draw(2, 2, 32), draw(8, 32)),
        (draw(2, 32).float(), draw(8, 32)),
    ],
    ids=["too few outputs", "other inputs", "not a matrix", "fp32"],
)
def test_what_does_not_fit_is_refused(x: torch.Tensor, weight: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"needs x \(rows, inputs\)"):
        few_rows_linear(x, weight)
