"""On a CUDA device nothing waits for it between drains, and step times are the device's own."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ryzen_callbacks import AnomalyDetector, OptimizationValidator, TrainingMetricsCollector
from ryzen_callbacks.step_callback import StepCallback
from ryzen_callbacks.step_recorder import StepRecorder
from tiny_run import Tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_recording_never_synchronises_and_a_steps_time_is_that_of_its_kernels() -> None:
    device = torch.device("cuda")
    gradient = torch.full((1000,), 2.0, device=device)
    matrix = torch.randn(4096, 4096, device=device)
    loss = torch.tensor(3.0, device=device)
    recorder = StepRecorder(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            recorder.wait_started()
            recorder.wait_ended()
            for _ in range(10):
                matrix @ matrix
            recorder.before_optimizer_step("learning_rate", 0.1, [gradient])
            recorder.batch_ended(loss * 1, 10, None)
            recorder.step_ended(step, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    steps = recorder.drain()
    assert [s.values["loss"] for s in steps] == [3.0] * 5
    assert [s.values["grad_norm"] for s in steps] == pytest.approx([2.0 * 1000**0.5] * 5)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(10):
        matrix @ matrix
    end.record()
    end.synchronize()
    expected = start.elapsed_time(end) / 1000
    times = sorted(s.values["step_time_s"] for s in steps[1:])
    assert times[1] == pytest.approx(expected, rel=0.5)


def test_in_a_trainer_the_three_callbacks_synchronise_once_a_drain_and_never_between(
    make_trainer: Callable[..., Any], make_loader: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA's own count: its debug mode warns of every operation that makes the host wait."""
    module = Tiny()
    waited_at: list[int] = []

    def watched(hook: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                try:
                    return hook(*args, **kwargs)
                finally:
                    torch.cuda.set_sync_debug_mode("default")
                    waits = [w for w in caught if "synchronizing CUDA operation" in str(w.message)]
                    waited_at.extend(module.trainer.global_step for _ in waits)

        return run

    for name in ("on_before_optimizer_step", "on_train_batch_end"):
        monkeypatch.setattr(StepCallback, name, watched(getattr(StepCallback, name)))
    callbacks = [TrainingMetricsCollector(), AnomalyDetector(), OptimizationValidator()]
    make_trainer(callbacks=callbacks, max_epochs=1, log_every_n_steps=4, accelerator="gpu").fit(
        module, make_loader()
    )
    assert waited_at == [4, 8, 12, 16]
