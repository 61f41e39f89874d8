"""The Triton kernels against PyTorch's form: on a GPU where there is one, else by Triton's interpreter.

Without a GPU it needs TRITON_INTERPRET=1. The interpreter rounds no bf16, so everything is fp32.
"""

import pytest
import torch

from ryzen_llm.kernels.packed_rows import PackedRows, pack, unpack
from ryzen_llm.kernels.packed_rows_triton import linear, lookup

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 7, 8])
@pytest.mark.parametrize(("groups", "group"), [(1, 48), (2, 24), (1, 576)])
def test_both_kernels(bits: int, groups: int, group: int) -> None:
    """Rows that do not fill a block, planes shorter and longer than one."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(2**bits, (70, groups, group), generator=draw)
    scale = torch.rand(70, groups, generator=draw)
    rows = PackedRows(pack(codes, bits).to(device), scale.to(device), bits)
    indices = torch.tensor([69, 3, 3], device=device)
    torch.testing.assert_close(lookup(indices, *rows), unpack(rows)[indices])
    x = torch.randn(2, groups * group, generator=draw).to(device)
    torch.testing.assert_close(linear(x, *rows), x @ unpack(rows).T, atol=2e-3, rtol=1e-4)
