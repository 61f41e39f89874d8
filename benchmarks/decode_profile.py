"""Where the time of a decoding step goes, and which share of the memory's bandwidth it reaches."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity

from benchmarks.peaks import read_bandwidth
from ryzen_llm.decoding import Generator

_STEPS = 32
_ATTENTION, _PRODUCTS = "attention, cache writes", "products with weights"


@torch.inference_mode()
def profile_decoding(generator: Generator, prompt: Tensor) -> dict[str, Any]:
    """Seconds of a step by what it does, and the bytes that it has to read against what memory gives.

    `generator` compiles, for a CPU, with Inductor's `cpp.enable_kernel_profile` set; `prompt` is (time,).
    """
    cache = generator.new_cache(1, len(prompt) + _STEPS)
    generator.model.run_blocks(prompt[None], cache.append(len(prompt)), cache.layers)
    token = prompt[None, -1:]
    for _ in range(3):  # which compile
        generator.fixed_width(token, cache)
        cache.truncate(len(prompt))
    seconds = []
    for _ in range(_STEPS):
        started = time.perf_counter()
        generator.fixed_width(token, cache)
        seconds.append(time.perf_counter() - started)
    cache.truncate(len(prompt))
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(_STEPS):
            generator.fixed_width(token, cache)
    by_name = {event.key: event.self_cpu_time_total / 1e6 / _STEPS for event in profiler.key_averages()}
    parts: dict[str, float] = defaultdict(float)
    for name, taken in by_name.items():
        if part := _part(name):
            parts[part] += taken
    if missing := {_ATTENTION, _PRODUCTS} - parts.keys():
        raise RuntimeError(f"the profile has no op of {missing}, expected some: has one been renamed?")
    step = statistics.median(seconds)
    read = _weight_bytes(generator) + cache.bytes_allocated
    bandwidth = read_bandwidth()
    return {
        "length": len(prompt),
        "step_seconds": step,
        "parts_seconds": {**parts, "the rest (other ops, dispatch, Python)": step - sum(parts.values())},
        "longest_seconds": dict(sorted(by_name.items(), key=lambda item: -item[1])[:12]),
        "bytes_read": read,
        "bytes_per_second": read / step,
        "read_bandwidth": bandwidth,
        "share_of_bandwidth": read / step / bandwidth,
    }


def _part(name: str) -> str | None:
    """What a kernel of the step is for; None for what is not a kernel."""
    if "cpp_fused" in name:  # and then the names of the ops around it
        return "norms, rotation, gates, sampling (fused)"
    if name == "ryzen_llm::append_and_attend":
        return _ATTENTION
    products = ("ryzen_llm::quantised_linear", "aten::mm", "aten::addmm", "mkldnn::_linear_pointwise")
    return _PRODUCTS if name in products or "pack_mm" in name else None


def _weight_bytes(generator: Generator) -> int:
    """Bytes of the weights that every step reads: of a table that is only looked up in, none to speak of."""
    model = generator.model
    looked_up = (
        set()
        if model.head is None
        else {id(x) for x in (*model.embedding.parameters(), *model.embedding.buffers())}
    )
    tensors = {id(x): x for x in (*model.parameters(), *model.buffers())}
    return sum(x.numel() * x.element_size() for key, x in tensors.items() if key not in looked_up)
