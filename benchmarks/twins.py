"""Runs that differ in one thing and share all else: their data, and the verdict on their losses."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from ryzen_callbacks.intervals import mean_interval

from ryzen_llm.data import TextDataModule


def text_of(options: argparse.Namespace, vocab_size: int, seed: int) -> TextDataModule:
    """The text of `options.source` in batches of `options.batch` x `options.context`, in the seed's order."""
    data = TextDataModule(
        options.source, vocab_size=vocab_size, context=options.context, batch_size=options.batch, seed=seed
    )
    data.prepare_data()
    data.setup("fit")
    return data


def compare(losses: Sequence[float], baseline: Sequence[float], margin: float) -> dict[str, Any]:
    """Relative `increase` of paired losses, 6 or more, its 95% interval, and whether it is within `margin`.

    An interval inside the margin on both sides (`equivalent`) is two one-sided tests at 2.5% (TOST).
    """
    relative = [a / b - 1 for a, b in zip(losses, baseline, strict=True)]
    interval = mean_interval(relative)
    assert interval is not None  # of 6 or more
    low, high = interval
    return {
        "increase": statistics.fmean(relative),
        "ci_low": low,
        "ci_high": high,
        "equivalent": -margin <= low and high <= margin,
        "no_worse": high <= margin,
    }


def shown(row: dict[str, Any], digits: int = 2) -> str:
    """What `compare` found, in percent."""
    increase, low, high = (f"{row[key]:+.{digits}%}" for key in ("increase", "ci_low", "ci_high"))
    return f"{increase} [{low}, {high}]"
