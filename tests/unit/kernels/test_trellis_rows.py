"""Trellis codes: their values against Python's integers by every path, and how near the encoder comes."""

import dataclasses
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from random_rows import random_trellis
from triton_checks import build, run_interpreted

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import TrellisRows, packed_linear, packed_lookup, trellis_encode, unpack
from ryzen_llm.kernels import trellis_rows as module
from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.trellis_rows import has_fast_values, trellis_dot, values_of

BITS = range(1, 5)
GRID_ERRORS = {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.01154}
"""Of the best uniform grid on normal numbers, in variances (Max 1960); no code is below 4**-bits."""
needs_avx2 = pytest.mark.skipif(not cpu_features().avx2, reason="this CPU has no AVX2")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is there on Linux only")


def normal(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed))


def decoded(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return values_of(TrellisRows(codes, torch.ones(len(codes), 1), bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 48, 576])
def test_values_are_those_of_the_formula_in_integers(bits: int, size: int) -> None:
    rows, values = random_trellis(bits, 37, size)
    torch.testing.assert_close(unpack(rows).double(), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((values_of(rows) * rows.scale).double(), values, atol=1e-5, rtol=1e-5)
    indices = torch.tensor([5, 0, 36, 5])
    torch.testing.assert_close(packed_lookup(indices, rows).double(), values[indices], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_product_is_that_of_the_values(bits: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles that do not divide the rows; with its gradient."""
    monkeypatch.setattr("ryzen_llm.kernels.packed_rows.TILE_ROWS", 10)
    rows, values = random_trellis(bits)
    x = normal(n, 48).requires_grad_()
    got = packed_linear(x, rows)
    torch.testing.assert_close(got.double(), x.double() @ values.T, atol=2e-4, rtol=1e-5)
    upstream = normal(*got.shape, seed=1)
    (gradient,) = torch.autograd.grad(got, x, upstream)
    torch.testing.assert_close(gradient.double(), upstream.double() @ values, atol=2e-4, rtol=1e-5)


@needs_avx2
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [8, 24, 576])
def test_one_x_is_multiplied_straight_from_the_codes(bits: int, size: int) -> None:
    """Sums are fp32: off by a part of the sum of the terms' sizes; the mean of 510 is taken off last."""
    rows, values = random_trellis(bits, 33, size)
    assert has_fast_values()
    terms = normal(1, size)[0].double().abs() @ (values.abs() + 4).T
    for dtype in (torch.float32, torch.bfloat16):
        x = normal(1, size)[0].to(dtype)
        got = trellis_dot(x, rows)
        assert got.dtype == torch.float32
        assert ((got.double() - x.double() @ values.T).abs() <= terms * 2**-20).all()


@needs_avx2
def test_no_rows_give_no_products() -> None:
    rows, _ = random_trellis(2)
    empty = TrellisRows(rows.codes[:0], rows.scale[:0], 2)
    assert trellis_dot(normal(1, 48)[0], empty).shape == (0,)
    assert unpack(empty).shape == (0, 48)


@needs_avx2
@pytest.mark.parametrize("dynamic", [False, True], ids=["static sizes", "symbolic sizes"])
def test_a_compiled_step_takes_it_as_one_graph(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, values = random_trellis(3)
    monkeypatch.setattr("ryzen_llm.kernels.packed_rows.multiply_by_tiles", None)
    x = normal(1, 48)
    with torch.no_grad():
        got = torch.compile(packed_linear, fullgraph=True, dynamic=dynamic)(x, rows)
    torch.testing.assert_close(got.double(), x.double() @ values.T, atol=1e-4, rtol=1e-5)


@needs_avx2
def test_the_ops_keep_pytorchs_rules() -> None:
    rows, _ = random_trellis(3)
    assert has_fast_values(), "compiled"
    torch.library.opcheck(torch.ops.ryzen_llm.trellis_dot.default, (normal(1, 48)[0], rows.codes, 3))
    torch.library.opcheck(torch.ops.ryzen_llm.trellis_values.default, (rows.codes, 3))


@needs_avx2
def test_what_does_not_fit_is_refused_before_memory_is_read() -> None:
    rows, _ = random_trellis(3)
    x = normal(1, 48)[0]
    assert has_fast_values(), "compiled"
    for codes, bits in ((rows.codes, 2), (rows.codes[:, 1:], 3), (rows.codes, 5), (rows.codes.int(), 3)):
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.ryzen_llm.trellis_dot(x, codes, bits)
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.ryzen_llm.trellis_values(codes[:, :7], bits)
    for codes, bits in ((rows.codes, 0), (rows.codes[0], 3)):
        with pytest.raises(RuntimeError, match="do not fit"):
            torch.ops.ryzen_llm.trellis_values(codes, bits)
    for target, feedback, bits in (
        (normal(2, 16), torch.eye(8), 2),
        (normal(2, 12), torch.eye(12), 2),
        (normal(2, 16), torch.eye(16), 5),
    ):
        with pytest.raises(RuntimeError, match="do not fit"):
            trellis_encode(target, feedback, bits)
    for target, feedback in ((normal(2, 16) * torch.nan, torch.eye(16)), (normal(2, 16), -torch.eye(16))):
        with pytest.raises(InputError, match="must be finite"):
            trellis_encode(target, feedback, 2)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_nearer_to_normal_numbers_than_any_grid(bits: int) -> None:
    """By a sixth and more; and not nearer than is possible, which would be a fault of the measurement."""
    target = normal(64, 576)
    codes = trellis_encode(target, torch.eye(576), bits)
    assert codes.shape == (64, 2 + 576 * bits // 8)
    values = decoded(codes, bits)
    scale = (target * values).sum() / values.square().sum()
    error = float((target - scale * values).square().mean())
    assert 4.0**-bits < error < 0.86 * GRID_ERRORS[bits]


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_near_the_best_that_there_are(bits: int) -> None:
    """Beside the Viterbi algorithm over all states, which finds the least error of any row of codes."""
    states = torch.arange(2**16)
    mixed = (states * 34038481 + 76625530) % 2**32
    values = (sum(mixed >> shift & 255 for shift in (0, 8, 16, 24)) - 510) / 147.800537
    target = normal(8, 48)
    best = []
    for row in target.double():
        costs = (row[0] - values) ** 2
        for wanted in row[1:]:
            costs = costs.view(-1, 2**bits).amin(1)[states % 2 ** (16 - bits)] + (wanted - values) ** 2
        best.append(float(costs.min()))
    found = (decoded(trellis_encode(target, torch.eye(48), bits), bits) - target).double().square().sum(-1)
    least = torch.tensor(best, dtype=torch.float64)
    assert (found >= least * (1 - 1e-4)).all()
    assert (found / least).median() < 1.5


@pytest.mark.parametrize("size", [8, 64, 136, 256])
def test_every_path_makes_up_for_its_own_errors(size: int) -> None:
    """Where columns hang together, less of what the Hessian weighs is lost than without feedback; in rows
    shorter than a block, and longer than the window in which paths may differ.
    """
    states = normal(4 * size, size) @ normal(size, size, seed=1) / size**0.5
    hessian = (states.T @ states / len(states) + 0.01 * torch.eye(size)).double()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    feedback = torch.linalg.cholesky(inverse, upper=True).T.float()
    target = normal(48, size, seed=2)

    def cost(codes: torch.Tensor) -> float:
        errors = (target - decoded(codes, 2)).double()
        return float(((errors @ hessian) * errors).sum(-1).mean())

    plain = cost(trellis_encode(target, torch.eye(size), 2))
    assert cost(trellis_encode(target, feedback, 2)) < 0.85 * plain


def test_rows_do_not_depend_on_each_other() -> None:
    target = normal(40, 64)
    together = trellis_encode(target, torch.eye(64), 3)
    assert torch.equal(together[7:8], trellis_encode(target[7:8], torch.eye(64), 3))


def test_an_x86_processor_without_avx2_is_not_given_its_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would end the process."""
    monkeypatch.setattr(module, "cpu_features", lambda: dataclasses.replace(cpu_features(), avx2=False))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    rows, values = random_trellis(2)
    torch.testing.assert_close(unpack(rows).double(), values, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="AVX2 on x86"):
        trellis_encode(normal(1, 48), torch.eye(48), 2)


def test_without_a_compiler_codes_are_read_but_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr("torch.utils.cpp_extension.load", fail)
    monkeypatch.setattr(module, "_is_compiled", module._is_compiled.__wrapped__)
    monkeypatch.setattr(module, "cpu_features", lambda: dataclasses.replace(cpu_features(), avx2=True))
    rows, values = random_trellis(2)
    with pytest.warns(UserWarning, match=r"trellis_rows.cpp could not be compiled.*Ninja is required"):
        torch.testing.assert_close(unpack(rows).double(), values, atol=1e-5, rtol=1e-5)
    with (
        pytest.warns(UserWarning, match="trellis"),
        pytest.raises(InputError, match=r"C\+\+ compiler.*code: .grid"),
    ):
        trellis_encode(normal(1, 48), torch.eye(48), 2)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, which the interpreter is not for")
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted("interpreted_trellis_rows.py", {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
def test_the_kernels_on_a_gpu() -> None:
    run_interpreted("interpreted_trellis_rows.py", {})


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", BITS)
def test_the_kernels_compile_without_a_gpu(bits: int, capability: int) -> None:
    from ryzen_llm.kernels import trellis_rows_triton as kernels

    blocks = {"ROWS": kernels.BLOCK_ROWS, "COLUMNS": kernels.BLOCK_COLUMNS}
    for kernel, sizes in (
        (kernels.lookup_kernel, {"COLUMNS": kernels.LOOKUP_COLUMNS}),
        (kernels.linear_kernel, blocks),
    ):
        assert build(kernel, {"BITS": bits, **sizes}, capability).asm["cubin"]
