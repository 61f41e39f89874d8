"""`TextDataModule`: from the name of a corpus to batches of token ids."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Subset

from ryzen_llm.data.corpus import open_corpus
from ryzen_llm.data.resumable_loader import ResumableLoader, ShuffledSampler
from ryzen_llm.data.splits import Split
from ryzen_llm.data.token_store import Recipe, TokenStore, default_cache_dir, open_store
from ryzen_llm.data.tokenizer import Tokenizer
from ryzen_llm.data.windows import TokenWindows
from ryzen_llm.errors import InputError


class TextDataModule(LightningDataModule):
    """Text as batches of token ids: int64, (batch, context + 1), so that a batch holds inputs and targets.

    The corpus is encoded once into a memory-mapped store; later runs open it at once. Documents go to train,
    val or test by a hash of their text. Training batches are shuffled by (seed, epoch) and go on exactly
    where a checkpoint stopped.

    Args:
        source: "stdlib" (the running Python's own sources and docs); a file, folder or glob of .txt, .md,
            .rst, .py, .jsonl, .jsonl.gz or .parquet; "hf:NAME[:CONFIG[:SPLIT]]" for a Hugging Face dataset;
            or a list of these.
        tokenizer: path of a tokenizer.json, or a `Tokenizer`, such as a pretrained model's; if not given,
            byte-level BPE is trained on the train split.
        vocab_size: number of tokens of the tokenizer to train, at least 257; not used with a given tokenizer.
        context: number of tokens the model sees; a batch holds one more, the last target.
        batch_size: windows per batch and device.
        val_fraction: share of documents held out for validation; 0 for none.
        test_fraction: share of documents held out for testing; 0 for none.
        text_field: name of the field with the text in .jsonl, .parquet and Hugging Face rows.
        seed: decides the order of training batches, together with the epoch.
        num_workers: processes that prepare batches; 0 does it in the main process, which is enough for most.
        cache_dir: folder for token stores; if not given, $RYZEN_LLM_CACHE or ~/.cache/ryzen_llm.

    Raises:
        InputError: an argument out of range; in `prepare_data` and `setup`, a corpus that cannot be used.
    """

    def __init__(
        self,
        source: str | list[str] = "stdlib",
        tokenizer: str | Tokenizer | None = None,
        vocab_size: int = 4096,
        context: int = 256,
        batch_size: int = 16,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        text_field: str = "text",
        seed: int = 0,
        num_workers: int = 0,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        _check_whole_number("vocab_size", vocab_size, 257)
        _check_whole_number("context", context, 1)
        _check_whole_number("batch_size", batch_size, 1)
        _check_whole_number("seed", seed, 0)
        _check_whole_number("num_workers", num_workers, 0)
        for name, fraction in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 <= fraction < 1:
                raise InputError(f"{name}: {fraction} is not a share; expected 0 or more and less than 1")
        if val_fraction + test_fraction >= 1:
            raise InputError(
                f"val_fraction + test_fraction: {val_fraction + test_fraction:g} leaves nothing to train on; "
                "expected less than 1"
            )
        if not source:
            raise InputError(
                "source: empty; expected a file, folder, glob, hf:NAME or stdlib, or a list of these"
            )
        if not text_field:
            raise InputError("text_field: empty; expected the name of the field that holds the text")
        self.source = source
        self.given_tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.context = context
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.text_field = text_field
        self.seed = seed
        self.num_workers = num_workers
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
        self._store: TokenStore | None = None

    @property
    def store(self) -> TokenStore:
        """The token store; built or opened on first use."""
        if self._store is None:
            given = self.given_tokenizer
            tokenizer = Tokenizer.from_file(given) if isinstance(given, str) else given
            recipe = Recipe(
                tokenizer.to_json() if tokenizer else self.vocab_size, self.val_fraction, self.test_fraction
            )
            self._store = open_store(open_corpus(self.source, self.text_field), recipe, self.cache_dir)
        return self._store

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the batches are encoded with."""
        return self.store.tokenizer

    def num_tokens(self, split: Split) -> int:
        """Return the number of tokens of a split."""
        return self.store.num_tokens(split)

    def prepare_data(self) -> None:
        """Build the token store; Lightning calls this in one process per machine."""
        self._check_sizes()

    def setup(self, stage: str) -> None:
        """Open the token store and check that every split is long enough."""
        self._check_sizes()

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches without the last, incomplete one; resumable in mid-epoch."""
        windows = TokenWindows(self.store, "train", self.context)
        rank = self.trainer.global_rank if self.trainer else 0
        sampler = ShuffledSampler(windows, self.seed, self._world_size(), rank)
        return ResumableLoader(windows, sampler=sampler, drop_last=True, **self._loader_options())

    def val_dataloader(self) -> list[DataLoader[torch.Tensor]]:
        """Batches of the val split, the last one as it is; no loader if val_fraction is 0.

        They come in one shuffled order, whatever the seed: a few of them are from all over the split.
        """
        return self._evaluation_loaders("val", self.val_fraction)

    def test_dataloader(self) -> list[DataLoader[torch.Tensor]]:
        """Batches of the test split, likewise; no loader if test_fraction is 0."""
        return self._evaluation_loaders("test", self.test_fraction)

    def state_dict(self) -> dict[str, Any]:
        """Return the tokenizer, with which a checkpoint can read and write text, and what the batches are."""
        return {
            "tokenizer": self.tokenizer.to_json(),
            "store_key": self.store.key,
            "batches": {name: getattr(self, name) for name in ("context", "batch_size", "seed")},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that the checkpoint is of this tokenizer and, to train on, of these batches.

        Raises:
            InputError: it is of another.
        """
        if state_dict["tokenizer"] != self.tokenizer.to_json():
            raise InputError("checkpoint: trained with another tokenizer; its token ids mean other text here")
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self.check_resumable(state_dict)

    def check_resumable(self, state_dict: dict[str, Any]) -> None:
        """Check that training can go on from the state of a checkpoint: the same text in the same batches.

        Raises:
            InputError: it cannot.
        """
        if state_dict["store_key"] != self.store.key:
            raise InputError(
                "checkpoint: trained on other data "
                f"(store {state_dict['store_key']}, here {self.store.key}); "
                "restore source, tokenizer and fractions to resume it, or start a new run"
            )
        saved, here = state_dict["batches"], self.state_dict()["batches"]
        if changes := [
            f"data.{name} is {here[name]}, was {saved[name]}" for name in here if here[name] != saved[name]
        ]:
            raise InputError(
                f"checkpoint: trained on other batches ({', '.join(changes)}); restore them to resume it, or "
                "start a new run"
            )

    def _evaluation_loaders(self, split: Split, fraction: float) -> list[DataLoader[torch.Tensor]]:
        if not fraction:
            return []
        windows = TokenWindows(self.store, split, self.context)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
        return [DataLoader(Subset(windows, order), **self._loader_options())]

    def _loader_options(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }

    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    def _check_sizes(self) -> None:
        fractions: dict[Split, float] = {"val": self.val_fraction, "test": self.test_fraction}
        self._check_size("train", self.batch_size * self._world_size())
        for split, fraction in fractions.items():
            if fraction:
                self._check_size(split, 1, f", or set {split}_fraction to 0")

    def _check_size(self, split: Split, windows: int, remedy: str = ", or lower batch_size") -> None:
        needed = windows * self.context + 1
        if self.num_tokens(split) < needed:
            raise InputError(
                f"source: the {split} split has {self.num_tokens(split)} tokens in "
                f"{self.store.num_documents(split)} documents, needed are {needed} ({windows} x context "
                f"{self.context} + 1). Use more text or documents, lower context{remedy}"
            )


def _check_whole_number(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}: {value!r} is not usable; expected a whole number of at least {least}")
