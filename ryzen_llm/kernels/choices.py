"""Which form of each op a model uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from ryzen_llm.errors import InputError
from ryzen_llm.kernels.candidates import CANDIDATES
from ryzen_llm.kernels.causal_attention import causal_attention
from ryzen_llm.kernels.linear import linear_in_cpp
from ryzen_llm.kernels.rotary_qkv import rotary_qkv_in_cpp

AUTOMATIC = "automatic"
"""The form of ops that nothing was measured for, by rules of thumb."""


_DECIDES: dict[str, Callable[..., Any]] = {
    "attention": causal_attention,
    "rotary_qkv": rotary_qkv_in_cpp,
    "linear": linear_in_cpp,
}
"""Forms that look at what they are given, while they are traced."""


@dataclass(frozen=True)
class KernelChoices:
    """A form of each op, by its name in `CANDIDATES`, or "automatic".

    Raises InputError for a name that is not there.
    """

    attention: str = AUTOMATIC
    norm: str = AUTOMATIC
    swiglu: str = AUTOMATIC
    geglu: str = AUTOMATIC
    rotary_qkv: str = AUTOMATIC
    linear: str = AUTOMATIC
    loss: str = AUTOMATIC

    def __post_init__(self) -> None:
        for field in fields(self):
            name, known = getattr(self, field.name), CANDIDATES[field.name]
            if name != AUTOMATIC and name not in known:
                expected = ", ".join([AUTOMATIC, *known])
                raise InputError(f"{field.name} is {name!r}, expected one of {expected}")

    def function(self, op: str, compiled: bool = False) -> Callable[..., Any]:
        """The form chosen for `op`; where that is automatic, `compiled` says whether the model is."""
        name = getattr(self, op)
        if name == AUTOMATIC:
            if op in _DECIDES:
                return _DECIDES[op]
            if op == "loss":
                name = "fused, compiled" if compiled else "fused"
            else:
                name = next(iter(CANDIDATES[op]))
        return CANDIDATES[op][name].function


PLAIN = KernelChoices(**{op: next(iter(forms)) for op, forms in CANDIDATES.items()})
"""Each op in its plainest form, as PyTorch has it: what baselines use."""
