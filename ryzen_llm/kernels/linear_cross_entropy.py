"""Output head and next-token cross-entropy in one op that never holds all logits.

A chunk of rows at a time: logits = x Wᵀ into a slab that is used again, their log-sum-exp in fp32, and at
once the gradient in the slab's place,

    dlogits = softmax(logits) * (1 + 2 z lse) - (1 - smoothing) * onehot(target) - smoothing / vocab,

from which dx = dlogits W and dW += dlogitsᵀ x: three matrix products in all, made in the forward pass, so
that backward only scales (Wijmans et al. 2024, arXiv:2411.09009, and Liger-Kernel, Hsu et al. 2024,
arXiv:2410.10989, do so too). Above its inputs and gradients it needs the memory of one slab.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import linear_cpu
from ryzen_llm.kernels.compilation import shared_compilations
from ryzen_llm.kernels.derivatives import refuse_second_derivative
from ryzen_llm.kernels.hardware import cpu_caches

Reduction = Literal["mean", "sum", "none"]

GPU_SLAB_BYTES = 256 * 2**20
"""Enough rows to fill a GPU at any vocabulary, and small beside the activations of a batch."""

_SUMMED_ROWS = 512
"""Of the weight's gradient, added at once: a CPU first copies them to the sums' dtype, within its cache."""
_SOFTMAX_ROWS = 64
"""Rows whose softmax PyTorch makes at once: in fp32 they stay in a CPU's cache."""


def linear_cross_entropy(
    hidden_states: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Reduction = "mean",
    compiled: bool = False,
    slab_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden_states @ weight.T`` and how many targets had the largest logit.

    `hidden_states` is (..., size), `weight` (vocab, size), of any floating dtype, and `targets` (...) int64.
    Under autocast the products run in its dtype; sums, the loss and the gradient of `weight` are fp32 (fp64
    for fp64 inputs). `label_smoothing` mixes the target with the uniform distribution (Szegedy et al. 2016,
    arXiv:1512.00567); `z_loss` is the weight of the squared log-sum-exp (Chowdhery et al. 2022,
    arXiv:2204.02311). Targets equal to `ignore_index` count for nothing; the mean over none is NaN, as in
    PyTorch. Returns the loss, a scalar or with ``reduction="none"`` shaped like `targets`, and a scalar int64
    count. "none" makes the logits a second time in backward. On a CPU, `compiled` has Inductor make one loop
    of the softmax, for which PyTorch's own ops read the logits seven times. `slab_scale` multiplies the
    memory of a chunk's logits. It can be differentiated once. Raises InputError for shapes or settings that
    do not fit.
    """
    if weight.dim() != 2 or hidden_states.shape[-1] != weight.shape[1]:
        raise InputError(
            f"hidden_states are {tuple(hidden_states.shape)} and weight {tuple(weight.shape)}, expected "
            "(..., size) and (vocab, size)"
        )
    if targets.shape != hidden_states.shape[:-1] or targets.dtype != torch.int64:
        raise InputError(
            f"targets are {tuple(targets.shape)} {targets.dtype}, expected int64 of shape "
            f"{tuple(hidden_states.shape[:-1])}"
        )
    if not 0 <= label_smoothing <= 1 or z_loss < 0:
        raise InputError(
            f"label_smoothing is {label_smoothing} and z_loss {z_loss}, expected 0 to 1 and zero or more"
        )
    if torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = hidden_states.to(torch.get_autocast_dtype(hidden_states.device.type))
    x, flat = hidden_states.reshape(-1, hidden_states.shape[-1]), targets.flatten()
    kept = flat != ignore_index
    labels = torch.where(kept, flat, 0)
    if reduction == "none":
        losses, predictions = _rows(x, weight, labels, label_smoothing, z_loss, compiled, slab_scale)
        loss = torch.where(kept, losses, 0).view(targets.shape)
    else:
        gradients = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
        weights = kept.to(torch.promote_types(x.dtype, torch.float32))
        # At once, where fp16 would not lose small gradients by it: backward then has nothing to scale by.
        divided = reduction == "mean" and x.dtype != torch.float16 and len(x) > 0
        if divided:
            weights /= weights.sum()
        loss, predictions, _, _ = _total(
            x, weight, labels, weights, label_smoothing, z_loss, compiled, slab_scale, gradients
        )
        if reduction == "mean" and not divided:
            loss = loss / weights.sum()
    return loss, ((predictions == flat) & kept).sum()


def reference(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """The loss of each row by its formula: `logits` (rows, vocab), `targets` (rows,) -> (rows,)."""
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, targets[:, None]).squeeze(-1)
    smooth = label_smoothing * logits.mean(-1)
    return lse - (1 - label_smoothing) * target - smooth + z_loss * lse.square()


SoftmaxRows = Callable[[Tensor, Tensor, Tensor, float, float, bool, Tensor, Tensor], None]
"""(logits, targets, row_weights, label_smoothing, z_loss, gradients, losses, predictions): fills the last
two, and with `gradients` puts the gradient of the weighted loss in the place of `logits`."""


@torch.library.custom_op("ryzen_llm::linear_cross_entropy", mutates_args=())
def _total(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    label_smoothing: float,
    z_loss: float,
    compiled: bool,
    slab_scale: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted sum of the losses, predictions (rows,), and its gradients by x and weight (else empty), that
    by weight in `_kept_dtype`.
    """
    losses, predictions, dx, dw = _in_chunks(
        x, weight, targets, row_weights, label_smoothing, z_loss, compiled, slab_scale, gradients
    )
    weighted = torch.where(row_weights == 0, 0, losses * row_weights)  # what is left out may be no number
    return weighted.sum(), predictions, dx, dw


@_total.register_fake
def _total_fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    label_smoothing: float,
    z_loss: float,
    compiled: bool,
    slab_scale: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = x.new_empty(x.shape if gradients else (0,))
    dw = weight.new_empty(weight.shape if gradients else (0,), dtype=_kept_dtype(weight))
    return row_weights.new_empty(()), torch.empty_like(targets), dx, dw


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[2:])
    ctx.weight_dtype = inputs[1].dtype
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, upstream: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_cross_entropy")
    if upstream is None:
        return (None,) * 9
    dx, dw = ctx.saved_tensors
    if type(upstream) is Tensor and upstream.is_cpu and upstream == 1:  # a GPU would be waited for
        return dx, dw.to(ctx.weight_dtype), *(None,) * 7
    return (dx * upstream).to(dx.dtype), (dw * upstream).to(ctx.weight_dtype), *(None,) * 7


_total.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@register_flop_formula(torch.ops.ryzen_llm.linear_cross_entropy)
def _flops(x: list[int], weight: list[int], *settings: Any, **_: Any) -> int:
    return (6 if settings[-1] else 2) * x[0] * weight[0] * weight[1]


@torch.library.custom_op("ryzen_llm::linear_cross_entropy_rows", mutates_args=())
def _rows(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    compiled: bool,
    slab_scale: float,
) -> tuple[Tensor, Tensor]:
    """The loss of each row and its prediction, (rows,) both."""
    ones = x.new_ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    settings = (label_smoothing, z_loss, compiled, slab_scale)
    return _in_chunks(x, weight, targets, ones, *settings, False)[:2]


@_rows.register_fake
def _rows_fake(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    compiled: bool,
    slab_scale: float,
) -> tuple[Tensor, Tensor]:
    losses = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return losses, torch.empty_like(targets)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.settings = inputs[3:]
    ctx.set_materialize_grads(False)


def _recompute(ctx: Any, upstream: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative("linear_cross_entropy")
    if upstream is None:
        return (None,) * 7
    x, weight, targets = ctx.saved_tensors
    _, _, dx, dw = _total(x, weight, targets, upstream, *ctx.settings, True)
    return dx, dw.to(weight.dtype), *(None,) * 5


_rows.register_autograd(_recompute, setup_context=_keep_inputs)


def _in_chunks(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    label_smoothing: float,
    z_loss: float,
    compiled: bool,
    slab_scale: float,
    gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, vocab = len(x), len(weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    head = weight.to(x.dtype)
    losses, predictions = x.new_empty(rows, dtype=wide), torch.empty_like(targets)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if gradients else x.new_empty(0)
    new = weight.new_empty if rows else weight.new_zeros
    dw = new(weight.shape, dtype=torch.promote_types(weight.dtype, wide)) if gradients else None
    softmax_rows = _softmax_on_gpu() if x.is_cuda else _softmax_compiled if compiled else _softmax_by_pytorch
    chunk = slab_rows(rows, vocab, x.element_size(), x.device, slab_scale)
    slab = x.new_empty(chunk, vocab)
    in_cpp = x.dtype == torch.bfloat16 and linear_cpu.takes(weight)
    summed = vocab if x.is_cuda else _SUMMED_ROWS
    for start in range(0, rows, chunk):
        part = slice(start, min(start + chunk, rows))
        logits = slab[: part.stop - part.start]
        torch.mm(x[part], head.T, out=logits)
        softmax_rows(
            logits,
            targets[part],
            row_weights[part],
            label_smoothing,
            z_loss,
            gradients,
            losses[part],
            predictions[part],
        )
        if dw is not None and in_cpp:
            dx[part] = linear_cpu.by_input(logits, weight)
            linear_cpu.add_by_weight(dw, logits, x[part], add=start > 0)
        elif dw is not None:
            torch.mm(logits, head, out=dx[part])
            product = _by_weight(logits, x[part])
            for first in range(0, vocab, summed):
                sums, terms = dw[first : first + summed], product[first : first + summed]
                sums.add_(terms) if start else sums.copy_(terms)
    kept = _kept_dtype(weight)
    return losses, predictions, dx, weight.new_empty(0, dtype=kept) if dw is None else dw.to(kept)


def _kept_dtype(weight: Tensor) -> torch.dtype:
    """Of the weight's gradient until backward has scaled it: before, its sums may be too large for fp16."""
    return torch.float32 if weight.dtype == torch.float16 else weight.dtype


def _by_weight(dlogits: Tensor, x: Tensor) -> Tensor:
    """dlogitsᵀ x, from fp16 in fp32: a sum over the rows may be too large for fp16."""
    if x.dtype != torch.float16:
        return dlogits.T @ x
    with torch.autocast(x.device.type, enabled=False):  # it would make fp16 of them again
        if x.is_cuda:
            return torch.mm(dlogits.T, x, out_dtype=torch.float32)
        return dlogits.T.float() @ x.float()


def slab_rows(rows: int, vocab: int, element_size: int, device: torch.device, scale: float = 1.0) -> int:
    """Rows of logits made at once: `scale` times half a CPU's last-level cache, or `GPU_SLAB_BYTES`.

    Chunks are of one size, but for the last; fewer than 128 rows would make poor matrix products.
    """
    budget = (cpu_caches().l3 or 2**24) // 2 if device.type == "cpu" else GPU_SLAB_BYTES
    most = max(int(scale * budget) // (vocab * element_size) // 128 * 128, 128)
    chunks = -(-rows // most)
    return max(-(-rows // max(chunks, 1)), 1)


def _softmax_by_pytorch(
    logits: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    label_smoothing: float,
    z_loss: float,
    gradients: bool,
    losses: Tensor,
    predictions: Tensor,
) -> None:
    for start in range(0, len(logits), _SOFTMAX_ROWS):
        part = slice(start, start + _SOFTMAX_ROWS)
        block, labels, weights = logits[part].to(losses.dtype), targets[part, None], row_weights[part, None]
        torch.argmax(block, -1, out=predictions[part])
        losses[part] = reference(block, targets[part], label_smoothing, z_loss)
        if gradients:
            lse = block.logsumexp(-1, keepdim=True)
            scale = weights * (1 + 2 * z_loss * lse)
            block = torch.sub(block, lse).exp_().mul_(scale)
            block.scatter_add_(-1, labels, weights * (label_smoothing - 1))
            if label_smoothing:
                block -= weights * (label_smoothing / block.shape[-1])
            logits[part] = block


def _softmax_compiled(
    logits: Tensor,
    targets: Tensor,
    row_weights: Tensor,
    label_smoothing: float,
    z_loss: float,
    gradients: bool,
    losses: Tensor,
    predictions: Tensor,
) -> None:
    # Not in the loop: an index out of bounds would end the process there, and raises here.
    target_logits = logits.gather(-1, targets[:, None]).to(losses.dtype)
    # Tensors unless zero, for which less is computed: Dynamo would compile for each number anew.
    smoothing, z = (losses.new_tensor(value) if value else 0.0 for value in (label_smoothing, z_loss))
    with torch.no_grad(), shared_compilations():
        loop = _softmax_loop()
        loop(logits, target_logits, targets, row_weights, smoothing, z, gradients, losses, predictions)


@functools.cache
def _softmax_loop() -> Callable[..., None]:
    def loop(
        logits: Tensor,
        target_logits: Tensor,
        targets: Tensor,
        row_weights: Tensor,
        label_smoothing: Tensor | float,
        z_loss: Tensor | float,
        gradients: bool,
        losses: Tensor,
        predictions: Tensor,
    ) -> None:
        block, vocab = logits.to(losses.dtype), logits.shape[-1]
        largest = block.amax(-1, keepdim=True)
        lse = (block - largest).exp().sum(-1, keepdim=True).log() + largest
        loss = lse - (1 - label_smoothing) * target_logits + z_loss * lse.square()
        if isinstance(label_smoothing, Tensor):
            loss -= label_smoothing * block.mean(-1, keepdim=True)
        losses.copy_(loss.squeeze(-1))
        columns = torch.arange(vocab, dtype=torch.int32, device=block.device)  # vectorised, as argmax is not
        predictions.copy_(torch.where(block == largest, columns, vocab).amin(-1))
        if gradients:
            gradient = (block - lse).exp() * (1 + 2 * z_loss * lse) - label_smoothing / vocab
            gradient -= (columns == targets[:, None]).to(block.dtype) * (1 - label_smoothing)
            logits.copy_(gradient * row_weights[:, None])

    return torch.compile(loop, fullgraph=True, dynamic=True)


def _softmax_on_gpu() -> SoftmaxRows:
    try:
        from ryzen_llm.kernels.linear_cross_entropy_triton import softmax_rows
    except ImportError:  # Triton is there on Linux only
        return _softmax_by_pytorch
    return softmax_rows
