"""Files and options of the command line: short names, several files, what is printed can be read again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import SETTINGS, arguments, report

from ryzen_llm.pipeline import Orchestrator, parse
from ryzen_llm.pipeline.report import Accuracy, FinalReport

CUSTOM = (
    '{"num_epochs": 2, "batch_size": 16, "target_speedup": 4.0, "accuracy_loss_threshold": 0.005, '
    '"output_dir": "out"}'
)
FLAT = {
    "num_epochs": (7, "trainer.max_epochs"),
    "batch_size": (3, "data.batch_size"),
    "learning_rate": (0.125, "optimizer.learning_rate"),
    "enable_kernel_optimization": (False, None),
    "enable_embedding_compression": (False, None),
    "enable_kv_cache_optimization": (False, None),
    "enable_speculative_decoding": (False, None),
    "target_speedup": (9.5, "e2e_speedup_target"),
    "accuracy_loss_threshold": (0.25, "accuracy_loss_max"),
    "output_dir": ("elsewhere", None),
    "kernel_speedup_min": (1.5, None),
    "compression_ratio_min": (1.25, None),
    "kv_cache_memory_savings_min": (0.5, None),
    "speculation_speedup_min": (1.75, None),
    "e2e_speedup_target": (9.5, None),
    "accuracy_loss_max": (0.25, None),
    "test_pass_rate_min": (0.75, None),
}
"""The flat keys with a value that is no default, and the key that a short name stands for."""


def settings(*arguments: str) -> dict[str, Any]:
    """Every dotted key and its value, as the run would have it."""

    def flatten(prefix: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            return {prefix: value}
        parts = [flatten(f"{prefix}.{key}" if prefix else key, part) for key, part in value.items()]
        return {key: part for found in parts for key, part in found.items()}

    return flatten("", yaml.safe_load(parse(arguments).text))


@pytest.mark.parametrize("form", ["option", "option=", "json", "yaml"])
def test_flat_keys(form: str, tmp_path: Path) -> None:
    written = {key: json.dumps(value).strip('"') for key, (value, _) in FLAT.items()}
    file = tmp_path / f"flat.{form}"
    file.write_text(
        json.dumps({key: value for key, (value, _) in FLAT.items()})
        if form == "json"
        else "\n".join(f"{key}: {value}" for key, value in written.items())
    )
    given = {
        "option": [part for key, value in written.items() for part in (f"--{key}", value)],
        "option=": [f"--{key}={value}" for key, value in written.items()],
    }.get(form, ["--config", str(file)])
    defaults = settings()
    changed = {key: value for key, value in settings(*given).items() if value != defaults[key]}
    assert changed == {dotted or key: value for key, (value, dotted) in FLAT.items()}


def test_a_run_from_several_files_and_options(
    tmp_path: Path,
    corpus: Path,
    train: Callable[[list[str]], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The file of the README with its flat keys over one with dotted ones, and an option over both."""
    base = {"data.source": str(corpus), **SETTINGS, "data.batch_size": 2, "trainer.limit_train_batches": 4}
    nested: dict[str, Any] = {}
    for key, value in base.items():
        part, _, name = key.rpartition(".")
        (nested.setdefault(part, {}) if part else nested)[name] = value
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(nested))
    (tmp_path / "custom.json").write_text(CUSTOM)
    monkeypatch.chdir(tmp_path)
    files = ["--config", "base.yaml", "--config", "custom.json"]
    assert train([*files, "--validation_rounds=1", "--data.context=8"]) == 0

    out = tmp_path / "out"
    rows = report(out, "training_metrics_report")["batches"]
    assert {row["tokens"] for row in rows} == {16 * 8}
    assert len(report(out, "training_metrics_report")["epochs"]) == 2
    results = {result["name"]: result for result in report(out, "validation_report")["results"]}
    assert results["end_to_end"]["threshold"] == 4.0
    assert results["numerical_correctness"]["threshold"] == 0.005
    # What was run can be run again.
    assert parse(["--config", str(out / "config.yaml")]).text == (out / "config.yaml").read_text()
    assert settings("--config", str(out / "config.yaml"))["data.batch_size"] == 16


def test_the_later_file_wins_and_options_win_over_files_before_them(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("batch_size: 2\nlearning_rate: 0.5\nnum_epochs: 2\n")
    (tmp_path / "two.json").write_text('{"data": {"batch_size": 3}, "num_epochs": 3}')
    found = settings(
        "--config", str(tmp_path / "one.yaml"), f"--config={tmp_path / 'two.json'}", "--num_epochs", "4"
    )
    assert [found[k] for k in ("data.batch_size", "optimizer.learning_rate", "trainer.max_epochs")] == [
        3,
        0.5,
        4,
    ]


def test_a_switch_needs_no_value_and_takes_one() -> None:
    assert not any(settings()[name] for name in ("resume", "strict"))
    found = settings(
        "--strict", "--seed", "3", "--enable_kv_cache_optimization", "--compile", "false", "--resume"
    )
    names = ("strict", "seed", "enable_kv_cache_optimization", "compile", "resume")
    assert [found[name] for name in names] == [True, 3, True, False, True]
    assert settings("--resume=false")["resume"] is False


def test_the_printed_configuration_reads_as_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        *arguments(tmp_path / "texts", tmp_path / "out"),
        "--prompt",
        "a: [b]\n'c'",
        "--trainer.devices=1",
    ]
    with pytest.raises(SystemExit) as printed:
        parse([*given, "--print_config"])
    assert printed.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert settings("--config", str(tmp_path / "printed.yaml")) == settings(*given)


@pytest.mark.parametrize(("verdict", "status"), [("PASS", 0), ("FAIL", 3), ("NOT_MEASURED", 0)])
def test_strict_takes_self_tests_for_a_verdict(
    verdict: str,
    status: int,
    train: Callable[[list[str]], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = FinalReport(
        status="done",
        phases=[],
        optimizations={},
        e2e_speedup=None,
        accuracy=Accuracy(),
        tests={"status": verdict},
        sample=None,
        recommendations=[],
        artifacts={},
    )
    monkeypatch.setattr(Orchestrator, "run", lambda self: made)
    command = [f"--output_dir={tmp_path}"]
    assert train(command) == 0
    assert train([*command, "--strict"]) == status


def test_help_names_every_key_with_an_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as printed:
        parse(["--help"])
    assert printed.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for key in settings():
        assert f"--{key} " in text, key
    for alias in ("num_epochs", "batch_size", "learning_rate", "target_speedup", "accuracy_loss_threshold"):
        assert f"{alias} = " in text
