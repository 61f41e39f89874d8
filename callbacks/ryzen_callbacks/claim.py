"""A claim: something is faster, smaller or no worse than something else, by how much, and how to find out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from ryzen_callbacks.verdict import finite_number

Measure = Literal["time", "bytes", "peak_memory", "loss"]
QuantityName = Literal["speedup", "ratio", "saving", "increase", "difference"]

_QUANTITIES: dict[str, tuple[QuantityName, ...]] = {
    "time": ("speedup",),
    "bytes": ("ratio", "saving"),
    "peak_memory": ("ratio", "saving"),
    "loss": ("increase", "difference"),
}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One measurable claim about an optimisation.

    | measure     | each arm returns               | quantity (first: default) | holds when              |
    |-------------|--------------------------------|---------------------------|-------------------------|
    | time        | anything; runs the work once   | speedup                   | base / opt >= threshold |
    | bytes       | a number of bytes              | ratio                     | base / opt >= threshold |
    |             |                                | saving                    | 1 - opt / base >= ...   |
    | peak_memory | anything; runs the work once   | ratio, saving             | as for bytes            |
    | loss        | losses per batch, same batches | increase                  | d <= threshold          |
    |             |                                | difference                | -threshold <= d <= ...  |

    d is (opt - base) / base of the mean losses. "increase" claims to be no worse, "difference" to be
    equivalent: a 95% interval of d inside the margin is two one-sided tests (TOST) at 2.5%. Peak memory is
    that of the accelerator's tensors; it is not measured on a CPU.

    Both arms must do the same work. A timed arm is run many times and must be repeatable.

    `tolerance` eases the line that has to be met, by tolerance * |threshold|: down where it is a lower bound,
    else up. `rounds` overrides the validator's number of rounds for this claim.

    Raises:
        ValueError: unknown measure, a quantity that does not go with it, a threshold or tolerance that is not
            a finite number, a threshold that everything meets (a speed-up or ratio of 0 or less) or nothing
            does (a difference below 0), or a missing arm.
    """

    name: str
    baseline: Callable[[], Any] | None = None
    optimized: Callable[[], Any] | None = None
    measure: Measure
    threshold: float
    tolerance: float = 0.0
    quantity: QuantityName | None = None
    baseline_name: str = "baseline"
    optimized_name: str = "optimized"
    description: str = ""
    rounds: int | None = None
    not_measured_because: str = ""
    """Why the claim cannot be measured; see `Claim.not_built`."""

    def __post_init__(self) -> None:
        if self.measure not in _QUANTITIES:
            raise ValueError(
                f"claim {self.name!r}: measure is {self.measure!r}, expected one of {', '.join(_QUANTITIES)}"
            )
        allowed = _QUANTITIES[self.measure]
        if self.quantity is None:
            object.__setattr__(self, "quantity", allowed[0])
        elif self.quantity not in allowed:
            raise ValueError(
                f"claim {self.name!r}: quantity {self.quantity!r} does not go with measure {self.measure!r}; "
                f"use {' or '.join(allowed)}"
            )
        for label, figure in (("threshold", self.threshold), ("tolerance", self.tolerance)):
            if (number := finite_number(figure)) is None:
                raise ValueError(f"claim {self.name!r}: {label} is {figure!r}, expected a finite number")
            object.__setattr__(self, label, number)
        if self.quantity in ("speedup", "ratio") and self.threshold <= 0:
            raise ValueError(f"claim {self.name!r}: threshold is {self.threshold}, expected more than 0")
        if self.quantity == "difference" and self.threshold < 0:
            raise ValueError(f"claim {self.name!r}: threshold is {self.threshold}, expected 0 or more")
        if not 0 <= self.tolerance < 1:
            raise ValueError(
                f"claim {self.name!r}: tolerance is {self.tolerance}, expected 0 <= tolerance < 1"
            )
        if self.rounds is not None and self.rounds < 1:
            raise ValueError(f"claim {self.name!r}: rounds is {self.rounds}, expected 1 or more")
        if not self.not_measured_because and not (callable(self.baseline) and callable(self.optimized)):
            raise ValueError(
                f"claim {self.name!r}: baseline and optimized must both be callables without arguments; "
                "for a claim that cannot be measured yet use Claim.not_built(name, reason, ...)"
            )

    @classmethod
    def not_built(
        cls,
        name: str,
        reason: str,
        *,
        measure: Measure,
        threshold: float,
        quantity: QuantityName | None = None,
        description: str = "",
    ) -> Claim:
        """A claim that cannot be measured yet: it is reported as NOT_MEASURED, with `reason`."""
        if not reason:
            raise ValueError(f"claim {name!r}: a claim that is not measured needs a reason")
        return cls(
            name=name,
            measure=measure,
            threshold=threshold,
            quantity=quantity,
            description=description,
            not_measured_because=reason,
        )
