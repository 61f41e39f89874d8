"""The Triton kernel against PyTorch's form: on a GPU where there is one, else by Triton's interpreter.

Without a GPU it needs TRITON_INTERPRET=1. The interpreter rounds no bf16, so the inputs are fp32.
"""

import pytest
import torch

from ryzen_llm.kernels.linear_cross_entropy import _softmax_by_pytorch
from ryzen_llm.kernels.linear_cross_entropy_triton import softmax_rows

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device)


@pytest.mark.parametrize(("rows", "vocab", "block"), [(3, 1, 8192), (4, 37, 8192), (2, 300, 128)])
@pytest.mark.parametrize("gradients", [True, False])
def test_softmax_rows(
    rows: int,
    vocab: int,
    block: int,
    gradients: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one block and in several, where maximum and sum are made online."""
    monkeypatch.setattr("ryzen_llm.kernels.linear_cross_entropy_triton.LARGEST_BLOCK", block)
    logits = 5 * randn(rows, vocab + 3)[:, :vocab]
    logits[0] *= 20  # far apart, and the largest in a later block
    targets = torch.arange(rows, device=device) * 7 % vocab
    row_weights = torch.linspace(0, 1, rows, device=device)
    results = []
    for kernel in (softmax_rows, _softmax_by_pytorch):
        work, losses = logits.clone(), torch.empty(rows, device=device)
        predictions = torch.empty(rows, dtype=torch.int64, device=device)
        kernel(work, targets, row_weights, 0.1, 0.01, gradients, losses, predictions)
        results.append((work, losses, predictions))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)


def test_a_target_outside_the_vocabulary_shows_as_nan() -> None:
    """A kernel cannot raise."""
    losses, predictions = torch.empty(2, device=device), torch.empty(2, dtype=torch.int64, device=device)
    softmax_rows(
        randn(2, 5),
        torch.tensor([1, 5], device=device),
        torch.ones(2, device=device),
        0.0,
        0.0,
        False,
        losses,
        predictions,
    )
    assert losses.isnan().tolist() == [False, True]
