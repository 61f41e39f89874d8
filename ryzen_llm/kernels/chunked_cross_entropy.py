"""Next-token cross-entropy for an output head that is no plain matrix, without all logits at once."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ryzen_llm.kernels.linear_cross_entropy import slab_rows

Head = Callable[[Tensor], Tensor]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def chunked_cross_entropy(
    head: Head, hidden_states: Tensor, targets: Tensor, parameters: Sequence[nn.Parameter]
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of ``head(hidden_states)`` and how many targets had the largest logit.

    `hidden_states` is (..., size), `head` maps (rows, size) to (rows, vocab), and `targets` (...) is int64,
    -100 where nothing counts. As in `linear_cross_entropy`, each chunk of rows makes its logits, its loss and
    at once its gradients, those of `parameters` (all that `head` trains) included; backward only scales.
    Returns a scalar loss, fp32 or wider, which can be differentiated once, and a scalar int64 count.
    """
    x, flat = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.flatten()
    trained = [p for p in parameters if p.requires_grad]
    gradients = torch.is_grad_enabled() and (x.requires_grad or bool(trained))
    if gradients:
        loss, correct = _Chunked.apply(head, flat, x, *trained)  # type: ignore[no-untyped-call]
    else:
        loss, correct, _, _ = _in_chunks(head, flat, x, [], False)
    return loss, correct


def _in_chunks(
    head: Head, targets: Tensor, x: Tensor, trained: list[Tensor], gradients: bool
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    kept = (targets >= 0).sum()
    # NaN where nothing is kept, also without any row.
    total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device) / kept
    correct = torch.zeros((), dtype=torch.int64, device=x.device)
    dx = torch.empty_like(x)
    sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
    with torch.no_grad():
        vocab = head(x[:1]).shape[-1]
    rows = slab_rows(len(x), vocab, 4, x.device)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        with torch.set_grad_enabled(gradients):
            chunk = x[part].detach().requires_grad_(gradients)
            logits = head(chunk)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits, targets[part], ignore_index=-100, reduction="sum") / kept
        total += loss.detach()
        correct += (logits.detach().argmax(-1) == targets[part]).sum()
        if gradients:
            dx[part], *found = torch.autograd.grad(loss, [chunk, *trained])
            for so_far, gradient in zip(sums, found, strict=True):
                so_far += gradient
    return total, correct, dx, sums


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, head: Head, targets: Tensor, x: Tensor, *trained: Tensor) -> tuple[Tensor, Tensor]:
        # Inside of forward the parameters arrive detached from what `head` closes over; autograd is asked for
        # the ones that it uses.
        loss, correct, dx, sums = _in_chunks(head, targets, x, list(trained), True)
        ctx.save_for_backward(dx, *(s.to(p.dtype) for s, p in zip(sums, trained, strict=True)))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # by create_graph
            raise RuntimeError("chunked_cross_entropy can be differentiated once; compute all logits instead")
        return None, None, *((g * upstream[0]).to(g.dtype) for g in ctx.saved_tensors)
