"""The main job: five phases and their reports."""

from ryzen_llm.pipeline.config import RunConfig, exit_with, parse
from ryzen_llm.pipeline.drafter_training import DrafterOrchestrator
from ryzen_llm.pipeline.orchestrator import Orchestrator

__all__ = ["DrafterOrchestrator", "Orchestrator", "RunConfig", "exit_with", "parse"]
