"""The fused head and loss against the formula in fp64: values and gradients."""

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import linear_cross_entropy

module = importlib.import_module("ryzen_llm.kernels.linear_cross_entropy")  # the function has its name
FUSED = torch.ops.ryzen_llm


def inputs(rows: int, size: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, size, generator=draw, dtype=torch.float64)
    weight = torch.randn(vocab, size, generator=draw, dtype=torch.float64)
    return x, weight, torch.randint(vocab, (rows,), generator=draw)


def formula(x: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """PyTorch's cross-entropy of all logits; the z-loss it lacks is written out."""
    z_loss, reduction = options.pop("z_loss", 0.0), options.pop("reduction", "mean")
    logits = x @ weight.T
    losses = F.cross_entropy(logits, targets, reduction="none", **options)
    kept = targets != options.get("ignore_index", -100)
    losses = losses + torch.where(kept, z_loss * logits.logsumexp(-1).square(), 0)
    if reduction == "none":
        return losses
    return losses.sum() / (kept.sum() if reduction == "mean" else 1)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last of them shorter, of several softmax blocks each."""
    monkeypatch.setattr(module, "slab_rows", lambda rows, *_: min(rows, 5))
    monkeypatch.setattr(module, "_SOFTMAX_ROWS", 2)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("label_smoothing", "z_loss"), [(0.0, 0.0), (0.1, 0.0), (0.0, 1e-2), (0.2, 1e-3)])
def test_loss_and_gradients_follow_the_formula(reduction: str, label_smoothing: float, z_loss: float) -> None:
    x, weight, targets = inputs(13, 7, 11)
    targets[[2, 5]] = 3
    options: dict[str, Any] = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "reduction": reduction,
        "ignore_index": 3,
    }
    results = []
    for function in (lambda *a: linear_cross_entropy(*a, **options)[0], lambda *a: formula(*a, **options)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*leaves, targets)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss, *torch.autograd.grad(loss, leaves, upstream)))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-12, rtol=1e-10)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_compiled_loop_follows_the_formula(reduction: str) -> None:
    x, weight, targets = inputs(13, 7, 11)
    targets[[2, 5]] = -100
    settings: dict[str, Any] = {"label_smoothing": 0.1, "z_loss": 1e-2, "reduction": reduction}
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss, num_correct = linear_cross_entropy(*leaves, targets, compiled=True, **settings)
    exact = formula(*leaves, targets, **settings)
    torch.testing.assert_close(loss, exact, atol=1e-12, rtol=1e-10)
    assert num_correct == ((x @ weight.T).argmax(-1) == targets).sum()
    upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
    for ours, expected in zip(
        torch.autograd.grad(loss, leaves, upstream), torch.autograd.grad(exact, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-12, rtol=1e-10)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(*leaves, targets + 11, compiled=True)


@given(rows=st.integers(0, 9), size=st.integers(1, 9), vocab=st.integers(1, 40), strided=st.booleans())
@settings(max_examples=30, deadline=None)
def test_any_shape_also_empty_and_not_contiguous(rows: int, size: int, vocab: int, strided: bool) -> None:
    x, weight, targets = inputs(rows, size, vocab)
    if strided:
        x, weight = x.T.contiguous().T, weight.repeat_interleave(2, 0)[::2]
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss, num_correct = linear_cross_entropy(*leaves, targets, reduction="sum")
    exact = formula(*leaves, targets, reduction="sum")
    torch.testing.assert_close(loss, exact, atol=1e-11, rtol=1e-10)
    assert num_correct == ((x @ weight.T).argmax(-1) == targets).sum()
    for ours, expected in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(exact, leaves), strict=True
    ):
        torch.testing.assert_close(ours, expected, atol=1e-11, rtol=1e-10)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction: str) -> None:
    x, weight, targets = inputs(6, 3, 5)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        settings: Any = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": reduction}
        return linear_cross_entropy(x, weight, targets, **settings)[0]

    assert torch.autograd.gradcheck(loss, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("gradients", [True, False])
def test_opcheck(gradients: bool) -> None:
    x, weight, targets = inputs(6, 3, 5)
    leaves = (x.requires_grad_(gradients), weight.requires_grad_(gradients), targets)
    ones = torch.ones(6, dtype=torch.float64)
    torch.library.opcheck(
        FUSED.linear_cross_entropy.default, (*leaves, ones, 0.1, 0.01, False, 1.0, gradients)
    )
    torch.library.opcheck(FUSED.linear_cross_entropy_rows.default, (*leaves, 0.1, 0.01, False, 1.0))


@pytest.mark.parametrize("vocab", [50, 64], ids=["PyTorch's products", "products in C++ where there are any"])
def test_under_autocast_the_weights_gradient_stays_fp32(vocab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding each product to bf16 costs 2^-8; a sum in bf16 over many rows loses far more."""
    monkeypatch.setattr(module, "slab_rows", lambda rows, *_: min(rows, 300))  # three chunks
    x, weight, targets = inputs(700, 32, vocab)
    exact_leaves = [x.requires_grad_(), weight.requires_grad_()]
    exact = torch.autograd.grad(formula(*exact_leaves, targets), exact_leaves)
    leaves = [t.detach().float().requires_grad_() for t in exact_leaves]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = linear_cross_entropy(*leaves, targets)
    assert loss.dtype == torch.float32
    gradients = torch.autograd.grad(loss, leaves)
    for ours, expected in zip(gradients, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() < 2**-7 * expected.norm()


def test_memory_does_not_grow_with_rows_times_vocabulary() -> None:
    """The point of it: one slab of logits, whatever the number of rows."""
    device = torch.device("cpu")
    for rows, vocab in ((4096, 50_000), (100_000, 8192), (64, 50_000)):
        slab = module.slab_rows(rows, vocab, 2, device)
        budget = (module.cpu_caches().l3 or 2**24) // 2
        assert slab <= rows
        assert slab * vocab * 2 <= max(budget, 128 * vocab * 2)


def test_all_ignored_is_nan_as_in_pytorch_and_counts_nothing() -> None:
    x, weight, _ = inputs(3, 4, 5)
    loss, num_correct = linear_cross_entropy(x, weight, torch.full((3,), -100))
    assert loss.isnan()
    assert num_correct == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_mean_over_no_rows_is_nan_as_in_pytorch(dtype: torch.dtype) -> None:
    x, weight, targets = inputs(0, 4, 5)
    assert linear_cross_entropy(x.to(dtype), weight.to(dtype), targets)[0].isnan()


def half_precision_gradients_are_not_lost(device: str, weight_dtype: torch.dtype, reduction: Any) -> None:
    """30 by one weight: its sum over 4096 rows, before it is divided, is beyond fp16's largest, 65504."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(4096, 16, generator=draw) / 8, torch.randn(64, 16, generator=draw) / 8
    x[:, 0], weight[:, 0] = 30, 0
    x, weight, targets = x.half(), weight.half(), torch.zeros(4096, dtype=torch.int64)
    exact = [x.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.autograd.grad(formula(*exact, targets), exact)
    leaves = [x.to(device).requires_grad_(), weight.to(device, weight_dtype).requires_grad_()]
    with torch.autocast(device, torch.float16, enabled=weight_dtype != torch.float16):
        loss, _ = linear_cross_entropy(*leaves, targets.to(device), reduction=reduction)
    for ours, theirs in zip(torch.autograd.grad(loss.mean(), leaves), expected, strict=True):
        assert (ours.double().cpu() - theirs).norm() < 0.01 * theirs.norm()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=["fp16", "autocast"])
def test_the_gradient_by_the_weight_is_summed_in_fp32_and_scaled_before_it_is_rounded_to_fp16(
    weight_dtype: torch.dtype, reduction: Any
) -> None:
    half_precision_gradients_are_not_lost("cpu", weight_dtype, reduction)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=["fp16", "autocast"])
def test_so_it_is_on_a_gpu(weight_dtype: torch.dtype) -> None:
    half_precision_gradients_are_not_lost("cuda", weight_dtype, "mean")


def test_one_row_without_a_batch() -> None:
    x, weight, targets = inputs(1, 4, 5)
    loss, _ = linear_cross_entropy(x[0], weight, targets[0])
    torch.testing.assert_close(loss, formula(x, weight, targets), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_ignored_row_counts_for_nothing_whatever_it_holds(reduction: Any) -> None:
    x, weight, targets = inputs(6, 4, 5)
    targets[2] = -100
    expected = formula(x, weight, targets, reduction=reduction)
    x[2] = torch.nan
    loss, _ = linear_cross_entropy(x, weight, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_second_derivative_is_refused_rather_than_wrong(reduction: Any) -> None:
    x, weight, targets = inputs(6, 4, 5)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss, _ = linear_cross_entropy(*leaves, targets, reduction=reduction)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss.sum(), x, create_graph=True)


def test_the_compiled_loop_takes_more_settings_than_dynamo_compiles_of_one_function() -> None:
    """A schedule of the smoothing, and training and validation in several dtypes, in one process."""
    for step in range(6):
        for gradients in (True, False):
            x, weight, targets = inputs(13, 7, 11)
            smoothing = 0.1 * step
            loss, _ = linear_cross_entropy(
                x.requires_grad_(gradients), weight, targets, compiled=True, label_smoothing=smoothing
            )
            exact = formula(x, weight, targets, label_smoothing=smoothing)
            torch.testing.assert_close(loss, exact, atol=1e-12, rtol=1e-10)


def test_what_does_not_fit_is_named() -> None:
    x, weight, targets = inputs(3, 4, 5)
    with pytest.raises(InputError, match="hidden_states are"):
        linear_cross_entropy(x, weight.T, targets)
    with pytest.raises(InputError, match="targets are"):
        linear_cross_entropy(x, weight, targets[:2])
    with pytest.raises(InputError, match="label_smoothing is 2"):
        linear_cross_entropy(x, weight, targets, label_smoothing=2)
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        linear_cross_entropy(x, weight, targets + 5)


@pytest.mark.slow
def test_compiled_without_a_graph_break() -> None:
    x, weight, targets = (t.float() if t.is_floating_point() else t for t in inputs(40, 16, 30))
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    compiled = torch.compile(linear_cross_entropy, fullgraph=True)
    for ours, plain in zip(compiled(*leaves, targets), linear_cross_entropy(*leaves, targets), strict=True):
        torch.testing.assert_close(ours, plain)
    ours = torch.autograd.grad(compiled(*leaves, targets)[0], leaves)
    plain = torch.autograd.grad(linear_cross_entropy(*leaves, targets)[0], leaves)
    torch.testing.assert_close(ours, plain)


def run_interpreted(environment: dict[str, str]) -> None:
    script = str(Path(__file__).with_name("interpreted_linear_cross_entropy.py"))
    command = [sys.executable, "-m", "pytest", "-q", script, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is there on Linux only")
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, which the interpreter is not for")
def test_the_triton_kernel_interpreted() -> None:
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    run_interpreted({"TRITON_INTERPRET": "1"})


@pytest.mark.gpu
def test_the_triton_kernel_on_a_gpu() -> None:
    run_interpreted({})


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_in_bf16_products_the_gradients_are_near_those_in_fp64(device: str) -> None:
    """The whole op. Logits have a deviation of 1: of 8, as unscaled weights make them, bf16 loses 1%."""
    x, weight, targets = inputs(700, 64, 1000)
    exact_leaves = [x.requires_grad_(), (weight / 8).requires_grad_()]
    exact = torch.autograd.grad(formula(*exact_leaves, targets), exact_leaves)
    leaves = [t.detach().float().to(device).requires_grad_() for t in exact_leaves]
    with torch.autocast(device, torch.bfloat16):
        loss, _ = linear_cross_entropy(*leaves, targets.to(device))
    for ours, expected in zip(torch.autograd.grad(loss, leaves), exact, strict=True):
        assert (ours.cpu() - expected).norm() < 2**-7 * expected.norm()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is there on Linux only")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("block", [1, 8192])
def test_every_configuration_compiles_without_a_gpu(
    capability: int, dtype: str, gradients: bool, block: int
) -> None:
    """Type and shared-memory errors, which the interpreter cannot see."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ryzen_llm.kernels.linear_cross_entropy_triton import softmax_rows_kernel

    signature = {
        "logits_ptr": f"*{dtype}",
        "targets_ptr": "*i64",
        "row_weights_ptr": "*fp32",
        "losses_ptr": "*fp32",
        "predictions_ptr": "*i64",
        "stride": "i32",
        "vocab": "i32",
        "label_smoothing": "fp32",
        "z_loss": "fp32",
        "GRADIENTS": "constexpr",
        "BLOCK": "constexpr",
    }
    source = ASTSource(softmax_rows_kernel, signature, {"GRADIENTS": gradients, "BLOCK": block})
    built = compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 16 if block > 1 else 4}
    )
    assert built.asm["cubin"]
