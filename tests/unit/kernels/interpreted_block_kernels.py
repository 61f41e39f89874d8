"""The Triton kernels of a block, and those of quantised weights, against the formulas in fp64.

On a GPU where there is one, else interpreted, which needs TRITON_INTERPRET=1. The interpreter rounds no bf16,
so there the inputs are fp64 and fp32; on a GPU they are bf16 too.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ryzen_llm.kernels import rotary_table
from ryzen_llm.kernels.gated import geglu, geglu_by_triton, swiglu, swiglu_by_triton
from ryzen_llm.kernels.linear_on_gpu import (
    GROUP,
    int4_linear_on_gpu,
    int8_linear_on_gpu,
    pack_nibbles,
    unpack_nibbles,
)
from ryzen_llm.kernels.rms_norm import add_rms_norm_by_triton
from ryzen_llm.kernels.rotary_qkv import rotary_qkv_by_triton

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 2.0**-16  # exact in fp32, as which a kernel gets it
# The interpreter takes a tenth of a second for each.
examples = settings(max_examples=8 if device.type == "cpu" else 60, deadline=None)
DTYPES = [torch.float64, torch.float32] + ([torch.bfloat16] if device.type == "cuda" else [])
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2**-6}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)


def same(
    ours: Callable[..., Any], formula: Callable[..., Any], inputs: list[Tensor], dtype: torch.dtype
) -> None:
    """Outputs and gradients of both, the formula's in fp64 from the same rounded numbers."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    outputs, exact = ours(*leaves), formula(*exact_leaves)
    assert [y.shape for y in outputs] == [y.shape for y in exact]
    assert all(y.dtype == dtype for y in outputs)
    upstream = [randn(*y.shape, seed=9 + i).to(dtype) for i, y in enumerate(exact)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    exact_gradients = torch.autograd.grad(exact, exact_leaves, [u.double() for u in upstream])
    for result, expected in zip((*outputs, *gradients), (*exact, *exact_gradients), strict=True):
        torch.testing.assert_close(result.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def norm_formula(x: Tensor, added: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
    total = x if added is None else x + added
    return total, total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight


@given(
    rows=st.integers(0, 7),
    size=st.integers(1, 70),
    add=st.booleans(),
    strided=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@examples
def test_norm_of_a_sum(rows: int, size: int, add: bool, strided: bool, dtype: torch.dtype) -> None:
    x, added, weight = randn(rows, size), randn(rows, size, seed=1), randn(size, seed=2)
    if strided:
        x, added = x.T.contiguous().T, added.repeat(1, 2)[:, :size]
    if add:
        same(lambda *a: add_rms_norm_by_triton(*a, EPS), norm_formula, [x, added, weight], dtype)
    else:
        ours = lambda x, w: add_rms_norm_by_triton(x, None, w, EPS)  # noqa: E731
        same(ours, lambda x, w: norm_formula(x, None, w), [x, weight], dtype)


def test_norm_where_only_one_of_both_is_used() -> None:
    leaves = [randn(3, 5).requires_grad_(), randn(3, 5, seed=1).requires_grad_(), randn(5).requires_grad_()]
    total, _ = add_rms_norm_by_triton(*leaves, EPS)
    by_x, by_added = torch.autograd.grad(total.sum(), leaves[:2])
    assert torch.equal(by_x, torch.ones_like(by_x))
    assert torch.equal(by_added, by_x)
    _, normed = add_rms_norm_by_triton(*leaves, EPS)
    gradients = torch.autograd.grad(normed.square().sum(), leaves)
    expected = torch.autograd.grad(norm_formula(*leaves)[1].square().sum(), leaves)
    torch.testing.assert_close(gradients, expected, atol=1e-10, rtol=1e-8)


def test_norm_of_a_residual_in_fp32_and_what_is_added_in_another_dtype() -> None:
    """As under autocast."""
    x, added, weight = randn(3, 40).float(), randn(3, 40, seed=1).half(), randn(40).float()
    leaves = [t.requires_grad_() for t in (x, added, weight)]
    total, normed = add_rms_norm_by_triton(*leaves, EPS)
    expected = norm_formula(*leaves)
    assert total.dtype == normed.dtype == torch.float32
    torch.testing.assert_close((total, normed), expected)
    by_ours = torch.autograd.grad(normed.sum() + total.sum(), leaves)
    assert [g.dtype for g in by_ours] == [torch.float32, torch.float16, torch.float32]
    torch.testing.assert_close(by_ours, torch.autograd.grad(expected[0].sum() + expected[1].sum(), leaves))


@given(
    rows=st.integers(0, 4),
    size=st.integers(1, 1100),
    strided=st.booleans(),
    gelu=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@examples
def test_gate(rows: int, size: int, strided: bool, gelu: bool, dtype: torch.dtype) -> None:
    gate_up = 3 * randn(rows, 2 * size)
    if strided:
        gate_up = gate_up.repeat(1, 2)[:, : 2 * size]
    ours, formula = (geglu_by_triton, geglu) if gelu else (swiglu_by_triton, swiglu)
    same(lambda x: (ours(x),), lambda x: (formula(x),), [gate_up], dtype)


def qkv_formula(
    projected: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    query_scale: float,
) -> tuple[Tensor, ...]:
    """Each pair as a complex number, which turns by multiplication; everything in the inputs' dtype."""
    head_dim = projected.shape[-1] // (heads[0] + 2 * heads[1])
    split = projected.unflatten(-1, (heads[0] + 2 * heads[1], head_dim)).transpose(1, 2)
    parts = list(split.split((heads[0], heads[1], heads[1]), dim=1))
    turns = torch.complex(cos.double(), sin.double())
    for i, (weight, scale) in enumerate(((q_weight, query_scale), (k_weight, 1.0))):
        if weight is not None:
            parts[i] = norm_formula(parts[i], None, weight)[1]
        first, second = parts[i].double().chunk(2, -1)
        turned = torch.complex(first, second) * turns * scale
        parts[i] = torch.cat((turned.real, turned.imag), -1)
    return tuple(parts)


@given(
    batch=st.integers(0, 2),
    time=st.integers(1, 4),
    half=st.integers(1, 20),
    heads=st.sampled_from([(1, 1), (3, 1), (6, 2), (9, 3)]),
    norm=st.booleans(),
    scale=st.sampled_from([1.0, 0.75]),
    each_text=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
@examples
def test_rotary_qkv(
    batch: int,
    time: int,
    half: int,
    heads: tuple[int, int],
    norm: bool,
    scale: float,
    each_text: bool,
    dtype: torch.dtype,
) -> None:
    width = (heads[0] + 2 * heads[1]) * 2 * half
    projected = randn(batch, time, width + 2)[..., :width]  # rows with a gap
    positions = torch.arange(max(batch, 1) * time, device=device) * 3
    positions = positions.view(-1, time)[:batch] if each_text else positions[:time]
    cos, sin = rotary_table(positions, 2 * half, 10000.0)
    weights = [randn(2 * half, seed=1), randn(2 * half, seed=2)] if norm else []

    def ours(projected: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q_weight, k_weight = weights or (None, None)
        return rotary_qkv_by_triton(
            projected,
            cos,
            sin,
            q_weight,
            k_weight,
            num_heads=heads[0],
            num_kv_heads=heads[1],
            eps=EPS,
            query_scale=scale,
        )

    def formula(projected: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        q_weight, k_weight = weights or (None, None)
        return qkv_formula(projected, q_weight, k_weight, cos, sin, heads, scale)

    same(ours, formula, [projected, *weights], dtype)


@given(rows=st.integers(0, 20), outputs=st.integers(1, 40), inputs=st.integers(1, 300), strided=st.booleans())
@examples
def test_int8_linear(rows: int, outputs: int, inputs: int, strided: bool) -> None:
    x = randn(rows, inputs + strided)[:, :inputs].float()
    codes = (100 * randn(outputs, inputs, seed=1)).clamp(-127, 127).to(torch.int8)
    scale = randn(outputs, seed=2).abs().bfloat16()
    expected = x.double() @ (codes.double() * scale.double()[:, None]).T
    torch.testing.assert_close(int8_linear_on_gpu(x, codes, scale).double(), expected, atol=1e-2, rtol=1e-4)


@given(rows=st.integers(0, 20), outputs=st.integers(1, 40), groups=st.integers(1, 9))
@examples
def test_int4_linear(rows: int, outputs: int, groups: int) -> None:
    """Against the weight made of the codes as they were before packing."""
    x = randn(rows, groups * GROUP).float()
    codes = (
        torch.arange(outputs * groups * GROUP, dtype=torch.int32, device=device).view(outputs, -1) * 7 % 16
    )
    scales, zeros = (randn(outputs, groups, seed=s).bfloat16() for s in (1, 2))
    in_groups = codes.view(outputs, groups, GROUP).double() - 8
    weight = (in_groups * scales.double()[..., None] + zeros.double()[..., None]).flatten(1)
    packed = pack_nibbles(codes)
    assert torch.equal(unpack_nibbles(packed, scales.double(), zeros.double()), weight)
    result = int4_linear_on_gpu(x, packed, scales, zeros).double()
    torch.testing.assert_close(result, x.double() @ weight.T, atol=1e-2, rtol=1e-4)


def test_gradcheck() -> None:
    """By differences, so that no formula of ours is trusted."""
    x, added, weight = (t.requires_grad_() for t in (randn(2, 5), randn(2, 5, seed=1), randn(5, seed=2)))
    assert torch.autograd.gradcheck(lambda *a: add_rms_norm_by_triton(*a, EPS), (x, added, weight))
    gate_up = randn(2, 6).requires_grad_()
    assert torch.autograd.gradcheck(swiglu_by_triton, (gate_up,))
    assert torch.autograd.gradcheck(geglu_by_triton, (gate_up,))
    projected, w = randn(1, 2, 12).requires_grad_(), randn(4).requires_grad_()
    cos, sin = rotary_table(torch.arange(2, device=device), 4, 10000.0)
    assert torch.autograd.gradcheck(
        lambda p, a, b: rotary_qkv_by_triton(p, cos, sin, a, b, num_heads=1, num_kv_heads=1, eps=EPS),
        (projected, w, randn(4, seed=1).requires_grad_()),
    )


@pytest.mark.parametrize("norm", [True, False])
def test_opcheck(norm: bool) -> None:
    ops = torch.ops.ryzen_llm
    leaves = [t.requires_grad_() for t in (randn(2, 5), randn(2, 5, seed=1), randn(5, seed=2))]
    torch.library.opcheck(ops.add_rms_norm.default, (leaves[0], leaves[1] if norm else None, leaves[2], EPS))
    int8 = (randn(2, 5).float(), torch.ones(3, 5, dtype=torch.int8, device=device), randn(3).float())
    torch.library.opcheck(ops.int8_linear_on_gpu.default, int8)
    groups = (randn(3, 1).float(), randn(3, 1).float())
    int4 = (randn(2, 32).float(), torch.ones(3, 16, dtype=torch.uint8, device=device), *groups)
    torch.library.opcheck(ops.int4_linear_on_gpu.default, int4)
    torch.library.opcheck(ops.gated.default, (randn(2, 6).requires_grad_(), norm))
    cos, sin = rotary_table(torch.arange(2, device=device), 4, 10000.0)
    weights = [randn(4).requires_grad_(), randn(4, seed=1).requires_grad_()] if norm else [None, None]
    torch.library.opcheck(
        ops.rotary_qkv.default, (randn(1, 2, 12).requires_grad_(), cos, sin, *weights, 1, 1, EPS, 1.0)
    )
