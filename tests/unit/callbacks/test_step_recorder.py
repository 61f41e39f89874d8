"""A step's values are those of its micro-batches, and nothing leaves the device before a drain."""

import math
import time
from typing import Any

import pytest
import torch
from ryzen_callbacks.step_recorder import StepRecorder


def recorder(**settings: Any) -> StepRecorder:
    return StepRecorder(torch.device("cpu"), **settings)


def parameters(*gradients: list[float]) -> list[torch.Tensor]:
    made = []
    for gradient in gradients:
        parameter = torch.zeros(len(gradient), requires_grad=True)
        parameter.grad = torch.tensor(gradient)
        made.append(parameter)
    return made


def test_micro_batches_are_averaged_and_counted_together() -> None:
    r = recorder()
    for loss, tokens in ((1.0, 10), (4.0, 30)):
        r.batch_started()
        r.batch_ended(torch.tensor(loss), tokens, 2)
    r.step_ended(step=7, epoch=1)
    (step,) = r.drain()
    assert (step.step, step.epoch) == (7, 1)
    assert step.values["loss"] == 2.5
    assert step.values["tokens"] == 40
    assert step.values["samples"] == 4


def test_the_gradient_norm_is_that_of_all_gradients_of_all_optimizers() -> None:
    r = recorder()
    r.before_optimizer_step("learning_rate", 0.1, [*parameters([3.0], [4.0]), torch.zeros(1)])
    r.before_optimizer_step("learning_rate_1", torch.tensor(0.2), parameters([12.0]))
    r.step_ended(1, 0)
    values = r.drain()[0].values
    assert values["grad_norm"] == pytest.approx(13.0)
    assert values["learning_rate"] == pytest.approx(0.1)
    assert values["learning_rate_1"] == pytest.approx(0.2)


def test_a_sparse_gradient_counts() -> None:
    embedding = torch.nn.Embedding(10, 2, sparse=True)
    embedding(torch.tensor([1, 1, 5])).sum().backward()
    r = recorder()
    r.before_optimizer_step("learning_rate", 0.1, embedding.parameters())
    r.step_ended(1, 0)
    assert r.drain()[0].values["grad_norm"] == pytest.approx(math.sqrt(2 * 2**2 + 2 * 1))


def test_a_learning_rate_tensor_is_read_as_it_was_at_the_step() -> None:
    rate = torch.tensor(0.5)
    r = recorder()
    r.before_optimizer_step("learning_rate", rate, [])
    r.step_ended(1, 0)
    rate.fill_(0.0)
    assert r.drain()[0].values["learning_rate"] == 0.5


def test_what_was_not_measured_has_no_entry() -> None:
    r = recorder()
    r.batch_ended(None, None, None)
    r.step_ended(1, 0)
    assert r.drain()[0].values == {}


def test_times_add_up_and_broken_steps_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    r = recorder()
    r.break_clock()
    for step in range(1, 5):
        if step == 3:
            r.break_clock()  # validation
        for _ in range(2):  # two micro-batches
            now[0] += 1.0  # waiting for data
            r.batch_started()
            now[0] += 10.0
            r.batch_ended(torch.tensor(1.0), 44, None)
            if _ == 0:
                r.idle()
        r.step_ended(step, 0)
        now[0] += 0.5  # the callback's own work
        r.idle()
    times = [(s.values.get("step_time_s"), s.values.get("data_wait_s")) for s in r.drain()]
    # 0.5 s of callbacks, twice 1 s of waiting, twice 10 s of work
    assert times == [(None, None), (22.5, 2.0), (None, None), (22.5, 2.0)]


def test_rates_are_counts_over_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    r = recorder()
    for step in (1, 2):
        now[0] += 4.0
        r.batch_ended(None, 100, 8)
        r.step_ended(step, 0)
        r.idle()
    first, second = r.drain()
    assert "tokens_per_second" not in first.values
    assert second.values["tokens_per_second"] == 25.0
    assert second.values["samples_per_second"] == 2.0


def test_a_module_that_logs_loss_itself_does_not_replace_the_measured_one() -> None:
    r = recorder()
    r.batch_ended(torch.tensor(2.0), None, None)
    r.step_ended(1, 0)
    r.add_extras({"loss": torch.tensor(99.0), "accuracy": torch.tensor(0.5), "memory_bytes": 3.0})
    assert r.drain()[0].values == {"loss": 2.0, "accuracy": 0.5, "memory_bytes": 3.0}


def test_nothing_is_read_from_the_device_before_a_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    """`.item()`, `.tolist()`, `float()`, `.cpu()` all wait for an accelerator; a drain makes one transfer."""
    reads: list[str] = []
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__"):
        original = getattr(torch.Tensor, name)

        def spy(self: torch.Tensor, *a: Any, name: str = name, original: Any = original, **k: Any) -> Any:
            reads.append(name)
            return original(self, *a, **k)

        monkeypatch.setattr(torch.Tensor, name, spy)
    r = recorder()
    for step in range(20):
        r.batch_started()
        r.before_optimizer_step("learning_rate", 0.1, parameters([3.0], [4.0]))
        r.batch_ended(torch.tensor(1.0), 10, 2)
        r.step_ended(step, 0)
        r.idle()
    assert reads == []
    assert len(r.drain()) == 20
    assert reads == ["tolist"]


def test_over_ranks_losses_are_averaged_counts_summed_and_the_slowest_rank_counts() -> None:
    """A stand-in for all-reduce over two ranks, of which the other one has twice the values of this one."""

    def reduce(tensor: torch.Tensor, how: str) -> torch.Tensor:
        return tensor + 2 * tensor if how == "sum" else torch.maximum(tensor, 2 * tensor)

    r = recorder(reduce=reduce, world_size=2)
    for step in (1, 2):
        r.batch_ended(torch.tensor(2.0), 10, None)
        r.before_optimizer_step("learning_rate", 0.1, parameters([5.0]))
        r.step_ended(step, 0)
        r.idle()
    values = r.drain()[1].values
    assert values["loss"] == 3.0
    assert values["tokens"] == 30
    assert values["tokens_per_second"] == pytest.approx(30 / values["step_time_s"])
    assert "samples" not in values


def test_sharded_gradients_add_up_by_their_squares() -> None:
    r = recorder(reduce=lambda t, how: t * 2 if how == "sum" else t, world_size=2, sharded_gradients=True)
    r.before_optimizer_step("learning_rate", 0.1, parameters([3.0]))
    r.step_ended(1, 0)
    assert r.drain()[0].values["grad_norm"] == pytest.approx(3 * math.sqrt(2))
