"""The Triton kernel by Triton's interpreter, in numpy: the maths without a GPU. Needs TRITON_INTERPRET=1."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from random_cache import PAIRS, SETTINGS, case

from ryzen_llm.kernels import Stored
from ryzen_llm.kernels.cached_attention import reference
from ryzen_llm.kernels.cached_attention_triton import decode


@pytest.mark.parametrize("window", [0, 33])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(("keys", "values"), [*PAIRS, ("fp8", "fp8")])
def test_the_kernel_gives_attention_on_the_dequantised_cache(
    keys: str, values: str, setting: dict[str, Any], window: int
) -> None:
    a = case(keys, values, **setting)
    segments = [(a["keys"], a["values"], a["ring"], 0)]
    got = decode(a["queries"], segments, a["positions"], window)
    torch.testing.assert_close(got, reference(**a, window=window), atol=2e-5, rtol=2e-5)


def test_kernels_start_on_the_device_of_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts them on the current one, which with several GPUs is another."""
    devices: list[torch.device] = []

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        devices.append(tensor.device)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    a = case("int8", "int8")
    decode(a["queries"], [(a["keys"], a["values"], a["ring"], 0)], a["positions"], 0)
    assert devices == [a["queries"].device]


def test_the_kernel_joins_full_precision_sinks_to_the_rest() -> None:
    a = case("int4", "int4", time=2)
    sinks = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 16)
    segments = [(a["keys"], a["values"], 0, 3), (Stored(sinks[0]), Stored(sinks[1]), 0, 0)]
    got = decode(a["queries"], segments, a["positions"], 0)
    torch.testing.assert_close(got, reference(**a, sinks=sinks), atol=2e-5, rtol=2e-5)
