"""What speculative decoding gains on real prompts, by category, over plain decoding and beside peers."""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json
from torch import Tensor

from benchmarks.chat_prompts import read_prompts
from benchmarks.environments import move_to_parts
from benchmarks.speculation_peers import PEERS, build_peer
from ryzen_llm.data import Tokenizer
from ryzen_llm.decoding import (
    WEIGHTS,
    Draft,
    Drafter,
    DraftSession,
    Generator,
    SpeculativeDecoder,
    Step,
)
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_drafters, load_pretrained
from ryzen_llm.model import Transformer

Arm = Callable[[Tensor], tuple[list[int], Counter[str]]]
"""A prompt (1, time) -> the new ids, and figures to be added up."""

SHARED = (
    "model",
    "prompts",
    "per_category",
    "new_tokens",
    "longest_prompt",
    "threads",
    "widths",
    "eager",
)
"""Settings that the parts of one measurement must share."""


def main(arguments: list[str]) -> None:
    """Measure the arms asked for, add them to those in the file, print the tables and draw the plot."""
    parser = argparse.ArgumentParser(prog="benchmark.py speculation", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="what load_pretrained takes")
    parser.add_argument("--prompts", type=Path, required=True, help="Spec-Bench's question.jsonl, or alike")
    parser.add_argument("--per-category", type=int, default=4, help="prompts of each category (default: 4)")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--longest-prompt", type=int, default=1024, help="tokens; of longer ones, the last")
    parser.add_argument("--weights", choices=WEIGHTS, default="int4", help="of our arms (default: int4)")
    parser.add_argument(
        "--drafters",
        nargs="*",
        default=["suffix", "recycling", "suffix,recycling"],
        help="our arms: drafters as for generate.py, joined by commas, or `wrong`, which never holds; plain "
        "decoding is always among them",
    )
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/speculation.json"))
    options = parser.parse_args(arguments)
    options.threads = torch.get_num_threads()
    console = Console()
    settings = {
        key: value.name if isinstance(value := getattr(options, key), Path) else value for key in SHARED
    }
    found = _earlier(options.out, settings)
    model, tokenizer = load_pretrained(options.model)
    prompts = read_prompts(options.prompts, tokenizer, options.per_category, options.longest_prompt)
    if options.drafters:
        found["arms"] |= ours(model, tokenizer, prompts, options, console)
    for peer in options.peers:
        try:
            arm = build_peer(peer, model, tokenizer, options)
        except (ImportError, InputError) as error:
            console.print(f"not measured: {peer} ({error})")
            found["arms"][peer] = {"not_measured": str(error)}
            continue
        with console.status(f"{peer}: warming up"):
            arm(next(iter(prompts.values()))[0][:, :32])
        found["arms"] |= measure({peer: arm}, prompts, console)
        del arm
        gc.collect()
    write_json(options.out, found)
    show(found["arms"], console)
    console.print(f"written: {options.out}")
    plot(found["arms"], options.out.with_suffix(".png"), console)


class WrongDrafter(Drafter, DraftSession):
    """Draws ids at random: what drafts cost that never hold."""

    name = "wrong"

    def begin(self, tokens: Sequence[int], hidden_state: Tensor) -> DraftSession:
        """See `Drafter.begin`."""
        return self

    def propose(self, most: int) -> Draft:
        """See `DraftSession.propose`."""
        return Draft([random.randrange(1000) for _ in range(most)], range(most))

    def update(self, step: Step) -> None:
        """Learns nothing."""


def ours(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Mapping[str, Sequence[Tensor]],
    options: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    """Plain decoding and that with each choice of drafters, prompt by prompt in turn."""
    generator = Generator(model, weights=options.weights, compile=not options.eager)
    engines: dict[str, Generator | SpeculativeDecoder] = {f"plain {options.weights}": generator}
    for drafters in options.drafters:
        names = drafters.split(",")
        label = "+".join(name.partition(":")[0] for name in names)
        wrong: list[str | Drafter] = [WrongDrafter() for name in names if name == WrongDrafter.name]
        chosen = wrong + load_drafters(
            [name for name in names if name != WrongDrafter.name],
            model,
            weights=options.weights,
            compile=not options.eager,
        )
        engines[f"{label} {options.weights}"] = SpeculativeDecoder(generator, chosen, widths=options.widths)
    arms: dict[str, Arm] = {}
    for name, engine in engines.items():
        arms[name] = functools.partial(_generate, engine, tokenizer.stop_ids, options.new_tokens)
        with console.status(f"{name}: compiling"):
            engine.generate(next(iter(prompts.values()))[0][:, :32], max_new_tokens=16)
        if isinstance(engine, SpeculativeDecoder):
            engine.forget()
    return measure(arms, prompts, console)


def _generate(
    engine: Generator | SpeculativeDecoder, stops: Sequence[int], new_tokens: int, prompt: Tensor
) -> tuple[list[int], Counter[str]]:
    started = time.perf_counter()
    out = engine.generate(prompt, max_new_tokens=new_tokens, stop_tokens=stops)
    ids = out.new_ids[0].tolist()
    seconds = time.perf_counter() - started
    figures = Counter[str](decoding_microseconds=round(1e6 * (seconds - out.time_to_first_token_s)))
    if isinstance(engine, SpeculativeDecoder):
        told = engine.statistics
        figures.update(
            steps=told.steps,
            drafted=sum(told.drafted.values()),
            accepted=sum(told.accepted.values()),
            drafting_microseconds=round(1e6 * told.drafting_seconds),
        )
        figures.update({f"passes of width {width}": passes for width, passes in told.passes.items()})
        figures.update({f"accepted from {name}": tokens for name, tokens in told.accepted.items()})
    return ids, figures


def measure(
    arms: Mapping[str, Arm], prompts: Mapping[str, Sequence[Tensor]], console: Console
) -> dict[str, Any]:
    """Every arm on every prompt, prompt by prompt in random order; sums by category, the day and the machine.

    `same_ids` of the others counts the texts that are the first arm's, token by token.
    """
    found: dict[str, dict[str, Counter[str]]] = {name: {} for name in arms}
    order = list(arms)
    shuffled = random.Random(0)
    for category, chosen in prompts.items():
        for sums in found.values():
            sums[category] = Counter()
        for index, prompt in enumerate(chosen):
            shuffled.shuffle(order)  # in turn, each would always inherit the same one's clock
            texts: dict[str, list[int]] = {}
            with console.status(f"{category}: prompt {index + 1} of {len(chosen)}"):
                for name in order:
                    started = time.perf_counter()
                    texts[name], figures = arms[name](prompt)
                    figures["microseconds"] = round(1e6 * (time.perf_counter() - started))
                    figures["tokens"] = len(texts[name])
                    figures["prompt_tokens"] = prompt.shape[1]
                    figures["prompts"] = 1
                    found[name][category].update(figures)
            first, *others = arms
            for name in others:
                found[name][category]["same_ids"] += texts[name] == texts[first]
    told = {"date": datetime.now(UTC).date().isoformat(), "environment": describe_environment()}
    return {
        name: told | {"categories": {category: dict(figures) for category, figures in sums.items()}}
        for name, sums in found.items()
    }


def show(arms: Mapping[str, Any], console: Console) -> None:
    """Speed-ups by category, and what they come from."""
    measured = {name: arm["categories"] for name, arm in arms.items() if "categories" in arm}
    if not measured:
        return
    categories = list(next(iter(measured.values())))
    for title, pace in (
        ("tokens a second, prompt included", "microseconds"),
        ("tokens a second from the second on", "decoding_microseconds"),
    ):
        table = Table(title=f"{title}; speed-up over the plain arm of the same engine")
        for heading in ("arm", *categories, "geometric mean"):
            table.add_column(heading, justify="right")
        for name, figures in measured.items():
            paces = [rate for category in categories if (rate := _pace(figures[category], pace))]
            if len(paces) < len(categories):
                continue
            base = measured.get(baseline(name), {})
            ratios = [
                rate / plain
                for category, rate in zip(categories, paces, strict=True)
                if category in base and (plain := _pace(base[category], pace))
            ]
            cells = [f"{rate:.1f}" for rate in (*paces, geometric_mean(paces))]
            if len(ratios) == len(paces):
                cells = [
                    f"{cell} ({ratio:.2f}x)"
                    for cell, ratio in zip(cells, (*ratios, geometric_mean(ratios)), strict=True)
                ]
            table.add_row(name, *cells)
        console.print(table)
    table = Table(title="tokens a step; accepted of those drafted; texts that are the plain arm's")
    for heading in ("arm", *categories):
        table.add_column(heading, justify="right")
    for name, figures in measured.items():
        if "steps" in figures[categories[0]]:
            cells = []
            for category in categories:
                f = figures[category]
                accepted = f["accepted"] / f["drafted"] if f["drafted"] else 0
                tokens = (f["tokens"] - f["prompts"]) / f["steps"]
                cells.append(f"{tokens:.2f}; {accepted:.0%}; {f['same_ids']}/{f['prompts']}")
            table.add_row(name, *cells)
    console.print(table)


def baseline(name: str) -> str:
    """The plain arm of the same engine."""
    if name in PEERS:
        return name.removesuffix(" prompt lookup")
    return f"plain {name.rpartition(' ')[2]}"


def _pace(figures: Mapping[str, int], key: str) -> float | None:
    tokens = figures["tokens"] - (figures["prompts"] if key == "decoding_microseconds" else 0)
    return 1e6 * tokens / figures[key] if figures.get(key) else None


def plot(arms: Mapping[str, Any], path: Path, console: Console) -> None:
    """Speed-up of each arm over the plain one of its engine, by category."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: pip install matplotlib")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = {name: arm["categories"] for name, arm in arms.items() if "categories" in arm}
    shown = [name for name in measured if baseline(name) != name and baseline(name) in measured]
    if not shown:
        return
    categories = list(measured[shown[0]])
    figure, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    for index, name in enumerate(shown):
        ratios = [
            (_pace(measured[name][c], "microseconds") or 0)
            / (_pace(measured[baseline(name)][c], "microseconds") or 1)
            for c in categories
        ]
        places = [i + (index - (len(shown) - 1) / 2) * 0.8 / len(shown) for i in range(len(categories))]
        axes.bar(places, ratios, 0.8 / len(shown), label=name)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(categories)), categories)
    axes.set_ylabel("speed-up over the same engine's plain decoding")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    console.print(f"written: {path}")


def _earlier(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier part has left at `path`, to be added to."""
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found.get("settings") != settings:
            raise InputError(
                f"--out {path}: holds another measurement, of {found.get('settings')}; name another file"
            )
        move_to_parts(found, found["arms"].values())
        return found
    return {"benchmark": "speculation", "settings": settings, "arms": {}}
