"""A step's values are those of its micro-batches, and nothing leaves the device before a drain."""

import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ryzen_callbacks.step_recorder import StepRecorder


def recorder(**settings: Any) -> StepRecorder:
    return StepRecorder(torch.device("cpu"), **settings)


def gradients(*values: list[float]) -> list[torch.Tensor]:
    return [torch.tensor(gradient) for gradient in values]


def test_micro_batches_are_averaged_and_counted_together() -> None:
    r = recorder()
    for loss, tokens in ((1.0, 10), (4.0, 30)):
        r.batch_ended(torch.tensor(loss), tokens, 2)
    r.step_ended(step=7, epoch=1)
    (step,) = r.drain()
    assert (step.step, step.epoch) == (7, 1)
    assert step.values["loss"] == 2.5
    assert step.values["tokens"] == 40
    assert step.values["samples"] == 4


def test_the_gradient_norm_is_that_of_all_gradients_of_all_optimizers() -> None:
    r = recorder()
    r.before_optimizer_step("learning_rate", 0.1, gradients([3.0], [4.0]))
    r.before_optimizer_step("learning_rate_1", torch.tensor(0.2), gradients([12.0]))
    r.step_ended(1, 0)
    values = r.drain()[0].values
    assert values["grad_norm"] == pytest.approx(13.0)
    assert values["learning_rate"] == pytest.approx(0.1)
    assert values["learning_rate_1"] == pytest.approx(0.2)


def test_of_an_optimizer_that_steps_several_times_in_a_batch_the_last_norm_counts() -> None:
    """LBFGS, and manual optimisation: gradients of several steps are not parts of one gradient."""
    r = recorder()
    for _ in range(4):
        r.before_optimizer_step("learning_rate", 0.1, gradients([6.0], [8.0]))
    r.before_optimizer_step("learning_rate", 0.1, gradients([3.0], [4.0]))
    r.before_optimizer_step("learning_rate_1", 0.2, gradients([12.0]))
    r.step_ended(1, 0)
    assert r.drain()[0].values["grad_norm"] == pytest.approx(13.0)


@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("other", [torch.float16, torch.float32, torch.float64])
def test_the_norm_of_half_precision_gradients_may_be_beyond_half_precision(
    count: int, other: torch.dtype
) -> None:
    """That of 100,000 values of 100 is 31,623, but the sum of their squares is no float16."""
    r = recorder(half_gradients=True)
    half = [torch.full((100_000,), 100.0, dtype=torch.float16) for _ in range(count)]
    r.before_optimizer_step("learning_rate", 0.1, [*half, torch.zeros(3, dtype=other)])
    r.step_ended(1, 0)
    assert r.drain()[0].values["grad_norm"] == pytest.approx(100 * math.sqrt(100_000 * count), rel=1e-3)


def test_a_sparse_gradient_counts() -> None:
    embedding = torch.nn.Embedding(10, 2, sparse=True)
    embedding(torch.tensor([1, 1, 5])).sum().backward()
    r = recorder()
    r.before_optimizer_step(
        "learning_rate", 0.1, [p.grad for p in embedding.parameters() if p.grad is not None]
    )
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


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The present in seconds, to be moved on by the test."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_times_add_up_and_broken_steps_have_none(clock: list[float]) -> None:
    r = recorder()
    r.break_clock()
    for step in range(1, 5):
        if step == 3:
            r.break_clock()  # validation
        for _ in range(2):  # two micro-batches
            clock[0] += 0.25  # callbacks
            r.wait_started()
            clock[0] += 1.0
            r.wait_ended()
            clock[0] += 10.0
            r.batch_ended(torch.tensor(1.0), 44, None)
        r.step_ended(step, 0)
        clock[0] += 0.5  # the callback's own work
    times = [(s.values.get("step_time_s"), s.values.get("data_wait_s")) for s in r.drain()]
    # twice 0.25 s and once 0.5 s of callbacks, twice 1 s of waiting, twice 10 s of work
    assert times == [(None, None), (23.0, 2.0), (None, None), (23.0, 2.0)]


def test_rates_are_counts_over_time(clock: list[float]) -> None:
    r = recorder()
    for step in (1, 2):
        clock[0] += 4.0
        r.batch_ended(None, 100, 8)
        r.step_ended(step, 0)
    first, second = r.drain()
    assert "tokens_per_second" not in first.values
    assert second.values["tokens_per_second"] == 25.0
    assert second.values["samples_per_second"] == 2.0
    assert "data_wait_s" not in second.values


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
        r.wait_started()
        r.wait_ended()
        r.before_optimizer_step("learning_rate", 0.1, gradients([3.0], [4.0]))
        r.batch_ended(torch.tensor(1.0), 10, 2)
        r.step_ended(step, 0)
    assert reads == []
    assert len(r.drain()) == 20
    assert reads == ["tolist"]


def over_two_ranks(
    feed: Callable[[StepRecorder], None], feed_other: Callable[[StepRecorder], None], **settings: Any
) -> list[dict[str, float]]:
    """What the first of two ranks hands out: its all-reduce is given the tables that the other one sends."""
    sent: list[torch.Tensor] = []

    def send(table: torch.Tensor, how: str) -> torch.Tensor:
        sent.append(table)
        return table

    def reduce(table: torch.Tensor, how: str) -> torch.Tensor:
        other = sent.pop(0)
        return table + other if how == "sum" else torch.maximum(table, other)

    other, own = recorder(reduce=send, **settings), recorder(reduce=reduce, **settings)
    feed_other(other)
    feed(own)
    other.drain()
    return [step.values for step in own.drain()]


def steps(
    loss: float | None, tokens: int, norm: float | None, seconds: float, clock: list[float]
) -> Callable[[StepRecorder], None]:
    """Feeds two steps of these values; the second has times."""

    def feed(r: StepRecorder) -> None:
        for step in (1, 2):
            clock[0] += seconds
            r.batch_ended(torch.tensor(loss) if loss is not None else None, tokens, None)
            r.before_optimizer_step("learning_rate", 0.1, gradients([norm]) if norm is not None else [])
            r.step_ended(step, 0)

    return feed


def test_over_ranks_losses_are_averaged_counts_summed_and_the_slowest_rank_counts(
    clock: list[float],
) -> None:
    _, values = over_two_ranks(steps(2.0, 10, 5.0, 0.5, clock), steps(4.0, 20, 5.0, 1.5, clock))
    assert values["loss"] == 3.0
    assert values["tokens"] == 30
    assert values["grad_norm"] == 5.0
    assert values["step_time_s"] == 1.5
    assert values["tokens_per_second"] == 20.0
    assert "samples" not in values


def test_a_rank_without_a_value_has_that_of_the_others_so_that_all_decide_alike(clock: list[float]) -> None:
    """A rank that returned no loss, and owns no part of the sharded gradient."""
    without, full = steps(None, 10, None, 0.5, clock), steps(math.nan, 20, 5.0, 0.5, clock)
    for own, other in ((without, full), (full, without)):
        values = over_two_ranks(own, other, sharded_gradients=True)[1]
        assert math.isnan(values["loss"])
        assert values["grad_norm"] == 5.0
    assert over_two_ranks(without, steps(3.0, 20, None, 0.5, clock))[0]["loss"] == 3.0


def test_sharded_gradients_add_up_by_their_squares(clock: list[float]) -> None:
    shards = steps(1.0, 1, 3.0, 0.5, clock), steps(1.0, 1, 4.0, 0.5, clock)
    assert over_two_ranks(*shards, sharded_gradients=True)[0]["grad_norm"] == pytest.approx(5.0)
