"""Whether this project's recipe learns what transformers' does: twins of one start, paired losses."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from ryzen_callbacks import describe_environment, write_json
from torch import Tensor, nn

from benchmarks.side_by_side import settings_of
from benchmarks.training import Loss, loss_of_logits, transformers_model
from benchmarks.twins import compare, shown, text_of
from ryzen_llm.errors import InputError
from ryzen_llm.interop.weights import weights_of
from ryzen_llm.kernels import shared_compilations, supports_bf16
from ryzen_llm.model import PRESETS, ModelConfig, Transformer
from ryzen_llm.training import KernelOptimizer, OptimizerConfig, build_adamw

OURS, PEER = "ours", "transformers"
CONTROL = "transformers, batches reversed"
"""The peer once more, each batch's sequences in the other order: it differs in roundings only."""
WARMUP_STEPS = 20
CHUNKS = 5
"""Parts of a curve whose mean losses are compared, besides the validation loss at its end."""


@shared_compilations()
def main(arguments: list[str]) -> None:
    """Train twins from the same weights on the same tokens; print and write the paired differences."""
    parser = argparse.ArgumentParser(
        prog="benchmark.py loss_curves",
        description=__doc__,
        epilog="All arms start a seed with the same weights, read the same batches, and have bf16 autocast "
        "where the hardware has it, torch.compile and the same AdamW; ours has its own model code, fused "
        "loss and measured kernels, transformers its LlamaForCausalLM. A third twin, a control, is "
        "transformers' with the sequences of each batch in reverse order, which differs in roundings only: "
        "where it is as far off, the training itself is unstable.",
    )
    parser.add_argument("--model", default="small", choices=PRESETS, help="shape (default: small, 28M)")
    parser.add_argument("--source", default="stdlib", help="text, as data.source (default: stdlib)")
    parser.add_argument("--batch", type=int, default=2, help="sequences a step (default: 2)")
    parser.add_argument("--context", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--steps", type=int, default=150, help="of each twin (default: 150)")
    parser.add_argument("--seeds", type=int, default=6, help="pairs of twins, 6 or more (default: 6)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="AdamW's peak (default: 1e-3)")
    parser.add_argument("--validation-batches", type=int, default=50)
    parser.add_argument(
        "--margin", type=float, default=0.005, help="of equivalence, relative (default: 0.5%%)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/loss_curves.json"))
    options = parser.parse_args(arguments)
    if options.seeds < 6 or options.steps < CHUNKS:
        raise InputError(
            f"--seeds is {options.seeds} and --steps {options.steps}, expected 6 or more, for an interval, "
            f"and {CHUNKS} or more"
        )
    if importlib.util.find_spec("transformers") is None:
        raise InputError("transformers is not installed: pip install transformers")
    recipe = OptimizerConfig(learning_rate=options.learning_rate)
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = supports_bf16(device)
    config = ModelConfig.from_name(options.model)
    ours, theirs = Transformer(config).to(device), transformers_model(config).to(device)
    KernelOptimizer(ours, options.batch, options.context, bf16=bf16).optimize()
    ours.compile_blocks()
    peer = loss_of_logits(theirs, compiled=True)
    arms: dict[str, tuple[nn.Module, Loss]] = {
        OURS: (ours, lambda ids, targets: ours.loss(ids, targets)[0]),
        PEER: (theirs, peer),
        CONTROL: (theirs, lambda ids, targets: peer(ids.flip(0), targets.flip(0))),
    }
    curves: dict[str, list[list[float]]] = {name: [] for name in arms}
    validation: dict[str, list[float]] = {name: [] for name in arms}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        start = Transformer(config)
        train, val = _batches(config, seed, options)
        for name, (model, loss) in arms.items():
            started = time.perf_counter()
            _set_weights(model, start)
            curves[name].append(_train(model, loss, train, recipe, bf16, f"seed {seed}, {name}"))
            validation[name].append(_validate(loss, val, device, bf16))
            console.print(
                f"seed {seed}, {name}: validation loss {validation[name][-1]:.4f} after {options.steps} "
                f"steps and {time.perf_counter() - started:.0f} s"
            )
    rows = []
    table = Table(
        title=f"{options.steps} steps of {options.batch} x {options.context} tokens, {options.seeds} seeds"
    )
    margin = f"within {options.margin:.1%}"
    for heading in ("loss", OURS, PEER, "difference [95%]", margin, "reversed [95%]", margin):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for label, pairs in _parts(curves, validation, options.steps).items():
        row, control = (compare(pairs[name], pairs[PEER], options.margin) for name in (OURS, CONTROL))
        rows.append({"loss": label, **pairs, **row, "control": control})
        table.add_row(
            label,
            *(f"{statistics.fmean(pairs[name]):.4f}" for name in (OURS, PEER)),
            *(
                cell
                for each in (row, control)
                for cell in (shown(each, digits=3), "yes" if each["equivalent"] else "not shown")
            ),
        )
    console.print(table)
    write_json(
        options.out,
        {
            "benchmark": "loss_curves",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "settings": settings_of(options),
            "rows": rows,
            "curves": curves,
            "environment": describe_environment(),
        },
    )
    console.print(f"written: {options.out}")


def _batches(
    config: ModelConfig, seed: int, options: argparse.Namespace
) -> tuple[list[Tensor], list[Tensor]]:
    data = text_of(options, config.vocab_size, seed)
    train = list(islice(data.train_dataloader(), options.steps))
    if len(train) < options.steps:
        raise InputError(
            f"--source {options.source} has {len(train)} batches, --steps asks for {options.steps}"
        )
    return train, list(islice(data.val_dataloader()[0], options.validation_batches))


def _set_weights(model: nn.Module, start: Transformer) -> None:
    if isinstance(model, Transformer):
        model.load_state_dict(start.state_dict())
        return
    model.load_state_dict(dict(weights_of(start, 0.0)), strict=False)  # their tied head is no weight of ours
    if not torch.equal(model.get_parameter("lm_head.weight").cpu(), start.embedding.dense_weight()):
        raise AssertionError("the twins start with other weights")


def _train(
    model: nn.Module, loss: Loss, batches: Iterable[Tensor], recipe: OptimizerConfig, bf16: bool, what: str
) -> list[float]:
    """The loss of every step, of a model that is trained from its weights as they are."""
    model.train()
    device = next(model.parameters()).device
    optimizer = build_adamw(model, recipe)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / WARMUP_STEPS, total_iters=WARMUP_STEPS)
    losses = []
    for batch in track(list(batches), what, transient=True):
        value = _loss(loss, batch.to(device), bf16)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(value.detach())
    return [float(value) for value in losses]


@torch.no_grad()
def _validate(loss: Loss, batches: list[Tensor], device: torch.device, bf16: bool) -> float:
    return statistics.fmean(float(_loss(loss, batch.to(device), bf16)) for batch in batches)


def _loss(loss: Loss, batch: Tensor, bf16: bool) -> Tensor:
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=bf16):
        return loss(batch[:, :-1], batch[:, 1:])


def _parts(
    curves: dict[str, list[list[float]]], validation: dict[str, list[float]], steps: int
) -> dict[str, dict[str, list[float]]]:
    """The mean loss of each part of the curves, by arm and seed, and the validation loss."""
    parts: dict[str, dict[str, list[float]]] = {}
    bounds = [steps * i // CHUNKS for i in range(CHUNKS + 1)]
    for begin, end in pairwise(bounds):
        parts[f"steps {begin + 1} to {end}"] = {
            name: [statistics.fmean(curve[begin:end]) for curve in each] for name, each in curves.items()
        }
    return parts | {"validation": validation}
