"""For ops whose gradients are ops of their own, which cannot be differentiated."""

import torch


def refuse_second_derivative(op: str) -> None:
    """To be called in the backward of `op`: raises RuntimeError in one that is to be differentiated again.

    PyTorch would warn at most, and take the gradient for a constant.
    """
    if torch.is_grad_enabled():  # by create_graph
        raise RuntimeError(
            f"{op} can be differentiated once; for second derivatives, compute with PyTorch's kernels: "
            "model.use_kernels(ryzen_llm.kernels.PLAIN)"
        )
