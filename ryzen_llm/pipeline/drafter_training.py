"""The same five phases for draft heads: trained on the model's own text, validated by the speed they give."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

import torch
from ryzen_callbacks import Claim
from torch import Tensor

from ryzen_llm.claims import speculative_decoding
from ryzen_llm.data import Tokenizer
from ryzen_llm.data.token_store import default_cache_dir
from ryzen_llm.decoding import Generator, HeadsConfig
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained, render_chat
from ryzen_llm.model import Transformer
from ryzen_llm.pipeline.orchestrator import Orchestrator
from ryzen_llm.pipeline.report import Accuracy, Kernels
from ryzen_llm.pipeline.training import train
from ryzen_llm.selftest import IntegrationTestRunner
from ryzen_llm.training import DraftHeadsModule, TargetTextModule, Turns, check_heads_resumable

HEADS = "heads.safetensors"
TEXTS_IN_A_BATCH = 8


class DrafterOrchestrator(Orchestrator):
    """Trains `DraftHeads` for `drafter.target` and writes them to heads.safetensors in the output directory.

    Of `data`, its batch_size (of places, see `TargetTextModule`), val_fraction, seed and cache_dir apply. The
    claim that is measured is the one of speculative decoding, with these heads besides the other drafters.
    """

    kind = "heads"
    module: DraftHeadsModule  # type: ignore[assignment]

    def _build(self) -> tuple[int | None, str]:
        options, data = self.config.drafter, self.config.data
        assert options.target is not None
        if not self.config.options.runs("training"):
            raise InputError("phases has no training, which drafter.target is about: leave one of them out")
        target, self.tokenizer = load_pretrained(options.target)
        cache_dir = Path(data.cache_dir) if data.cache_dir else default_cache_dir()
        self.texts = TargetTextModule(
            Generator(target, weights=options.weights, compile=True),
            layout(self.tokenizer),
            cache_dir / "target-texts" / f"{target.content_hash()[:16]}-{options.weights}",
            texts=options.texts,
            length=options.length,
            depth=options.depth,
            batch_size=data.batch_size,
            val_fraction=data.val_fraction,
            seed=data.seed,
        )
        self.console.print(f"{self.texts.parts} batches of text by the model itself, written once")
        self.texts.prepare_data()
        self.texts.setup("fit")
        vocabulary = self.texts.vocabulary(min(options.vocab_size, target.config.vocab_size))
        config = HeadsConfig(target.config.hidden_size, options.intermediate_size, options.depth)
        self.module = DraftHeadsModule(target, config, vocabulary, self.config.optimizer)
        parameters = sum(parameter.numel() for parameter in self.module.parameters())
        return None, (
            f"{len(self.texts.train):,} places in texts of {options.length} tokens; heads with "
            f"{parameters:,} parameters for {len(vocabulary):,} tokens of {Path(options.target).name}"
        )

    def _choose_parts(self, device: torch.device, precision: str) -> None:
        self.kernels = Kernels(reason="draft heads are trained with the plain ops")

    def _check_prompt(self) -> None:
        """There is no sample."""

    def _check_resumable(self, checkpoint: Path) -> None:
        check_heads_resumable(checkpoint, self.module.heads, self.config.optimizer)

    def _train(self) -> None:
        self.checkpoint = train(self.trainer, self.module, self.texts, self.resume_from)
        measured = self.trainer.callback_metrics
        self.accuracy = Accuracy(
            val_loss=float(measured["val_loss"]),
            val_accuracy=float(measured["val_accuracy"]),
            unigram_entropy=self.texts.unigram_entropy,
        )
        self.module.heads.save(self.output_dir / HEADS)

    def _trained_model(self) -> Transformer:
        return self.module.target

    def _batches(self, split: Literal["train", "val"], count: int) -> list[Tensor]:
        """The later halves of texts, since they begin alike."""
        ids = (self.texts.train if split == "train" else self.texts.val).ids
        later: tuple[Tensor, ...] = ids[:, ids.shape[1] // 2 :].split(TEXTS_IN_A_BATCH)  # type: ignore[no-untyped-call]
        return list(later[:count])

    def _claims(self) -> list[Claim]:
        context = self._claim_context(self._trained_model())
        drafters = (*self.config.optimizations.drafters, f"heads:{self.output_dir / HEADS}")
        enabled = dataclasses.replace(context.enabled, drafters=drafters)
        return [speculative_decoding.claim(dataclasses.replace(context, enabled=enabled))]

    def _to_generate(self) -> list[str]:
        target = self.config.drafter.target
        assert target is not None
        return ["--model", str(target), "--drafter", f"heads:{self.output_dir / HEADS}"]

    def _self_tests(self) -> IntegrationTestRunner:
        return IntegrationTestRunner(self._trained_model(), self.tokenizer, self._batches("val", 1))


def layout(tokenizer: Tokenizer) -> Turns:
    """How the model's chat template lays out a conversation; without one, a text begins and goes on."""
    if tokenizer.special.chat_template is None:
        return Turns([tokenizer.end_of_text_id], [], [], frozenset(tokenizer.stop_ids))
    marks = ("\x00question\x00", "\x00answer\x00", "\x00next\x00")
    roles = ("user", "assistant", "user")
    rendered = render_chat(
        tokenizer,
        [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)],
    )
    parts = []
    for mark in marks:
        part, found, rendered = rendered.partition(mark)
        if not found:
            raise InputError(
                "drafter.target: its chat template does not show what was said; train it without"
            )
        parts.append(tokenizer.encode_rendered(part))
    before_user, before_answer, between = parts
    stops = frozenset(tokenizer.stop_ids)
    end = next((i + 1 for i, token in enumerate(between) if token in stops), 0)
    return Turns(before_user, before_answer, between[end:], stops)
