"""FLOPs are counted as the formula has them: two for each multiply-add of a matrix product."""

import torch
from ryzen_callbacks import count_flops


def test_a_linear_layer_forward_and_backward() -> None:
    batch, inputs, outputs = 5, 7, 11
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    x = torch.randn(batch, inputs, requires_grad=True)
    product = 2 * batch * inputs * outputs
    assert count_flops(lambda: layer(x)) == product
    # Backward has two products of the same size: for the weight's gradient and for the input's.
    assert count_flops(lambda: layer(x).sum().backward()) == 3 * product


def test_a_transformer_layer_comes_near_to_six_per_parameter_and_token() -> None:
    """The usual estimate, 6 N per token, leaves out attention, which is small at this length."""
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    matrices = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    x = torch.randn(2, 8, 64, requires_grad=True)
    counted = count_flops(lambda: layer(x).sum().backward()) / (2 * 8)
    assert 6 * matrices <= counted <= 6.5 * matrices
