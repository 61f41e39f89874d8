"""phase2_final_report.json: its fields, as pydantic models. A figure that was not measured is None."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from ryzen_llm.training import OpChoice

PhaseStatus = Literal["done", "failed", "interrupted", "skipped"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", json_schema_serialization_defaults_required=True)


class Phase(_Part):
    """One phase and how it ended; `error` says why it failed or was skipped."""

    name: str
    status: PhaseStatus
    duration_s: float | None
    error: str | None = None


class Component(_Part):
    """One claim, as the validation report has it."""

    status: str
    measured: float | None
    ci_low: float | None
    ci_high: float | None
    threshold: float | None
    message: str


class Accuracy(_Part):
    """How good the trained model is, in nats per token; a model that ignores context cannot get below
    `unigram_entropy`.
    """

    val_loss: float | None = None
    val_accuracy: float | None = None
    unigram_entropy: float | None = None
    initial_val_loss: float | None = None
    """On the same text before training, where it started from a pretrained model."""
    reason: str | None = None
    """Why a figure is None."""


class Kernels(_Part):
    """The form chosen for each op and all that were measured; without any, `reason` says why."""

    device: str | None = None
    """Instruction sets and caches, or a GPU's properties."""
    choices: list[OpChoice] = []
    reason: str | None = None


class FinalReport(_Part):
    """The report of the whole run."""

    schema_version: int = 1
    status: Literal["done", "failed", "interrupted"]
    checkpoint: str | None = None
    """The weights that everything below is about; within the output directory where they lie there."""
    phases: list[Phase]
    optimizations: dict[str, Component]
    kernels: Kernels = Kernels(reason="setup did not finish")
    e2e_speedup: Component | None
    accuracy: Accuracy
    tests: dict[str, Any] | None
    """The summary of the self-tests, and the verdict (`status`) against `threshold`, the least pass rate."""
    sample: str | None
    recommendations: list[str]
    artifacts: dict[str, str]
