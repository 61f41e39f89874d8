"""GeGLU activation (Shazeer 2020, arXiv:2002.05202) with the tanh form of GELU, as in Gemma."""

import torch.nn.functional as F
from torch import Tensor


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) * up, where `gate_up` (..., 2 * size) holds the gate first; the result is (..., size)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
