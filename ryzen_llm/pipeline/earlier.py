"""What an earlier call left in the output directory, for a call that runs some of the phases only."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from ryzen_callbacks import ValidationReport

from ryzen_llm.pipeline.report import FinalReport, Phase
from ryzen_llm.selftest import IntegrationTestReport

_Report = TypeVar("_Report", bound=BaseModel)


@dataclass(frozen=True)
class Earlier:
    """The reports of an earlier call on the same weights; None where there is none that can be read."""

    final: FinalReport | None = None
    validation: ValidationReport | None = None
    tests: IntegrationTestReport | None = None

    def phase(self, name: str) -> Phase:
        """How a phase that this call leaves out ended then."""
        done = [phase for phase in self.final.phases if phase.name == name] if self.final else []
        if done:
            return done[0]
        return Phase(name=name, status="skipped", duration_s=None, error="not in --phases")


def read_earlier(final: Path, validation: Path, tests: Path, checkpoint: str) -> Earlier:
    """What the three reports hold, where the final one is about `checkpoint`; else nothing."""
    found = _read(final, FinalReport)
    if found is None or found.checkpoint != checkpoint:
        return Earlier()
    return Earlier(found, _read(validation, ValidationReport), _read(tests, IntegrationTestReport))


def _read(path: Path, model: type[_Report]) -> _Report | None:
    try:
        return model.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, ValidationError) as error:
        warnings.warn(f"{path} cannot be read and is left out ({error})", stacklevel=2)
        return None
