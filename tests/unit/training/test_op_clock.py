"""What times an op on a GPU, tried on a stand-in for one: a queue of work that the host fills."""

from __future__ import annotations

import pytest
import torch

from ryzen_llm.training.op_clock import host_seconds, op_clock

LAUNCH = 0.3
"""Milliseconds in which the host launches a kernel."""


class Gpu:
    """Runs one kernel after the other, each when it is launched and the one before it is over."""

    def __init__(self) -> None:
        self.host = self.free = 0.0

    def launch(self, milliseconds: float) -> None:
        self.host += LAUNCH
        self.free = max(self.free, self.host) + milliseconds

    def sleep(self, cycles: int) -> None:
        self.launch(cycles / 2e6)  # at 2 GHz

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def record(self) -> None:
        self.at = max(self.gpu.free, self.gpu.host)

    def synchronize(self) -> None:
        self.gpu.synchronize()

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_an_op_takes_what_its_kernels_take_and_not_what_launching_them_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = Gpu()
    monkeypatch.setattr("torch.cuda.Event", gpu.event)
    monkeypatch.setattr("torch.cuda._sleep", gpu.sleep)
    monkeypatch.setattr("torch.cuda.synchronize", gpu.synchronize)

    def op() -> None:
        for milliseconds in (0.05, 0.01, 0.02):
            gpu.launch(milliseconds)

    clock = op_clock(torch.device("cuda"))
    assert [clock(op) for _ in range(3)] == pytest.approx([0.08e-3] * 3)
    assert op_clock(torch.device("cpu")) is host_seconds
