"""What a measurement was taken on."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch


def describe_environment() -> dict[str, Any]:
    """Versions, processor, threads, accelerator and load of this machine, as plain JSON values.

    `load_average` is the one-minute figure at the time of the call (None where the system has none): a reader
    of a timing wants to know whether the machine was busy.
    """
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": _version("lightning") or _version("pytorch-lightning"),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "device": _device_name(),
        "device_count": torch.accelerator.device_count(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
        "bf16": bf16_supported(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def bf16_supported() -> bool:
    """Whether the device in use has bf16 arithmetic in hardware (not emulated)."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if torch.backends.mps.is_available():
        return True
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return str(accelerator) if accelerator is not None else "cpu"


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
