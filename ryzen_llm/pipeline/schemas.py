"""JSON Schemas of the four reports, as published in docs/schemas.

`python -m ryzen_llm.pipeline.schemas docs/schemas` writes them anew after a change to a report's fields.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from ryzen_callbacks import TrainingMetricsReport, ValidationReport, write_json

from ryzen_llm.pipeline.report import FinalReport
from ryzen_llm.selftest import IntegrationTestReport

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REPORTS: dict[str, type[BaseModel]] = {
    "training_metrics_report": TrainingMetricsReport,
    "validation_report": ValidationReport,
    "integration_test_report": IntegrationTestReport,
    "phase2_final_report": FinalReport,
}


def report_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema (draft 2020-12) of each report, by the report's name without `.json`."""
    return {
        # As it is written: every field is there, those with a default too.
        name: {"$schema": _DIALECT, **model.model_json_schema(mode="serialization")}
        for name, model in _REPORTS.items()
    }


def main(arguments: list[str]) -> int:
    """Write every schema into the folder given, as `<report>.schema.json`."""
    (folder,) = arguments
    for name, schema in report_schemas().items():
        write_json(Path(folder) / f"{name}.schema.json", schema)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
