"""Training interrupted anywhere and resumed sees exactly the batches that it would have seen."""

import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import Dataset

from ryzen_llm.data import TextDataModule
from ryzen_llm.data.resumable_loader import ResumableLoader, ShuffledSampler
from ryzen_llm.errors import InputError


class Numbers(Dataset[torch.Tensor]):
    """Item i is the number i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


def loader(size: int = 23, batch_size: int = 3, seed: int = 0, workers: int = 0) -> ResumableLoader:
    numbers = Numbers(size)
    sampler = ShuffledSampler(numbers, seed)
    return ResumableLoader(numbers, batch_size, sampler=sampler, drop_last=True, num_workers=workers)


def epoch_of(resumable: ResumableLoader, epoch: int) -> list[list[int]]:
    resumable.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [batch.tolist() for batch in resumable]


@given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 5), st.integers(0, 5))
def test_replicas_share_out_a_permutation(size: int, replicas: int, seed: int, epoch: int) -> None:
    """Under DDP no window comes twice in an epoch, all processes do as many, fewer than one each is lost."""
    shares = []
    for rank in range(replicas):
        sampler = ShuffledSampler(Numbers(size), seed, replicas, rank)
        sampler.set_epoch(epoch)
        shares.append(list(sampler))
        assert len(shares[-1]) == len(sampler) == size // replicas
    seen = [index for share in shares for index in share]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(size))


def test_order_is_a_function_of_seed_and_epoch_and_of_nothing_else() -> None:
    """Another seed or epoch, another order; seed 0, epoch 1 is not seed 1, epoch 0."""
    orders = {(seed, epoch): epoch_of(loader(seed=seed), epoch) for seed in range(3) for epoch in range(3)}
    torch.manual_seed(123)
    assert all(epoch_of(loader(seed=seed), epoch) == order for (seed, epoch), order in orders.items())
    assert len({str(order) for order in orders.values()}) == len(orders)


@given(st.integers(0, 7), st.integers(0, 3), st.integers(1, 4))
def test_state_goes_on_where_it_was_taken(stop: int, epoch: int, batch_size: int) -> None:
    """The rest of the epoch, then whole epochs; the length is always that of the whole epoch."""
    whole = [epoch_of(loader(30, batch_size), number) for number in range(6)]
    first = loader(30, batch_size)
    first.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    iterator: Iterator[Any] = iter(first)
    for _ in range(stop):
        next(iterator)
    second = loader(30, batch_size)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    assert [batch.tolist() for batch in second] == whole[epoch][stop:]
    assert len(second) == len(whole[epoch])
    assert epoch_of(second, epoch + 1) == whole[epoch + 1]
    assert epoch_of(second, epoch) == whole[epoch]


def test_batches_that_workers_fetched_ahead_do_not_count() -> None:
    """State is what the trainer got, not what the workers read."""
    iterator = iter(first := loader(workers=2))
    seen = [next(iterator).tolist() for _ in range(2)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert seen + [batch.tolist() for batch in second] == epoch_of(loader(), 0)


@pytest.mark.parametrize("change", [{"size": 24}, {"batch_size": 4}, {"seed": 1}])
def test_state_of_another_order_is_refused(change: dict[str, int]) -> None:
    """There is no place to go on from; the error says what differs."""
    name = {"size": "windows"}.get(*change) or next(iter(change))
    with pytest.raises(InputError, match=rf"{name} is \d+, was \d+"):
        loader(**change).load_state_dict(loader().state_dict())


class Recorder(LightningModule):
    """A model that trains a little and writes down what it was given."""

    def __init__(self, log: Path | None = None, die_at: int | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []
        self.log_file, self.die_at = log, die_at

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.seen.append(batch.tolist())
        if len(self.seen) == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.weight * batch.float().mean()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        pass

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["batches_seen"] = len(self.seen)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def fit(
    corpus: Path, checkpoints: Path, resume: Path | None = None, workers: int = 0, **options: Any
) -> Recorder:
    """Train two epochs, keeping a checkpoint after every step, and return what was seen."""
    model = options.pop("model", None) or Recorder()
    data = TextDataModule(
        str(corpus), vocab_size=270, context=128, batch_size=16, val_fraction=0.1, seed=5, num_workers=workers
    )
    keep = ModelCheckpoint(checkpoints, "{step}", every_n_train_steps=1, save_top_k=-1)
    limits = {"max_epochs": 2} | options
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
        **limits,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The '.*_dataloader' does not have many workers")
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists")
        warnings.filterwarnings("ignore", "The dirpath has changed")
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")
        warnings.filterwarnings("error", ".*not resumable.*")
        trainer.fit(model, data, ckpt_path=resume, weights_only=True if resume else None)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"workers": 2},
        {"max_epochs": -1, "max_steps": 13},
        {"val_check_interval": 2},
        {"limit_train_batches": 4},
        {"accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_training_resumed_after_any_step_sees_what_was_left(
    make_corpus: Callable[..., Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    """From every checkpoint of a run, a new Trainer gives the rest of the batches, over epoch ends too."""
    corpus = make_corpus(40)
    whole = fit(corpus, tmp_path / "whole", **options).seen
    assert len({str(batch) for batch in whole}) == len(whole) >= 8
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"))
    assert len(checkpoints) >= 8
    for checkpoint in checkpoints:
        done = torch.load(checkpoint, weights_only=True)["batches_seen"]
        resumed = fit(corpus, tmp_path / "resumed", checkpoint, **options).seen
        assert resumed == whole[done:], f"resumed after batch {done}"


KILLED_RUN = """
import sys
from pathlib import Path
from test_resumable_loader import Recorder, fit
fit(Path(sys.argv[1]), Path(sys.argv[2]), model=Recorder(die_at=4), workers=1)
"""


def test_a_killed_run_resumes_in_a_new_process(make_corpus: Callable[..., Path], tmp_path: Path) -> None:
    """SIGKILL in the fourth step, with a worker fetching ahead; the last checkpoint is after the third."""
    corpus = make_corpus(40)
    whole = fit(corpus, tmp_path / "whole").seen
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    arguments = [sys.executable, "-c", KILLED_RUN, str(corpus), str(tmp_path / "killed")]
    result = subprocess.run(arguments, env=environment, capture_output=True, timeout=60)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    assert fit(corpus, tmp_path / "killed", tmp_path / "killed" / "step=3.ckpt").seen == whole[3:]
