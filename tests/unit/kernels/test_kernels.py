"""Every op against its formula in fp64, forward and backward."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ryzen_llm.kernels import (
    apply_rotary,
    causal_attention,
    cross_entropy,
    document_starts,
    rms_norm,
    rotary_table,
    swiglu,
)
from ryzen_llm.kernels.causal_attention import (
    attention_by_flex,
    attention_by_pytorch,
    attention_in_query_blocks,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attention_formula(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query, one head and one row at a time, in the dtype of the inputs."""
    batch, heads, time, head_dim = queries.shape
    group = heads // keys.shape[1]
    context = torch.empty_like(queries)
    for b in range(batch):
        for h in range(heads):
            for t in range(time):
                scores = keys[b, h // group, : t + 1] @ queries[b, h, t] / head_dim**0.5
                context[b, h, t] = scores.softmax(0) @ values[b, h // group, : t + 1]
    return context


@given(rows=st.integers(1, 5), size=st.integers(1, 70), scale=st.sampled_from([1e-6, 1.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_rms_norm_follows_its_formula(rows: int, size: int, scale: float) -> None:
    x, weight = randn(rows, size) * scale, randn(size, seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    torch.testing.assert_close(
        rms_norm(x.float(), weight.float(), 1e-6).double(), expected, atol=1e-5, rtol=1e-5
    )


def test_rms_norm_of_bf16_is_rounded_once() -> None:
    """The mean square of values near 300 needs more than bf16's 8 bits."""
    x, weight = (randn(4, 512) * 300).bfloat16(), randn(512, seed=1).bfloat16()
    exact = rms_norm(x.float(), weight.float(), 1e-5)
    assert rms_norm(x, weight, 1e-5).dtype == torch.bfloat16
    assert torch.equal(rms_norm(x, weight, 1e-5), exact.bfloat16())


@given(time=st.integers(1, 40), half=st.integers(1, 20), theta=st.sampled_from([1e4, 1e6]))
@settings(max_examples=40, deadline=None)
def test_rotary_multiplies_each_pair_as_complex_numbers(time: int, half: int, theta: float) -> None:
    """(x[i] + j x[i + half]) * exp(j * position * theta^(-i/half)), which is how the paper defines it."""
    positions = torch.arange(time) * 7
    x = randn(2, 3, time, 2 * half)
    angles = positions.double()[:, None] * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)
    rotated = apply_rotary(x.float(), *rotary_table(positions, 2 * half, theta))
    torch.testing.assert_close(
        rotated.double(), torch.cat((turned.real, turned.imag), -1), atol=2e-4, rtol=1e-4
    )


def test_rotary_scores_depend_on_the_distance_only() -> None:
    q, k = randn(1, 64).float(), randn(1, 64, seed=1).float()

    def score(at: int, distance: int) -> Tensor:
        tables = (rotary_table(torch.tensor([p]), 64, 10000.0) for p in (at + distance, at))
        (q_cos, q_sin), (k_cos, k_sin) = tables
        return (apply_rotary(q, q_cos, q_sin) * apply_rotary(k, k_cos, k_sin)).sum()

    torch.testing.assert_close(score(0, 5), score(900, 5), atol=1e-3, rtol=1e-3)
    assert (score(0, 5) - score(0, 6)).abs() > 0.1


def test_swiglu_gates_with_the_first_half() -> None:
    x = randn(3, 5, 12)
    gate, up = x[..., :6], x[..., 6:]
    torch.testing.assert_close(swiglu(x), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("time", [1, 2, 17, 70])
def test_causal_attention_follows_its_formula(heads: tuple[int, int], time: int) -> None:
    q, k, v = (randn(2, h, time, 8, seed=s) for s, h in enumerate((heads[0], heads[1], heads[1])))
    torch.testing.assert_close(causal_attention(q, k, v), attention_formula(q, k, v), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(
    ("heads", "time"), [((2, 2), 64), ((6, 2), 150), ((4, 1), 1), ((4, 2), 1040)], ids=lambda p: str(p)
)
def test_attention_in_query_blocks_equals_the_plain_kernel(
    heads: tuple[int, int], time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The form that compiled CPU blocks use, run uncompiled, forward and backward, at odd lengths."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    inputs = [
        randn(2, h, time, 8, seed=s).float().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for s, h in enumerate((heads[0], heads[1], heads[1]))
    ]
    blocked = causal_attention(*inputs)
    monkeypatch.undo()
    plain = causal_attention(*inputs)
    torch.testing.assert_close(blocked, plain, atol=1e-5, rtol=1e-5)
    upstream = randn(*plain.shape, seed=9).float()
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (blocked, plain)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_attention_in_query_blocks_keeps_no_weights_for_backward() -> None:
    """They were more than a third of a training step's memory; keys and values may be kept."""
    inputs = [randn(2, 2, 512, 8, seed=s).float().requires_grad_() for s in range(3)]
    largest = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel() if tensor.is_floating_point() else 0)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attention_in_query_blocks(*inputs)
    assert largest <= 2 * 2 * 512 * 8


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=3))
def test_documents_start_after_each_separator(rows: list[list[int]]) -> None:
    starts = []
    for row in rows:
        start = 0
        starts.append([])
        for at, token in enumerate(row):
            starts[-1].append(start)
            start = at + 1 if token == 2 else start
    assert document_starts(torch.tensor(rows), 2).tolist() == starts


def rows_of_documents(window: int) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries, keys and values, where documents start, and attention over one document at a time."""
    time, ends = 190, ([10, 100, 150], [63, 64])
    inputs = [randn(2, h, time, 16, seed=s).float().requires_grad_() for s, h in enumerate((4, 2, 2))]
    ids = torch.ones(2, time, dtype=torch.int64)
    expected = torch.zeros_like(inputs[0])
    for row, last in enumerate(ends):
        ids[row, last] = 0
        for first, end in pairwise([0, *(at + 1 for at in last), time]):
            part = (x[row : row + 1, :, first:end] for x in inputs)
            expected[row, :, first:end] = attention_by_pytorch(*part, window)[0]
    return inputs, document_starts(ids, 0), expected


@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize("form", [attention_by_pytorch, attention_in_query_blocks])
def test_attention_within_documents_is_that_of_each_document(
    form: Callable[..., Tensor], window: int
) -> None:
    inputs, starts, expected = rows_of_documents(window)
    got = form(*inputs, window, starts)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    upstream = randn(*got.shape, seed=9).float()
    gradients = [torch.autograd.grad(out, inputs, upstream) for out in (got, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [0, 30])
def test_flex_attention_within_documents_is_that_of_each_document(window: int) -> None:
    """Compiled, as a GPU's blocks have it; on a CPU PyTorch has no backward of it."""
    inputs, starts, expected = rows_of_documents(window)
    with torch.no_grad():
        got = torch.compile(attention_by_flex, fullgraph=True)(*(x.detach() for x in inputs), window, starts)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [0, 30])
def test_compiled_attention_within_documents_on_a_gpu(window: int) -> None:
    """Forward and backward, by the form that compiled blocks take there."""
    inputs, starts, expected = rows_of_documents(window)
    given_inputs = [x.detach().cuda().requires_grad_() for x in inputs]
    got = torch.compile(attention_by_pytorch, fullgraph=True)(*given_inputs, window, starts.cuda())
    torch.testing.assert_close(got.cpu(), expected, atol=1e-3, rtol=1e-3)
    upstream = randn(*got.shape, seed=9).float()
    ours = torch.autograd.grad(got, given_inputs, upstream.cuda())
    theirs = torch.autograd.grad(expected, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.cpu(), b, atol=3e-3, rtol=3e-3)


def test_cross_entropy_follows_its_formula() -> None:
    logits, targets = (
        randn(2, 7, 11) * 5,
        torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0)),
    )
    targets[1, :3] = -100
    targets[0, :2] = logits[0, :2].argmax(-1)
    kept = targets != -100
    log_probabilities = logits[kept] - logits[kept].exp().sum(-1, keepdim=True).log()
    expected = -log_probabilities[torch.arange(len(log_probabilities)), targets[kept]].mean()
    loss, num_correct = cross_entropy(logits.float(), targets)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-6)
    assert num_correct.item() == (logits[kept].argmax(-1) == targets[kept]).sum().item() >= 2


def test_cross_entropy_of_bf16_logits_is_computed_in_fp32() -> None:
    logits = (randn(3, 50_000) * 3).bfloat16()
    targets = torch.tensor([1, 2, 3])
    loss, _ = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), cross_entropy(logits.double(), targets)[0].double(), atol=1e-5, rtol=0
    )


def test_gradients_equal_those_of_the_formulas_in_fp64() -> None:
    half, targets = 3, torch.tensor([1, 4, 0])
    cos, sin = rotary_table(torch.arange(3), 2 * half, 10000.0)
    turns = torch.complex(cos.double(), sin.double())

    def rotary_formula(x: Tensor) -> Tensor:
        turned = torch.complex(x[..., :half], x[..., half:]) * turns
        return torch.cat((turned.real, turned.imag), -1)

    cases = [
        (
            lambda x, w: rms_norm(x, w, 1e-5),
            lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
            [randn(3, 6), randn(6, seed=1)],
        ),
        (lambda x: apply_rotary(x, cos, sin), rotary_formula, [randn(2, 3, 2 * half)]),
        (swiglu, lambda x: x[..., :3] / (1 + torch.exp(-x[..., :3])) * x[..., 3:], [randn(3, 6)]),
        (
            lambda x: cross_entropy(x, targets)[0],
            lambda x: (x.exp().sum(-1).log() - x[torch.arange(3), targets]).mean(),
            [randn(3, 6)],
        ),
    ]
    for op, formula, inputs in cases:
        exact_inputs = [x.requires_grad_() for x in inputs]
        fp32_inputs = [x.detach().float().requires_grad_() for x in inputs]
        exact, result = formula(*exact_inputs), op(*fp32_inputs)
        upstream = torch.ones_like(exact) if exact.dim() == 0 else randn(*exact.shape, seed=9)
        expected = torch.autograd.grad(exact, exact_inputs, upstream)
        gradients = torch.autograd.grad(result, fp32_inputs, upstream.float())
        for gradient, expected_gradient in zip(gradients, expected, strict=True):
            torch.testing.assert_close(gradient.double(), expected_gradient, atol=1e-5, rtol=1e-5)
