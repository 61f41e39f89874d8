"""bf16 is promised only where the processor multiplies it."""

import pathlib
import platform

import pytest
import torch

from ryzen_llm.kernels import cpu_features, supports_bf16

CPU = torch.device("cpu")
OLDER_CHECKS = (
    "_is_avx2_supported",
    "_is_avx512_supported",
    "_is_avx512_bf16_supported",
    "_is_vnni_supported",
)


@pytest.mark.skipif(
    platform.machine() != "x86_64" or not pathlib.Path("/proc/cpuinfo").exists(),
    reason="the independent reference is Linux's list of x86 flags",
)
def test_features_agree_with_the_kernel_of_the_operating_system() -> None:
    flags = set(pathlib.Path("/proc/cpuinfo").read_text().split("flags", 1)[1].split("\n", 1)[0].split())
    features = cpu_features()
    assert features.avx2 == ("avx2" in flags)
    assert features.avx512_bf16 == ("avx512_bf16" in flags)
    assert supports_bf16(CPU) == bool({"avx512_bf16", "amx_bf16"} & flags)


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True}, False),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": True}, True),
        ({"avx512_f": True, "amx_bf16": True}, True),
    ],
)
def test_bf16_needs_an_instruction_for_it(
    capabilities: dict[str, object], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert supports_bf16(CPU) is expected


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_build_without_the_report_is_asked_the_older_way(
    has_bf16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    for check in OLDER_CHECKS:
        answer = has_bf16 and "bf16" in check
        monkeypatch.setattr(torch.cpu, check, lambda answer=answer: answer, raising=False)
    assert supports_bf16(CPU) is has_bf16
    assert cpu_features().avx2 is False


def test_a_build_that_says_nothing_gets_no_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("get_capabilities", *OLDER_CHECKS):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert supports_bf16(CPU) is False
    assert cpu_features().avx2 is False


def test_other_devices_are_not_assumed_to_have_bf16() -> None:
    assert supports_bf16(torch.device("meta")) is False
