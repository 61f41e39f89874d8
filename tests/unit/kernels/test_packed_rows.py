"""Packed rows against their formula, by every path: PyTorch, Inductor, Triton's interpreter and compiler."""

import importlib
from importlib.util import find_spec

import pytest
import torch
from random_rows import random_rows
from triton_checks import build, run_interpreted

from ryzen_llm.kernels import chunked_cross_entropy, packed_linear, packed_lookup, unpack


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_take_their_bits_and_come_back(bits: int) -> None:
    rows, values = random_rows(bits)
    assert rows.codes.nbytes * 8 == 37 * 48 * bits
    torch.testing.assert_close(unpack(rows).double(), values, atol=1e-5, rtol=1e-5)
    indices = torch.tensor([5, 0, 36, 5])
    torch.testing.assert_close(packed_lookup(indices, rows).double(), values[indices], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 3, 6, 8])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_the_product_is_that_of_the_values(bits: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles that do not divide the rows; with its gradient."""
    monkeypatch.setattr("ryzen_llm.kernels.packed_rows.TILE_ROWS", 10)
    rows, values = random_rows(bits)
    x = torch.randn(n, 48, generator=torch.Generator().manual_seed(0), requires_grad=True)
    got = packed_linear(x, rows)
    torch.testing.assert_close(got.double(), x.double() @ values.T, atol=2e-3, rtol=1e-5)
    upstream = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(got, x, upstream)
    torch.testing.assert_close(gradient.double(), upstream.double() @ values, atol=2e-3, rtol=1e-5)


def test_the_compiled_decoding_step_gives_the_same() -> None:
    rows, values = random_rows(5)
    x = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = torch.compile(packed_linear, fullgraph=True)(x, rows)
    torch.testing.assert_close(got.double(), x.double() @ values.T, atol=1e-3, rtol=1e-5)


def test_chunked_cross_entropy_of_no_rows_is_nan_and_of_one_without_a_batch_its_loss() -> None:
    head = torch.nn.Linear(3, 5, bias=False)
    x, targets = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 5
    assert chunked_cross_entropy(head, x[:0], targets[:0], [head.weight])[0].isnan()
    loss, _ = chunked_cross_entropy(head, x[3], targets[3], [head.weight])
    torch.testing.assert_close(loss, -head(x[3]).log_softmax(-1)[3])


def test_a_second_derivative_of_chunked_cross_entropy_is_refused_rather_than_wrong() -> None:
    head = torch.nn.Linear(3, 5, bias=False)
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss, _ = chunked_cross_entropy(head, x, torch.arange(6) % 5, [head.weight])
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_chunked_cross_entropy_has_the_loss_and_gradients_of_all_logits_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In fp64, in chunks that do not divide the rows, with targets that do not count."""
    module = importlib.import_module("ryzen_llm.kernels.chunked_cross_entropy")  # the function has its name
    monkeypatch.setattr(module, "slab_rows", lambda *_: 3)
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 5, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    head = torch.nn.Linear(4, 7, dtype=torch.float64)
    targets = torch.randint(7, (2, 5), generator=draw)
    targets[0, 1] = -100
    loss, correct = chunked_cross_entropy(head, hidden, targets, list(head.parameters()))
    expected = torch.nn.functional.cross_entropy(head(hidden).flatten(0, 1), targets.flatten())
    assert correct == (head(hidden).argmax(-1) == targets).sum()
    wanted = (hidden, *head.parameters())
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(3 * loss, wanted), torch.autograd.grad(3 * expected, wanted), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is there on Linux only")


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, which the interpreter is not for")
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted("interpreted_packed_rows.py", {"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
def test_the_kernels_on_a_gpu() -> None:
    run_interpreted("interpreted_packed_rows.py", {})


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_kernels_compile_without_a_gpu(bits: int, capability: int) -> None:
    from ryzen_llm.kernels import packed_rows_triton as kernels

    blocks = {"ROWS": kernels.BLOCK_ROWS, "BYTES": kernels.BLOCK_BYTES}
    for kernel, sizes in (
        (kernels.lookup_kernel, {"COLUMNS": kernels.LOOKUP_COLUMNS}),
        (kernels.linear_kernel, blocks),
    ):
        assert build(kernel, {"BITS": bits, **sizes}, capability).asm["cubin"]
