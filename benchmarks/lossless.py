"""Whether speculation changes anything: ids with each drafter and cache against those without."""

from __future__ import annotations

import argparse
import hashlib
import json
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json
from torch import Tensor

from benchmarks.chat_prompts import read_prompts
from benchmarks.environments import move_to_parts
from ryzen_llm.decoding import WEIGHTS, Generator, SpeculativeDecoder
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_drafters, load_pretrained

SHARED = ("model", "prompts", "texts", "prompt_tokens", "new_tokens", "width", "batch", "compile")


def main(arguments: list[str]) -> None:
    """Two comparisons, for a kind of weights and each cache; what an earlier part has measured is kept.

    "same graph": a drafter against none, both over passes of the same width; every id has to be the same.
    "width 1": none over that width against plain decoding. Rounding differs there, so ids may where two
    tokens are as likely to that precision: the gap between the two likeliest logits at each first difference
    is set beside twice the noise, the largest difference of a leading logit at all places before one.
    """
    parser = argparse.ArgumentParser(prog="benchmark.py lossless", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="what load_pretrained takes")
    parser.add_argument("--prompts", type=Path, required=True, help="Spec-Bench's question.jsonl, or alike")
    parser.add_argument("--texts", type=int, default=200, help="prompts at least, of all categories alike")
    parser.add_argument("--prompt-tokens", type=int, default=48, help="of each prompt, the last")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--batch", type=int, default=25, help="texts decoded together")
    parser.add_argument("--weights", choices=WEIGHTS, default="bf16")
    parser.add_argument("--caches", nargs="+", default=["dense", "int8", "k8v4", "int4-sinks"])
    parser.add_argument("--drafters", nargs="+", default=["suffix", "recycling"], help="as for generate.py")
    parser.add_argument("--width-1", action="store_true", help="compare with plain decoding, too")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/lossless.json"))
    options = parser.parse_args(arguments)
    console = Console()
    settings = {
        key: value.name if isinstance(value := getattr(options, key), Path) else value for key in SHARED
    }
    found: dict[str, Any] = {"benchmark": "lossless", "settings": settings, "runs": {}}
    if options.out.is_file():
        found = json.loads(options.out.read_text(encoding="utf-8"))
        if found.get("settings") != settings:
            raise InputError(f"--out {options.out}: holds another measurement; name another file")
        move_to_parts(found, (run for runs in found["runs"].values() for run in runs.values()))
    model, tokenizer = load_pretrained(options.model)
    prompts = _prompts(
        read_prompts(options.prompts, tokenizer, options.texts, options.prompt_tokens), options
    )
    for cache in options.caches:
        generator = Generator(model, cache=cache, weights=options.weights, compile=options.compile)
        runs = found["runs"].setdefault(f"{options.weights}, {cache}", {})
        for drafter in ["none", *options.drafters]:
            name = drafter.partition(":")[0]
            if name in runs:
                continue  # by an earlier part
            drafters = load_drafters(
                [] if drafter == "none" else [drafter],
                model,
                weights=options.weights,
                compile=options.compile,
            )
            decoder = SpeculativeDecoder(generator, drafters, widths=[options.width])
            ids = _decode(decoder, prompts, options, console, f"{cache}, {name}")
            runs[name] = {"texts": len(ids), "tokens": ids.numel(), "hashes": [_hash(text) for text in ids]}
            runs[name]["same_texts"] = sum(map(operator.eq, runs[name]["hashes"], runs["none"]["hashes"]))
            runs[name]["environment"] = describe_environment()
            write_json(options.out, found)
        if options.width_1 and "width 1" not in runs:
            plain = _decode(generator, prompts, options, console, f"{cache}, plain")
            decoder = SpeculativeDecoder(generator, [], widths=[options.width])
            wide = _decode(decoder, prompts, options, console, f"{cache}, width {options.width}")
            runs["width 1"] = differences(generator, prompts, plain, wide, options.width)
            runs["width 1"]["environment"] = describe_environment()
            write_json(options.out, found)
    show(found["runs"], console)
    console.print(f"written: {options.out}")


def _prompts(by_category: dict[str, list[Tensor]], options: argparse.Namespace) -> list[Tensor]:
    """Batches of prompts of one length; those that are shorter are left out."""
    long_enough = [
        [ids for ids in prompts if ids.shape[1] == options.prompt_tokens] for prompts in by_category.values()
    ]
    share = -(-options.texts // len(long_enough))
    chosen = [ids for prompts in long_enough for ids in prompts[:share]]
    if len(chosen) < options.texts:
        chosen = [ids for prompts in long_enough for ids in prompts]
    if len(chosen) < options.texts:
        raise InputError(
            f"--prompts {options.prompts}: has {len(chosen)} of {options.prompt_tokens} tokens, expected "
            f"{options.texts}: lower --texts or --prompt-tokens"
        )
    return list(torch.split(torch.cat(chosen[: options.texts]), options.batch))


def _hash(ids: Tensor) -> str:
    return hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()[:16]


def _decode(
    engine: Generator | SpeculativeDecoder,
    prompts: Sequence[Tensor],
    options: argparse.Namespace,
    console: Console,
    what: str,
) -> Tensor:
    texts = []
    for index, batch in enumerate(prompts):
        with console.status(f"{what}: batch {index + 1} of {len(prompts)}"):
            texts.append(engine.generate(batch, max_new_tokens=options.new_tokens).new_ids)
    return torch.cat(texts)


@torch.inference_mode()
def differences(
    generator: Generator, prompts: Sequence[Tensor], plain: Tensor, wide: Tensor, width: int
) -> dict[str, Any]:
    """Where two runs first differ, the gap of the leading logits there, and the noise elsewhere."""
    different = plain != wide
    first = torch.where(different.any(1), different.int().argmax(1), plain.shape[1])
    gaps: list[float] = []
    noises: list[Tensor] = []
    sizes = [len(batch) for batch in prompts]
    for batch, texts, ends in zip(prompts, torch.split(plain, sizes), torch.split(first, sizes), strict=True):
        passes = [
            (generator.new_cache(len(batch), batch.shape[1] + texts.shape[1] + w), w) for w in (1, width)
        ]
        leading: list[Tensor] = []
        for cache, _ in passes:
            hidden_states = generator.model.run_blocks(batch, cache.append(batch.shape[1]), cache.layers)
            leading.append(generator.model.logits(hidden_states[:, -1]).float())
        for step in range(min(int(ends.max()) + 1, texts.shape[1])):
            if step:
                leading = []
                for cache, w in passes:
                    tokens = texts[:, step - 1 : step].repeat(1, w)
                    length = cache.length
                    leading.append(generator.fixed_width(tokens, cache).logits[:, 0].float())
                    cache.truncate(length + 1)
            narrow, likeliest = leading[0].topk(2)
            noise = (leading[1].gather(1, likeliest) - narrow).abs()
            noises.append(noise[step < ends].flatten())
            gaps += (narrow[:, 0] - narrow[:, 1])[ends == step].tolist()
    noise = torch.cat(noises)
    return {
        "texts": len(plain),
        "same_texts": int((first == plain.shape[1]).sum()),
        "first_differences": first[first < plain.shape[1]].tolist(),
        "gaps": gaps,
        "noise_max": float(noise.max()),
        "noise_mean": float(noise.mean()),
        "explained": sum(gap <= 2 * float(noise.max()) for gap in gaps),
    }


def show(runs: dict[str, Any], console: Console) -> None:
    """Identity by weights, cache and drafter."""
    table = Table(title="texts that are the same, token by token")
    for heading in ("weights, cache", "against", "texts", "the same", "first differences"):
        table.add_column(heading, justify="right")
    for name, by_drafter in runs.items():
        for against, run in by_drafter.items():
            told = ""
            if "gaps" in run:
                largest = max(run["gaps"], default=0.0)
                told = (
                    f"{run['explained']} of {len(run['gaps'])} with a gap within the noise "
                    f"(largest gap {largest:.3g}, noise up to {run['noise_max']:.3g})"
                )
            table.add_row(name, against, str(run["texts"]), str(run["same_texts"]), told)
    console.print(table)
