"""The Triton kernels against PyTorch's form: on a GPU where there is one, else by Triton's interpreter.

Without a GPU it needs TRITON_INTERPRET=1. The interpreter rounds no bf16, so everything is fp32.
"""

import pytest
import torch
from random_rows import random_trellis

from ryzen_llm.kernels import TrellisRows
from ryzen_llm.kernels.trellis_rows_triton import linear, lookup

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [8, 64, 576])
def test_both_kernels(bits: int, size: int) -> None:
    """Rows that do not fill a block, and columns less and more than one."""
    rows, values = random_trellis(bits, 70, size)
    rows, values = TrellisRows(rows.codes.to(device), rows.scale.to(device), bits), values.float().to(device)
    indices = torch.tensor([69, 3, 3], device=device)
    torch.testing.assert_close(lookup(indices, *rows), values[indices])
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0)).to(device)
    torch.testing.assert_close(linear(x, *rows), x @ values.T, atol=1e-4, rtol=1e-4)
