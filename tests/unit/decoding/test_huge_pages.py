"""Moving tensors to huge pages changes where they are and nothing else."""

import mmap
import sys

import pytest
import torch
from torch import nn

from ryzen_llm.decoding.huge_pages import move_to_huge_pages


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason=f"{sys.platform} has no huge pages to ask for")
def test_tensors_keep_their_values_and_identity_in_one_block() -> None:
    torch.manual_seed(0)
    tensors = [
        nn.Parameter(torch.randn(3, 5)),
        torch.arange(7, dtype=torch.uint8),
        nn.Parameter(torch.randn(4, 3).bfloat16(), requires_grad=False),
        torch.zeros(0),
    ]
    before = [tensor.detach().clone() for tensor in tensors]
    move_to_huge_pages(tensors)
    for tensor, old in zip(tensors, before, strict=True):
        assert torch.equal(tensor, old)
        assert tensor.dtype == old.dtype
        assert tensor.data_ptr() % 64 == 0
    addresses = [tensor.data_ptr() for tensor in tensors[:3]]
    assert addresses == sorted(addresses)
    assert addresses[2] - addresses[0] == 128, "one after the other"
    tensors[1].add_(1)
    assert torch.equal(tensors[1], before[1] + 1)
    assert torch.equal(tensors[2], before[2])


def test_a_transposed_tensor_stays_where_it_is() -> None:
    tensor = torch.randn(3, 4).T
    address = tensor.data_ptr()
    move_to_huge_pages([tensor])
    assert tensor.data_ptr() == address
