"""Shuffled batches that can stop anywhere in an epoch and go on exactly there."""

from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from ryzen_llm.errors import InputError


class ShuffledSampler(DistributedSampler[Any]):
    """This process's share of a permutation that is a function of (seed, epoch) only.

    A DistributedSampler, because Lightning tells those the epoch and leaves them in place under DDP. Its own
    order comes from seed + epoch, which makes one run's second epoch another's first, and it keeps the order
    as Python integers, which are many times larger than the 8 bytes a window here.
    """

    def __init__(self, dataset: Dataset[Any], seed: int, num_replicas: int = 1, rank: int = 0) -> None:
        super().__init__(
            dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed, drop_last=True
        )
        self.start = 0
        """How many of this process's windows to leave out at the start of the next pass."""

    def __iter__(self) -> Iterator[Any]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self._size())
        mine = order[: self.total_size][self.rank :: self.num_replicas]
        return map(int, mine[self.start :])

    def _size(self) -> int:
        assert isinstance(self.dataset, Sized)
        return len(self.dataset)


class ResumableLoader(DataLoader[Any]):
    """A DataLoader over a `ShuffledSampler` whose state is how many batches were handed out in which epoch.

    Lightning saves and restores that state with the checkpoint (its `_Stateful` protocol). After
    `load_state_dict`, the next pass over the same epoch gives the batches that were not handed out; `len()`
    stays that of the whole epoch, which is what Lightning counts against. Batches fetched ahead by workers
    but not handed out do not count.
    """

    _batches_done = 0
    _resume_epoch: int | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator: nothing is drawn before the first batch is asked for. Lightning makes the iterator
        # before it sets the epoch of the sampler, and workers would fetch ahead from the wrong epoch.
        if self._resume_epoch != self._epoch:
            self._batches_done = 0
        self._resume_epoch = None
        assert self.batch_size is not None
        self.sampler.start = self._batches_done * self.batch_size  # type: ignore[attr-defined]
        for batch in super().__iter__():
            self._batches_done += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Return the position, and what the order of batches depends on."""
        return {"epoch": self._epoch, "batches_done": self._batches_done, "order": self._order()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the state was taken.

        Raises:
            InputError: the order of batches is another one here, so that there is no place to go on from.
        """
        saved, here = state_dict["order"], self._order()
        if differing := [name for name in here if saved.get(name) != here[name]]:
            changes = ", ".join(f"{name} is {here[name]}, was {saved.get(name)}" for name in differing)
            raise InputError(f"resume: the checkpoint has other data settings ({changes}); restore them")
        self._resume_epoch = state_dict["epoch"]
        self._batches_done = state_dict["batches_done"]
        if isinstance(self.sampler, ShuffledSampler):
            self.sampler.set_epoch(state_dict["epoch"])

    @property
    def _epoch(self) -> int:
        return getattr(self.sampler, "epoch", 0)  # Trainer(overfit_batches=...) puts in a sampler without

    def _order(self) -> dict[str, Any]:
        assert isinstance(self.dataset, Sized)
        return {
            "batch_size": self.batch_size,
            "windows": len(self.dataset),
            "seed": getattr(self.sampler, "seed", None),
            "num_replicas": getattr(self.sampler, "num_replicas", 1),
        }
