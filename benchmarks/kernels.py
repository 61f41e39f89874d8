"""Each op's forms forward and backward: eager, compiled, Triton, PyTorch's fused ones and Liger-Kernel's."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json
from torch import Tensor

from benchmarks.peaks import copy_bandwidth, matmul_peak
from benchmarks.side_by_side import speedup, time_arms
from ryzen_llm.kernels import CANDIDATES, Workload, describe_device, shared_compilations, supports_bf16
from ryzen_llm.kernels.regions import REGIONS, ops_of
from ryzen_llm.model import PRESETS, ModelConfig, Transformer
from ryzen_llm.training.kernel_trials import Arm, largest_error, make_arm, reference
from ryzen_llm.training.op_clock import op_clock

EAGER = "eager"


@shared_compilations()  # by the arms, which share their code
def main(arguments: list[str]) -> None:
    """Time every form of every op in interleaved rounds; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py kernels",
        description=__doc__,
        epilog="An op is measured among its neighbours in a block, compiled but for the arm 'eager', which "
        "is its plainest form, and for Liger-Kernel's, whose neighbours are eager, too. GB/s count each "
        "input and output once forward and backward, so that an arm that reads more gets a lower share; "
        "GFLOP/s leave out the masked half of attention. On CUDA the time is the GPU's own, without that in "
        "which Python launches its kernels.",
    )
    parser.add_argument("--model", default="small", choices=PRESETS, help="shape (default: small)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--context", type=int, default=512, help="tokens a sequence (default: 512)")
    parser.add_argument("--rounds", type=int, default=10, help="runs timed of each form (default: 10)")
    parser.add_argument("--ops", nargs="*", choices=REGIONS, help="default: those that the model has")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kernels.json"))
    options = parser.parse_args(arguments)
    console, device = Console(), torch.device(options.device)
    bf16 = supports_bf16(device)
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_name(options.model))
    work = model.workload(options.batch, options.context, bf16, compiled=True, device=device)
    bandwidth, flops = copy_bandwidth(device), matmul_peak(device, work.dtype)

    results, rows = [], []
    for op in options.ops or ops_of(work):
        with console.status(f"compiling and checking {op}"):
            arms, errors, absent = _arms(op, work)
        times = time_arms(arms, options.rounds, clock=op_clock(device))
        unit, amount, ceiling = _amount(op, work, bandwidth, flops)
        for name in times:
            seconds = statistics.median(times[name])
            ahead = speedup(times, EAGER, name)
            rows.append(
                (
                    op,
                    name,
                    f"{1000 * seconds:.3g}",
                    f"{amount / seconds / 1e9:,.1f} {unit}",
                    f"{amount / seconds / ceiling:.0%}",
                    f"{ahead}x",
                    f"{errors[name]:.1g}",
                )
            )
            results.append(
                {
                    "op": op,
                    "form": name,
                    "milliseconds": 1000 * seconds,
                    "rate": amount / seconds / 1e9,
                    "unit": unit,
                    "fraction_of_ceiling": amount / seconds / ceiling,
                    "speedup_over_eager": vars(ahead),
                    "relative_error": errors[name],
                    "seconds": times[name],
                }
            )
        results += [{"op": op, "form": name, "not_measured": why} for name, why in absent.items()]
        rows += [(op, name, "", "", "", "", why) for name, why in absent.items()]

    table = Table(
        title=f"{options.model}, {options.batch} x {options.context} tokens, {device}, {work.dtype}"
    )
    for heading in ("op", "form", "ms", "rate", "of ceiling", "over eager", "error"):
        table.add_column(heading, justify="left" if heading in ("op", "form") else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(
        f"ceilings measured in this run: copy {bandwidth / 1e9:,.1f} GB/s, matrix product {flops / 1e9:,.0f} "
        "GFLOP/s; error: of outputs and gradients, against fp32"
    )
    settings = {name: str(value) for name, value in dataclasses.asdict(work).items()}
    write_json(
        options.out,
        {
            "benchmark": "kernels",
            "settings": {
                "model": options.model,
                "rounds": options.rounds,
                "workload": settings,
                "copy_bytes_per_second": bandwidth,
                "matmul_flops_per_second": flops,
            },
            "hardware": describe_device(device),
            "results": results,
            "date": time.strftime("%Y-%m-%d"),
            "environment": describe_environment(),
        },
    )
    console.print(f"written: {options.out}")


def _arms(op: str, work: Workload) -> tuple[dict[str, Arm], dict[str, float], dict[str, str]]:
    """Each form warmed up and checked, its error, and why others are not there."""
    expected = reference(op, work)
    plainest = next(iter(CANDIDATES[op].values())).function
    eager = dataclasses.replace(work, compiled=False)
    builders: dict[str, Callable[[], Arm]] = {EAGER: lambda: make_arm(op, eager, plainest)}
    absent = {}
    for name, form in CANDIDATES[op].items():
        if why := form.unsuited(work):
            absent[name] = why
        elif op != "loss" or form.function is not plainest:  # the loss compiles itself or does not
            builders[name] = lambda form=form: make_arm(op, work, form.function)  # type: ignore[misc]
    if op == "loss" and hasattr(F, "linear_cross_entropy"):
        builders["F.linear_cross_entropy"] = lambda: make_arm(op, eager, _loss_by_pytorch)
    if op in _liger():
        if work.device.type != "cuda":
            absent["Liger-Kernel"] = "needs a GPU"
        elif importlib.util.find_spec("liger_kernel") is None:
            absent["Liger-Kernel"] = "not installed: pip install liger-kernel"
        else:
            builders["Liger-Kernel"] = lambda: make_arm(op, eager, _liger()[op])
    arms, errors = {}, {}
    for name, build in builders.items():
        try:
            arm = build()
            errors[name] = largest_error(arm(), expected)
            arm()
        except Exception as error:
            if name == EAGER:
                raise
            absent[name] = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        arms[name] = arm
    return arms, errors, absent


def _loss_by_pytorch(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
    if torch.is_autocast_enabled(hidden_states.device.type):  # it has no rule for autocast of its own
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        hidden_states, weight = hidden_states.to(dtype), weight.to(dtype)
    return (F.linear_cross_entropy(hidden_states.flatten(0, 1), weight, targets.flatten()),)


def _liger() -> dict[str, Callable[..., Any]]:
    """Liger-Kernel's ops with the arguments of ours; it has no norm of a sum, so the sum comes before."""

    def norm(x: Tensor, added: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from liger_kernel.transformers.functional import liger_rms_norm

        total = x + added
        return total, liger_rms_norm(total, weight, eps, in_place=False)

    def swiglu(gate_up: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_swiglu

        result: Tensor = liger_swiglu(*gate_up.chunk(2, dim=-1))
        return result

    def geglu(gate_up: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_geglu

        result: Tensor = liger_geglu(*gate_up.chunk(2, dim=-1))
        return result

    def loss(hidden_states: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor]:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        x = hidden_states.flatten(0, 1).to(dtype)
        return (liger_fused_linear_cross_entropy(x, weight.to(dtype), targets.flatten()),)

    return {"norm": norm, "swiglu": swiglu, "geglu": geglu, "loss": loss}


def _amount(op: str, work: Workload, bandwidth: float, flops: float) -> tuple[str, float, float]:
    """Unit, amount and ceiling of the work of an op: matrix products by FLOPs, the others by bytes."""
    tokens = work.batch * work.time
    if op == "loss":  # logits, and their product by both inputs
        return "GFLOP/s", 6.0 * tokens * work.vocab_size * work.hidden_size, flops
    if op == "linear":  # those of an MLP, and their products by both inputs
        return "GFLOP/s", 18.0 * tokens * work.hidden_size * work.intermediate_size, flops
    if op == "attention":  # two products forward and five backward, half of each masked
        products = 7 * tokens * work.time * work.num_heads * work.head_dim
        return "GFLOP/s", float(products), flops
    draw = torch.Generator().manual_seed(0)
    inputs = REGIONS[op].inputs(work, draw)
    read = sum(x.numel() * x.element_size() for x in inputs)
    plainest = next(iter(CANDIDATES[op].values())).function
    written = sum(y.numel() * y.element_size() for y in REGIONS[op].run(plainest, work, inputs))
    # Forward: inputs and outputs. Backward: inputs again, gradients of outputs, gradients of inputs.
    return "GB/s", float(3 * read + 2 * written), bandwidth
