"""SwiGLU activation (Shazeer 2020, arXiv:2002.05202)."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where `gate_up` (..., 2 * size) holds the gate first; the result is (..., size)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
