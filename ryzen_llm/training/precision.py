"""Which precision to train in on this hardware."""

from __future__ import annotations

import torch

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import supports_bf16


def choose_precision(requested: str | None, device: torch.device) -> tuple[str, str]:
    """The Trainer's `precision` and, in words, why.

    `requested` is a value of Lightning's ``Trainer(precision=...)``; None chooses bf16 autocast where
    `device` has bf16 arithmetic and fp32 elsewhere. Requested bf16 falls back to fp32 where it would be
    emulated, which is slower than fp32. Raises InputError for a precision that the recipes do not have.
    """
    has_bf16 = supports_bf16(device)
    if requested is None:
        return ("bf16-mixed", "has bf16") if has_bf16 else ("32-true", "has no bf16 arithmetic")
    if requested not in ("bf16-mixed", "32-true"):
        raise InputError(f"trainer.precision is {requested!r}, expected bf16-mixed or 32-true")
    if requested == "bf16-mixed" and not has_bf16:
        return "32-true", f"has no bf16 arithmetic, so {requested} falls back to fp32"
    return requested, "as configured"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The autocast of a run's `precision`, "bf16-mixed" or "32-true", which switches it off."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16-mixed")
