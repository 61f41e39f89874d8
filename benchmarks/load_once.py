"""One load of a model, measured in a process that does nothing else: `python -m benchmarks.load_once ...`."""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
IDS = [[1, 2, 3, 4, 5, 6, 7, 8]]
Load = Callable[[str, str], Any]


def ryzen_llm() -> Load:
    """This project's loader; what it imports is imported when this returns."""
    import gguf  # noqa: F401

    from ryzen_llm.interop import load_pretrained

    return lambda path, dtype: load_pretrained(path, dtype)[0]


def transformers() -> Load:
    """transformers' loaders of model and tokenizer."""
    import gguf  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: F401

    def load(path: str, dtype: str) -> Any:
        where: dict[str, Any] = {"pretrained_model_name_or_path": path}
        if path.endswith(".gguf"):
            where = {"pretrained_model_name_or_path": Path(path).parent, "gguf_file": Path(path).name}
        AutoTokenizer.from_pretrained(**where)
        return AutoModelForCausalLM.from_pretrained(**where, dtype=DTYPES[dtype])

    return load


LOADERS: dict[str, Callable[[], Load]] = {"ryzen_llm": ryzen_llm, "transformers": transformers}


def measure(loader: str, path: str, dtype: str) -> dict[str, Any]:
    """Seconds, and peak resident bytes above those after the imports, mapped files included.

    The first logits are measured too: a loader that leaves the weights in the file pays there.
    """
    import torch

    load = LOADERS[loader]()
    gc.collect()
    before = _reset_peak()
    start = time.perf_counter()
    model = load(path, dtype)
    loaded = time.perf_counter() - start
    peak_loaded = _status("VmHWM")
    with torch.no_grad():
        model(torch.tensor(IDS))
    first_logits = time.perf_counter() - start
    parameters = list(model.parameters())
    assert {str(p.dtype) for p in parameters} == {f"torch.{DTYPES[dtype]}"}
    return {
        "load_seconds": loaded,
        "first_logits_seconds": first_logits,
        "load_peak_bytes": None if before is None else peak_loaded - before,
        "first_logits_peak_bytes": None if before is None else _status("VmHWM") - before,
        "model_bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _reset_peak() -> int | None:
    """Resident bytes now, the peak set back to them; None where the system is not Linux."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
