"""Other projects' key-value caches, as arms to be timed beside ours."""

from __future__ import annotations

import copy
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop import export_pretrained
from ryzen_llm.model import Transformer

Arm = Callable[[Tensor], tuple[float, float]]
"""A prompt (time,) -> seconds to the first token, and seconds a token from there."""

PEERS = ("transformers", "static", "quanto", "hqq", "llama.cpp", "llama.cpp q8_0", "llama.cpp q4_0")


def build_peer(
    name: str,
    path: str,
    model: Transformer,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    tokens: int,
    new_tokens: int,
) -> Arm:
    """One of `PEERS`: transformers in eager `dtype` with the weights of `model`, llama.cpp with the file
    at `path`.

    `tokens` is the longest prompt. Raises InputError or ImportError where a peer is not installed or cannot
    read the file.
    """
    if name.startswith("llama.cpp"):
        return _llama_cpp(name, path, tokens + new_tokens, new_tokens)
    return _transformers(name, model, tokenizer, dtype, new_tokens)


def _llama_cpp(name: str, path: str, context: int, new_tokens: int) -> Arm:
    if Path(path).suffix != ".gguf":
        raise InputError("reads GGUF files only")
    import llama_cpp

    kind = {"q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}.get(name.partition(" ")[2])
    threads = torch.get_num_threads()
    engine = llama_cpp.Llama(
        model_path=path,
        verbose=False,
        n_ctx=context + 8,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        type_k=kind,
        type_v=kind,
        flash_attn=kind is not None,
    )

    def run(prompt: Tensor) -> tuple[float, float]:
        engine.reset()  # or it takes up the cache of the round before, and there is nothing to read
        started = time.perf_counter()
        tokens = engine.generate(prompt.tolist(), temp=0.0, reset=False)
        next(tokens)
        first = time.perf_counter()
        for _ in range(new_tokens):
            next(tokens)
        return first - started, (time.perf_counter() - first) / new_tokens

    return run


def _transformers(
    name: str, model: Transformer, tokenizer: Tokenizer, dtype: torch.dtype, new_tokens: int
) -> Arm:
    if importlib.util.find_spec("transformers") is None:
        raise InputError("not installed: pip install transformers")
    import transformers

    with tempfile.TemporaryDirectory() as directory:
        export_pretrained(model, tokenizer, directory)
        peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).eval()
    settings: dict[str, Any] = {"static": {"cache_implementation": "static"}}.get(name, {})
    if name in ("quanto", "hqq"):
        nbits = 4 if name == "quanto" else 8
        settings = {
            "cache_implementation": "quantized",
            "cache_config": {"backend": name, "nbits": nbits},
        }

    class Clock:
        """Notes when each token came."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, _: Tensor) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def run(prompt: Tensor) -> tuple[float, float]:
        clock = Clock()
        started = time.perf_counter()
        peer.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            do_sample=False,
            min_new_tokens=new_tokens + 1,
            max_new_tokens=new_tokens + 1,
            streamer=clock,
            **copy.deepcopy(settings),  # which it takes the backend out of
        )
        _, first, *rest = clock.times  # the streamer gets the prompt first
        return first - started, (rest[-1] - first) / len(rest)

    gc.collect()
    return run
