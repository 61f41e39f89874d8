"""Results that are measured in parts, of which each has the machine that it was measured on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def move_to_parts(found: dict[str, Any], parts: Iterable[dict[str, Any]]) -> None:
    """Give the one environment of a file, as older ones have it, to each of its parts without one."""
    environment = found.pop("environment", None)
    if environment is not None:
        for part in parts:
            part.setdefault("environment", environment)
