"""From one projection to rotated queries, keys and values in C++, against the form in PyTorch in fp64."""

import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ryzen_llm.kernels.hardware import cpu_features
from ryzen_llm.kernels.rotary import rotary_table
from ryzen_llm.kernels.rotary_qkv import rotary_qkv_in_cpp
from ryzen_llm.kernels.rotary_qkv_cpu import is_in_cpp

pytestmark = pytest.mark.skipif(not cpu_features().avx512_bf16, reason="this CPU has no AVX512-BF16")

BF16 = 2**-8
"""Of a number, what rounding to bf16 takes at most."""


def draw(batch: int, time: int, heads: int, kv_heads: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """A projection, and the cosines and sines of its positions."""
    generator = torch.Generator().manual_seed(time)
    projected = torch.randn(batch, time, (heads + 2 * kv_heads) * width, generator=generator).bfloat16()
    return projected.requires_grad_(), *rotary_table(torch.arange(3, time + 3), width, 1e4)


def formula(
    projected: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, scale: float
) -> list[Tensor]:
    """Each pair of numbers is one complex number, turned by its angle."""
    parts = projected.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    q, k, v = parts.split([heads, kv_heads, kv_heads], dim=1)
    turn = torch.complex(cos.double(), sin.double())
    turned = [torch.complex(*x.chunk(2, dim=-1)) * turn for x in (q * scale, k)]
    return [*(torch.cat((x.real, x.imag), dim=-1) for x in turned), v]


def run(*inputs: Tensor, heads: int, kv_heads: int, scale: float = 1.0, **weights: Any) -> tuple[Tensor, ...]:
    return rotary_qkv_in_cpp(
        *inputs,
        weights.get("q_weight"),
        weights.get("k_weight"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        eps=1e-6,
        query_scale=scale,
    )


@given(
    batch=st.integers(0, 2),
    time=st.integers(1, 70),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    width=st.sampled_from([32, 64, 96]),
    scale=st.sampled_from([1.0, 0.3]),
)
@settings(max_examples=20, deadline=None)
def test_results_and_gradients_are_those_of_fp64(
    batch: int, time: int, kv_heads: int, group: int, width: int, scale: float
) -> None:
    """Every number is rounded once."""
    assert is_in_cpp()
    heads = {"heads": kv_heads * group, "kv_heads": kv_heads, "scale": scale}
    inputs = draw(batch, time, kv_heads * group, kv_heads, width)
    unrounded = inputs[0].detach().double().requires_grad_()
    got, exact = run(*inputs, **heads), formula(unrounded, *inputs[1:], **heads)
    for ours, theirs in zip(got, exact, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == torch.bfloat16
        assert ((ours - theirs).abs() <= BF16 * theirs.abs() + 1e-5).all()
    # By q in one layout, by k and v in another.
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).bfloat16() for x in got]
    upstream[0] = upstream[0].transpose(1, 2).contiguous().transpose(1, 2)
    ours = torch.autograd.grad(got, inputs[0], upstream)[0]
    theirs = torch.autograd.grad(exact, unrounded, [x.double() for x in upstream])[0]
    assert ((ours - theirs).abs() <= BF16 * theirs.abs() + 1e-5).all()


def test_it_is_a_well_behaved_op() -> None:
    assert is_in_cpp()
    torch.library.opcheck(torch.ops.ryzen_llm.rotary_qkv_cpu.default, (*draw(1, 5, 2, 1, 32), 2, 1, 1.0))


def test_second_derivatives_are_refused() -> None:
    """PyTorch would take the gradient for a constant, with a warning at most."""
    projected, cos, sin = draw(2, 5, 2, 1, 32)
    q, _, _ = run(projected, cos, sin, heads=2, kv_heads=1)
    with pytest.raises(RuntimeError, match="rotary_qkv can be differentiated once"):
        torch.autograd.grad(q.square().sum(), projected, create_graph=True)


def test_the_op_is_for_training_steps_that_it_suits_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All else has the form in PyTorch, which a compiled decoding step fuses with its neighbours."""
    taken = []
    module = sys.modules["ryzen_llm.kernels.rotary_qkv"]  # its name is the function's too
    monkeypatch.setattr(module, "rotary_qkv", lambda *args, **kwargs: taken.append(args[0].shape))
    projected, cos, sin = draw(2, 5, 2, 1, 32)
    heads = {"heads": 2, "kv_heads": 1}
    run(projected, cos, sin, **heads)
    assert not taken
    run(projected.detach(), cos, sin, **heads)
    with torch.no_grad():
        run(projected, cos, sin, **heads)
    run(projected.detach().float().requires_grad_(), cos, sin, **heads)
    run(projected, cos.expand(2, 1, 5, 16), sin.expand(2, 1, 5, 16), **heads)
    run(projected, cos, sin, **heads, q_weight=torch.ones(32), k_weight=torch.ones(32))
    run(*draw(2, 5, 2, 1, 16), **heads)
    assert len(taken) == 6


def test_errors_say_what_was_given() -> None:
    assert is_in_cpp()
    projected, cos, sin = draw(2, 5, 2, 1, 32)
    op = torch.ops.ryzen_llm.rotary_qkv_cpu
    with pytest.raises(RuntimeError, match=r"needs a bf16 projection \(batch, time, .* got \[2, 5, 128\]"):
        op(projected.float(), cos, sin, 2, 1, 1.0)
    with pytest.raises(RuntimeError, match=r"tables \(time, head_dim / 2\); got 32, \[4, 16\] and \[5, 16\]"):
        op(projected, cos[1:], sin, 2, 1, 1.0)
