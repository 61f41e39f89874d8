"""Choosing a compressed embedding for a model, within a budget of bytes or of quality, by measuring."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.errors import InputError
from ryzen_llm.kernels import can_encode
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import (
    CODES,
    Calibration,
    CompressedEmbedding,
    Embedding,
    FactorizedEmbedding,
    ProductEmbedding,
    QuantizedEmbedding,
    allocate_bits,
)
from ryzen_llm.training.embedding_calibration import Quality, calibrate, check_text, measure, with_embedding

_HELD_OUT = 0.25
_SEARCH_STEPS = 5
_SMALLEST_RATIO, _LARGEST_RATIO = 2.0, 12.0


@dataclass(frozen=True)
class Candidate:
    """One measured embedding: its kind and settings, bytes and ratio against dense bf16, and its cost."""

    kind: str
    settings: dict[str, Any]
    bytes_resident: int
    ratio: float
    quality: Quality


@dataclass(frozen=True)
class EmbeddingChoice:
    """What `EmbeddingCompressor` chose, and everything it measured on the way, smallest ratio first."""

    embedding: Embedding
    chosen: Candidate
    curve: tuple[Candidate, ...]

    def report(self) -> dict[str, Any]:
        """The measurements in plain types, fit for JSON."""
        return {"chosen": asdict(self.chosen), "curve": [asdict(c) for c in self.curve]}


class EmbeddingCompressor:
    """Compresses a tied embedding after training, with what a calibration text says matters.

    Of the text's rows the last quarter is for measuring candidates, and not calibrated on.

    Args:
        model: A model with a tied dense embedding; left as it is.
        calibration: Token ids of real text, (batch, time) int64; some ten thousand tokens or more.
        more_text: More of such text, (batch, time) int64, in which tokens are counted only: a hundred
            thousand of them cost next to nothing, and say which rows can do with few bits.

    Raises InputError for an untied model, one that is compressed already, and text that cannot work.
    """

    def __init__(self, model: Transformer, calibration: Tensor, more_text: Tensor | None = None) -> None:
        if model.config.embedding != "dense":
            raise InputError(f"the model's embedding is {model.config.embedding} already, expected dense")
        check_text(calibration, model.config.vocab_size, "calibration")
        held_out = max(1, round(len(calibration) * _HELD_OUT))
        if held_out == len(calibration):
            raise InputError("calibration has one row, expected two or more: cut the text into several")
        self.model = model
        self.text, self.held_out = calibration[:-held_out], calibration[-held_out:]
        self.weight = model.embedding.dense_weight().float()
        self.calibration: Calibration = calibrate(model, self.text, more_text)
        self._measured: list[Candidate] = []

    def compress(self, kind: type[CompressedEmbedding], **settings: Any) -> CompressedEmbedding:
        """The embedding of one kind with these settings, calibrated, in bf16."""
        return kind.from_dense(self.weight, self.calibration, **settings).to(torch.bfloat16)

    def settings_for(self, ratio: float) -> list[tuple[type[CompressedEmbedding], dict[str, Any]]]:
        """Kinds and settings whose bytes are at most those of dense bf16 over `ratio`, the likeliest first.

        Raises InputError for a ratio that no kind reaches.
        """
        if not 1 < ratio < math.inf:
            raise InputError(
                f"ratio is {ratio}, expected more than 1: dense bf16 bytes over compressed bytes"
            )
        vocab_size, hidden_size = self.weight.shape
        available = int(2 * self.weight.numel() / ratio)
        found: list[tuple[type[CompressedEmbedding], dict[str, Any]]] = []
        refused: list[InputError] = []
        for code in CODES if can_encode() else ("grid",):
            try:
                tiers = allocate_bits(self.weight, self.calibration, available, code)
                found.append((QuantizedEmbedding, {"bits": tiers, "code": code}))
            except InputError as error:
                refused.append(error)
        if not found:
            raise refused[-1]
        # Beside a row's codes there is its scale, and beside all rows their centre and the rotation's signs.
        bits = int(((available - 3 * hidden_size) / vocab_size - 2) * 8 / hidden_size)
        if 1 <= bits <= 8:
            found.append((QuantizedEmbedding, {"bits": bits}))
        if rank := available // (2 * (vocab_size + hidden_size)):
            found.append((FactorizedEmbedding, {"rank": min(rank, hidden_size)}))
        width = 8 if not hidden_size % 8 else 4
        entries = min(256, vocab_size)
        a_stage = vocab_size * hidden_size // width + 2 * entries * hidden_size
        if not hidden_size % width and (stages := min(available // a_stage, 8)):
            found.append((ProductEmbedding, {"stages": stages, "width": width, "entries": entries}))
        return found

    def choose(
        self,
        *,
        ratio: float | None = None,
        perplexity_increase: float | None = None,
        progress: Callable[[str], None] = lambda what: None,
    ) -> EmbeddingChoice:
        """The candidate with the least divergence at `ratio`, or the smallest one whose relative increase of
        perplexity, on the held-out part of the text, is at most `perplexity_increase`.

        `progress` is told, in words, what is about to be made and measured, which takes minutes. Raises
        InputError unless exactly one budget is given, and for one that cannot be met.
        """
        if (ratio is None) == (perplexity_increase is None):
            raise InputError("give ratio or perplexity_increase, one of them")
        if ratio is not None:
            made = [self._made(*candidate, progress) for candidate in self.settings_for(ratio)]
            return self._choice(*min(made, key=lambda m: m[1].quality.kl))
        assert perplexity_increase is not None
        low, high = math.log(_SMALLEST_RATIO), math.log(_LARGEST_RATIO)
        best = None
        for step in range(_SEARCH_STEPS):
            middle = low if step == 0 else (low + high) / 2
            try:
                kind, settings = self.settings_for(math.exp(middle))[0]
            except InputError:  # so few bytes that no kind fits
                if step == 0:
                    raise
                high = middle
                continue
            found = self._made(kind, settings, progress)
            if found[1].quality.perplexity_increase <= perplexity_increase:
                low = middle
                best = found if best is None or found[1].ratio > best[1].ratio else best
            elif step == 0:
                raise InputError(
                    f"perplexity_increase is {perplexity_increase}, but at {found[1].ratio:.2f}x it is "
                    f"{found[1].quality.perplexity_increase:.4f} already: allow more"
                )
            else:
                high = middle
        assert best is not None
        return self._choice(*best)

    def apply(self, embedding: Embedding) -> Transformer:
        """A model of the same blocks with `embedding`."""
        return with_embedding(self.model, copy.deepcopy(embedding))

    def trainable(self, candidate: Candidate) -> Embedding:
        """The candidate in the form to be trained, for `heal`; on grids, where it is in trellis codes."""
        settings = {k: v for k, v in candidate.settings.items() if k not in ("packed", "reordered", "code")}
        if candidate.kind == QuantizedEmbedding.kind:
            return QuantizedEmbedding.trainable_from_dense(self.weight, self.calibration, **settings)
        kind = {k.kind: k for k in (FactorizedEmbedding, ProductEmbedding)}[candidate.kind]
        return kind.from_dense(self.weight, self.calibration, **settings)

    def quality(self, model: Transformer) -> Quality:
        """A model beside the dense one on the held-out part of the text."""
        return measure(self.model, {"": model}, self.held_out)[""]

    def _choice(self, embedding: Embedding, chosen: Candidate) -> EmbeddingChoice:
        return EmbeddingChoice(embedding, chosen, tuple(sorted(self._measured, key=lambda c: c.ratio)))

    def _made(
        self, kind: type[CompressedEmbedding], settings: dict[str, Any], progress: Callable[[str], None]
    ) -> tuple[Embedding, Candidate]:
        what = ", ".join([kind.kind, *(f"{k} {v}" for k, v in settings.items() if not isinstance(v, list))])
        progress(f"{what}: making")
        embedding = self.compress(kind, **settings)
        progress(f"{what}: measuring")
        return self._measure(embedding)

    def _measure(self, embedding: Embedding) -> tuple[Embedding, Candidate]:
        size = embedding.bytes_resident
        quality = self.quality(self.apply(embedding))
        ratio = 2 * self.weight.numel() / size
        found = Candidate(embedding.kind, embedding.settings, size, ratio, quality)
        self._measured.append(found)
        return embedding, found
