"""Training that starts from a model: its weights, its tokenizer, and one line where a key contradicts it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny import ROOT, SETTINGS, arguments, report

sys.path.append(str(Path(__file__).parents[1] / "unit" / "interop"))
from gguf_files import write_gguf
from random_models import save

from ryzen_llm.interop import export_pretrained, load_pretrained

MODEL_KEYS = [key for key in SETTINGS if key.startswith("model.")] + ["data.vocab_size"]


@pytest.fixture(scope="module")
def models(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model in each form that training can start from."""
    folder = tmp_path_factory.mktemp("models")
    save("llama", folder / "directory")
    write_gguf(folder / "m.gguf", "llama", "llama")
    checkpoint = max((finished / "checkpoints").glob("*.ckpt"), key=lambda path: path.stat().st_mtime)
    return {
        "directory": folder / "directory",
        "gguf": folder / "m.gguf",
        "checkpoint": checkpoint,
        "run": finished,
    }


def finetune(corpus: Path, out: Path, model: Path, **changes: Any) -> list[str]:
    left_out = dict.fromkeys((key.replace(".", "__") for key in MODEL_KEYS), None)
    return arguments(corpus, out, **{**left_out, "model__init_from": model, **changes})


@pytest.mark.parametrize("form", ["directory", "gguf", "checkpoint"])
def test_it_starts_from_the_weights_and_the_tokenizer_of_the_model(
    form: str, models: dict[str, Path], corpus: Path, train: Callable[[list[str]], int], tmp_path: Path
) -> None:
    """With a learning rate of next to nothing it ends as the model that it started from."""
    before, tokenizer = load_pretrained(models[form])
    out = tmp_path / "still"
    small = {"trainer__max_epochs": 1, "trainer__limit_train_batches": 2, "validation_rounds": 1}
    still = finetune(corpus, out, models[form], optimizer__learning_rate=1e-12, **small)
    assert train(still) == 0
    after, same_tokenizer = load_pretrained(out)
    assert same_tokenizer.to_json() == tokenizer.to_json()
    assert after.config == before.config
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    accuracy = report(out, "phase2_final_report")["accuracy"]
    assert accuracy["initial_val_loss"] == pytest.approx(accuracy["val_loss"], rel=1e-5)
    assert report(out, "training_metrics_report")["metadata"]["model"] == models[form].name


def test_it_improves_and_what_comes_out_goes_to_transformers(
    models: dict[str, Path], corpus: Path, train: Callable[[list[str]], int], tmp_path: Path
) -> None:
    import transformers

    out = tmp_path / "tuned"
    assert train(finetune(corpus, out, models["directory"], validation_rounds=1)) == 0
    accuracy = report(out, "phase2_final_report")["accuracy"]
    assert accuracy["val_loss"] < accuracy["initial_val_loss"] - 1
    tuned, tokenizer = load_pretrained(out)
    exported = export_pretrained(tuned, tokenizer, tmp_path / "exported")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("alpha beta gamma return def (x):")])
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, tuned(ids), atol=1e-4, rtol=1e-4)


CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "a preset": ({"model__name": "tiny"}, "model.name is tiny, but model.init_from brings"),
    "a tokenizer": ({"data__tokenizer": "tokenizer.json"}, "data.tokenizer is given, but model.init_from"),
    "a shape": ({"model__num_layers": 5}, "model.num_layers is 5, but the model at"),
    "an embedding": ({"model__embedding": "other"}, "model.embedding is other, but the model at"),
    "a context": ({"data__context": 129}, "data.context is 129, more than the model's max_position"),
    "no such model": ({"model__init_from": "/nowhere"}, "model /nowhere: no such file"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_the_model_is_one_line(
    case: str,
    models: dict[str, Path],
    corpus: Path,
    train: Callable[[list[str]], int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    changes, message = CONTRADICTIONS[case]
    assert train(finetune(corpus, tmp_path / "out", models["directory"], **changes)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_the_recipe_needs_only_the_model() -> None:
    recipe = yaml.safe_load((ROOT / "configs" / "finetune.yaml").read_text())
    assert "model" not in recipe
    assert not {"tokenizer", "vocab_size"} & recipe["data"].keys()
