"""Other engines' plain decoding and prompt lookup, as arms of the benchmark."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop import export_pretrained
from ryzen_llm.model import Transformer

Arm = Callable[[Tensor], tuple[list[int], Counter[str]]]

PEERS = ("transformers", "transformers prompt lookup", "llama.cpp", "llama.cpp prompt lookup")


def build_peer(name: str, model: Transformer, tokenizer: Tokenizer, options: argparse.Namespace) -> Arm:
    """Raises InputError or ImportError where the peer is absent."""
    if name.startswith("llama.cpp"):
        return _llama_cpp(name, tokenizer, options)
    return _transformers(name, model, tokenizer, options)


def _transformers(name: str, model: Transformer, tokenizer: Tokenizer, options: argparse.Namespace) -> Arm:
    if importlib.util.find_spec("transformers") is None:
        raise InputError("not installed: pip install transformers")
    import transformers

    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as directory:
        target = f"{directory}/model"
        export_pretrained(model, tokenizer, target)
        peer = transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).eval()
    settings: dict[str, Any] = {"prompt_lookup_num_tokens": 8} if name.endswith("prompt lookup") else {}

    @torch.inference_mode()
    def run(prompt: Tensor) -> tuple[list[int], Counter[str]]:
        ids = peer.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=options.new_tokens,
            eos_token_id=list(tokenizer.stop_ids),
            pad_token_id=tokenizer.stop_ids[0],
            **settings,
        )
        return ids[0, prompt.shape[1] :].tolist(), Counter()

    return run


def _llama_cpp(name: str, tokenizer: Tokenizer, options: argparse.Namespace) -> Arm:
    if not str(options.model).endswith(".gguf"):
        raise InputError("reads GGUF files only")
    import llama_cpp
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    threads = torch.get_num_threads()
    lookup = LlamaPromptLookupDecoding(num_pred_tokens=8) if name.endswith("prompt lookup") else None
    engine = llama_cpp.Llama(
        model_path=str(options.model),
        verbose=False,
        n_ctx=options.longest_prompt + options.new_tokens + 32,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        draft_model=lookup,
        logits_all=lookup is not None,
    )
    stops = set(tokenizer.stop_ids)

    def run(prompt: Tensor) -> tuple[list[int], Counter[str]]:
        ids: list[int] = []
        for token in engine.generate(prompt[0].tolist(), temp=0.0, reset=True):
            ids.append(token)
            if token in stops or len(ids) == options.new_tokens:
                break
        return ids, Counter()

    return run
