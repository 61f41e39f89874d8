"""The published JSON Schemas are those of the reports, and refuse what is no report."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ryzen_callbacks import ValidationReport, ValidationResult

from ryzen_llm.pipeline.schemas import main, report_schemas

PUBLISHED = Path(__file__).parents[3] / "docs" / "schemas"


def test_what_is_published_is_current(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    expected = {path.name: path.read_text("utf-8") for path in tmp_path.iterdir()}
    found = {path.name: path.read_text("utf-8") for path in PUBLISHED.iterdir()}
    assert found == expected, "run: python -m ryzen_llm.pipeline.schemas docs/schemas"


@pytest.mark.parametrize("name", report_schemas())
def test_each_is_a_schema(name: str) -> None:
    schema = json.loads((PUBLISHED / f"{name}.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["additionalProperties"] is False
    assert "schema_version" in schema["required"]


def validation_report() -> dict[str, Any]:
    result = ValidationResult(name="c", metric="speedup", threshold=1.0, status="FAIL", message="m")
    content = ValidationReport.of([result], {"cpu": "x"}).model_dump(mode="json")
    assert isinstance(content, dict)
    return content


def test_a_report_is_valid() -> None:
    jsonschema.validate(validation_report(), report_schemas()["validation_report"])


@pytest.mark.parametrize(
    ("spoil", "naming"),
    [
        (lambda report: report.pop("summary"), "summary"),
        (lambda report: report.update(more=1), "more"),
        (lambda report: report["results"][0].update(status="GREAT"), "GREAT"),
        (lambda report: report["results"][0].update(measured="2x"), "2x"),
    ],
)
def test_what_is_no_report_is_refused(spoil: Any, naming: str) -> None:
    report = validation_report()
    spoil(report)
    with pytest.raises(jsonschema.ValidationError, match=naming):
        jsonschema.validate(report, report_schemas()["validation_report"])
