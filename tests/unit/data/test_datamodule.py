"""`TextDataModule`: its batches, its checks, its checkpoint, its help."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from ryzen_llm.data import TextDataModule, Tokenizer
from ryzen_llm.errors import InputError

SMALL: dict[str, Any] = {
    "vocab_size": 270,
    "context": 32,
    "batch_size": 4,
    "val_fraction": 0.2,
    "test_fraction": 0.2,
}


def test_loaders_cover_their_split(make_corpus: Callable[..., Path]) -> None:
    """Train: every window once, whole batches, shuffled. Val and test: in order, the last batch as it is."""
    data = TextDataModule(str(make_corpus()), **SMALL)
    data.prepare_data()
    data.setup("fit")

    def windows(split: Any) -> list[list[int]]:
        tokens = data.store.tokens(split).tolist()
        return [tokens[i : i + 33] for i in range(0, len(tokens) - 32, 32)]

    train = list(data.train_dataloader())
    expected = windows("train")
    assert all(batch.shape == (4, 33) and batch.dtype == torch.int64 for batch in train)
    seen = [window for batch in train for window in batch.tolist()]
    assert len(seen) == len(expected) // 4 * 4
    assert {tuple(window) for window in seen} <= {tuple(window) for window in expected}
    assert seen != expected[: len(seen)]
    for split, (loader,) in (("val", data.val_dataloader()), ("test", data.test_dataloader())):
        seen = [window for batch in loader for window in batch.tolist()]
        assert sorted(seen) == sorted(windows(split)), "each once"
        assert seen != windows(split), "the first ones are from all over the split"
        assert seen == [window for batch in loader for window in batch.tolist()], "in the same order again"


def test_a_split_that_is_switched_off_has_no_loader(make_corpus: Callable[..., Path]) -> None:
    """A fraction of 0 is a choice, not an error; all documents are trained on."""
    data = TextDataModule(str(make_corpus()), **SMALL | {"val_fraction": 0.0, "test_fraction": 0.0})
    data.setup("fit")
    assert (data.val_dataloader(), data.test_dataloader()) == ([], [])
    assert (data.num_tokens("val"), data.store.num_documents("train")) == (0, 60)


def test_a_given_tokenizer_is_used_and_vocab_size_is_not(
    make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    """Fine-tuning must not retrain the vocabulary."""
    Tokenizer.train(["some other text"], 258).save(tmp_path / "tokenizer.json")
    data = TextDataModule(str(make_corpus()), tokenizer=str(tmp_path / "tokenizer.json"), vocab_size=100_000)
    data.setup("fit")
    assert data.tokenizer.to_json() == (tmp_path / "tokenizer.json").read_text()
    assert data.tokenizer.vocab_size == 258


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 256}, "vocab_size: 256 is not usable; expected a whole number of at least 257"),
        ({"context": 0}, "context: 0"),
        ({"context": 1.5}, "context: 1.5"),
        ({"batch_size": -1}, "batch_size: -1"),
        ({"batch_size": True}, "batch_size: True"),
        ({"seed": -1}, "seed: -1"),
        ({"num_workers": -1}, "num_workers: -1"),
        ({"val_fraction": 1.0}, "val_fraction: 1.0 is not a share"),
        ({"test_fraction": -0.1}, "test_fraction: -0.1 is not a share"),
        ({"test_fraction": float("nan")}, "test_fraction: nan is not a share"),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, "leaves nothing to train on"),
        ({"source": ""}, "source: empty"),
        ({"source": []}, "source: empty"),
        ({"text_field": ""}, "text_field: empty"),
    ],
)
def test_an_argument_out_of_range_is_refused_at_once(arguments: dict[str, Any], message: str) -> None:
    """Before any file is touched, naming the argument."""
    with pytest.raises(InputError) as caught:
        TextDataModule(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("documents", "change", "message"),
    [
        (60, {"context": 100_000}, r"the train split has \d+ tokens in \d+ documents, needed are 400001"),
        (60, {"batch_size": 100_000}, r"\(100000 x context 32 \+ 1\).*lower batch_size"),
        (
            1,
            {"batch_size": 1},
            r"the val split has 0 tokens in 0 documents, needed are 33.*set val_fraction to 0",
        ),
        (60, {"tokenizer": "missing.json"}, "missing.json cannot be read"),
        (60, {"vocab_size": 50_000}, "50000 is more than the text supports"),
    ],
)
def test_data_that_do_not_suffice_are_refused_before_training(
    make_corpus: Callable[..., Path], documents: int, change: dict[str, Any], message: str
) -> None:
    """The error says which split, what there is, what is needed and what to change."""
    data = TextDataModule(str(make_corpus(documents)), **SMALL | change)
    with pytest.raises(InputError, match=message):
        data.prepare_data()


class Idle(LightningModule):
    """A model with nothing to learn."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.weight * 1.0

    def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def run(what: str, data: TextDataModule, checkpoint: Path | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": 2} | options,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(trainer, what)(Idle(), datamodule=data, ckpt_path=checkpoint)
    return trainer


def test_checkpoint_holds_the_tokenizer_and_refuses_other_data(
    make_corpus: Callable[..., Path], tmp_path: Path
) -> None:
    """Resuming on other text or ids would be silent nonsense; testing on other text is legitimate."""
    path = str(make_corpus())
    data = TextDataModule(path, **SMALL)
    checkpoint = tmp_path / "last.ckpt"
    run("fit", data).save_checkpoint(checkpoint)
    state = torch.load(checkpoint, weights_only=True)["TextDataModule"]
    assert Tokenizer.from_json(state["tokenizer"]).encode("text") == data.tokenizer.encode("text")

    data.tokenizer.save(tmp_path / "tokenizer.json")
    same_ids = {"tokenizer": str(tmp_path / "tokenizer.json")}
    other_split = TextDataModule(path, **SMALL | same_ids | {"val_fraction": 0.3})
    run("test", other_split, checkpoint)
    with pytest.raises(InputError, match="checkpoint: trained on other data"):
        run("fit", other_split, checkpoint, max_steps=3)
    with pytest.raises(InputError, match="checkpoint: trained with another tokenizer"):
        run("test", TextDataModule(path, **SMALL | {"vocab_size": 271}), checkpoint)


def test_overfitting_one_batch_works(make_corpus: Callable[..., Path]) -> None:
    """`Trainer(overfit_batches=1)` puts a sampler without epochs into the loader."""
    assert run("fit", TextDataModule(str(make_corpus()), **SMALL), overfit_batches=1).global_step == 2


def test_every_argument_has_its_line_in_help() -> None:
    """jsonargparse makes --help from the docstring."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(TextDataModule, "data")
    text = " ".join(parser.format_help().split())
    for name in TextDataModule.__init__.__annotations__:
        if name != "return":
            after = text.split(f"--data.{name} ")[-1]
            assert not after.removeprefix(name.upper()).strip().startswith(("--", "(type")), name
