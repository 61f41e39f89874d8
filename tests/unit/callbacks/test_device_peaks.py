"""Peak rates are the dense ones of the right device, and unknown ones are not guessed."""

import pytest
import torch
from ryzen_callbacks.device_peaks import arithmetic, peak_flops, peak_flops_by_name


@pytest.mark.parametrize(
    ("device", "kind", "teraflops"),
    [
        ("NVIDIA H200", "bf16", 989),  # dense; the data sheet's 1,979 is with sparsity
        ("NVIDIA H100 80GB HBM3", "bf16", 989),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H100 NVL", "bf16", 835),
        ("NVIDIA H200 NVL", "bf16", 835),
        ("Tesla V100-PCIE-16GB", "fp16", 112),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156),
        ("NVIDIA L4", "bf16", 121),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA A10G", "bf16", 70),
        ("Tesla T4", "fp16", 65),
    ],
)
def test_known_devices(device: str, kind: str, teraflops: float) -> None:
    assert peak_flops_by_name(device, kind) == teraflops * 1e12


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA GeForce RTX 9999", "bf16"),
        ("NVIDIA A1000", "bf16"),
        ("Tesla V100-SXM2-16GB", "bf16"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16"),
    ],
)
def test_unknown_is_none(device: str, kind: str) -> None:
    assert peak_flops_by_name(device, kind) is None


def test_no_cpu_has_a_known_peak() -> None:
    assert peak_flops(torch.device("cpu"), "32-true") is None


def test_a_lightning_precision_names_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [arithmetic(p) for p in ("bf16-mixed", "16-mixed", "64-true")] == ["bf16", "fp16", "64-true"]
    for setting, expected in (("highest", "fp32"), ("high", "tf32")):
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda setting=setting: setting)
        assert arithmetic("32-true") == expected
