"""Real training runs of a small model, each with one fault planted, for benchmarks/anomalies.py."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS_BEFORE = (250, 400)
"""The fault comes at a random step in this range."""
STEPS_AFTER = 110
SINGLE, LASTING = 20, 100
"""Steps from the fault on within which an alarm counts as having found it."""


@dataclass(frozen=True)
class Fault:
    """What is planted: where it shows, how long after it an alarm counts, what it should be called."""

    shows_in: str
    window: int
    kinds: frozenset[str]


FAULTS = {
    # one batch whose targets are noise
    "bad batch": Fault("loss", SINGLE, frozenset({"loss_spike", "grad_norm_spike"})),
    # five steps at 100 times the learning rate
    "learning-rate spike": Fault("loss", SINGLE, frozenset({"loss_spike", "grad_norm_spike"})),
    # one gradient is NaN at one step, and so the weights ever after
    "NaN gradient": Fault("loss", SINGLE, frozenset({"non_finite"})),
    # from here on the targets are shuffled within the batch
    "label shuffle": Fault("loss", LASTING, frozenset({"loss_spike", "divergence"})),
    # from here on the step goes up the gradient
    "sudden divergence": Fault("loss", LASTING, frozenset({"loss_spike", "divergence", "grad_norm_spike"})),
    # from here on every batch comes 20 ms late
    "dead data loader": Fault("time", LASTING, frozenset({"data_wait_growth", "throughput_drop", "stall"})),
    # one step takes 0.4 s more
    "slow step": Fault("time", SINGLE, frozenset({"stall"})),
}

Row = dict[str, float]
"""One step's values, named as in `ryzen_callbacks`."""

_VOCAB, _CONTEXT, _BATCH = 32, 4, 64


def train(seed: int, fault: str | None) -> tuple[list[Row], int]:
    """Train next-token prediction on a random Markov chain; returns the steps and the fault's step.

    Without a fault the second is the run's length.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    at = rng.randint(*STEPS_BEFORE)
    length = at + STEPS_AFTER
    chain = torch.softmax(2.5 * torch.randn(_VOCAB, _VOCAB, generator=generator), -1)
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Embedding(_VOCAB, 16), nn.Flatten(), nn.Linear(16 * _CONTEXT, 64), nn.GELU(), nn.Linear(64, _VOCAB)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows: list[Row] = []
    end = time.perf_counter()
    for step in range(length):
        now = step >= at and fault is not None
        if now and fault == "dead data loader":
            time.sleep(0.02)
        inputs, targets = _batch(chain, generator)
        if fault == "bad batch" and step == at:
            targets = torch.randint(_VOCAB, targets.shape, generator=generator)
        if now and fault == "label shuffle":
            targets = targets[torch.randperm(_BATCH, generator=generator)]
        arrived = time.perf_counter()
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if fault == "NaN gradient" and step == at:
            next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]
        norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        rate = 3e-3
        if fault == "learning-rate spike" and at <= step < at + 5:
            rate *= 100
        if now and fault == "sudden divergence":
            rate *= -1
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if fault == "slow step" and step == at:
            time.sleep(0.4)
        before, end = end, time.perf_counter()
        rows.append(
            {
                "loss": loss.item(),
                "grad_norm": norm.item(),
                "step_time_s": end - before,
                "data_wait_s": arrived - before,
                "tokens_per_second": _BATCH / (end - before),
            }
        )
    return rows, at if fault is not None else length


def _batch(chain: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(batch, context) and (batch,) int64: pieces of the chain."""
    tokens = [torch.randint(_VOCAB, (_BATCH,), generator=generator)]
    for _ in range(_CONTEXT):
        tokens.append(torch.multinomial(chain[tokens[-1]], 1, generator=generator).squeeze(1))
    return torch.stack(tokens[:-1], 1), tokens[-1]
