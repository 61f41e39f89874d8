"""On a CUDA device nothing waits for it between drains, and step times are the device's own."""

import pytest
import torch
from ryzen_callbacks.step_recorder import StepRecorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_recording_never_synchronises_and_a_steps_time_is_that_of_its_kernels() -> None:
    device = torch.device("cuda")
    weight = torch.zeros(1000, device=device, requires_grad=True)
    weight.grad = torch.full_like(weight, 2.0)
    matrix = torch.randn(4096, 4096, device=device)
    loss = torch.tensor(3.0, device=device)
    recorder = StepRecorder(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(5):
            recorder.batch_started()
            for _ in range(10):
                matrix @ matrix
            recorder.before_optimizer_step("learning_rate", 0.1, [weight])
            recorder.batch_ended(loss * 1, 10, None)
            recorder.step_ended(step, 0)
            recorder.idle()
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
