"""What each optimizer step cost and gave, kept on the device until it is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Reduce = Callable[[Tensor, str], Tensor]
"""All-reduce of a tensor over the ranks with "sum" or "max"."""


@dataclass(slots=True)
class Step:
    """One optimizer step that is over. `values` has no entry for what was not measured."""

    step: int
    epoch: int
    values: dict[str, float]


@dataclass(slots=True)
class _Pending:
    """A step as recorded: its tensors are still on the device."""

    losses: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    learning_rates: dict[str, float | Tensor] = field(default_factory=dict)
    extras: dict[str, float | Tensor] = field(default_factory=dict)
    tokens: int | None = None
    samples: int | None = None
    data_wait: float | None = 0.0
    start: _Mark | None = None
    end: _Mark | None = None
    step: int = 0
    epoch: int = 0


class StepRecorder:
    """Collects loss, gradient norm, learning rates, counts and times per optimizer step; knows no Lightning.

    Nothing here waits for the device: losses and norms stay tensors until `drain()`, which moves all of them
    in one transfer (as float32). On CUDA a step's time is the time between events recorded on the stream;
    elsewhere it is host time. A step lasts from the end of the step before it to its own end, data wait
    included; `break_clock()` says that something else happened in between, and that the running step has no
    times.

    Args:
        device: where the training runs.
        reduce: all-reduce over the ranks, None for one process. Over ranks the loss is the mean, counts are
            sums and times the slowest rank's.
        sharded_gradients: each rank holds a part of every gradient (FSDP), so that squared norms add up.
    """

    def __init__(
        self,
        device: torch.device,
        reduce: Reduce | None = None,
        sharded_gradients: bool = False,
    ) -> None:
        self._device = device
        self._reduce = reduce
        self._sharded_gradients = sharded_gradients
        self._done: list[_Pending] = []
        self._current = _Pending()
        self._idle_since: float | None = None
        self._last_end: _Mark | None = None

    def __len__(self) -> int:
        return len(self._done)

    def break_clock(self) -> None:
        """The running step contains something that is not training: leave its times out."""
        self._last_end = None
        self._idle_since = None
        self._current.start = None
        self._current.data_wait = None

    def batch_started(self) -> None:
        """A micro-batch has arrived."""
        current = self._current
        if current.data_wait is not None and self._idle_since is not None:
            current.data_wait += time.perf_counter() - self._idle_since

    def before_optimizer_step(
        self, name: str, learning_rate: float | Tensor, parameters: Iterable[Tensor]
    ) -> None:
        """Note an optimizer's learning rate and the norm of its gradients, before clipping."""
        if isinstance(learning_rate, Tensor):
            learning_rate = learning_rate.detach().clone()  # the scheduler writes into it
        self._current.learning_rates[name] = learning_rate
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients:
            self._current.norms.append(_total_norm(gradients))

    def batch_ended(self, loss: Tensor | None, tokens: int | None, samples: int | None) -> None:
        """A micro-batch is done. `loss` is the batch's own mean, not divided by the accumulation."""
        current = self._current
        if loss is not None:
            current.losses.append(loss)
        if tokens is not None:
            current.tokens = (current.tokens or 0) + tokens
        if samples is not None:
            current.samples = (current.samples or 0) + samples

    def step_ended(self, step: int, epoch: int) -> None:
        """The micro-batches since the last call made one optimizer step."""
        current = self._current
        current.step, current.epoch = step, epoch
        current.start, current.end = self._last_end, _Mark(self._device)
        self._last_end = current.end
        self._done.append(current)
        self._current = _Pending()

    def idle(self) -> None:
        """The callback's own work for this batch is done: the wait for data begins."""
        self._idle_since = time.perf_counter()

    def add_extras(self, values: dict[str, float | Tensor]) -> None:
        """Attach further values to the step that ended last."""
        self._done[-1].extras.update(values)

    def drain(self, across_ranks: bool = True) -> list[Step]:
        """The steps that ended since the last call, as plain numbers.

        This waits for the device. Over ranks it is a collective, unless `across_ranks` is False.
        """
        done, self._done = self._done, []
        if not done:
            return []
        numbers = iter(_to_floats([t for pending in done for t in _tensors(pending)], self._device))
        steps = [Step(p.step, p.epoch, self._values(p, numbers)) for p in done]
        if self._reduce is not None and across_ranks:
            self._reduce_steps(steps, self._reduce)
        for step in steps:
            _add_rates(step.values)
        return steps

    def _values(self, pending: _Pending, numbers: Iterable[float]) -> dict[str, float]:
        """A step's values; takes its tensors' numbers from `numbers`, in the order of `_tensors`."""
        numbers = iter(numbers)
        values: dict[str, float] = {}
        losses = [next(numbers) for _ in pending.losses]
        norms = [next(numbers) for _ in pending.norms]
        if losses:
            values["loss"] = sum(losses) / len(losses)
        for name, rate in pending.learning_rates.items():
            values[name] = next(numbers) if isinstance(rate, Tensor) else float(rate)
        if norms:
            values["grad_norm"] = norms[0] if len(norms) == 1 else math.hypot(*norms)
        if pending.tokens is not None:
            values["tokens"] = pending.tokens
        if pending.samples is not None:
            values["samples"] = pending.samples
        if pending.start is not None and pending.end is not None and pending.data_wait is not None:
            values["step_time_s"] = pending.end.seconds_since(pending.start)
            values["data_wait_s"] = pending.data_wait
        for name, value in pending.extras.items():
            number = next(numbers) if isinstance(value, Tensor) else value
            values.setdefault(
                name, number
            )  # a module that logs "loss" itself does not replace the measured one
        return values

    def _reduce_steps(self, steps: list[Step], reduce: Reduce) -> None:
        """Make every rank's `steps` the same in what rules are judged by.

        The ranks step together, so that all of them hold the same steps; but not all need hold the same
        values (a rank may have returned no loss, or own no part of a sharded gradient), and a value counts
        where any rank has it.
        """
        for names, operation in ((_SUMS, "sum"), (_MAXIMA, "max")):
            rows = [
                [float(name in s.values) for name in names] + [self._share(s, name) for name in names]
                for s in steps
            ]
            table = reduce(torch.tensor(rows, dtype=torch.float64, device=self._device), operation).tolist()
            for step, row in zip(steps, table, strict=True):
                for name, present, value in zip(names, row, row[len(names) :], strict=False):
                    if present:
                        step.values[name] = self._whole(name, present, value)

    def _share(self, step: Step, name: str) -> float:
        value = step.values.get(name, 0.0)
        return value**2 if name == "grad_norm" and self._sharded_gradients else value

    def _whole(self, name: str, ranks: float, value: float) -> float:
        if name == "grad_norm" and self._sharded_gradients:
            return math.sqrt(value)
        return value / ranks if name in ("loss", "grad_norm") else value


_SUMS = ("loss", "grad_norm", "tokens", "samples")
_MAXIMA = ("step_time_s", "data_wait_s", "memory_bytes")


class _Mark:
    """A moment: on CUDA an event on the stream, elsewhere the host's clock."""

    __slots__ = ("_event", "_host")

    def __init__(self, device: torch.device) -> None:
        self._host = time.perf_counter()
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record()

    def seconds_since(self, earlier: _Mark) -> float:
        if self._event is None or earlier._event is None:
            return self._host - earlier._host
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event)) / 1000


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of all gradients together, on the device; full over the ranks for DTensor gradients."""
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    first = dense[0]
    if all(type(g) is Tensor and g.dtype == first.dtype and g.device == first.device for g in dense):
        # What get_total_norm comes down to, without its sorting: the dearest thing that is done at each step.
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(dense)))
        return norm
    norm = torch.nn.utils.get_total_norm(dense)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _add_rates(values: dict[str, float]) -> None:
    seconds = values.get("step_time_s")
    if not seconds:
        return
    for counted in ("tokens", "samples"):
        if counted in values:
            values[f"{counted}_per_second"] = values[counted] / seconds


def _tensors(pending: _Pending) -> list[Tensor]:
    mixed = [*pending.learning_rates.values(), *pending.extras.values()]
    return [*pending.losses, *pending.norms, *(v for v in mixed if isinstance(v, Tensor))]


def _to_floats(tensors: list[Tensor], device: torch.device) -> list[float]:
    if not tensors:
        return []
    stacked = torch.stack([t.reshape(()).to(device=device, dtype=torch.float32) for t in tensors])
    numbers: list[float] = stacked.tolist()
    return numbers
