"""What compressed embeddings save and cost: bytes, perplexity and head time, beside baselines and peers."""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json
from torch import Tensor

from benchmarks.embedding_peers import PEERS, round_to_nearest, truncated_svd
from benchmarks.side_by_side import settings_of, speedup, time_arms
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.kernels import shared_compilations, supports_bf16
from ryzen_llm.model import Transformer
from ryzen_llm.model.embedding import (
    CODES,
    DenseEmbedding,
    Embedding,
    FactorizedEmbedding,
    ProductEmbedding,
    QuantizedEmbedding,
    allocate_bits,
)
from ryzen_llm.training import EmbeddingCompressor, choose_precision, heal, measure

PARTS = ("quality", "speed", "heal")
LEAST = 0.02
"""Per cent, at the foot of the plot."""


def main(arguments: list[str]) -> None:
    """Measure the parts asked for; print tables, write JSON and a plot; other parts keep their figures."""
    parser = argparse.ArgumentParser(prog="benchmark.py embeddings", description=__doc__)
    parser.add_argument("--model", required=True, help="what load_pretrained takes, e.g. a GGUF file")
    parser.add_argument(
        "--text", type=Path, required=True, help="its second half is scored, the first calibrated on"
    )
    parser.add_argument("--also", type=Path, nargs="*", default=[], help="more text to calibrate on")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--arms", nargs="+", default=[""], help="only those with one of these in their name")
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.45, 3.6, 4.5, 6.0])
    parser.add_argument("--calibration-tokens", type=int, default=49152, help="of each text")
    parser.add_argument("--context", type=int, default=1024, help="tokens a window of scored text")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--heal-ratio", type=float, default=6.0)
    parser.add_argument("--heal-steps", type=int, default=150)
    parser.add_argument("--heal-learning-rate", type=float, default=5e-4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shipped-bytes", type=int, help="of the embedding tensor in the file as shipped")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/embeddings.json"))
    options = parser.parse_args(arguments)
    for path in (options.text, *options.also):
        if not path.is_file():
            raise InputError(f"text {path}: no such file")
    console = Console()
    model, tokenizer = load_pretrained(options.model, "bf16")
    model.float()  # the weights of bf16, but not its arithmetic, whose noise would cover what is measured
    ids = torch.tensor(tokenizer.encode(options.text.read_text(encoding="utf-8")))
    half, size = len(ids) // 2, options.windows * options.context
    needed = max(size, options.calibration_tokens)
    if half < needed:
        raise InputError(f"--text has {len(ids)} tokens, expected {2 * needed}: give more text")
    scored = ids[half : half + size].view(-1, options.context)
    calibration = [ids[:half]]
    for path in options.also:
        calibration.append(torch.tensor(tokenizer.encode(path.read_text(encoding="utf-8"))))
    rows = torch.cat([in_rows(text[: options.calibration_tokens]) for text in calibration])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    text = torch.cat([in_rows(part) for part in calibration])
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if found.get("model", Path(options.model).name) != Path(options.model).name:
        raise InputError(f"--out {options.out}: holds figures of {found['model']}; name another file")
    found |= {"benchmark": "embeddings", "model": Path(options.model).name}
    with console.status("calibrating"):
        started = time.perf_counter()
        compressor = EmbeddingCompressor(model, rows, text)
        found["calibration_s"] = time.perf_counter() - started
    if "quality" in options.parts:
        found["quality"] = quality(compressor, scored, options, console)
    if "speed" in options.parts:
        found["speed"] = speed(compressor, options, console)
    if "heal" in options.parts:
        found["healed"] = healed(compressor, text, scored, options, console)
    measured = {"settings": settings_of(options), "environments": describe_environment()}
    for key, value in measured.items():
        found[key] = found.get(key, {}) | dict.fromkeys(options.parts, value)
    write_json(options.out, found)
    console.print(f"written: {options.out}")
    plot(found, options.out.with_suffix(".png"), console)


def in_rows(ids: Tensor) -> Tensor:
    """Token ids in rows of 512, the rest left out."""
    return ids[: len(ids) // 512 * 512].view(-1, 512)


@functools.cache  # trellis codes take minutes, and two parts of the benchmark use them
def tiered(compressor: EmbeddingCompressor, code: str, ratio: float) -> Embedding:
    """The embedding in tiers at a ratio."""
    weight = compressor.weight
    tiers = allocate_bits(weight, compressor.calibration, int(2 * weight.numel() / ratio), code)
    return compressor.compress(QuantizedEmbedding, bits=tiers, code=code)


def wanted(name: str, options: argparse.Namespace) -> bool:
    """Whether an arm was asked for."""
    return any(part in name for part in options.arms)


def ours(compressor: EmbeddingCompressor, options: argparse.Namespace) -> dict[str, Callable[[], Embedding]]:
    """How to make each of this project's arms that were asked for."""
    weight = compressor.weight
    arms: dict[str, Callable[[], Embedding]] = {
        f"quantized, {code}, tiers {ratio}x": functools.partial(tiered, compressor, code, ratio)
        for code in CODES
        for ratio in options.ratios
    }
    arms["quantized, 4 bits"] = lambda: compressor.compress(QuantizedEmbedding, bits=4)
    rank = rank_of(weight, 2.45)
    arms["factorized, whitened, 2.45x"] = lambda: compressor.compress(FactorizedEmbedding, rank=rank)
    arms["product, 3 stages"] = lambda: compressor.compress(ProductEmbedding, stages=3)
    return {name: make for name, make in arms.items() if wanted(name, options)}


def rank_of(weight: Tensor, ratio: float) -> int:
    """The rank at which two factors are that much smaller than the matrix."""
    return int(weight.numel() / ratio / sum(weight.shape))


def quality(
    compressor: EmbeddingCompressor, scored: Tensor, options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Bytes, perplexity, divergence and agreement of every arm on text not calibrated on."""
    weight = compressor.weight
    models: dict[str, Transformer] = {}
    rows: list[dict[str, Any]] = []

    def add(name: str, embedding: Embedding, size: int, seconds: float) -> None:
        models[name] = compressor.apply(embedding)
        ratio = 2 * weight.numel() / size
        shipped = options.shipped_bytes / size if options.shipped_bytes else None
        rows.append(
            {"name": name, "bytes": size, "ratio": ratio, "ratio_to_shipped": shipped, "made_in_s": seconds}
        )

    def add_dense(name: str, matrix: Tensor, size: int) -> None:
        embedding = DenseEmbedding(*weight.shape)
        embedding.weight = torch.nn.Parameter(matrix, requires_grad=False)
        add(name, embedding, size, 0.0)

    for name, make in ours(compressor, options).items():
        with console.status(name):
            started = time.perf_counter()
            embedding = make()
            add(name, embedding, embedding.bytes_resident, time.perf_counter() - started)
    for bits, group in ((8, weight.shape[1]), (4, 32), (4, 64)):
        name = f"round to nearest, {bits} bits, groups of {group}"
        if wanted(name, options):
            add_dense(name, *round_to_nearest(weight, bits, group))
    if wanted("plain SVD, 2.45x", options):
        add_dense("plain SVD, 2.45x", *truncated_svd(weight, 2.45))
    skipped = {}
    for name, peer in PEERS.items():
        if not wanted(name, options):
            continue
        try:
            add_dense(name, *peer(weight))
        except Exception as error:  # whatever a peer lacks on this machine
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            console.print(f"{name}: skipped ({skipped[name]})")
    if not models:
        raise InputError(f"--arms {' '.join(options.arms)}: no arm has one of these in its name")
    with console.status("scoring"):
        qualities = measure(compressor.model, models, scored)
    table = Table(title=f"{scored.numel()} tokens not calibrated on, against dense bf16")
    for heading in ("embedding", "ratio", "MiB", "perplexity", "change", "KL (nats)", "top-1"):
        table.add_column(heading, justify="right")
    for row in rows:
        q = qualities[row["name"]]
        row |= asdict(q)
        table.add_row(
            row["name"],
            f"{row['ratio']:.2f}x",
            f"{row['bytes'] / 2**20:.1f}",
            f"{q.perplexity:.3f}",
            f"{q.perplexity_increase:+.2%}",
            f"{q.kl:.4f}",
            f"{q.top1_agreement:.1%}",
        )
    console.print(table)
    return [*rows, *({"name": name, "skipped": why} for name, why in skipped.items())]


def _ten_times(function: Callable[[Tensor], Tensor], argument: Tensor) -> None:
    for _ in range(10):
        function(argument)


@torch.inference_mode()
@shared_compilations()  # by the arms, of which several are of one kind
def speed(
    compressor: EmbeddingCompressor, options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Milliseconds of the head at batch 1 and of looking up 1 token, compiled, all arms in every round.

    The compressed ones take and give what decoding computes in: bf16, or fp32 where the hardware lacks it.
    """
    dense = compressor.model.embedding
    dtype = torch.bfloat16 if supports_bf16(compressor.weight.device) else torch.float32
    embeddings: dict[str, Embedding] = {
        "dense bf16": copy.deepcopy(dense).to(torch.bfloat16),
        "dense fp32": dense,
    }
    arms = ours(compressor, options)
    embeddings |= {name: copy.deepcopy(make()).to(dtype) for name, make in arms.items()}
    states = torch.randn(1, compressor.weight.shape[1])
    hidden = {name: states.to(next(e.parameters()).dtype) for name, e in embeddings.items()}
    ids = torch.tensor([[7]])
    rows: list[dict[str, Any]] = []
    heads = {n: torch.compile(e.logits, fullgraph=True, dynamic=False) for n, e in embeddings.items()}
    lookups = {n: torch.compile(e.lookup, fullgraph=True, dynamic=False) for n, e in embeddings.items()}
    for name in embeddings:
        for _ in range(3):
            heads[name](hidden[name]), lookups[name](ids)
    head_times = time_arms(
        {n: functools.partial(_ten_times, f, hidden[n]) for n, f in heads.items()}, options.rounds
    )
    look_times = time_arms(
        {n: functools.partial(_ten_times, f, ids) for n, f in lookups.items()}, options.rounds
    )
    table = Table(title="batch 1, compiled")
    for heading in ("embedding", "head ms", "speed-up of the head", "lookup us"):
        table.add_column(heading, justify="right")
    for name in embeddings:
        head, look = (sorted(t[name])[len(t[name]) // 2] / 10 for t in (head_times, look_times))
        faster = speedup(head_times, "dense bf16", name)
        rows.append(
            {"name": name, "head_ms": head * 1e3, "lookup_us": look * 1e6, "head_speedup": asdict(faster)}
        )
        table.add_row(name, f"{head * 1e3:.2f}", str(faster), f"{look * 1e6:.0f}")
    console.print(table)
    return rows


def healed(
    compressor: EmbeddingCompressor,
    text: Tensor,
    scored: Tensor,
    options: argparse.Namespace,
    console: Console,
) -> list[dict[str, Any]]:
    """Each kind healed on the calibration text: time, and quality before and after."""
    weight, calibration = compressor.weight, compressor.calibration
    tiers = allocate_bits(weight, calibration, int(2 * weight.numel() / options.heal_ratio))
    rank = rank_of(weight, 2.45)
    kinds: dict[str, Callable[[], Embedding]] = {
        f"quantized, grid, tiers {options.heal_ratio}x": lambda: QuantizedEmbedding.trainable_from_dense(
            weight, calibration, bits=tiers
        ),
        "factorized, whitened, 2.45x": lambda: FactorizedEmbedding.from_dense(weight, calibration, rank=rank),
        "product, 3 stages": lambda: ProductEmbedding.from_dense(weight, calibration, stages=3),
    }
    precision, _ = choose_precision(None, weight.device)
    table = Table(title=f"{options.heal_steps} steps of healing, {scored.numel()} tokens not healed on")
    for heading in ("embedding", "ratio", "seconds", "change before", "after", "KL before", "after"):
        table.add_column(heading, justify="right")
    rows: list[dict[str, Any]] = []
    for name, make in kinds.items():
        if not wanted(name, options):
            continue
        trainable = make()
        before = compressor.apply(trainable.compressed())
        started = time.perf_counter()
        with console.status(f"healing: {name}"):
            after = heal(
                compressor.model,
                trainable,
                text,
                steps=options.heal_steps,
                learning_rate=options.heal_learning_rate,
                precision=precision,
            )
        seconds = time.perf_counter() - started
        size = copy.deepcopy(after.embedding).to(torch.bfloat16).bytes_resident
        row: dict[str, Any] = {"name": name, "ratio": 2 * weight.numel() / size, "bytes": size}
        found = measure(compressor.model, {"before": before, "after": after}, scored)
        row |= {"seconds": seconds} | {when: asdict(quality) for when, quality in found.items()}
        rows.append(row)
        changes = [f"{found[when].perplexity_increase:+.2%}" for when in ("before", "after")]
        divergences = [f"{found[when].kl:.4f}" for when in ("before", "after")]
        table.add_row(name, f"{row['ratio']:.2f}x", f"{seconds:.0f}", *changes, *divergences)
    console.print(table)
    return rows


def plot(found: dict[str, Any], path: Path, console: Console) -> None:
    """The frontier: ratio against the increase of perplexity."""
    if importlib.util.find_spec("matplotlib") is None or "quality" not in found:
        console.print("no plot: it needs matplotlib and the part quality")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    for row in found["quality"]:
        if "skipped" in row:
            continue
        tiers = "tiers" in row["name"]
        change = max(100 * row["perplexity_increase"], LEAST)
        axes.plot(row["ratio"], change, "o" if tiers else "x", color="tab:blue" if tiers else "tab:gray")
        below = "trellis" in row["name"] and change > LEAST  # of the grid's at the same ratio
        above = "nf4" in row["name"]  # of what is rounded to nearest
        offset = (4, -9 if below else 13 if above else 4)
        axes.annotate(
            row["name"], (row["ratio"], change), fontsize=7, xytext=offset, textcoords="offset points"
        )
    for row in found.get("healed", []):
        change = max(100 * row["after"]["perplexity_increase"], LEAST)
        axes.plot(row["ratio"], change, "*", color="tab:green", markersize=12)
        label = f"{row['name']}, healed"
        axes.annotate(label, (row["ratio"], change), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.axhline(1, color="tab:red", linewidth=0.5)
    axes.set(
        yscale="log",
        xlim=(1.5, 1.35 * max(row.get("ratio", 0) for row in found["quality"])),  # with room for the labels
        ylim=(LEAST, 300),  # what destroys the model is off the plot
        xlabel="dense bf16 bytes over resident bytes",
        ylabel=f"increase of perplexity, %, or {LEAST} where it is less",
        title=f"{found['model']}: embedding size against quality",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    console.print(f"written: {path}")
