"""The description of the machine is of this machine, and goes into JSON as it is."""

import json
import os
import platform

import pytest
import torch
from ryzen_callbacks import describe_environment
from ryzen_callbacks.environment import bf16_supported


def test_the_description_is_of_this_process() -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        described = describe_environment()
    finally:
        torch.set_num_threads(threads)
    assert json.loads(json.dumps(described)) == described
    assert described["python"] == platform.python_version()
    assert described["torch"] == torch.__version__
    assert described["threads"] == 1
    assert described["cpu_count"] == os.cpu_count()
    assert (described["device"] == "cpu") == (not torch.accelerator.is_available())
    assert described["bf16"] is bf16_supported()


def test_a_machine_without_the_distribution_or_the_load_says_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ryzen_callbacks.environment._version", lambda name: None)
    monkeypatch.delattr(os, "getloadavg", raising=False)
    described = describe_environment()
    assert described["lightning"] is None
    assert described["load_average"] is None
