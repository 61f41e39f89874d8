"""What each optimizer step cost and gave, kept on the device until it is asked for."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

Reduce = Callable[[Tensor, str], Tensor]
"""All-reduce of a tensor over the ranks with "sum" or "max"."""

_Moment = float | torch.cuda.Event
"""The host's clock in seconds; on CUDA an event on the stream."""


@dataclass(slots=True)
class Step:
    """One optimizer step that is over. `values` has no entry for what was not measured."""

    step: int
    epoch: int
    values: dict[str, float]


@dataclass(slots=True)
class _Pending:
    """A step as recorded: its tensors are still on the device. `start` is None where the clock is broken."""

    losses: list[Tensor]
    norms: dict[str, list[Tensor]]
    learning_rates: dict[str, float | Tensor | None]
    extras: dict[str, float | Tensor] | None = None
    tokens: int | None = None
    samples: int | None = None
    data_wait: float | None = None
    start: _Moment | None = None
    end: _Moment | None = None
    step: int = 0
    epoch: int = 0

    @classmethod
    def empty(cls) -> _Pending:
        return cls([], {}, {})


class StepRecorder:
    """Collects loss, gradient norm, learning rates, counts and times per optimizer step; knows no Lightning.

    Nothing here waits for the device: losses and norms stay tensors until `drain()`, which moves all of them
    in one transfer (as float32). On CUDA a step's time is the time between events recorded on the stream;
    elsewhere it is host time. A step lasts from the end of the step before it to its own end, data wait
    included; `break_clock()` says that something else happened in between, and that the running step has no
    times. Data wait is the host time between `wait_started()` and `wait_ended()`, and nothing else.

    Args:
        device: where the training runs.
        reduce: all-reduce over the ranks, None for one process. Over ranks the loss is the mean, counts are
            sums and times the slowest rank's.
        sharded_gradients: each rank holds a part of every gradient (FSDP), so that squared norms add up.
        half_gradients: there are gradients in float16, which their norm may be too large for.
    """

    def __init__(
        self,
        device: torch.device,
        reduce: Reduce | None = None,
        sharded_gradients: bool = False,
        half_gradients: bool = False,
    ) -> None:
        self._device = device
        self._reduce = reduce
        self._sharded_gradients = sharded_gradients
        self._half_gradients = half_gradients
        self._done: list[_Pending] = []
        self._current = _Pending.empty()
        self._waiting_since = 0.0
        self._last_end: _Moment | None = None

    def __len__(self) -> int:
        return len(self._done)

    @property
    def stepped(self) -> bool:
        """Whether an optimizer has stepped since the last step ended."""
        return bool(self._current.learning_rates)

    def break_clock(self) -> None:
        """The running step contains something that is not training: leave its times out."""
        self._last_end = None

    def wait_started(self) -> None:
        """The next micro-batch is asked for."""
        self._waiting_since = time.perf_counter()

    def wait_ended(self) -> None:
        """It is there."""
        waited = time.perf_counter() - self._waiting_since
        self._current.data_wait = (self._current.data_wait or 0.0) + waited

    def before_optimizer_step(
        self, name: str, learning_rate: float | Tensor | None, gradients: list[Tensor]
    ) -> None:
        """Note an optimizer's learning rate, if it has one, and the norm of its `gradients`, before clipping.

        Where an optimizer steps several times in a batch the last one counts.
        """
        if isinstance(learning_rate, Tensor):
            learning_rate = learning_rate.detach().clone()  # the scheduler writes into it
        self._current.learning_rates[name] = learning_rate
        if gradients:
            if self._half_gradients:
                gradients = _half_to_single(gradients)
            self._current.norms[name] = _norms(gradients)

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
        current.start, current.end = self._last_end, self._now()
        self._last_end = current.end
        self._done.append(current)
        self._current = _Pending.empty()

    def add_extras(self, values: dict[str, float | Tensor]) -> None:
        """Attach `values` to the step that ended last."""
        self._done[-1].extras = values

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

    def _now(self) -> _Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _values(self, pending: _Pending, numbers: Iterable[float]) -> dict[str, float]:
        """A step's values; takes its tensors' numbers from `numbers`, in the order of `_tensors`."""
        numbers = iter(numbers)
        values: dict[str, float] = {}
        losses = [next(numbers) for _ in pending.losses]
        norms = [next(numbers) for parts in pending.norms.values() for _ in parts]
        if losses:
            values["loss"] = sum(losses) / len(losses)
        for name, rate in pending.learning_rates.items():
            if rate is not None:
                values[name] = next(numbers) if isinstance(rate, Tensor) else float(rate)
        if norms:
            values["grad_norm"] = math.hypot(*norms)
        if pending.tokens is not None:
            values["tokens"] = pending.tokens
        if pending.samples is not None:
            values["samples"] = pending.samples
        if pending.start is not None and pending.end is not None:
            values["step_time_s"] = _seconds(pending.start, pending.end)
            if pending.data_wait is not None:
                values["data_wait_s"] = pending.data_wait
        for name, value in (pending.extras or {}).items():
            number = next(numbers) if isinstance(value, Tensor) else value
            # A module that logs "loss" itself does not replace the measured one.
            values.setdefault(name, number)
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
_FEW = 32
_MAXIMA = ("step_time_s", "data_wait_s", "memory_bytes")


def _seconds(start: _Moment, end: _Moment) -> float:
    if isinstance(start, float) and isinstance(end, float):
        return end - start
    assert isinstance(start, torch.cuda.Event)  # one device, one kind of clock
    assert isinstance(end, torch.cuda.Event)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _norms(gradients: list[Tensor]) -> list[Tensor]:
    """Norms on the device whose hypotenuse is the norm of all gradients together (over ranks, for DTensors).

    A few gradients have one each, to be put together when they have left the device: the norm is the dearest
    thing that is done at each step, and putting the parts together is a third of it.
    """
    if len(gradients) <= _FEW and all(type(g) is Tensor and not g.is_sparse for g in gradients):
        return list(torch._foreach_norm(gradients))
    norm = torch.nn.utils.get_total_norm([g.coalesce().values() if g.is_sparse else g for g in gradients])
    return [norm.full_tensor() if isinstance(norm, DTensor) else norm]


def _half_to_single(gradients: list[Tensor]) -> list[Tensor]:
    """`gradients` with those in float16 replaced by their norms in float32, which have the same norm."""
    half = [g.coalesce().values() if g.is_sparse else g for g in gradients if g.dtype is torch.float16]
    rest = [g for g in gradients if g.dtype is not torch.float16]
    return [*rest, *torch._foreach_norm(half, dtype=torch.float32)] if half else rest


def _add_rates(values: dict[str, float]) -> None:
    seconds = values.get("step_time_s")
    if not seconds:
        return
    for counted in ("tokens", "samples"):
        if counted in values:
            values[f"{counted}_per_second"] = values[counted] / seconds


def _tensors(pending: _Pending) -> list[Tensor]:
    mixed = [*pending.learning_rates.values(), *(pending.extras or {}).values()]
    norms = [norm for parts in pending.norms.values() for norm in parts]
    return [*pending.losses, *norms, *(v for v in mixed if isinstance(v, Tensor))]


def _to_floats(tensors: list[Tensor], device: torch.device) -> list[float]:
    if not tensors:
        return []
    if {(t.dtype, t.device, t.ndim) for t in tensors} != {(torch.float32, device, 0)}:
        tensors = [t.reshape(()).to(device=device, dtype=torch.float32) for t in tensors]
    numbers: list[float] = torch.stack(tensors).tolist()
    return numbers
