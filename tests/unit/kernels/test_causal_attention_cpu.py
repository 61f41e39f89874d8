"""Attention of a training step in C++, forward and backward, against its formula in fp64."""

import math
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ryzen_llm.kernels import causal_attention, document_starts
from ryzen_llm.kernels.causal_attention import attention_in_cpp
from ryzen_llm.kernels.causal_attention_cpu import attend, is_in_cpp
from ryzen_llm.kernels.hardware import cpu_features

pytestmark = pytest.mark.skipif(not cpu_features().avx512_bf16, reason="this CPU has no AVX512-BF16")


def draw(batch: int, heads: int, kv_heads: int, time: int, width: int) -> list[Tensor]:
    """Queries, keys and values in bf16, as they lie in one projection."""
    generator = torch.Generator().manual_seed(time)
    projected = torch.randn(batch, time, heads + 2 * kv_heads, width, generator=generator).bfloat16()
    parts = projected.split([heads, kv_heads, kv_heads], dim=2)
    return [part.transpose(1, 2).requires_grad_() for part in parts]


def formula(
    queries: Tensor, keys: Tensor, values: Tensor, window: int, starts: Tensor | None = None
) -> Tensor:
    q, k, v = (x.double() for x in (queries, keys, values))
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    distances = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    hidden = (distances < 0) | (distances >= (window or q.shape[2]))
    if starts is not None:
        hidden = hidden | (torch.arange(q.shape[2]) < starts[:, None, :, None])
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -math.inf).softmax(-1)
    return weights @ v


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    time=st.integers(1, 400),
    width=st.sampled_from([16, 32, 48, 64, 80, 128]),
    window=st.sampled_from([0, 1, 5, 64, 100]),
    documents=st.sampled_from([0, 3, 50, 150]),
)
@settings(max_examples=40, deadline=None)
def test_results_and_gradients_are_those_of_fp64(
    batch: int, kv_heads: int, group: int, time: int, width: int, window: int, documents: int
) -> None:
    """Up to the rounding of weights and slopes to bf16, 2^-9 of each: here, of a whole tensor's size."""
    assert is_in_cpp()
    inputs = draw(batch, kv_heads * group, kv_heads, time, width)
    starts = None
    if documents:  # of about so many tokens, others in each row
        ids = torch.randint(documents, (batch, time), generator=torch.Generator().manual_seed(width))
        starts = document_starts(ids, 0)
    got, exact = attend(*inputs, window, starts), formula(*inputs, window, starts)
    upstream = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert got.shape == exact.shape
    assert got.dtype == torch.bfloat16
    assert rms(got - exact) <= 2**-8 * rms(exact)
    gradients = torch.autograd.grad(got, inputs, upstream)
    expected = torch.autograd.grad(exact, inputs, upstream.double())
    for ours, theirs in zip(gradients, expected, strict=True):
        # Where a query sees little, its gradient is a difference of like numbers, and as exact as those.
        assert rms(ours - theirs) <= 2**-7 * max(rms(theirs), rms(upstream) / math.sqrt(time))


def test_far_scores_are_weighed_by_the_largest() -> None:
    """Scores of hundreds, up and down over several chunks, so that the running maximum moves."""
    q, k, v = draw(1, 2, 1, 600, 64)
    with torch.no_grad():
        q, k = q * 8, k * torch.linspace(-6, 6, 600).sin()[:, None].bfloat16() * 16
        assert (q.double() @ k.double().mT).abs().max() / 8 > 500
        assert rms(attend(q, k, v) - formula(q, k, v, 0)) <= 2**-8 * rms(formula(q, k, v, 0))


def test_a_row_that_sees_no_key_of_a_chunk_takes_nothing_from_it() -> None:
    """Scores all far below zero: a maximum of zero from keys not seen would leave no weights."""
    q, k, v = (x.detach() for x in draw(1, 1, 1, 600, 32))
    q, k = q.abs() * 16, -k.abs() * 16
    assert (q.double() @ k.double().mT).max() / math.sqrt(32) < -150
    expected = formula(q, k, v, 40)
    assert rms(attend(q, k, v, 40) - expected) <= 2**-8 * rms(expected)


def test_the_future_changes_nothing_not_by_a_bit() -> None:
    q, k, v = (x.detach() for x in draw(2, 2, 1, 300, 32))
    before = attend(q, k, v)
    for at in (1, 63, 64, 257):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, at:] += 1
        after = attend(*changed)
        assert torch.equal(after[:, :, :at], before[:, :, :at])
        assert not torch.equal(after[:, :, at:], before[:, :, at:])


def test_a_nan_reaches_everything_that_sees_it() -> None:
    for which in range(3):
        inputs = [x.detach() for x in draw(1, 2, 1, 200, 32)]
        inputs[which][:, :, 70, 3] = math.nan
        missing = attend(*inputs).isnan().any(-1)[0, 0]
        assert missing[70]
        assert which == 0 or missing[70:].all()
        assert not missing[:64].any()  # a block ends there
        assert which != 0 or not missing[71:].any()


@pytest.mark.parametrize("at", [0, 3, 243, 255, 300])
def test_a_nan_is_not_lost_between_chunks(at: int) -> None:
    """Of 256 keys, where a chunk's largest score is found: whatever lane of the last vector it is in."""
    assert is_in_cpp()
    q, k, v = (x.detach() for x in draw(1, 1, 1, 600, 32))
    k[0, 0, at, 3] = math.nan
    missing = attend(q, k, v).isnan().any(-1)[0, 0]
    assert missing.tolist() == [t >= at for t in range(600)]


def test_nothing_gives_nothing() -> None:
    for batch, time in ((0, 5), (2, 0)):
        inputs = draw(batch, 2, 1, time, 32)
        context = attend(*inputs)
        assert context.shape == (batch, 2, time, 32)
        assert [x.shape for x in torch.autograd.grad(context.sum(), inputs)] == [x.shape for x in inputs]


def test_threads_and_layout_change_nothing() -> None:
    """Strides are read, not copied away; each head is summed by one thread."""
    inputs = draw(2, 4, 2, 150, 64)
    packed = [x.detach().contiguous().requires_grad_() for x in inputs]
    upstream = torch.randn(2, 4, 150, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    threads = torch.get_num_threads()
    results = []
    for given_inputs, given_threads in ((inputs, threads), (packed, threads), (inputs, 1)):
        torch.set_num_threads(given_threads)
        context = attend(*given_inputs)
        results.append([context, *torch.autograd.grad(context, given_inputs, upstream)])
    torch.set_num_threads(threads)
    for first, second in pairwise(results):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_it_is_a_well_behaved_op() -> None:
    assert is_in_cpp()
    q, k, v = draw(1, 2, 1, 70, 32)
    torch.library.opcheck(torch.ops.ryzen_llm.causal_attention.default, (q, k, v, None, 9))
    starts = document_starts(torch.arange(70)[None] % 30, 7)
    torch.library.opcheck(torch.ops.ryzen_llm.causal_attention.default, (q, k, v, starts, 0))


def test_second_derivatives_are_refused() -> None:
    """PyTorch would take the gradient for a constant, with a warning at most."""
    inputs = draw(1, 2, 1, 7, 32)
    with pytest.raises(RuntimeError, match="causal_attention can be differentiated once"):
        torch.autograd.grad(attend(*inputs).square().sum(), inputs, create_graph=True)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static sizes", "symbolic sizes"])
def test_a_compiled_step_takes_it_without_a_break(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`causal_attention` by rule of thumb; query blocks must not be what is compared with itself."""
    # By way of its module's name, which is the function's too.
    monkeypatch.setattr(sys.modules["ryzen_llm.kernels.causal_attention"], "attention_in_query_blocks", None)
    inputs = draw(1, 2, 1, 70, 32)
    compiled = torch.compile(causal_attention, fullgraph=True, dynamic=dynamic)
    got, expected = compiled(*inputs), attend(*inputs)
    assert torch.equal(got, expected)
    ours, theirs = (torch.autograd.grad(context.sum(), inputs) for context in (got, expected))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_does_not_suit_is_left_to_query_blocks() -> None:
    for inputs in (draw(1, 2, 1, 70, 24), [x.float() for x in draw(1, 2, 1, 70, 32)]):
        torch.testing.assert_close(
            attention_in_cpp(*inputs).double(), formula(*inputs, 0), atol=2e-2, rtol=2e-2
        )


def test_errors_say_what_was_given() -> None:
    q, k, v = draw(1, 2, 1, 70, 32)
    with pytest.raises(RuntimeError, match=r"needs int64 starts \(batch, time\), contiguous; got \[1, 69\]"):
        attend(q, k, v, 0, torch.zeros(1, 69, dtype=torch.int64))
    narrow, short = ([x[..., :16] for x in (k, v)], [x[:, :, 1:] for x in (k, v)])
    for wrong in ((q.float(), k, v), (q, *narrow), (q, *short), (q[0], k[0], v[0])):
        with pytest.raises(RuntimeError, match=r"causal_attention needs bf16 queries .* got \["):
            attend(*wrong)
