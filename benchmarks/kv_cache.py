"""What key-value caches and weights of few bits cost and save: bytes, perplexity, speed, beside peers."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json
from torch import Tensor

from benchmarks.cache_peers import PEERS, Arm, build_peer
from benchmarks.decode_profile import profile_decoding
from benchmarks.side_by_side import peak_memory, settings_of, speedup, time_arms
from ryzen_llm.cache import KVCache, LayerFormat, build_cache
from ryzen_llm.data import Tokenizer
from ryzen_llm.decoding import Generator, KVCacheOptimizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop import load_pretrained
from ryzen_llm.kernels import shared_compilations
from ryzen_llm.model import Transformer

PARTS = ("memory", "quality", "weights", "speed", "profile")
KINDS = ("dense", "int8", "k8v4", "int4", "int4-sinks")
CALIBRATED = "int4-sinks, calibrated"
Kinds = str | Sequence[str | LayerFormat]
Scored = Callable[[Tensor], Tensor]
"""A window (time,) -> logits (time, vocab_size)."""


def main(arguments: list[str]) -> None:
    """Measure the parts asked for; print tables, write JSON and a plot; other parts keep their figures."""
    parser = argparse.ArgumentParser(prog="benchmark.py kv_cache", description=__doc__)
    parser.add_argument("--model", required=True, help="what load_pretrained takes, e.g. a GGUF file")
    parser.add_argument("--text", type=Path, required=True, help="real text for perplexity and calibration")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 512, 2048, 8192], help="for memory")
    parser.add_argument("--context", type=int, default=2048, help="tokens a window of text")
    parser.add_argument("--windows", type=int, default=8, help="windows of text scored (default: 8)")
    parser.add_argument("--savings", type=float, nargs="*", default=[0.65, 0.7, 0.71], help="to optimise for")
    parser.add_argument("--decode-lengths", type=int, nargs="+", default=[128, 1024, 4096])
    parser.add_argument("--weights", default="int4", help="of the timed arms (default: int4)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens timed at a time")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kinds", nargs="+", default=KINDS, help="caches to measure, beside dense")
    parser.add_argument("--peers", nargs="*", default=PEERS, choices=PEERS, help="peers to time")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kv_cache.json"))
    options = parser.parse_args(arguments)
    options.kinds = list(dict.fromkeys(("dense", *options.kinds)))  # the first is what others save against
    if not options.text.is_file():
        raise InputError(f"--text {options.text}: no such file")
    console = Console()
    model, tokenizer = load_pretrained(options.model)
    ids = torch.tensor(tokenizer.encode_prompt(options.text.read_text(encoding="utf-8")))
    needed = (options.windows + 1) * options.context
    if {"speed", "profile"} & set(options.parts):
        needed = max(needed, *options.decode_lengths)
    if len(ids) < needed:
        raise InputError(
            f"--text has {len(ids)} tokens, expected {needed}: give more text, fewer windows or shorter "
            "--decode-lengths"
        )
    windows = _windows(ids, tokenizer.encode_prompt(""), options)
    found: dict[str, Any] = json.loads(options.out.read_text()) if options.out.is_file() else {}
    if found.get("model", Path(options.model).name) != Path(options.model).name:
        raise InputError(f"--out {options.out}: holds figures of {found['model']}; name another file")
    found |= {"benchmark": "kv_cache", "model": Path(options.model).name}

    def keep(part: str, rows: list[dict[str, Any]]) -> None:
        """Into the file, in place of what is there of the same lengths; a later part may fail.

        What another machine has measured of the part goes: a part has one environment.
        """
        measured, environment = {row.get("length") for row in rows}, describe_environment()
        environments = found.setdefault("environments", {})
        if _machine(environments.get(part)) != _machine(environment):
            found[part] = []
        found[part] = [row for row in found[part] if row.get("length") not in measured] + rows
        environments[part] = environment
        found.setdefault("settings", {})[part] = settings_of(options)
        write_json(options.out, found)

    if "memory" in options.parts:
        keep("memory", memory(model, options, console))
    if "quality" in options.parts:
        keep("quality", quality(model, windows, options, console))
    if "weights" in options.parts:
        keep("weights", weights(model, windows, options, console))
    if "speed" in options.parts:
        for rows in speed(model, tokenizer, ids, windows, options, console):
            keep("speed", rows)
    if "profile" in options.parts:
        keep("profile", [profile(model, ids[:length], options, console) for length in options.decode_lengths])
    console.print(f"written: {options.out}")
    plot(found, options.out.with_suffix(".png"), console)


@torch.inference_mode()
def memory(model: Transformer, options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Bytes of a cache after so many tokens, and at the peak while its buffers grew up to there."""
    rows: list[dict[str, Any]] = []
    table = Table(title="bytes allocated, saved against bf16")
    for heading in ("cache", *map(str, options.lengths)):
        table.add_column(heading, justify="right")
    dense: dict[int, int] = {}
    for kind in options.kinds:
        cells = []
        for length in options.lengths:
            peak = peak_memory(functools.partial(_fill, model, kind, length), torch.device("cpu"))
            final = _fill(model, kind, length).bytes_allocated
            dense.setdefault(length, final)
            saved = 1 - final / dense[length]
            rows.append({"cache": kind, "length": length, "bytes": final, "peak_bytes": peak, "saved": saved})
            cells.append(f"{final / 2**20:.2f} MiB ({saved:.1%})")
        table.add_row(kind, *cells)
    console.print(table)
    return rows


def _calibrated(optimizer: KVCacheOptimizer) -> dict[str, Kinds]:
    """The smallest cache, if transforms pay in any of its layers."""
    formats = optimizer.formats(["int4-sinks"] * optimizer.model.config.num_layers)
    return {CALIBRATED: formats} if any(format.key_transform for format in formats) else {}


@torch.inference_mode()
def quality(
    model: Transformer, windows: Tensor, options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """Perplexity, divergence and agreement with the dense cache, which is in bf16, of a model that computes
    in fp32, so that only what the caches do is seen; calibrated on the end of the text, which is not scored.
    """
    context = options.context
    with console.status("measuring each layer in each format"):
        optimizer = KVCacheOptimizer(model, windows[-1:])
        choices = [optimizer.choose(saving=saving) for saving in options.savings]
    kinds: dict[str, Kinds] = {kind: kind for kind in options.kinds}
    kinds |= _calibrated(optimizer)
    kinds |= {f"optimised {choice.saving:.1%}": choice.formats for choice in choices}
    bytes_: dict[str, int] = {}
    for name, kind in kinds.items():
        cache = _cache(model, kind, context)
        cache.reserve(context)
        bytes_[name] = cache.bytes_allocated
    full = next(iter(bytes_.values()))

    def score(kind: Kinds, window: Tensor) -> Tensor:
        logits: Tensor = model(window[None], _cache(model, kind, context))[0]
        return logits

    arms = {name: functools.partial(score, kind) for name, kind in kinds.items()}
    rows = [{**row, "saved": 1 - bytes_[row["arm"]] / full} for row in _scores(arms, windows, console)]
    console.print("saved: " + ", ".join(f"{row['arm']} {row['saved']:.1%}" for row in rows))
    return [{"cache": row.pop("arm"), **row} for row in rows]


@torch.inference_mode()
def weights(
    model: Transformer, windows: Tensor, options: argparse.Namespace, console: Console
) -> list[dict[str, Any]]:
    """The same of the kinds of weights, against bf16, with a dense cache and as they decode."""

    def arm(kind: str) -> Scored:
        generator = Generator(model, weights=kind)

        def score(window: Tensor) -> Tensor:
            cache = generator.new_cache(1, len(window))
            hidden_states = generator.model.run_blocks(window[None], cache.append(len(window)), cache.layers)
            return generator.model.logits(hidden_states)[0]

        return score

    rows = _scores({kind: arm(kind) for kind in ("bf16", "int8", "int4")}, windows, console)
    return [{"weights": row.pop("arm"), **row} for row in rows]


def _windows(ids: Tensor, begin: list[int], options: argparse.Namespace) -> Tensor:
    """Windows of the text and one more of its end, each beginning as the model's texts do (Gemma: <bos>)."""
    text, step = ids[len(begin) :], options.context - len(begin)
    parts = [*text[: options.windows * step].view(-1, step), text[-step:]]
    return torch.stack([torch.cat((ids.new_tensor(begin), part)) for part in parts])


def _scores(arms: Mapping[str, Scored], windows: Tensor, console: Console) -> list[dict[str, Any]]:
    """What each arm's logits of all windows but the last are worth beside the first arm's."""
    windows = windows[:-1]
    losses: dict[str, list[float]] = {name: [] for name in arms}
    divergences: dict[str, list[float]] = {name: [] for name in arms}
    agreements: dict[str, list[float]] = {name: [] for name in arms}
    for index, window in enumerate(windows):
        with console.status(f"window {index + 1} of {len(windows)}"):
            reference = torch.empty(0)
            for name, arm in arms.items():
                logits = arm(window).float().log_softmax(-1)
                reference = reference if len(reference) else logits
                losses[name].append(float(F.nll_loss(logits[:-1], window[1:])))
                divergences[name].append(
                    float(F.kl_div(logits, reference, log_target=True, reduction="batchmean"))
                )
                agreements[name].append(float((logits.argmax(-1) == reference.argmax(-1)).float().mean()))
    first = next(iter(arms))
    table = Table(title=f"{len(windows)} windows of {windows.shape[1]} tokens, against {first}")
    for heading in ("", "perplexity", "change", "KL (nats)", "top-1"):
        table.add_column(heading, justify="right")
    rows: list[dict[str, Any]] = []
    for name in arms:
        loss = statistics.fmean(losses[name])
        row = {
            "arm": name,
            "perplexity": math.exp(loss),
            "perplexity_increase": math.exp(loss - statistics.fmean(losses[first])) - 1,
            "kl": statistics.fmean(divergences[name]),
            "top1_agreement": statistics.fmean(agreements[name]),
            "losses": losses[name],
        }
        rows.append(row)
        table.add_row(
            name,
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_increase']:+.2%}",
            f"{row['kl']:.4f}",
            f"{row['top1_agreement']:.1%}",
        )
    console.print(table)
    return rows


def speed(
    model: Transformer,
    tokenizer: Tokenizer,
    ids: Tensor,
    windows: Tensor,
    options: argparse.Namespace,
    console: Console,
) -> Iterator[list[dict[str, Any]]]:
    """Prefill and decoding tokens/s for one length after the other, all arms in interleaved rounds."""
    prompts = {length: ids[:length] for length in options.decode_lengths}
    arms: dict[str, Arm] = {}
    absent: dict[str, str] = {}
    optimizer = KVCacheOptimizer(model, windows[-1:])
    kinds: dict[str, Kinds] = {kind: kind for kind in options.kinds}
    kinds |= _calibrated(optimizer)
    for name, cache in kinds.items():
        generator = Generator(model, cache=cache, weights=options.weights, compile=True)
        arms[f"ours {name}"] = _ours(generator, options.new_tokens)
    for peer in options.peers:
        try:
            arms[peer] = build_peer(
                peer,
                options.model,
                model,
                tokenizer,
                generator.dtype,
                max(options.decode_lengths),
                options.new_tokens,
            )
        except (ImportError, InputError) as error:
            absent[peer] = str(error)
    for length, prompt in prompts.items():
        rows: list[dict[str, Any]] = []
        if length + options.new_tokens > model.config.max_position_embeddings:
            continue
        prefill, decode = defaultdict[str, list[float]](list), defaultdict[str, list[float]](list)
        timed = functools.partial(_time, arms, prompt, prefill, decode)
        for name in arms:
            with console.status(f"{name} at {length}: compiling and warming up"):
                try:
                    timed(name)
                except (RuntimeError, ValueError, TypeError, AttributeError, ImportError) as error:
                    absent[name] = f"at {length}: {' '.join(str(error).split())[:200]}"
        prefill.clear()
        decode.clear()
        running = {name: functools.partial(timed, name) for name in arms if name not in absent}
        time_arms(running, options.rounds)
        base = "ours dense" if "ours dense" in running else next(iter(running))
        table = Table(title=f"{length} tokens of prompt, {options.new_tokens} new, {options.weights} weights")
        for heading in ("arm", "prefill tokens/s", "decode tokens/s", f"speed-up over {base}"):
            table.add_column(heading, justify="right")
        for name in running:
            ratio = speedup(decode, base, name)
            rows.append(
                {
                    "arm": name,
                    "length": length,
                    "prefill_tokens_per_second": length / statistics.median(prefill[name]),
                    "decode_tokens_per_second": 1 / statistics.median(decode[name]),
                    "decode_speedup_over": base,
                    "decode_speedup": vars(ratio),
                    "seconds_per_token": decode[name],
                }
            )
            table.add_row(
                name,
                f"{rows[-1]['prefill_tokens_per_second']:.0f}",
                f"{rows[-1]['decode_tokens_per_second']:.1f}",
                str(ratio),
            )
        console.print(table)
        for name, why in absent.items():
            console.print(f"not measured: {name} ({why})")
            rows.append({"arm": name, "length": length, "not_measured": why})
        yield rows


def _time(
    arms: Mapping[str, Arm],
    prompt: Tensor,
    prefill: Mapping[str, list[float]],
    decode: Mapping[str, list[float]],
    name: str,
) -> None:
    first, rest = arms[name](prompt)
    prefill[name].append(first)
    decode[name].append(rest)


def _ours(generator: Generator, new_tokens: int) -> Arm:
    def run(prompt: Tensor) -> tuple[float, float]:
        out = generator.generate(prompt, max_new_tokens=new_tokens + 1)
        assert out.tokens_per_second is not None
        return out.time_to_first_token_s, 1 / out.tokens_per_second

    return run


def profile(
    model: Transformer, prompt: Tensor, options: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Where a step of decoding with a dense cache spends its time, and how much bandwidth it reaches."""
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}), shared_compilations():
        torch._dynamo.reset()
        row = profile_decoding(Generator(model, weights=options.weights, compile=True), prompt)
    table = Table(title=f"a step of {1e3 * row['step_seconds']:.2f} ms after {len(prompt)} tokens")
    table.add_column("part")
    table.add_column("ms", justify="right")
    for part, seconds in row["parts_seconds"].items():
        table.add_row(part, f"{1e3 * seconds:.2f}")
    console.print(table)
    console.print(
        f"reads {row['bytes_read'] / 2**20:.0f} MiB: {row['bytes_per_second'] / 1e9:.1f} of "
        f"{row['read_bandwidth'] / 1e9:.1f} GB/s, {row['share_of_bandwidth']:.0%}"
    )
    return row


def plot(found: dict[str, Any], path: Path, console: Console) -> None:
    """Memory against length, and perplexity against memory saved."""
    if importlib.util.find_spec("matplotlib") is None:
        console.print("no plot: pip install matplotlib")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for kind in dict.fromkeys(row["cache"] for row in found.get("memory", [])):
        rows = [row for row in found["memory"] if row["cache"] == kind]
        left.plot([r["length"] for r in rows], [r["peak_bytes"] / 2**20 for r in rows], "o-", label=kind)
    left.set(xlabel="tokens", ylabel="peak MiB allocated", xscale="log", yscale="log")
    for row in found.get("quality", []):
        right.plot(100 * row["saved"], 100 * row["perplexity_increase"], "o", label=row["cache"])
    right.set(xlabel="% saved against bf16", ylabel="% perplexity increase")
    for axes in (left, right):
        if axes.has_data():
            axes.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    console.print(f"written: {path}")


def _machine(environment: dict[str, Any] | None) -> tuple[Any, ...] | None:
    """What has to be the same for figures to go together."""
    if environment is None:
        return None
    return tuple(environment[key] for key in ("cpu", "cpu_capability", "threads", "torch"))


def _fill(model: Transformer, kind: str, length: int) -> KVCache:
    """A cache that has grown to `length` tokens; their values do not matter here."""
    cache = _cache(model, kind, length)
    for start in range(0, length, 128):
        cache.append(min(128, length - start))
    return cache


def _cache(model: Transformer, kinds: Kinds, length: int) -> KVCache:
    return build_cache(
        kinds,
        model.config,
        batch_size=1,
        max_length=length,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
