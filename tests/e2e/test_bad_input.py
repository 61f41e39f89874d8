"""Bad input ends with one clear line naming what is wrong and exit status 2, and leaves nothing behind."""

import gzip
import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load_script(name):
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train = load_script("train")
generate = load_script("generate")
export = load_script("export")

FILES = {
    "unknown.yaml": "learning_rte: 1.0\n",
    "wrong_type.json": json.dumps({"num_epochs": "many"}),
    "list.yaml": "- a\n- b\n",
    "broken.yaml": "data: [1,\n",
    "nested.yaml": "data: 3\nbatch_size: 4\n",
    "empty.yaml": "data:\n",
    "null.yaml": "seed: null\n",
    "number.jsonl": f'{{"text": {"1" * 5000}}}\n',
    "deep.jsonl": f'{{"text": {"[" * 100_000}',
    "empty.txt": "",
    "short.txt": "A few words only.",
    "binary.txt": b"text\x00\x01\x02",
    "latin1.txt": "caf\xe9".encode("latin-1"),
    "rows.jsonl": '{"body": "x"}\n',
    "broken.jsonl": '{"text": "x"}\n{"text": \n',
    "rows.jsonl.gz": b"not gzip at all",
    "foreign.json": '{"a": 1}',
    "picture.png": b"\x89PNG",
    "prose.txt": "\n\n".join(
        f"Sentence {i} is about the number {i * i} and nothing else." for i in range(12000)
    ),
    "truncated.ckpt": b"PK\x03\x04 cut off",
    "text.ckpt": "hello",
}

CASES = {
    "unknown key on the command line": (["--data.contxt", "8"], "contxt"),
    "unknown key in a file": (["--config", "{}/unknown.yaml"], "learning_rte"),
    "wrong type in a JSON file": (["--config", "{}/wrong_type.json"], "max_epochs"),
    "wrong type on the command line": (["--batch_size", "big"], "batch_size"),
    "missing configuration file": (["--config", "{}/none.yaml"], "none.yaml"),
    "configuration that is a list": (["--config", "{}/list.yaml"], "list.yaml"),
    "configuration that is not YAML": (["--config", "{}/broken.yaml"], "broken.yaml"),
    "a part that is a number": (["--config", "{}/nested.yaml"], "data"),
    "binary configuration": (["--config", "{}/latin1.txt"], "latin1.txt"),
    "missing source": (["--data.source", "{}/none.txt"], "none.txt"),
    "glob without a match": (["--data.source", "{}/*.md"], "*.md"),
    "unsupported suffix": (["--data.source", "{}/picture.png"], "picture.png"),
    "empty corpus": (["--data.source", "{}/empty.txt"], "empty"),
    "corpus shorter than one context": (
        ["--data.source", "{}/short.txt", "--data.vocab_size", "257"],
        "split",
    ),
    "no text to validate on": (["--data.val_fraction", "0"], "val_fraction"),
    "binary corpus": (["--data.source", "{}/binary.txt"], "binary.txt"),
    "corpus that is not UTF-8": (["--data.source", "{}/latin1.txt"], "latin1.txt"),
    "rows without the text field": (["--data.source", "{}/rows.jsonl"], "text"),
    "broken row": (["--data.source", "{}/broken.jsonl"], "broken.jsonl"),
    "broken gzip": (["--data.source", "{}/rows.jsonl.gz"], "rows.jsonl.gz"),
    "foreign tokenizer": (["--data.tokenizer", "{}/foreign.json"], "foreign.json"),
    "vocabulary larger than the data supports": (
        ["--data.source", "{}/prose.txt", "--data.vocab_size", "50000"],
        "vocab_size",
    ),
    "vocabulary smaller than the bytes": (["--data.vocab_size", "100"], "vocab_size"),
    "no context": (["--data.context", "0"], "context"),
    "no batch": (["--batch_size", "0"], "batch_size"),
    "fractions that leave nothing": (
        ["--data.val_fraction", "0.6", "--data.test_fraction", "0.6"],
        "fraction",
    ),
    "negative learning rate": (["--learning_rate", "-1"], "learning_rate"),
    "learning rate that is no number": (["--learning_rate", "nan"], "learning_rate"),
    "unknown schedule": (["--optimizer.schedule", "linear"], "schedule"),
    "threshold out of range": (["--accuracy_loss_max", "2"], "accuracy_loss_max"),
    "negative threshold": (["--target_speedup", "-3"], "e2e_speedup_target"),
    "no rounds": (["--validation_rounds", "0"], "validation_rounds"),
    "less than no time": (["--kernel_seconds", "-1"], "kernel_seconds"),
    "empty prompt": (["--prompt", ""], "prompt"),
    "prompt that is not UTF-8": (["--prompt", "caf\udce9"], "prompt"),
    "prompt longer than the model's context": (
        ["--prompt", "x" * 2100, *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "prompt has ",
    ),
    "seed beyond 32 bits": (["--seed", "5000000000"], "seed"),
    "clipping that climbs": (["--trainer.gradient_clip_val", "-1"], "gradient_clip_val"),
    "clipping at no number": (["--trainer.gradient_clip_val", "nan"], "gradient_clip_val"),
    "no validation": (["--trainer.limit_val_batches", "0"], "limit_val_batches"),
    "no end but a time": (["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:01:00"], "max_epochs"),
    "a part left empty": (["--config", "{}/empty.yaml"], "data is None, expected keys and values"),
    "a key that is null": (["--config", "{}/null.yaml"], "seed is None, expected a whole number"),
    "drafters with commas": (["--drafters", "suffix,recycling"], "expected a list, as in [a,b]"),
    "source with an empty entry": (["--data.source", "['{}/prose.txt', '']"], "source: '' is empty"),
    "row with an endless number": (
        ["--data.source", "{}/number.jsonl"],
        "number.jsonl, line 1: not valid JSON",
    ),
    "row that is too deep": (["--data.source", "{}/deep.jsonl"], "deep.jsonl, line 1: not valid JSON"),
    "output directory with something else in it": (
        ["--output_dir", "{}", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "output_dir",
    ),
    "unknown model": (
        ["--model.name", "tinny", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "tinny",
    ),
    "heads that do not divide": (
        ["--model.num_kv_heads", "3", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "num_kv_heads",
    ),
    "context larger than the model's": (
        ["--data.context", "4096", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "context",
    ),
    "model's vocabulary smaller than the tokenizer's": (
        ["--model.vocab_size", "100", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "vocab_size",
    ),
    "unwritable output directory": (
        ["--output_dir", "/dev/null/out", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "output_dir",
    ),
    "output directory that is a file": (
        ["--output_dir", "{}/short.txt", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "output_dir",
    ),
    "unknown accelerator": (
        ["--trainer.accelerator", "abacus", *["--data.source", "{}/prose.txt", "--data.vocab_size", "270"]],
        "abacus",
    ),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setenv("RYZEN_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_one_clear_line(capsys, status, naming):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 2
    assert len(lines) == 1
    assert naming in lines[0]


@pytest.mark.parametrize("case", CASES)
def test_training_refuses(case, folder, capsys):
    arguments, naming = CASES[case]
    arguments = [argument.replace("{}", str(folder)) for argument in arguments]
    if "--output_dir" not in arguments:
        arguments += ["--output_dir", str(folder / "out")]
    before = {path.name for path in folder.iterdir()} | {"cache"}
    assert_one_clear_line(capsys, train.main(arguments), naming)
    assert {path.name for path in folder.iterdir()} <= before


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_exporting_refuses_files_of_no_size(size, folder, capsys):
    """Before it reads the model."""
    status = export.main(["--model", "none.ckpt", "--out", "out", f"--max-shard-gb={size}"])
    assert_one_clear_line(capsys, status, "--max-shard-gb")


@pytest.mark.parametrize(
    "model", ["none.ckpt", "truncated.ckpt", "text.ckpt", "pickle.ckpt", "foreign.ckpt", "."]
)
def test_generating_refuses(model, folder, capsys):
    torch.save({"code": gzip.open}, folder / "pickle.ckpt")  # a pickle that is not tensors and plain types
    torch.save({"state_dict": {}}, folder / "foreign.ckpt")
    assert_one_clear_line(
        capsys,
        generate.main(["--model", str(folder / model), "--prompt", "x"]),
        {"none.ckpt": "none.ckpt", ".": "holds no model"}.get(model, "checkpoint"),
    )
