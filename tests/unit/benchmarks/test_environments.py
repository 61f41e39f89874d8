"""What is measured in parts, on several days and machines, says of each part where it was measured."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from benchmarks import lossless, speculation
from ryzen_llm.data import SpecialTokens, Tokenizer
from ryzen_llm.interop import export_pretrained
from ryzen_llm.model import ModelConfig, Transformer

RESULTS = Path(__file__).parents[3] / "benchmarks" / "results"
OPTIONS = {
    speculation: ["--per-category=1", "--new-tokens=3", "--longest-prompt=8", "--widths=2", "--eager"],
    lossless: ["--texts=2", "--prompt-tokens=8", "--new-tokens=3", "--width=2", "--caches=dense"],
}


def parts_of(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    if "arms" in found:
        yield from found["arms"].items()
    for runs in found.get("runs", {}).values():
        yield from runs.items()


@pytest.fixture
def arguments(tmp_path: Path, module: ModuleType) -> list[str]:
    """Of a benchmark on a small model, but for the drafters."""
    trained = Tokenizer.train(["a few words of text, a few more words"] * 9, 270)
    tokenizer = Tokenizer.from_json(
        trained.to_json(), SpecialTokens(chat_template="{{ messages[0].content }}")
    )
    shape: dict[str, Any] = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, max_position_embeddings=64, **shape)
    export_pretrained(Transformer(config), tokenizer, tmp_path / "model")
    prompts = [{"category": name, "turns": ["a few more words of text, words"]} for name in ("qa", "rag")]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    given = [f"--model={tmp_path / 'model'}", f"--prompts={tmp_path / 'prompts.jsonl'}", "--weights=fp32"]
    more = ["--peers"] if module is speculation else ["--width-1"]
    return [*given, *more, *OPTIONS[module], f"--out={tmp_path / 'results.json'}"]


@pytest.mark.parametrize("module", OPTIONS)
@pytest.mark.parametrize("old_form", [False, True], ids=["", "one environment for all"])
def test_each_part_keeps_the_machine_that_it_was_measured_on(
    module: ModuleType,
    old_form: bool,
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "results.json"

    def found_by(machine: str, drafter: str) -> dict[str, Any]:
        monkeypatch.setattr(module, "describe_environment", lambda: {"cpu": machine})
        module.main([*arguments, "--drafters", drafter])
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    found = found_by("one", "suffix")
    assert all(part["environment"] == {"cpu": "one"} for _, part in parts_of(found))
    assert "environment" not in found
    if old_form:
        for _, part in parts_of(found):
            del part["environment"]
        path.write_text(json.dumps(found | {"environment": {"cpu": "one"}}))
    again = found_by("another", "recycling")
    assert "environment" not in again
    machines = {name: part["environment"]["cpu"] for name, part in parts_of(again)}
    measured_again = {"plain fp32"} if module is speculation else set()
    for name, machine in machines.items():
        assert machine == ("another" if "recycling" in name or name in measured_again else "one"), name
    assert len(machines) == len(dict(parts_of(found))) + 1


@pytest.mark.parametrize("file", ["speculation", "lossless-int4", "lossless-bf16"])
def test_the_kept_results_say_of_each_part_where_it_was_measured(file: str) -> None:
    """Themselves, or for all of them until something is added."""
    found = json.loads((RESULTS / f"{file}.json").read_text())
    assert all("cpu" in (found.get("environment") or part["environment"]) for _, part in parts_of(found))
