"""A checkpoint gives back its model and tokenizer; any other file gives one clear error and runs no code."""

import os
import pickle
import shutil
import string
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ryzen_llm.data import TextDataModule
from ryzen_llm.decoding import DraftHeads, HeadsConfig
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.training import (
    DraftHeadsModule,
    LanguageModule,
    OptimizerConfig,
    check_heads_resumable,
    check_resumable,
    load_checkpoint,
    newest_checkpoint,
)

Checkpoint = tuple[Path, LanguageModule]


def test_a_round_trip_gives_the_same_model_and_tokenizer(
    checkpoint: Checkpoint, data: TextDataModule
) -> None:
    path, module = checkpoint
    model, tokenizer = load_checkpoint(path)
    assert model.config == module.model.config
    assert not model.training
    for (name, read), (_, written) in zip(
        model.state_dict().items(), module.model.state_dict().items(), strict=True
    ):
        assert torch.equal(read, written), name
    text = "alpha naïve\n return 東京"
    assert tokenizer.encode(text) == data.tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.end_of_text_id == data.tokenizer.end_of_text_id


def test_the_checkpoint_is_of_trained_weights_not_of_the_first_ones(
    checkpoint: Checkpoint, data: TextDataModule
) -> None:
    """Otherwise the round trip would hold for a checkpoint that was saved too early, too."""
    model, _ = load_checkpoint(checkpoint[0])
    ids = next(iter(data.train_dataloader()))
    with torch.no_grad():
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss < torch.log(torch.tensor(data.tokenizer.vocab_size)) - 0.1


def test_a_compiled_module_leaves_a_checkpoint_that_reads_the_same(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """torch.compile must not add `_orig_mod` to the names."""
    path, module = checkpoint
    names = set(torch.load(path, weights_only=True)["state_dict"])
    module.compile_blocks = True
    module.configure_model()
    assert set(module.state_dict()) == names


def test_the_newest_is_by_step_not_by_name_or_date(checkpoint: Checkpoint) -> None:
    path, _ = checkpoint
    for step in (10, 9, 100):
        shutil.copy(path, path.with_name(f"step={step}.ckpt"))
    os.utime(path.with_name("step=100.ckpt"), (0, 0))
    for name in ("step=200-v1.ckpt", "step=.ckpt", "step=last.ckpt"):  # Lightning's, and anyone's
        shutil.copy(path, path.with_name(name))
    assert newest_checkpoint(path.parent) == path.with_name("step=100.ckpt")


@pytest.mark.parametrize("left", [0, 10, 0.3, 0.999])
def test_a_newest_that_was_cut_off_is_passed_over_with_a_warning(checkpoint: Checkpoint, left: float) -> None:
    path, module = checkpoint
    content = path.read_bytes()
    kept = left if isinstance(left, int) else int(left * len(content))
    path.with_name("step=7.ckpt").write_bytes(content[:kept])
    with pytest.warns(UserWarning, match="step=7.ckpt.*taking the one before"):
        assert newest_checkpoint(path.parent) == path
    with pytest.warns(UserWarning, match="step=7.ckpt"):
        model, _ = load_pretrained(path.parent.parent)
    assert torch.equal(model.embedding.weight, module.model.embedding.weight)


def test_no_checkpoint_is_none_and_an_error_to_load(checkpoint: Checkpoint, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert newest_checkpoint(empty) is None
    assert newest_checkpoint(tmp_path / "missing") is None
    with pytest.raises(InputError, match="holds no model"):
        load_pretrained(empty)


class Malicious:
    """Unpickling this makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


def without(key: str) -> Callable[[Path, dict[str, Any]], None]:
    def save(path: Path, content: dict[str, Any]) -> None:
        torch.save({name: value for name, value in content.items() if name != key}, path)

    return save


def changed(**changes: Any) -> Callable[[Path, dict[str, Any]], None]:
    return lambda path, content: torch.save(content | changes, path)


def bare_zip(path: Path, content: dict[str, Any]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no tensors here")


def renamed_tensor(path: Path, content: dict[str, Any]) -> None:
    weights = dict(content["state_dict"])
    weights["model.other"] = weights.pop("model.norm.weight")
    torch.save(content | {"state_dict": weights}, path)


def other_shape(path: Path, content: dict[str, Any]) -> None:
    ours = content["ryzen_llm"]
    torch.save(content | {"ryzen_llm": ours | {"model": ours["model"] | {"hidden_size": 32}}}, path)


FOREIGN: dict[str, Callable[[Path, dict[str, Any]], Any]] = {
    "a pickle of plain types": lambda path, _: path.write_bytes(pickle.dumps({"state_dict": {}})),
    "a pickle that runs code": lambda path, _: path.write_bytes(
        pickle.dumps(Malicious(path.with_name("ran")))
    ),
    "a torch file that runs code": lambda path, content: torch.save(
        content | {"extra": Malicious(path.with_name("ran"))}, path
    ),
    "an old-style torch file that runs code": lambda path, content: torch.save(
        content | {"extra": Malicious(path.with_name("ran"))}, path, _use_new_zipfile_serialization=False
    ),
    "a zip without tensors": bare_zip,
    "a safetensors file": lambda path, content: save_file({"weight": torch.zeros(2)}, path),
    "a text": lambda path, _: path.write_text("weights"),
    "an empty file": lambda path, _: path.touch(),
    "a tensor": lambda path, _: torch.save(torch.zeros(3), path),
    "a list": lambda path, _: torch.save([1, 2], path),
    "no section of this project": without("ryzen_llm"),
    "a section that is no mapping": changed(ryzen_llm="yes"),
    "another format": changed(ryzen_llm={"format": 99}),
    "no shape of the model": changed(ryzen_llm={"format": 1}),
    "an unknown field in the shape": changed(ryzen_llm={"format": 1, "model": {"colour": 3}}),
    "a shape that is none": changed(ryzen_llm={"format": 1, "model": "tiny"}),
    "no weights": without("state_dict"),
    "weights that are none": changed(state_dict={"model.norm.weight": 1.0}),
    "weights in a list": changed(state_dict=[torch.zeros(2)]),
    "data that are none": changed(TextDataModule="text"),
    "a tokenizer that is a number": changed(TextDataModule={"tokenizer": 3}),
    "weights of another name": renamed_tensor,
    "weights of another shape": other_shape,
    "no tokenizer": without("TextDataModule"),
    "a tokenizer that is none": changed(TextDataModule={"tokenizer": "{}", "store_key": "x"}),
}


def test_a_checkpoint_of_other_data_classes_is_not_resumed(
    checkpoint: Checkpoint, data: TextDataModule
) -> None:
    """Where in the data to go on from is not in it."""
    path, module = checkpoint
    check_resumable(path, module.model.config, data, module.optimizer_config)
    content = torch.load(path, weights_only=True)
    without("TextDataModule")(path, content)
    with pytest.raises(InputError, match="was not trained with TextDataModule; start a new run"):
        check_resumable(path, module.model.config, data, module.optimizer_config)


def test_a_resumed_optimizer_is_the_one_before_but_its_schedule_may_change(
    checkpoint: Checkpoint, data: TextDataModule
) -> None:
    """The optimizer's state brings its settings along: others in the configuration would not be used."""
    path, module = checkpoint
    longer = OptimizerConfig(learning_rate=0.01, schedule="wsd", decay_fraction=0.1, final_fraction=0.0)
    check_resumable(path, module.model.config, data, longer)
    for change in ({"learning_rate": 0.02}, {"weight_decay": 0.3}, {"beta1": 0.8}, {"beta2": 0.99}):
        ((name, value),) = change.items()
        other = OptimizerConfig(**{"learning_rate": 0.01, **change})
        with pytest.raises(InputError, match=rf"optimizer\.{name} is {value}, was "):
            check_resumable(path, module.model.config, data, other)


def test_a_checkpoint_of_draft_heads_is_theirs_alone(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """They are resumed where they are the same; no language model is read from it, nor they from one's."""
    path, language = checkpoint
    vocabulary, optimizer = torch.arange(8), OptimizerConfig(learning_rate=0.02)
    module = DraftHeadsModule(language.model, HeadsConfig(16, 8, 2), vocabulary, optimizer)
    content: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(content)
    heads = tmp_path / "heads" / "checkpoints" / "step=3.ckpt"
    heads.parent.mkdir(parents=True)
    torch.save(content, heads)
    assert newest_checkpoint(heads.parent, "heads") == heads
    check_heads_resumable(heads, module.heads, optimizer)
    for other, settings, naming in (
        (DraftHeads(HeadsConfig(16, 8, 3), vocabulary), optimizer, "drafter.depth is 3, was 2"),
        (DraftHeads(HeadsConfig(16, 8, 2), vocabulary + 1), optimizer, "drafts other tokens"),
        (module.heads, OptimizerConfig(), "optimizer.learning_rate is 0.001, was 0.02"),
    ):
        with pytest.raises(InputError, match=naming):
            check_heads_resumable(heads, other, settings)
    with pytest.raises(InputError, match="is of draft heads, expected one of a language model"):
        load_checkpoint(heads)
    with pytest.raises(InputError, match="is of draft heads, expected one of a language model"):
        load_pretrained(heads.parent.parent)
    with pytest.raises(InputError, match="is of a language model, expected one of draft heads"):
        newest_checkpoint(path.parent, "heads")


def test_any_text_is_passed_over(checkpoint: Checkpoint) -> None:
    """To an unpickler each character is an instruction, for a stack that has nothing on it."""
    path, _ = checkpoint
    for character in string.printable:
        path.with_name("step=7.ckpt").write_text(f"{character} text")
        with pytest.warns(UserWarning, match=r"step=7\.ckpt"):
            assert newest_checkpoint(path.parent) == path


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_file_is_one_clear_error_and_runs_nothing(kind: str, checkpoint: Checkpoint) -> None:
    path, _ = checkpoint
    content = torch.load(path, weights_only=True)
    foreign = path.with_name("foreign.ckpt")
    FOREIGN[kind](foreign, content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"foreign\.ckpt") as raised:
            load_pretrained(foreign)
    assert "\n" not in str(raised.value)
    assert not foreign.with_name("ran").exists()


def test_the_malicious_pickle_would_have_run(tmp_path: Path) -> None:
    """The trap of the test above works."""
    pickle.loads(pickle.dumps(Malicious(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
