"""Prompts by category, in the form of Spec-Bench (Xia et al. 2024, arXiv:2401.07851)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from ryzen_llm.data import Tokenizer
from ryzen_llm.errors import InputError
from ryzen_llm.interop import render_chat

TASKS = ("translation", "summarization", "qa", "math_reasoning", "rag")
OPEN_CHAT = "mt_bench"
"""All of MT-Bench's own categories."""


def read_prompts(
    path: Path, tokenizer: Tokenizer, per_category: int, longest: int
) -> dict[str, list[Tensor]]:
    """The first `per_category` prompts of each category as ids, (1, time), their last `longest` tokens.

    The file has a JSON object a line with "category" and "turns", of which the first is asked. Raises
    InputError where it has not.
    """
    prompts: dict[str, list[Tensor]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            category = row["category"] if row["category"] in TASKS else OPEN_CHAT
            chosen = prompts.setdefault(category, [])
            if len(chosen) < per_category:
                text = render_chat(tokenizer, [{"role": "user", "content": row["turns"][0]}])
                chosen.append(torch.tensor(tokenizer.encode_rendered(text)[-longest:])[None])
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"--prompts {path}: not JSON lines with category and turns ({error})") from error
    if not prompts:
        raise InputError(f"--prompts {path}: is empty")
    return prompts
