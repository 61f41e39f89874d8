"""What is written past TensorBoard's own writer is read back by its own reader, checksums and all."""

import ctypes
import math
import random
import struct
from pathlib import Path

import pytest
from ryzen_callbacks.step_recorder import Step
from ryzen_callbacks.tensorboard_records import _masked_crc32c, encode
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c


def test_checksums_are_those_of_tensorboards_own_code() -> None:
    rng = random.Random(0)
    texts = [rng.randbytes(length) for length in (4, 5, 8, 193, 255, 256, 257, 1000)]
    assert _masked_crc32c(texts) == [struct.pack("<I", masked_crc32c(text)) for text in texts]


def test_every_value_of_every_step_comes_back(tmp_path: Path) -> None:
    """Steps with different values, among them none, zeros and what is not finite, and long tags."""
    steps = [
        Step(1, 0, {}),
        Step(127, 0, {"loss": 0.0, "grad_norm": math.nan}),
        Step(128, 0, {"loss": -1.5, "learning_rate": 1e-30, "x" * 300: math.inf}),
        Step(129, 0, {"loss": 1e39, "grad_norm": -1e39}),  # too large for float32
        Step(2**40, 1, {"loss": 3e38, "samples": 4, "a/ä": 7.0}),
    ]
    (tmp_path / "events.out.tfevents.1.x").write_bytes(encode(steps, "train/", wall_time=12.5))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    names = {name for step in steps for name in step.values}
    assert set(events.Tags()["scalars"]) == {f"train/{name}" for name in names}
    for name in names:
        expected = [(12.5, s.step, ctypes.c_float(s.values[name]).value) for s in steps if name in s.values]
        read = [(e.wall_time, e.step, e.value) for e in events.Scalars(f"train/{name}")]
        assert read == [pytest.approx(row, rel=1e-6, nan_ok=True) for row in expected]
