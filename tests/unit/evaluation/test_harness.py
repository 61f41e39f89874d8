"""lm-evaluation-harness gets from our adapter what it gets from transformers; runs where it is installed."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ryzen_llm.errors import InputError

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


@pytest.fixture
def model(folder: Path) -> Any:
    from ryzen_llm.evaluation.harness import HarnessModel

    return HarnessModel(str(folder / "model"), max_length=64)


def asking(*settings: dict[str, Any]) -> list[Any]:
    """A request of the harness for each."""
    return [
        lm_eval.api.instance.Instance("generate_until", {}, ("the cat", one | {"max_gen_toks": 4}), index)
        for index, one in enumerate(settings)
    ]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0.0, None, None)),
        ({"do_sample": False, "temperature": 0.7}, (0.0, None, None)),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 20}, (0.7, 20, 0.9)),
        ({"temperature": 0.7, "top_k": 0}, (0.7, None, None)),
        ({"temperature": 0.7, "top_k": -1, "top_p": 1.0}, (0.7, None, 1.0)),
        ({"num_beams": 1, "repetition_penalty": 1.0, "min_p": None}, (0.0, None, None)),
    ],
)
def test_what_a_task_says_of_sampling_is_done(
    settings: dict[str, Any], expected: tuple[Any, ...], model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(model._generator, "generate", lambda ids, **how: given.update(how))
    model.generate_until(asking(settings))
    assert (given["temperature"], given["top_k"], given["top_p"]) == expected
    assert given["max_new_tokens"] == 4


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"num_beams": 10}, "generation_kwargs have num_beams=10, expected until, max_gen_toks, do_sample"),
        ({"repetition_penalty": 1.2, "seed": 3}, "have repetition_penalty=1.2, seed=3, expected"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused_before_any_text_is_made(
    setting: dict[str, Any], message: str, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model._generator, "generate", lambda *_, **__: pytest.fail("a text was made"))
    with pytest.raises(InputError, match=message):
        model.generate_until(asking({}, setting))
