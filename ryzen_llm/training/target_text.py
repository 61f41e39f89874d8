"""Text that a model writes itself, to train a drafter for it on: nothing is more like what it will write."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ryzen_llm.data.resumable_loader import ResumableLoader, ShuffledSampler
from ryzen_llm.decoding import Generator, Sampling
from ryzen_llm.errors import InputError

WRITTEN_AT_ONCE = 48
"""Texts decoded together."""
_TENSORS = ("ids", "own", "hidden_states")

Batch = tuple[Tensor, Tensor, Tensor]
"""Of places in texts: what the model's output head saw there, (batch, hidden_size); the token that came
then, which is the model's own, and the `depth` tokens after it, (batch, 1 + depth) int64; and which of these
are the model's own, and all before them, (batch, depth) bool: others cannot be foretold."""


@dataclass(frozen=True)
class Turns:
    """How a conversation is laid out in ids.

    Attributes:
        before_user: What comes before what a user says, at the very beginning.
        before_answer: What comes between that and the model's answer, the token that ends a turn included.
        between: What comes between an answer (its last token is the one that ends a turn) and the next user.
        stops: Tokens that end a turn.
    """

    before_user: Sequence[int]
    before_answer: Sequence[int]
    between: Sequence[int]
    stops: frozenset[int]


@torch.inference_mode()
def write_texts(
    generator: Generator,
    turns: Turns,
    *,
    texts: int,
    length: int,
    longest_question: int,
    seed: int = 0,
    on_token: Callable[[int], None] | None = None,
) -> dict[str, Tensor]:
    """Conversations in which the model plays both parts, as in Magpie (Xu et al. 2024, arXiv:2406.08464).

    What a user says is drawn at temperature 1, answers are greedy, and one turn follows the other until there
    are `length` tokens. All texts are decoded together; `on_token` is called with how many tokens each has.

    Returns `ids` (texts, length) int64, `own` of that shape, whether the model chose the token in an answer,
    bool, and `hidden_states` (texts, length - 1, hidden_size), what its output head saw at all but the last.
    Raises InputError for a length beyond the model's context.
    """
    model = generator.model
    known = len(turns.before_user)
    if not known < length <= model.config.max_position_embeddings:
        raise InputError(
            f"length is {length}, expected more than {known} and at most "
            f"max_position_embeddings = {model.config.max_position_embeddings}"
        )
    device = generator.device
    rng = torch.Generator(device).manual_seed(seed)
    cache = generator.new_cache(texts, length)
    writers = [_Writer(turns, longest_question) for _ in range(texts)]
    rows = [list(turns.before_user) for _ in range(texts)]
    answered = [[False] * known for _ in range(texts)]
    question = Sampling(1.0)
    seen = [model.run_blocks(torch.tensor(rows, device=device), cache.append(known), cache.layers).cpu()]
    logits = model.logits(seen[0][:, -1].to(device))
    likeliest = logits.argmax(-1)
    for time in range(known, length):
        asking = [row for row, writer in enumerate(writers) if writer.asking]
        drawn = dict(zip(asking, question.sample(logits[asking], rng).tolist(), strict=True))
        for row, (writer, own_choice) in enumerate(zip(writers, likeliest.tolist(), strict=True)):
            token, own = writer.next(drawn.get(row, own_choice), own_choice)
            rows[row].append(token)
            answered[row].append(own)
        if on_token is not None:
            on_token(time + 1)
        if time + 1 < length:
            outcome = generator.fixed_width(torch.tensor([row[-1:] for row in rows], device=device), cache)
            seen.append(outcome.hidden_states.cpu())
            logits, likeliest = outcome.logits[:, 0], outcome.likeliest[:, 0]
    return {"ids": torch.tensor(rows), "own": torch.tensor(answered), "hidden_states": torch.cat(seen, 1)}


class _Writer:
    """Whose turn it is in one text."""

    def __init__(self, turns: Turns, longest_question: int) -> None:
        self.turns = turns
        self.longest_question = longest_question
        self.forced: list[int] = []
        self.answering = False
        self.asked = 0

    @property
    def asking(self) -> bool:
        """Whether the next token is drawn: only then it has to be."""
        return not self.forced and not self.answering

    def next(self, drawn: int, likeliest: int) -> tuple[int, bool]:
        """The next token, and whether it is of an answer."""
        if self.forced:
            return self.forced.pop(0), False
        if self.answering:
            if likeliest in self.turns.stops:
                self.answering, self.asked = False, 0
                self.forced = list(self.turns.between)
            return likeliest, True
        self.asked += 1
        if drawn in self.turns.stops or self.asked > self.longest_question:
            self.answering = True
            self.forced = list(self.turns.before_answer)
            return self.next(drawn, likeliest)
        return drawn, False


class Places(Dataset[Batch]):
    """Places in texts from which a draft could start: after a token of an answer that the model goes on with.

    Args:
        texts: As `write_texts` gives them.
        depth: Tokens of a draft. Places with fewer tokens to come are left out.
    """

    def __init__(self, texts: dict[str, Tensor], depth: int) -> None:
        self.ids, own = texts["ids"], texts["own"]
        self.hidden_states = texts["hidden_states"]
        self.own = own.unfold(1, depth + 1, 1).int().cumprod(-1).bool()  # (texts, places, 1 + depth)
        self.places = self.own[:, 1:, 1].nonzero()

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch, see `Batch`."""
        text, place = self.places[indices].T
        after = torch.arange(1, self.own.shape[-1] + 1)
        tokens = self.ids[text[:, None], place[:, None] + after]
        return self.hidden_states[text, place], tokens, self.own[text, place + 1, 1:]


class TargetTextModule(pl.LightningDataModule):
    """`Places` of texts that a model has written by itself, in batches.

    The texts are written once, in `prepare_data`, to `path`, some at a time, so that an interruption costs
    these. A batch is of places from anywhere: those of one text are too much alike.

    Args:
        generator: Who writes.
        turns: How its conversations are laid out.
        path: Folder for the texts.
        texts: How many, at least; whole batches are written.
        length: Tokens of each.
        depth: Tokens of a draft.
        batch_size: Places in a batch.
        val_fraction: Share of the texts held out, at least one.
        seed: Of what is drawn, and of the order.

    Raises InputError in `prepare_data` for a length that the model cannot have, and in `setup` for a damaged
    file and for fewer places than a batch has.
    """

    def __init__(
        self,
        generator: Generator,
        turns: Turns,
        path: Path,
        *,
        texts: int = 512,
        length: int = 384,
        depth: int = 3,
        batch_size: int = 1024,
        val_fraction: float = 0.05,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.turns = turns
        self.path = path
        self.parts = -(-texts // WRITTEN_AT_ONCE)
        self.length = length
        self.depth = depth
        self.batch_size = batch_size
        self.held_out = max(1, round(val_fraction * self.parts * WRITTEN_AT_ONCE))
        self.seed = seed

    def prepare_data(self) -> None:
        """Write the texts that are missing."""
        self.path.mkdir(parents=True, exist_ok=True)
        missing = [part for part in range(self.parts) if not self._file(part).is_file()]
        console = Console(stderr=True)
        with Progress(console=console, disable=not console.is_terminal) as bars:
            total = len(missing) * (self.length - len(self.turns.before_user))
            bar = bars.add_task("texts to train on", total=total)
            for part in missing:
                written = write_texts(
                    self.generator,
                    self.turns,
                    texts=WRITTEN_AT_ONCE,
                    length=self.length,
                    longest_question=min(64, self.length // 4),
                    seed=self.seed + part,
                    on_token=lambda _: bars.advance(bar),
                )
                temporary = self._file(part).with_suffix(".part")
                temporary.write_bytes(save(written))
                os.replace(temporary, self._file(part))

    def setup(self, stage: str) -> None:
        """Read the texts."""
        parts = [self._read(part) for part in range(self.parts)]
        texts = {name: torch.cat([part[name] for part in parts]) for name in _TENSORS}
        self.val = Places({name: each[: self.held_out] for name, each in texts.items()}, self.depth)
        self.train = Places({name: each[self.held_out :] for name, each in texts.items()}, self.depth)
        if len(self.train) < self.batch_size:
            raise InputError(
                f"the texts to train on have {len(self.train)} places, expected at least batch_size = "
                f"{self.batch_size}: write more texts, or take smaller batches"
            )

    def vocabulary(self, size: int) -> Tensor:
        """The ids that answers use most, `size` of them at most, ascending int64."""
        counts = self._chosen().bincount(minlength=self.generator.model.config.vocab_size)
        return counts.topk(min(size, len(counts))).indices.sort().values

    @property
    def unigram_entropy(self) -> float:
        """Of the tokens of answers, in nats: what a guess by frequency alone would lose at each."""
        chosen = self._chosen()
        return float(torch.special.entr(chosen.bincount() / len(chosen)).sum())

    def train_dataloader(self) -> ResumableLoader:
        """Shuffled batches; resumable in mid-epoch."""
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = ShuffledSampler(self.train, self.seed, processes, rank)
        return ResumableLoader(
            self.train, self.batch_size, sampler=sampler, drop_last=True, collate_fn=_as_it_is
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Places of the texts held out."""
        return DataLoader(self.val, self.batch_size, collate_fn=_as_it_is)

    def _chosen(self) -> Tensor:
        return self.train.ids[:, : self.train.own.shape[1]][self.train.own[..., 0]]

    def _file(self, part: int) -> Path:
        return self.path / f"{self.length}-{self.seed + part}.safetensors"

    def _read(self, part: int) -> dict[str, Tensor]:
        try:
            tensors = load_file(self._file(part))
            return {name: tensors[name] for name in _TENSORS}
        except (SafetensorError, OSError, KeyError) as error:
            raise InputError(f"{self._file(part)}: damaged ({error}); delete it to write it anew") from error


def _as_it_is(batch: Any) -> Any:
    return batch
