"""What a compressed embedding costs in a model trained from scratch: validation loss beside a dense twin."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from rich.console import Console
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json

from benchmarks.side_by_side import settings_of
from benchmarks.twins import compare, shown, text_of
from ryzen_llm.errors import InputError
from ryzen_llm.model import ModelConfig
from ryzen_llm.model.embedding import Embedding, QuantizedEmbedding, allocate_bits
from ryzen_llm.training import (
    LanguageModule,
    OptimizerConfig,
    calibrate,
    choose_precision,
    with_embedding,
)

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantized, 6 to 3 bits": ("quantized", {"bits": [[512, 6], [1024, 4], [2560, 3]]}),
    "quantized, 3 bits": ("quantized", {"bits": 3}),
    "factorized, rank 48": ("factorized", {"rank": 48}),
    "product": ("product", {"width": 4, "entries": 256}),
    "hashed": ("hashed", {"buckets": 1008}),
}
CALIBRATION_BATCHES = 16


def main(arguments: list[str]) -> None:
    """Train twins of the same seed, tokens and settings; print and write the paired differences."""
    parser = argparse.ArgumentParser(prog="benchmark.py embedding_training", description=__doc__)
    parser.add_argument("--model", default="tiny", help="a preset's name")
    parser.add_argument(
        "--layers", type=int, help="of the model, if not the preset's; 2 in configs/quickstart.yaml"
    )
    parser.add_argument("--source", default="stdlib", help="text, as data.source")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS)[:1])
    parser.add_argument(
        "--ratios", type=float, nargs="*", default=[4, 6], help="to which the dense twin is compressed, too"
    )
    parser.add_argument("--validation-batches", type=int, default=100)
    parser.add_argument("--margin", type=float, default=0.01, help="of equivalence, relative")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embedding_training.json"))
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.precision, _ = choose_precision(None, device)
    if options.seeds < 6:
        raise InputError(f"--seeds is {options.seeds}, expected 6 or more, for an interval")
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    console = Console()
    losses: dict[str, list[float]] = {"dense": []}
    ratios: dict[str, float] = {}
    for seed in range(options.seeds):
        for kind in ("dense", *options.kinds):
            with console.status(f"seed {seed}: {kind}"):
                found = train(kind, seed, options)
            for name, (loss, ratios[name]) in found.items():
                losses.setdefault(name, []).append(loss)
                console.print(f"seed {seed}, {name}: validation loss {loss:.4f} at {ratios[name]:.2f}x")
    table = Table(title=f"{options.steps} steps of {options.batch} x {options.context} tokens")
    for heading in (
        "embedding",
        "ratio",
        "validation loss",
        "against the dense twin",
        f"within {options.margin:.0%}",
    ):
        table.add_column(heading, justify="right")
    rows: list[dict[str, Any]] = []
    for name, each in losses.items():
        row: dict[str, Any] = {"name": name, "ratio": ratios[name], "losses": each}
        mean = sum(each) / len(each)
        if name == "dense":
            table.add_row(name, "1", f"{mean:.4f}", "", "")
        else:
            row |= compare(each, losses["dense"], options.margin)
            table.add_row(name, f"{ratios[name]:.2f}x", f"{mean:.4f}", shown(row), str(row["equivalent"]))
        rows.append(row)
    console.print(table)
    settings = settings_of(options)
    kept: list[dict[str, Any]] = json.loads(options.out.read_text())["runs"] if options.out.is_file() else []
    run = {"rows": rows, "settings": settings, "environment": describe_environment()}
    write_json(options.out, {"benchmark": "embedding_training", "runs": [*kept, run]})
    console.print(f"written: {options.out}")


def train(name: str, seed: int, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Validation loss, and the embedding's ratio, after training from this seed; of the dense one also after
    compressing it to each of `ratios`, calibrated on training text.
    """
    pl.seed_everything(seed, verbose=False)
    data = text_of(options, options.vocab_size, seed)
    kind, settings = KINDS.get(name, ("dense", {}))
    config = ModelConfig.from_name(
        options.model,
        vocab_size=data.tokenizer.vocab_size,
        **({"num_layers": options.layers} if options.layers else {}),
        embedding=kind,
        embedding_settings=settings or None,
    )
    module = LanguageModule(config, OptimizerConfig())
    trainer = pl.Trainer(
        max_steps=options.steps,
        max_epochs=-1,
        limit_val_batches=options.validation_batches,
        precision=options.precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, train_dataloaders=data.train_dataloader())
    trained = module.model

    def loss_with(embedding: Embedding) -> tuple[float, float]:
        module.model = with_embedding(trained, embedding)
        (result,) = trainer.validate(module, dataloaders=data.val_dataloader(), verbose=False)
        return result["val_loss"], embedding.compression_ratio

    found = {name: loss_with(trained.embedding.compressed())}
    if kind == "dense":
        text = torch.cat([batch[:, :-1] for batch in islice(data.train_dataloader(), CALIBRATION_BATCHES)])
        weight, calibration = trained.embedding.dense_weight().float(), calibrate(trained, text)
        for ratio in options.ratios:
            tiers = allocate_bits(weight, calibration, int(2 * weight.numel() / ratio), "trellis")
            made = QuantizedEmbedding.from_dense(weight, calibration, bits=tiers, code="trellis")
            found[f"compressed after training, {ratio:g}x"] = loss_with(made)
    return found
