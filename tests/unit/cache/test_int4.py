"""Four-bit codes are as near as their step, those of eight bits nearer, and queries meet them unchanged."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ryzen_llm.cache import Int4, LayerCache, LayerFormat, Transform


@pytest.mark.parametrize("fine", [0, 2, 4, 6])
def test_each_channel_is_read_back_within_half_its_step(fine: int) -> None:
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) + 0.5
    format = Int4(fine)
    stored = format.encode(x)
    assert stored.codes.shape == (200, (16 + fine) // 2)
    # A unit vector as the query reads one channel.
    read = stored.dequantised() @ format.against_codes(torch.eye(16)).T
    assert stored.scale is not None
    assert stored.minimum is not None
    coarse = stored.scale.float()[:, None] / 2
    rounding = stored.minimum.float().abs()[:, None] * 2**-10  # of the minimum, to fp16
    error = (read - x).abs()
    assert (error[:, fine:] <= coarse + rounding).all()
    assert (error[:, :fine] <= coarse / 17 + rounding).all()
    assert (error[:, fine:] > coarse / 2).any(), "the bound would not see a step twice as fine"


@settings(max_examples=30, deadline=None)
@given(fine=st.sampled_from([0, 2, 8]), seed=st.integers(0, 2**16))
def test_vectors_with_their_codes_channels_have_the_same_products(fine: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    q, x = (torch.randn(5, 16, generator=draw, dtype=torch.float64) for _ in range(2))
    wide = (Int4(fine).against_codes(q) * Int4(fine).as_codes(x)).sum(-1)
    torch.testing.assert_close(wide, (q * x).sum(-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transformed", [True, False])
def test_a_layer_with_fine_channels_attends_as_the_formula_says(transformed: bool) -> None:
    """Against softmax attention in fp64 on keys that are rounded channel by channel, sinks as they are."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 40, 16, generator=draw) for heads in (4, 2, 2))
    hadamard = torch.tensor([[1.0]], dtype=torch.float64)
    for _ in range(4):
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    hadamard /= 4
    matrix, offset, transform = hadamard.expand(2, 16, 16), torch.zeros(2, 1, 16), None
    if transformed:
        matrix = torch.linalg.qr(torch.randn(2, 16, 16, generator=draw)).Q.half()
        offset = torch.randn(2, 1, 16, generator=draw)
        transform = Transform(offset, matrix, torch.linalg.inv(matrix.double()).half())
    layer = LayerCache(
        LayerFormat(Int4(4), Int4(), sinks=3, key_transform=transform),
        batch_size=1,
        kv_heads=2,
        head_dim=16,
        window=0,
        max_length=40,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    layer.grow(40)
    layer.positions = torch.arange(40)[None]
    got = layer.attend(q, k, v)

    z = (k - offset).double() @ matrix.double()
    low = z.amin(-1, keepdim=True)
    step = (z.amax(-1, keepdim=True) - low) / 15
    step = torch.cat((step.expand(-1, -1, -1, 4) / 17, step.expand(-1, -1, -1, 12)), -1)
    rounded = ((z - low) / step).round() * step + low
    keys = torch.cat((k[:, :, :3].double(), rounded[:, :, 3:] @ matrix.double().inverse() + offset), 2)
    rest = layer.values.slots(3, 40).dequantised().double()
    values = torch.cat((v[:, :, :3].double(), rest @ hadamard), 2)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.double(), keys.repeat_interleave(2, 1), values.repeat_interleave(2, 1), is_causal=True
    )
    # Minimum and scale are rounded to fp16, so that a few codes differ by one: on the mean, not on each.
    error = (got.double() - expected).abs()
    assert error.mean() < 2e-3
    plain = torch.nn.functional.scaled_dot_product_attention(
        q.double(), k.double().repeat_interleave(2, 1), values.repeat_interleave(2, 1), is_causal=True
    )
    assert error.mean() < 0.1 * (plain - expected).abs().mean(), "as far from it as exact keys are"


@settings(max_examples=10, deadline=None)
@given(chunks=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_any_chunking_stores_the_same_bytes(chunks: list[int]) -> None:
    k = torch.randn(1, 2, sum(chunks), 16, generator=torch.Generator().manual_seed(sum(chunks)))
    whole, parts = Int4(4).encode(k), [Int4(4).encode(part) for part in torch.split(k, chunks, 2)]
    assert torch.equal(whole.codes, torch.cat([part.codes for part in parts], 2))
