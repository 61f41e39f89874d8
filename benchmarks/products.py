"""The matrix products of a decoding step, of one token and of a few, by each kind of weights."""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json
from torch import Tensor, nn

from benchmarks.peaks import copy_bandwidth
from benchmarks.side_by_side import speedup, time_arms
from ryzen_llm.decoding.huge_pages import move_to_huge_pages
from ryzen_llm.decoding.weights import FewRowsLinear, Int4Linear, Int8Linear
from ryzen_llm.errors import InputError
from ryzen_llm.kernels.few_rows_linear import is_in_cpp
from ryzen_llm.model import PRESETS, ModelConfig, Transformer

PYTORCH = "PyTorch bf16"
Product = Callable[[Tensor], Tensor]


@torch.inference_mode()
def main(arguments: list[str]) -> None:
    """Time all products of a pass, by number of tokens, in interleaved rounds; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py products",
        description=__doc__,
        epilog="GB/s are of the weights' bytes, read once.",
    )
    parser.add_argument(
        "--model", default="smollm2-135m", choices=PRESETS, help="shape (default: smollm2-135m)"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 48, 128], help="of a pass")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/products.json"))
    options = parser.parse_args(arguments)
    if not is_in_cpp():
        raise InputError("products: this CPU has no AVX512-BF16, which the products measured here need")
    console = Console()
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_name(options.model))
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    shapes = [(linear.out_features, linear.in_features) for linear in linears]
    if model.head is None:
        shapes.append((model.config.vocab_size, model.config.hidden_size))
    with console.status("packing weights"):
        kinds = _kinds(shapes)
    bandwidth = copy_bandwidth(torch.device("cpu"))
    results = []
    table = Table(title=f"{options.model}, {torch.get_num_threads()} threads, {options.rounds} rounds")
    for heading in ("tokens", "weights", "ms", "GB/s", f"over {PYTORCH}", "time over the first"):
        table.add_column(heading, justify="left" if heading == "weights" else "right")
    arms: dict[str, Callable[[], None]] = {}
    for tokens in options.tokens:
        inputs = {size: torch.randn(tokens, size).bfloat16() for _, size in shapes}
        for name, (products, _) in kinds.items():
            arms[f"{tokens} {name}"] = functools.partial(_run, products, [inputs[size] for _, size in shapes])
    for arm in arms.values():
        arm()
    times = time_arms(arms, options.rounds)
    for tokens in options.tokens:
        for name, (_, size) in kinds.items():
            own = f"{tokens} {name}"
            seconds = statistics.median(times[own])
            ahead = speedup(times, f"{tokens} {PYTORCH}", own)
            longer = speedup(times, own, f"{options.tokens[0]} {name}")
            table.add_row(
                str(tokens),
                name,
                f"{1000 * seconds:.2f}",
                f"{size / seconds / 1e9:.1f}",
                f"{ahead}x",
                f"{longer.value:.2f}x",
            )
            results.append(
                {
                    "tokens": tokens,
                    "weights": name,
                    "milliseconds": 1000 * seconds,
                    "bytes_per_second": size / seconds,
                    "speedup_over_pytorch": vars(ahead),
                    "time_over_fewest_tokens": vars(longer),
                    "seconds": times[own],
                }
            )
        table.add_section()
    console.print(table)
    console.print(f"copying memory: {bandwidth / 1e9:.1f} GB/s, read and written")
    write_json(
        options.out,
        {
            "benchmark": "products",
            "settings": {
                "model": options.model,
                "rounds": options.rounds,
                "copy_bytes_per_second": bandwidth,
            },
            "results": results,
            "date": time.strftime("%Y-%m-%d"),
            "environment": describe_environment(),
        },
    )
    console.print(f"written: {options.out}")


def _kinds(shapes: list[tuple[int, int]]) -> dict[str, tuple[list[Product], int]]:
    """By name, the product of each layer and the bytes of their weights, placed as a `Generator` does."""
    linears = [nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16) for outputs, inputs in shapes]
    made: dict[str, list[nn.Module]] = {
        PYTORCH: [*linears],
        "bf16": [FewRowsLinear(linear) for linear in linears],
        "int8": [Int8Linear(linear, "layer") for linear in linears],
        "int4": [Int4Linear(linear, "layer") for linear in linears],
    }
    kinds: dict[str, tuple[list[Product], int]] = {}
    for name, layers in made.items():
        weights = [weight for layer in layers for weight in (*layer.parameters(), *layer.buffers())]
        if name != "bf16":  # whose weights are PyTorch's
            move_to_huge_pages(weights)
        kinds[name] = [*layers], sum(weight.nbytes for weight in weights)
    return kinds


def _run(products: list[Product], inputs: list[Tensor]) -> None:
    for product, x in zip(products, inputs, strict=True):
        product(x)
