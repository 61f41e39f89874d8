"""Linear layers of a training step in C++, forward and backward, against their formula in fp64."""

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ryzen_llm.kernels import linear_cpu
from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.linear import linear_in_cpp

pytestmark = pytest.mark.skipif(
    not cpu_features().avx512_bf16 or cpu_features().amx_bf16, reason="for CPUs with AVX512-BF16, without AMX"
)

BF16 = 2**-8
"""Of a number, what rounding to bf16 takes at most."""
SUMS = 1e-5
"""Of a sum's terms, what fp32 takes at most here."""


@pytest.fixture(autouse=True, scope="module")
def compiled() -> None:
    assert linear_cpu.is_in_cpp()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_near(result: Tensor, exact: Tensor, terms: Tensor, rounding: float) -> None:
    """Within a rounding of `exact`, and what a sum of `terms`, in absolute value, takes."""
    assert result.shape == exact.shape
    assert ((result.double() - exact).abs() <= rounding * exact.abs() + SUMS * terms).all()


@given(
    leading=st.lists(st.integers(0, 5), min_size=0, max_size=2),
    rows=st.integers(0, 40),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=60, deadline=None)
def test_results_and_gradients_are_those_of_fp64(
    leading: list[int], rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    """In whole and cut tiles: numbers are rounded once, and the gradient of fp32 weights not at all."""
    x = normal(*leading, rows, 16 * inputs).bfloat16().requires_grad_()
    weight = normal(16 * outputs, 16 * inputs, seed=1).to(dtype).requires_grad_()
    y = linear_cpu.multiply(x, weight)
    assert y.dtype == torch.bfloat16
    by_y = normal(*y.shape, seed=2).bfloat16()
    dx, dw = torch.autograd.grad(y, (x, weight), by_y)
    assert (dx.dtype, dw.dtype) == (torch.bfloat16, dtype)

    x64, w64, by_y64 = x.detach().double(), weight.detach().bfloat16().double(), by_y.double()
    assert_near(y, x64 @ w64.T, x64.abs() @ w64.abs().T, BF16)
    assert_near(dx, by_y64 @ w64, by_y64.abs() @ w64.abs(), BF16)
    x64, by_y64 = x64.flatten(0, -2), by_y64.flatten(0, -2)
    rounding = BF16 if dtype == torch.bfloat16 else 0.0
    assert_near(dw, by_y64.T @ x64, by_y64.abs().T @ x64.abs(), rounding)


@pytest.mark.parametrize("rows", [2047, 2048, 2049, 4097])
def test_the_weights_gradient_takes_all_rows_however_it_is_divided(rows: int) -> None:
    """It is summed in parts of 2048 rows, and rows by twos."""
    x, by_y = normal(rows, 48).bfloat16(), normal(rows, 80, seed=1).bfloat16()
    total = torch.full((80, 48), torch.nan)
    exact, terms = by_y.double().T @ x.double(), by_y.double().abs().T @ x.double().abs()
    linear_cpu.add_by_weight(total, by_y, x, add=False)
    assert_near(total, exact, terms, 0)
    linear_cpu.add_by_weight(total, by_y, x, add=True)
    assert_near(total, 2 * exact, 2 * terms, 0)


@pytest.mark.usefixtures("threads")
def test_neither_other_rows_nor_threads_change_a_bit() -> None:
    weight = normal(176, 80)
    x, by_y = normal(300, 80, seed=1).bfloat16(), normal(300, 176, seed=2).bfloat16()

    def results() -> list[Tensor]:
        dw = torch.empty(176, 80)
        linear_cpu.add_by_weight(dw, by_y, x, add=False)
        return [linear_cpu.multiply(x, weight), linear_cpu.by_input(by_y, weight), dw]

    expected = results()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert all(torch.equal(a, b) for a, b in zip(results(), expected, strict=True))
    for rows in (1, 7, 129):
        assert torch.equal(linear_cpu.multiply(x[:rows], weight), expected[0][:rows])
        assert torch.equal(linear_cpu.by_input(by_y[:rows], weight), expected[1][:rows])


def test_layout_changes_nothing() -> None:
    """A view that is not contiguous is as good as its copy."""
    weight = normal(32, 48).requires_grad_()
    x = normal(48, 6, 4).bfloat16().transpose(0, 2)
    by_y = normal(1, 1, 32).bfloat16().expand(4, 6, 32)
    y, copied = linear_cpu.multiply(x, weight), linear_cpu.multiply(x.contiguous(), weight)
    assert torch.equal(y, copied)
    (got,) = torch.autograd.grad(y, weight, by_y)
    (expected,) = torch.autograd.grad(copied, weight, by_y.contiguous())
    assert torch.equal(got, expected)


def test_threads_of_python_do_not_share_what_is_packed() -> None:
    """As in two models that train in one process: each call's factors lie in room that is kept."""
    cases = [(normal(200, 16 * n, seed=n).bfloat16(), normal(96, 16 * n, seed=n + 1)) for n in range(1, 9)]
    expected = [linear_cpu.multiply(*case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            got = pool.map(lambda case: linear_cpu.multiply(*case), cases)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_spoils_all_that_it_meets_and_nothing_else(value: float) -> None:
    x, weight = normal(20, 32).bfloat16(), normal(64, 32)
    x[11, 3] = value
    y = linear_cpu.multiply(x, weight)
    spoilt = ~y.isfinite()
    assert spoilt[11].all()
    assert spoilt.sum() == 64


def test_they_are_well_behaved_ops() -> None:
    ops = torch.ops.ryzen_llm
    x, weight, by_y = normal(3, 5, 32).bfloat16(), normal(48, 32), normal(3, 5, 48).bfloat16()
    torch.library.opcheck(ops.linear_cpu.default, (x.requires_grad_(), weight.requires_grad_()))
    torch.library.opcheck(ops.linear_cpu_by_input.default, (by_y, weight.detach()))
    torch.library.opcheck(ops.linear_cpu_by_weight.default, (by_y, x.detach()))
    torch.library.opcheck(ops.linear_cpu_add_by_weight.default, (torch.zeros(48, 32), by_y, x.detach(), True))


def test_second_derivatives_are_refused() -> None:
    """They would be wrong without a word if the gradient counted as a constant."""
    x, weight = normal(8, 16).bfloat16().requires_grad_(), normal(16, 16).requires_grad_()
    with pytest.raises(RuntimeError, match=r"linear can be differentiated once; .*PLAIN"):
        torch.autograd.grad(linear_cpu.multiply(x, weight).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_step_takes_it_without_a_break(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under autocast, in one graph; the result is that of the op called by hand."""
    monkeypatch.setattr(linear_cpu, "FEWEST_ROWS", 64)
    x, weight = normal(4, 16, 48).requires_grad_(), normal(32, 48, seed=1).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = torch.compile(linear_in_cpp, fullgraph=True, dynamic=dynamic)(x, weight)
    expected = linear_cpu.multiply(x.bfloat16(), weight)
    by_y = normal(*y.shape, seed=3).bfloat16()
    ours, by_hand = (torch.autograd.grad(result, (x, weight), by_y) for result in (y, expected))
    assert all(torch.equal(a, b) for a, b in zip((y, *ours), (expected, *by_hand), strict=True))


def test_a_bias_is_added_and_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Qwen2 has it; rounded to bf16 as the result is."""
    monkeypatch.setattr(linear_cpu, "FEWEST_ROWS", 64)
    x, weight, bias = normal(64, 48), normal(32, 48, seed=1), normal(32, seed=2).requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear_in_cpp(x, weight, bias)
    product = x.bfloat16().double() @ weight.detach().bfloat16().double().T
    exact = product + bias.detach()
    assert ((y - exact).abs() <= BF16 * (product.abs() + bias.detach().abs() + exact.abs()) + SUMS).all()
    (by_bias,) = torch.autograd.grad(y, bias, torch.ones_like(y))
    assert torch.equal(by_bias, torch.full((32,), 64.0))


def test_the_ops_are_for_training_steps_that_they_suit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else, such as a decoding step, has PyTorch's product."""
    taken = []
    module = sys.modules["ryzen_llm.kernels.linear"]  # its name is the function's too
    monkeypatch.setattr(module, "linear", lambda x, weight, bias: taken.append(x.shape))
    rows = linear_cpu.FEWEST_ROWS
    x, weight = normal(rows, 32).bfloat16(), normal(48, 32).bfloat16().requires_grad_()
    linear_in_cpp(x, weight)
    linear_in_cpp(x.requires_grad_(), weight.detach())
    with torch.autocast("cpu", torch.bfloat16):
        linear_in_cpp(x.detach().float(), weight.detach().float().requires_grad_())
    assert not taken
    with torch.no_grad():
        linear_in_cpp(x, weight)
    linear_in_cpp(x.detach(), weight.detach())
    linear_in_cpp(x[1:], weight)
    linear_in_cpp(x.detach().float(), weight.detach().float().requires_grad_())
    linear_in_cpp(x, normal(40, 32).bfloat16().requires_grad_())
    with torch.autocast("cpu", torch.float16):
        linear_in_cpp(x, weight)
    assert len(taken) == 6


def test_its_operations_are_counted() -> None:
    """FLOPs of a step, from which the collector has MFU, do not forget what is not PyTorch's."""
    x, weight = normal(5, 7, 32).bfloat16().requires_grad_(), normal(48, 32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        linear_cpu.multiply(x, weight).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 35 * 32 * 48


def test_errors_say_what_was_given() -> None:
    ops = torch.ops.ryzen_llm
    x, weight = normal(3, 32).bfloat16(), normal(48, 32)
    with pytest.raises(RuntimeError, match=r"linear_cpu needs bf16, got \[3, 32\]"):
        ops.linear_cpu(x.float(), weight)
    for wrong in (weight.double(), weight.T, weight[:, :16], normal(40, 32)):
        with pytest.raises(
            RuntimeError, match=r"\(outputs, inputs\) in bf16 or fp32, both multiples of 16, got"
        ):
            ops.linear_cpu(x, wrong)
    with pytest.raises(RuntimeError, match=r"got \[3, 48\], \[4, 32\] and \[48, 32\]"):
        ops.linear_cpu_by_weight(normal(3, 48).bfloat16(), normal(4, 32).bfloat16())
