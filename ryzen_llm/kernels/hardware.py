"""What the processor at hand can do, as PyTorch says; what it does not say counts as absent."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class CpuFeatures:
    """The CPU's name where PyTorch knows it, and which of the instruction sets that matter here it has."""

    name: str | None
    avx2: bool
    avx512: bool
    avx512_bf16: bool
    avx512_vnni: bool
    amx_bf16: bool
    arm_bf16: bool


def cpu_features() -> CpuFeatures:
    """Ask `torch.cpu.get_capabilities()`, or on a build without it the older single checks."""
    report = getattr(torch.cpu, "get_capabilities", None)
    found: dict[str, Any] = dict(report()) if report is not None else {}

    def has(capability: str, older_check: str | None = None) -> bool:
        check = getattr(torch.cpu, older_check, None) if older_check and not found else None
        return bool(check() if check is not None else found.get(capability, False))

    return CpuFeatures(
        name=found.get("cpu_name"),
        avx2=has("avx2", "_is_avx2_supported"),
        avx512=has("avx512_f", "_is_avx512_supported"),
        avx512_bf16=has("avx512_bf16", "_is_avx512_bf16_supported"),
        avx512_vnni=has("avx512_vnni", "_is_vnni_supported"),
        amx_bf16=has("amx_bf16"),
        arm_bf16=has("bf16") or has("arm_bf16"),
    )


@dataclass(frozen=True)
class CpuCaches:
    """Bytes of the first core's data caches, shared ones in full; None where unknown."""

    l1: int | None
    l2: int | None
    l3: int | None


@functools.cache
def cpu_caches() -> CpuCaches:
    """Ask Linux, which lists them under /sys; PyTorch's report has no L3."""
    sizes: dict[str, int] = {}
    for cache in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                sizes[level] = int(size.removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return CpuCaches(l1=sizes.get("1"), l2=sizes.get("2"), l3=sizes.get("3"))


def describe_device(device: torch.device) -> str:
    """What matters for the speed of kernels, in a line: instruction sets and caches, or a GPU's sizes."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return (
            f"{gpu.name}: compute capability {gpu.major}.{gpu.minor}, {gpu.multi_processor_count} "
            f"multiprocessors, {gpu.total_memory >> 20:,} MiB, L2 {gpu.L2_cache_size >> 20} MiB, "
            f"shared memory {gpu.shared_memory_per_block_optin >> 10} KiB a block"  # type: ignore[attr-defined]
        )
    if device.type != "cpu":
        return device.type
    features, caches = cpu_features(), cpu_caches()
    names = {
        "AVX2": features.avx2,
        "AVX512": features.avx512,
        "AVX512-BF16": features.avx512_bf16,
        "VNNI": features.avx512_vnni,
        "AMX-BF16": features.amx_bf16,
        "ARM-BF16": features.arm_bf16,
    }
    has = ", ".join(name for name, there in names.items() if there) or "no instruction set that matters here"
    sizes = {"L1": caches.l1, "L2": caches.l2, "L3": caches.l3}
    known = ", ".join(f"{level} {size >> 10:,} KiB" for level, size in sizes.items() if size)
    return f"{features.name or 'CPU'}: {has}; caches {known or 'unknown'}; {torch.get_num_threads()} threads"


def supports_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware; emulated bf16 is slower than fp32, so False."""
    if device.type == "cpu":
        features = cpu_features()
        return features.avx512_bf16 or features.amx_bf16 or features.arm_bf16
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return False
