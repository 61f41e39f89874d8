"""lm-evaluation-harness gets from our adapter what it gets from transformers; runs where it is installed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "interop"))
from random_models import save

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_target: {target}
{more}
metadata: {{version: 1}}
"""
KINDS = {
    "multiple_choice": (
        "label",
        "doc_to_choice: '{{choices}}'\nmetric_list: [{metric: acc}, {metric: acc_norm}]",
    ),
    "loglikelihood": ("'{{continuation}}'", "metric_list: [{metric: perplexity}, {metric: acc}]"),
    "loglikelihood_rolling": (
        "'{{long}}'",
        "metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]",
    ),
    "generate_until": (
        "'{{continuation}}'",
        "generation_kwargs: {until: ['t', '\\n\\n'], max_gen_toks: 20}\nmetric_list: [{metric: exact_match}]",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of transformers and a task of each kind; nothing comes from a hub."""
    folder = tmp_path_factory.mktemp("harness")
    save("llama", folder / "model")
    words = ["the cat", "the dog", "def main", "the mat sat", "return 12", "a"]
    rows = [
        {
            "question": f"{word} {words[i - 1]}",
            "choices": [" ran", " sat on the mat", " and"],
            "label": i % 3,
            "continuation": " on the mat",
            "long": " ".join(words * (2 * i + 1)),
        }
        for i, word in enumerate(words)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "tasks").mkdir()
    for kind, (target, more) in KINDS.items():
        text = TASK.format(
            name=f"small_{kind}", data=folder / "rows.jsonl", kind=kind, target=target, more=more
        )
        (folder / "tasks" / f"{kind}.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))


def run(folder: Path, model: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The harness's results, and the model's answers, by task."""
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=[f"small_{kind}" for kind in KINDS],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    answers = {task: [row["resps"] for row in rows] for task, rows in found["samples"].items()}
    return found["results"], answers


def test_every_kind_of_task_gives_what_transformers_gives(folder: Path) -> None:
    import ryzen_llm.evaluation.harness  # noqa: F401 - registers the model

    ours, our_answers = run(folder, "ryzen_llm", path=str(folder / "model"), max_length=64)
    theirs, their_answers = run(
        folder, "hf", pretrained=str(folder / "model"), max_length=64, dtype="float32"
    )
    assert our_answers["small_generate_until"] == their_answers["small_generate_until"]
    assert any(answer[0][0] for answer in our_answers["small_generate_until"])
    for task, expected in theirs.items():
        for metric, value in expected.items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    assert theirs["small_multiple_choice"]["acc,none"] not in (0, 1)
    assert torch.tensor(theirs["small_loglikelihood"]["perplexity,none"]).isfinite()
