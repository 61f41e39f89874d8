"""Compress a model's tied embedding, optionally heal it, and write a directory that load_pretrained reads."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from ryzen_callbacks import AnomalyDetector, TrainingMetricsCollector, write_json

from ryzen_llm.data import open_corpus
from ryzen_llm.errors import InputError
from ryzen_llm.interop import export_pretrained, load_pretrained
from ryzen_llm.pipeline import exit_with
from ryzen_llm.training import EmbeddingCompressor, heal

REPORT = "embedding_compression.json"
HEALING_REPORT = "training_metrics_report.json"
"""Both beside the weights."""
_TEXT = 16
"""Times as much text as is calibrated on is read, for counting tokens and for healing."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="compress.py", description=__doc__)
    parser.add_argument("--model", required=True, help="what load_pretrained takes")
    parser.add_argument(
        "--out", required=True, type=Path, help="directory to write; it must not be there yet"
    )
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--ratio", type=float, help="dense bf16 bytes over compressed bytes")
    budget.add_argument("--perplexity-increase", type=float, help="relative, at most; 0.01 is 1%%")
    parser.add_argument("--text", default="stdlib", help="text to calibrate on, like what the model is for")
    parser.add_argument("--tokens", type=int, default=32768, help="of the text, to calibrate on")
    parser.add_argument("--context", type=int, default=512, help="tokens a row")
    parser.add_argument("--heal-steps", type=int, default=0, help="steps of the healing pass (default: none)")
    options = parser.parse_args(arguments)
    try:
        _compress(options)
    except InputError as error:
        return exit_with(error)
    return 0


def _compress(options: argparse.Namespace) -> None:
    try:
        out = Path(os.path.abspath(options.out.expanduser()))
        in_use = out.exists() and (not out.is_dir() or any(out.iterdir()))
    except (OSError, RuntimeError) as error:  # a name that is too long, or ~ of nobody
        raise InputError(f"--out {options.out}: {getattr(error, 'strerror', error)}") from error
    if in_use:
        raise InputError(f"{out}: is there already; name another directory, or remove it")
    if options.heal_steps < 0 or options.context < 2 or options.tokens < 1:
        raise InputError("--heal-steps must be zero or more, --context 2 or more, and --tokens 1 or more")
    model, tokenizer = load_pretrained(options.model)
    ids: list[int] = []
    wanted = options.tokens * _TEXT
    for document in open_corpus(options.text, "text").documents():
        ids += tokenizer.encode(document)
        if len(ids) >= wanted:
            break
    rows = torch.tensor(ids[: len(ids) // options.context * options.context]).view(-1, options.context)
    if not rows.numel():
        raise InputError(f"--text {options.text}: has {len(ids)} tokens, expected {options.context} or more")
    calibrated = max(options.tokens // options.context, 2)
    more = rows[calibrated:]
    with Console(stderr=True).status("calibrating") as status:
        compressor = EmbeddingCompressor(model, rows[:calibrated], more if len(more) else None)
        choice = compressor.choose(
            ratio=options.ratio, perplexity_increase=options.perplexity_increase, progress=status.update
        )
    compressed, quality, report = compressor.apply(choice.embedding), choice.chosen.quality, choice.report()
    if options.heal_steps:
        trainable = compressor.trainable(choice.chosen)
        healing = out.with_name(f"{out.name}-healing")
        healed = heal(
            model,
            trainable,
            torch.cat((compressor.text, more)),  # not on what it is measured on
            steps=options.heal_steps,
            callbacks=[TrainingMetricsCollector(healing / HEALING_REPORT), AnomalyDetector()],
        )
        after = compressor.quality(healed)
        kept = after.kl < quality.kl
        report["healed"] = {"quality": asdict(after), "kept": kept}
        print(
            f"healed for {options.heal_steps} steps: divergence from the dense model {quality.kl:.4f} -> "
            f"{after.kl:.4f} nats" + ("" if kept else ", which is no better: not kept")
        )
        if kept:
            compressed, quality = healed, after
    compressed.embedding.to(torch.bfloat16)
    written = export_pretrained(compressed, tokenizer, out, densify=False, dtype="bf16")
    write_json(written / REPORT, report)
    print(
        f"{choice.chosen.kind}: {choice.chosen.ratio:.2f}x smaller than dense bf16, perplexity "
        f"{quality.perplexity_increase:+.2%}, top-1 agreement {quality.top1_agreement:.1%} on text not "
        f"calibrated on\nwritten: {written}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
