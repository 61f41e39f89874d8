"""Optimizer steps per second: this project's recipe, naive and strong PyTorch, transformers and litgpt."""

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
from torch import Tensor, nn

from benchmarks.peaks import matmul_peak
from benchmarks.side_by_side import Ratio, peak_memory, speedup, time_arms
from ryzen_llm.kernels import PLAIN, shared_compilations, supports_bf16
from ryzen_llm.model import PRESETS, ModelConfig, Transformer
from ryzen_llm.training import KernelOptimizer, OptimizerConfig, build_adamw
from ryzen_llm.training.op_clock import synchronize

OURS = "ours"
ARMS = {
    OURS: "bf16 autocast where the hardware has it, blocks and loss compiled, fused AdamW, measured kernels",
    "naive": "our model with PyTorch's kernels, eager fp32, PyTorch's default AdamW",
    "strong": "our model with PyTorch's kernels, bf16 autocast, compiled as a whole, fused AdamW, as nanoGPT",
    "no compile": "ours without torch.compile",
    "no fused": "ours without fused AdamW",
    "no bf16": "ours in fp32",
    "no measured kernels": "ours without KernelOptimizer, its kernels chosen by rules of thumb",
    "no fused loss": "ours with all logits at once, compiled",
    "checkpointing": "ours with activation checkpointing",
    "document masking": "ours, and no token sees another document",
    "transformers": "LlamaForCausalLM, bf16 autocast, compiled, fused AdamW",
    "transformers eager": "LlamaForCausalLM, eager fp32, PyTorch's default AdamW",
    "litgpt": "litgpt.GPT, bf16 autocast, compiled, fused AdamW",
    "litgpt eager": "litgpt.GPT, eager fp32, PyTorch's default AdamW",
}
LEARNING_RATE = 1e-4
SEPARATOR = 0
DOCUMENT = 200
"""Tokens from one separator to the next, in the batch of all arms."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(input_ids, targets), both (batch, context) int64 -> mean cross-entropy."""


@shared_compilations()  # by the arms, which share their code
def main(arguments: list[str]) -> None:
    """Train each arm a few steps on the same batch in interleaved rounds; print a table, write JSON."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py training",
        description=__doc__,
        epilog="Every arm has a model of the same shape and does forward, backward and AdamW. They are: "
        + "; ".join(f"{name}: {what}" for name, what in ARMS.items())
        + ".",
    )
    parser.add_argument("--model", default="small", choices=PRESETS, help="shape (default: small, 28M)")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step (default: 8)")
    parser.add_argument("--context", type=int, default=512, help="tokens a sequence (default: 512)")
    parser.add_argument("--rounds", type=int, default=8, help="steps timed of each arm (default: 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", nargs="*", choices=ARMS, help="measure ours and these arms (default: all)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    options = parser.parse_args(arguments)
    console = Console()
    device = torch.device(options.device)
    config = ModelConfig.from_name(options.model)
    torch.manual_seed(0)
    batch = torch.randint(config.vocab_size, (options.batch, options.context + 1), device=device)
    batch[:, DOCUMENT - 1 :: DOCUMENT] = SEPARATOR

    builders, absent = _builders(config, device, (options.batch, options.context))
    if options.only is not None:
        builders = {name: build for name, build in builders.items() if name in (OURS, *options.only)}
    steps: dict[str, Callable[[], object]] = {}
    warmup_seconds, memory, parameters = {}, {}, {}
    for name, build in builders.items():
        with console.status(f"compiling and warming up {name}"):
            start = time.perf_counter()
            try:
                model, loss, optimizer, bf16 = build()
                step = _step(loss, optimizer, batch, bf16)
                for _ in range(2):
                    step()
                synchronize()
                seconds = time.perf_counter() - start
                memory[name] = peak_memory(step, device)
            except Exception as error:  # a peer's version, or no room for it: the others have their figures
                if name == OURS:
                    raise
                absent[name] = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                continue
        parameters[name] = sum(p.numel() for p in model.parameters())
        warmup_seconds[name], steps[name] = seconds, step
    if len(set(parameters.values())) > 1:
        raise AssertionError(f"the arms differ in size, so nothing is measured: {parameters}")
    times = time_arms(steps, options.rounds, settle=True)

    tokens = options.batch * options.context
    flops = tokens * Transformer(config).flops_per_token(options.context)
    peak = matmul_peak(device, torch.bfloat16 if supports_bf16(device) else torch.float32)
    baselines = [name for name in times if name != OURS]
    table = Table(title=f"{options.model}, {options.batch} x {options.context} tokens a step, {device}")
    for heading in ("arm", "tokens/s", "of peak", "ours is faster by", "memory", "warm-up"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    rows = []
    for name in times:
        seconds = statistics.median(times[name])
        ahead = speedup(times, name, OURS) if name in baselines else None
        rows.append(
            {
                "arm": name,
                "what": ARMS[name],
                "tokens_per_second": tokens / seconds,
                "flops_per_second": flops / seconds,
                "fraction_of_matmul_peak": flops / seconds / peak,
                "ours_is_faster_by": vars(ahead) if ahead else None,
                "peak_step_bytes": memory[name],
                "warmup_seconds": warmup_seconds[name],
                "seconds": times[name],
            }
        )
        table.add_row(*_cells(rows[-1], ahead))
    console.print(table)
    console.print(
        "of peak: of the rate of a large matrix product, measured in this run\n"
        "memory: peak of one step above weights and optimizer state"
    )
    for name, why in absent.items():
        console.print(f"not measured: {name} ({why})")
    write_json(
        options.out,
        {
            "benchmark": "training",
            "settings": {
                "model": config.to_dict(),
                "parameters": parameters[OURS],
                "batch": options.batch,
                "context": options.context,
                "rounds": options.rounds,
                "device": str(device),
                "matmul_peak_flops_per_second": peak,
                "flops": "6 per parameter and token and 12 * layers * width * context for attention",
            },
            "arms": rows,
            "absent": absent,
            "environment": describe_environment(),
        },
    )
    console.print(f"written: {options.out}")


def _cells(row: dict[str, Any], ahead: Ratio | None) -> list[str]:
    return [
        row["arm"],
        f"{row['tokens_per_second']:,.0f}",
        f"{row['fraction_of_matmul_peak']:.0%}",
        f"{ahead}x" if ahead else "",
        f"{row['peak_step_bytes'] / 2**20:,.0f} MiB",
        f"{row['warmup_seconds']:.0f} s",
    ]


Built = tuple[nn.Module, Loss, torch.optim.Optimizer, bool]


def _builders(
    config: ModelConfig, device: torch.device, shape: tuple[int, int]
) -> tuple[dict[str, Callable[[], Built]], dict[str, str]]:
    """What builds each arm, and the arms that cannot run here with the reason."""
    bf16 = supports_bf16(device)

    def ours(
        regional: bool = True,
        autocast: bool = bf16,
        fused: bool = True,
        measured: bool = True,
        checkpointing: bool = False,
        separator: int | None = None,
        **kernels: str,
    ) -> Built:
        model = Transformer(config).to(device)
        model.checkpoint_activations, model.document_separator = checkpointing, separator
        if measured:
            KernelOptimizer(model, *shape, bf16=autocast, compile=regional).optimize()
        model.use_kernels(dataclasses.replace(model.kernels, **kernels))
        if regional:
            model.compile_blocks()
        adamw = build_adamw(model, OptimizerConfig(learning_rate=LEARNING_RATE), fused=fused)
        return model, lambda ids, targets: model.loss(ids, targets)[0], adamw, autocast

    def strong() -> Built:
        model = Transformer(config, PLAIN).to(device)
        loss = torch.compile(lambda ids, targets: model.loss(ids, targets)[0])
        adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
        return model, loss, adamw, bf16

    def naive() -> Built:
        model = Transformer(config, PLAIN).to(device)
        adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
        return model, lambda ids, targets: model.loss(ids, targets)[0], adamw, False

    builders: dict[str, Callable[[], Built]] = {
        OURS: ours,
        "naive": naive,
        "strong": strong,
        "no compile": lambda: ours(regional=False),
        "no fused": lambda: ours(fused=False),
        "no measured kernels": lambda: ours(measured=False),
        "no fused loss": lambda: ours(loss="all logits, compiled"),
        "checkpointing": lambda: ours(checkpointing=True),
        "document masking": lambda: ours(separator=SEPARATOR),
    }
    if bf16:
        builders["no bf16"] = lambda: ours(autocast=False)
    absent = {}
    # litgpt's own pins exclude the versions of its dependencies that transformers and this project need.
    peers = (
        ("transformers", transformers_model, "transformers"),
        ("litgpt", _litgpt, "--no-deps litgpt psutil"),
    )
    for name, build, requirement in peers:
        if importlib.util.find_spec(name) is None:
            absent[name] = f"not installed: pip install {requirement}"
            continue
        builders[f"{name} eager"] = lambda build=build: _peer(build(config), device, False, False)  # type: ignore[misc]
        builders[name] = lambda build=build: _peer(  # type: ignore[misc]
            build(config), device, True, bf16
        )
    return builders, absent


def _peer(model: nn.Module, device: torch.device, optimised: bool, bf16: bool) -> Built:
    model = model.to(device)
    adamw = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=optimised or None)
    return model, loss_of_logits(model, compiled=optimised), adamw, bf16


def loss_of_logits(model: nn.Module, compiled: bool) -> Loss:
    """The usual loss of a model that gives logits; compiled, it is so as a whole with the model."""

    def loss(input_ids: Tensor, targets: Tensor) -> Tensor:
        output = model(input_ids)
        logits = output if isinstance(output, Tensor) else output.logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return torch.compile(loss) if compiled else loss


def transformers_model(config: ModelConfig) -> nn.Module:
    """LlamaForCausalLM of the same shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model: nn.Module = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            tie_word_embeddings=config.tie_embeddings,
            use_cache=False,
        )
    )
    return model


def _litgpt(config: ModelConfig) -> nn.Module:
    from litgpt import GPT, Config

    model = GPT(
        Config(
            block_size=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_query_groups=config.num_kv_heads,
            n_embd=config.hidden_size,
            head_size=config.head_dim,
            rotary_percentage=1.0,
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=config.rms_norm_eps,
            mlp_class_name="LLaMAMLP",
            intermediate_size=config.intermediate_size,
        )
    )
    if config.tie_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    module: nn.Module = model
    return module


def _step(loss: Loss, optimizer: torch.optim.Optimizer, batch: Tensor, bf16: bool) -> Callable[[], object]:
    def step() -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
            value = loss(batch[:, :-1], batch[:, 1:])
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return step
