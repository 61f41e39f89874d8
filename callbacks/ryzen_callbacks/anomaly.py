"""What a rule finds."""

from __future__ import annotations

from dataclasses import dataclass

from ryzen_callbacks.reports import AnomalyRow, Severity


@dataclass(frozen=True)
class Anomaly:
    """Something at `step` that should not be. `expected` is (low, high), None where open."""

    step: int
    kind: str
    severity: Severity
    value: float
    expected: tuple[float | None, float | None]
    message: str

    def row(self) -> AnomalyRow:
        """As it stands in a report; a value that is not finite is None there."""
        return AnomalyRow(
            step=self.step,
            kind=self.kind,
            severity=self.severity,
            value=self.value,
            expected=self.expected,
            message=self.message,
        )
