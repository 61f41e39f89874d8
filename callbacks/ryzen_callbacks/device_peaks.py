"""Peak arithmetic rates of accelerators, dense, in FLOP/s: the denominator of MFU."""

from __future__ import annotations

import torch

# Dense tensor-core rates, without structured sparsity (NVIDIA's headline figures with sparsity are twice
# these; dividing by them halves every MFU). Keyed by a part of torch.cuda.get_device_name(); the first match
# wins. Sources: the vendors' data sheets: NVIDIA A100 (2021), A10, L4, L40S, H100 (SXM, PCIe, NVL; 2023),
# H200 (2023), B200 (2024), V100 (2018), T4 (2018); AMD Instinct MI300X (2023).
_PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    ("B200", {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1100e12, "fp32": 75e12}),
    ("H200 NVL", {"bf16": 835e12, "fp16": 835e12, "tf32": 417e12, "fp32": 60e12}),
    ("H200", {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    ("H100 NVL", {"bf16": 835e12, "fp16": 835e12, "tf32": 417e12, "fp32": 60e12}),
    ("H100 PCIe", {"bf16": 756e12, "fp16": 756e12, "tf32": 378e12, "fp32": 51e12}),
    ("H100", {"bf16": 989e12, "fp16": 989e12, "tf32": 494e12, "fp32": 67e12}),
    ("A100", {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12}),
    ("L40S", {"bf16": 362e12, "fp16": 362e12, "tf32": 183e12, "fp32": 91.6e12}),
    ("L4", {"bf16": 121e12, "fp16": 121e12, "tf32": 60e12, "fp32": 30.3e12}),
    ("A10G", {"bf16": 70e12, "fp16": 70e12, "tf32": 35e12, "fp32": 31.2e12}),
    ("A10", {"bf16": 125e12, "fp16": 125e12, "tf32": 62.5e12, "fp32": 31.2e12}),
    ("V100 PCIE", {"fp16": 112e12, "fp32": 14e12}),
    ("V100", {"fp16": 125e12, "fp32": 15.7e12}),
    ("T4", {"fp16": 65e12, "fp32": 8.1e12}),
    ("MI300X", {"bf16": 1307e12, "fp16": 1307e12, "tf32": 653.7e12, "fp32": 163.4e12}),
)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense peak FLOP/s of one `device` at a Lightning `precision` ("bf16-mixed", "16-mixed", "32-true",
    ...).

    None where the device or the precision is not in the table (every CPU among them): unknown is not guessed.
    """
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device), arithmetic(precision))


def peak_flops_by_name(device_name: str, kind: str) -> float | None:
    """Dense peak FLOP/s for a device's name and "bf16", "fp16", "tf32" or "fp32"; None if unknown."""
    words = device_name.replace("-", " ").split()
    if "MIG" in words:
        return None  # a slice of a device has a part of its peak
    for model, rates in _PEAKS:
        if all(word in words for word in model.split()):
            return rates.get(kind)
    return None


def arithmetic(precision: str) -> str:
    """Which of a device's rates a Lightning `precision` uses for its matrix products."""
    if precision.startswith("bf16"):
        return "bf16"
    if precision.startswith("16"):
        return "fp16"
    if precision.startswith("32"):
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return precision
